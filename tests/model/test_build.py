"""Building the network that a recipe names, and loading weights into it strictly."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from qcompress.errors import CheckpointError, ModelError, UsageError
from qcompress.model.build import build_model, channel_axes, load_weights, tied_names
from qcompress.types.settings import ModelSettings

CODE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.body = nn.Linear(3, width)
        self.norm = nn.BatchNorm1d(width)
        self.head = nn.Linear(width, 2)

    def forward(self, x):
        return self.head(self.norm(self.body(x)))

def make(width=4):
    return Net(width)

def fail():
    raise ValueError("no such size")

number = 3

def give_number():
    return 3
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "net.py").write_text(CODE)
    (tmp_path / "broken.py").write_text("import nothing_of_this_name")
    return tmp_path


def build(folder: Path, factory: str, *, allow_code: bool = True, **args: object) -> nn.Module:
    return build_model(ModelSettings(factory=factory, args=args), folder, allow_code)


def test_a_file_runs_with_leave_only(folder: Path) -> None:
    assert build(folder, "net.py:make", width=6).body.out_features == 6
    with pytest.raises(UsageError, match="--allow-code"):
        build(folder, "net.py:make", allow_code=False)


def test_what_is_built_is_in_eval_mode(folder: Path) -> None:
    made = build(folder, "torch.nn:Linear", in_features=3, out_features=2)
    assert isinstance(made, nn.Linear) and not made.training


@pytest.mark.parametrize(
    ("factory", "args", "error"),
    [
        ("net.py", {}, "is not MODULE:NAME"),
        ("absent.py:make", {}, "no file"),
        ("broken.py:make", {}, "does not import: ModuleNotFoundError"),
        ("net.py:other", {}, "has no callable 'other'"),
        ("net.py:number", {}, "has no callable 'number'"),
        ("net.py:fail", {}, "fails: ValueError: no such size"),
        ("net.py:make", {"depth": 3}, "fails: TypeError"),
        ("net.py:give_number", {}, "gives a int, not a torch.nn.Module"),
        ("no_such_package_anywhere:make", {}, "does not import"),
    ],
)
def test_a_factory_that_does_not_work_is_refused(folder: Path, factory: str, args: dict[str, int], error: str) -> None:
    with pytest.raises(ModelError, match=error) as caught:
        build(folder, factory, **args)
    assert "\n" not in str(caught.value)


def test_weights_must_fit_to_the_name_and_the_shape(folder: Path) -> None:
    module = build(folder, "net.py:make")
    state = {name: torch.randn_like(value.float()) for name, value in module.state_dict().items()}
    del state["norm.num_batches_tracked"]
    load_weights(module, state, "m.safetensors")
    assert torch.equal(module.head.weight, state["head.weight"])
    without = {name: value for name, value in state.items() if not name.startswith("head")}
    with pytest.raises(CheckpointError, match=r"lacks 'head\.weight', 'head\.bias'"):
        load_weights(module, without, "m.safetensors")
    with pytest.raises(CheckpointError, match="has 'extra' too many"):
        load_weights(module, state | {"extra": torch.zeros(1)}, "m.safetensors")
    with pytest.raises(CheckpointError, match=r"'body\.weight'.*\[5, 3\] in the checkpoint and \[4, 3\]"):
        load_weights(module, state | {"body.weight": torch.zeros(5, 3)}, "m.safetensors")


def test_half_weights_load_into_a_float_module(folder: Path) -> None:
    module = build(folder, "net.py:make")
    state = {name: value.half() for name, value in module.state_dict().items() if value.is_floating_point()}
    load_weights(module, state, "m.safetensors")
    assert module.body.weight.dtype == torch.float32


def test_a_tied_weight_needs_one_of_its_names() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
            self.head.weight = self.embed.weight

    module = Tied()
    assert tied_names(module) == {"head.weight": "embed.weight"}
    weight = torch.randn(5, 3)
    load_weights(module, {"head.weight": weight}, "m.safetensors")
    assert torch.equal(module.embed.weight, weight)


def test_transposed_layers_say_where_their_channels_are() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ConvTranspose2d(4, 2, 3))
    assert {name: axis.axes for name, axis in channel_axes(module).items()} == {"1.weight": (1,)}
