"""Small networks, data, a loss and a metric that the recipes of bytes.py name as `networks.py:NAME`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

SIDE, WORDS = 8, 24


class Separable(nn.Module):
    """A convolution, a depthwise and a pointwise one with batch norms, ReLU and ReLU6, a shortcut, a linear layer."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.pointwise = nn.Conv2d(width, width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.last = nn.Conv2d(width, width, 3, padding=1)
        self.fc = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.bn1(self.conv(x)))
        x = F.relu6(self.bn2(self.depthwise(x)))
        x = F.relu(self.bn3(self.pointwise(x)))
        return self.fc(F.relu(x + self.last(x)).mean((2, 3)))


class Block(nn.Module):
    """Two linear layers around a shortcut, which give a tuple."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor, scale: float = 1.0) -> tuple[Tensor, None]:
        return x + scale * self.down(F.gelu(self.up(x))), None


class Text(nn.Module):
    """An embedding, blocks, and an output layer over tokens; what it does depends on its input, so it has no graph."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, width)
        self.blocks = nn.ModuleList([Block(width) for _ in range(2)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, WORDS, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        if float(x.detach().sum()) == 12345.0:
            return x
        for block in self.blocks:
            x = block(x, scale=0.5)[0]
        return self.head(self.norm(x))


class Mirror(nn.Module):
    """An image made smaller and larger again, by a convolution and a transposed one."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 8, 4, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(8, 3, 4, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(F.relu(self.down(x)))


def separable(width: int = 8) -> nn.Module:
    return Separable(width)


def text() -> nn.Module:
    return Text()


def mirror() -> nn.Module:
    return Mirror()


def samples(count: int) -> TensorDataset:
    """Images and labels without a file."""
    generator = torch.Generator().manual_seed(5)
    labels = torch.randint(4, (count,), generator=generator)
    return TensorDataset(torch.randn(count, 3, SIDE, SIDE, generator=generator) + labels[:, None, None, None], labels)


def smoothed(output: Tensor, batch: Any) -> Tensor:
    """A loss that a recipe brings along."""
    return F.cross_entropy(output, batch.labels, label_smoothing=0.2)


def confidence(output: Tensor, batch: Any) -> Tensor:
    """A metric that a recipe brings along: the probability of the right class."""
    return output.softmax(1).gather(1, batch.labels[:, None])[:, 0]
