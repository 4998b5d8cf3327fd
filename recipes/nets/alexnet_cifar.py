"""AlexNet (Krizhevsky 2014, arXiv 1404.5997, its widths) with kernels and strides small enough for 32x32 images."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class AlexNet(nn.Module):
    """Takes [samples, 3, 32, 32].

    width   scales every channel and the two hidden dense layers
    stride  of the first convolution; with 1 the others see four times as many places
    """

    def __init__(self, classes: int, width: float, stride: int, dropout: float) -> None:
        super().__init__()
        first, second, third, fourth, fifth, hidden = (
            max(1, round(size * width)) for size in (64, 192, 384, 256, 256, 4096)
        )
        self.conv1 = nn.Conv2d(3, first, 3, stride, 1)
        self.conv2 = nn.Conv2d(first, second, 3, 1, 1)
        self.conv3 = nn.Conv2d(second, third, 3, 1, 1)
        self.conv4 = nn.Conv2d(third, fourth, 3, 1, 1)
        self.conv5 = nn.Conv2d(fourth, fifth, 3, 1, 1)
        self.dropout = nn.Dropout(dropout)
        side = 4 // stride
        self.fc1 = nn.Linear(side * side * fifth, hidden)
        self.fc2 = nn.Linear(hidden, hidden)
        self.fc3 = nn.Linear(hidden, classes)
        for layer in self.children():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                # Without batch norm, what begins smaller than He et al. 2015 shrinks from layer to layer.
                nn.init.kaiming_normal_(layer.weight, nonlinearity="linear" if layer is self.fc3 else "relu")
                nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = F.relu(self.conv4(F.relu(self.conv3(x))))
        x = F.max_pool2d(F.relu(self.conv5(x)), 2)
        x = F.relu(self.fc1(self.dropout(x.flatten(1))))
        return self.fc3(F.relu(self.fc2(self.dropout(x))))


def alexnet(classes: int = 10, width: float = 1.0, stride: int = 2, dropout: float = 0.5) -> nn.Module:
    return AlexNet(classes, width, stride, dropout)
