"""MobileNetV1 (Howard et al. 2017, arXiv 1704.04861) with TensorFlow's padding, its batch norms unfolded."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class SeparableBlock(nn.Module):
    """A depthwise and a pointwise convolution, each with batch norm and activation."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.dw = nn.Conv2d(inputs, inputs, 3, stride, 1 if stride == 1 else 0, groups=inputs, bias=False)
        self.dw_bn = nn.BatchNorm2d(inputs, eps=1e-3)
        self.pw = nn.Conv2d(inputs, outputs, 1, bias=False)
        self.pw_bn = nn.BatchNorm2d(outputs, eps=1e-3)
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        # TensorFlow's SAME padding puts the odd pixel of a stride of 2 behind.
        x = F.pad(x, (0, 1, 0, 1)) if self.stride == 2 else x
        x = self.dw_bn(self.dw(x)).clamp(0, 6)
        return self.pw_bn(self.pw(x)).clamp(0, 6)


class MobileNetV1(nn.Module):
    """`width` scales the channels: 0.75 gives those of the published MobileNetV1 0.75.

    small  for images of 32 x 32: the first and the last stride are 1, so that 4 x 4 places are left before the mean
    """

    def __init__(self, width: float = 1.0, classes: int = 1000, small: bool = False) -> None:
        super().__init__()
        first, *outputs = (int(channels * width) for channels in (32, 64, 128, 128, 256, 256, *[512] * 6, 1024, 1024))
        strides = (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 1 if small else 2, 1)
        self.conv1 = nn.Conv2d(3, first, 3, 1 if small else 2, 1 if small else 0, bias=False)
        self.bn1 = nn.BatchNorm2d(first, eps=1e-3)
        self.blocks = nn.Sequential(
            *(
                SeparableBlock(before, after, stride)
                for before, after, stride in zip((first, *outputs[:-1]), outputs, strides, strict=True)
            )
        )
        self.fc = nn.Linear(outputs[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.conv1.stride == (1, 1) else F.pad(x, (0, 1, 0, 1))
        x = self.bn1(self.conv1(x)).clamp(0, 6)
        return self.fc(self.blocks(x).mean((2, 3)))


def mobilenet_v1(width: float = 1.0, classes: int = 1000) -> nn.Module:
    return MobileNetV1(width, classes)


def mobilenet_v1_cifar(width: float = 0.5) -> nn.Module:
    """For ten classes of images of 32 x 32."""
    return MobileNetV1(width, 10, small=True)
