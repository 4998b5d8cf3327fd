"""Small networks, data and trainers that the tests of training share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from model import networks
from torch import Tensor, nn

from qcompress.data.batches import Batch, Batches
from qcompress.model.live import LiveModel
from qcompress.registry import METHODS
from qcompress.registry.regularizers import DsmmConfig, MinSquaredConfig
from qcompress.training.loop import Data, Trained, Watch, train
from qcompress.training.losses import make_loss
from qcompress.training.penalties import attach_penalties
from qcompress.training.trainer import Trainer
from qcompress.types.data_settings import Crop4, Flip
from qcompress.types.plan import Decision, Rule, TensorInfo
from qcompress.types.settings import Classification, Cosine, Sgd, Training


def points(count: int = 96) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 3, 8, 8, generator=generator)
    y = (x[:, 0].mean((1, 2)) > 0).long() + 2 * (x[:, 1].mean((1, 2)) > 0).long()
    return x, y


def batches(size: int = 16, count: int = 96) -> Batches:
    x, y = points(count)

    def read(indices: Sequence[int]) -> Batch:
        chosen = torch.tensor(list(indices))
        return Batch(args=(x[chosen],), labels=y[chosen])

    return Batches(count, size, read)


def net(*, dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(dropout),
        nn.Linear(8, 4),
    )


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def rules() -> list[Rule]:
    return [
        Rule("0.weight", "dsmm", DsmmConfig(preset="paper-dsmm"), "a"),
        Rule("6.weight", "min-squared", MinSquaredConfig(levels=4, start=0.3, ramp=0.2), "b"),
    ]


def settings(**options: Any) -> Training:
    optimizer = options.pop("optimizer", Sgd(lr=0.05, momentum=0.9, weight_decay=1e-3))
    return Training(epochs=3, **options, optimizer=optimizer, schedule=Cosine())


def run(module: nn.Module, training: Training, watch: Watch | None = None, **more: Any) -> Trained:
    penalties = more.pop("penalties", None)
    penalties = attach_penalties(module, rules()) if penalties is None else penalties
    data = more.pop("data", Data(batches(), (Flip(), Crop4())))
    return train(module, data, make_loss(Classification()), training, penalties, watch or Watch(), seed=5, **more)


def make_trainer(kind: type[nn.Module], size: int = 16, count: int = 48) -> Trainer:
    x = torch.cat([batch.args[0] for batch in networks.batches(kind, 4, count // 4)])

    def read(indices: Sequence[int]) -> Batch:
        return Batch((x[list(indices)],), labels=torch.tensor(list(indices)) % 2)

    training = Training(epochs=1, optimizer=Sgd(lr=0.01))
    return Trainer(Data(Batches(count, size, read)), make_loss(Classification()), training, Watch(), 0)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.second(F.relu(self.first(x)))))


def tied() -> tuple[LiveModel, list[Decision]]:
    from qcompress.model.live import make_live_model

    torch.manual_seed(0)
    module, data = Tied(), [Batch((torch.randn(8, 6),))]
    config = METHODS["lsq"].config(bits=2)
    own = [Decision(TensorInfo("first.weight", (6, 6), "F32"), "lsq", config, "test")]
    last = Decision(TensorInfo("last.weight", (3, 6), "F32"), "rtn", METHODS["rtn"].config(bits=8), "test")
    return make_live_model(module, [*own, last], data, data[0], device=torch.device("cpu")), own
