"""Small networks that between them have every shape of graph that matters."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qcompress.data.batches import Batch
from qcompress.model.live import LiveModel, make_live_model
from qcompress.registry import METHODS
from qcompress.types.plan import Decision, TensorInfo


class Residual(nn.Module):
    """Two convolutions with batch norms around a shortcut, which works in place, then pooling and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.stem_bn = nn.BatchNorm2d(8)
        self.conv1 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(8)
        self.act = nn.ReLU(inplace=True)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.stem_bn(self.stem(x)))
        y = self.bn2(self.conv2(self.act(self.bn1(self.conv1(x)))))
        y += x
        return self.fc(F.relu_(y).mean((2, 3)))


class Separable(nn.Module):
    """Depthwise and pointwise convolutions with ReLU6, as in MobileNet."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, stride=2, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(6)
        self.dw = nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False)
        self.dw_bn = nn.BatchNorm2d(6)
        self.pw = nn.Conv2d(6, 10, 1, bias=False)
        self.pw_bn = nn.BatchNorm2d(10)
        self.fc = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.bn(self.conv(x)))
        x = F.relu6(self.dw_bn(self.dw(x)))
        x = F.relu6(self.pw_bn(self.pw(x)))
        return self.fc(x.mean((2, 3)))


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 12), nn.Linear(12, 6)

    def forward(self, x: Tensor, scale: float = 1.0) -> tuple[Tensor, None]:
        return x + scale * self.second(F.gelu(self.first(x))), None


class Untraceable(nn.Module):
    """Blocks that give tuples, around which the data decide what is done."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 6)
        self.blocks = nn.ModuleList([Block() for _ in range(3)])
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        if float(x.sum()) == 12345.0:
            return x
        for block in self.blocks:
            x = block(x, scale=0.5)[0]
        return self.head(x)


SHAPES = {Residual: (3, 8, 8), Separable: (3, 12, 12), Mlp: (6,), Untraceable: (4,)}


def trained(kind: type[nn.Module], seed: int = 0) -> nn.Module:
    """A network with weights and batch-norm statistics like those of a trained one, in eval mode."""
    torch.manual_seed(seed)
    module = kind()
    for one in module.modules():
        if isinstance(one, nn.BatchNorm2d):
            nn.init.uniform_(one.weight, 0.5, 1.5)
            nn.init.normal_(one.bias, std=0.3)
    module.train()
    with torch.no_grad():
        for _ in range(20):
            module(inputs(kind, 32))
    return module.eval()


def inputs(kind: type[nn.Module], samples: int) -> Tensor:
    return torch.randn(samples, *SHAPES[kind])


def batches(kind: type[nn.Module], count: int = 3, samples: int = 16) -> list[Batch]:
    return [Batch((inputs(kind, samples),)) for _ in range(count)]


def decisions(module: nn.Module, method: str, **options: object) -> list[Decision]:
    """Every weight of two or more dimensions with one method."""
    config = METHODS[method].config(**options)
    return [
        Decision(TensorInfo(name, tuple(value.shape), "F32"), method, config, "test")
        for name, value in module.state_dict().items()
        if value.ndim >= 2
    ]


def live(kind: type[nn.Module], method: str = "rtn", *, blocks: tuple[str, ...] = (), **options: object) -> LiveModel:
    module = trained(kind)
    options = options or {"bits": 4}
    data = batches(kind)
    return make_live_model(
        module, decisions(module, method, **options), data, data[0].first(2), device=torch.device("cpu"), blocks=blocks
    )
