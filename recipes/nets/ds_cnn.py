"""The keyword-spotting network of MLPerf Tiny (Banbury et al. 2021, arXiv 2106.07597)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class SeparableBlock(nn.Module):
    """A depthwise and a pointwise convolution, each with batch norm and activation."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.dw = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.dw_bn = nn.BatchNorm2d(channels, eps=1e-3)
        self.pw = nn.Conv2d(channels, channels, 1)
        self.pw_bn = nn.BatchNorm2d(channels, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.dw_bn(self.dw(x)))
        return F.relu(self.pw_bn(self.pw(x)))


class DsCnn(nn.Module):
    """Takes one channel of 49 frames of 10 coefficients; twelve keywords."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 64, (10, 4), 2)
        self.bn1 = nn.BatchNorm2d(64, eps=1e-3)
        self.blocks = nn.Sequential(*(SeparableBlock(64) for _ in range(4)))
        self.fc = nn.Linear(64, 12)

    def forward(self, x: Tensor) -> Tensor:
        # Frames and coefficients may come without a channel dimension.
        x = x.reshape(-1, 1, 49, 10)
        x = F.relu(self.bn1(self.conv1(F.pad(x, (1, 1, 4, 5)))))
        return self.fc(F.avg_pool2d(self.blocks(x), (24, 5)).flatten(1))


def ds_cnn() -> nn.Module:
    return DsCnn()
