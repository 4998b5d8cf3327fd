"""What a network says of its tensors, built without weights where it can be."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qcompress.errors import ModelError, RecipeError, UsageError
from qcompress.model.build import build_network, read_facts
from qcompress.types.plan import ModelFacts, Recipe, TensorFacts
from qcompress.types.run import ModelRun
from qcompress.types.settings import ModelSettings

CODE = """
from functools import lru_cache
from pathlib import Path

import torch
from torch import nn

HERE = Path(__file__).parent

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))
        self.embed, self.head = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
        self.head.weight = self.embed.weight
        self.attention = nn.MultiheadAttention(4, 2)
        self.up = nn.ConvTranspose1d(4, 6, 3)
        self.down = nn.Conv1d(6, 4, 3)
        self.norm = nn.BatchNorm1d(4)
        with open(HERE / "built", "a") as log:
            log.write(self.scale.device.type + " ")

def make():
    return Net()

class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.idle = nn.Linear(4, 4), nn.Linear(4, 4)
        self.looks = False
    def forward(self, x):
        return self.a(x) if not self.looks or x.sum() > 0 else x

def make_two(looks=False):
    net = Two()
    net.looks = looks
    return net

class Renamed(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.b = self.a
        self.register_state_dict_post_hook(lambda _, found, *__: found.update(other=found.pop("b.bias")))

def make_renamed():
    return Renamed()

class Caching(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.linear = nn.Parameter(torch.randn(5, 2)), nn.Linear(2, 2)
        self.parts(3)

    @staticmethod
    @lru_cache(maxsize=None)
    def positions(length):
        return torch.arange(length)

    @staticmethod
    @lru_cache(maxsize=4)
    def parts(length):
        return ({"of": torch.arange(length)},)

    def forward(self, x):
        return self.table[self.positions(len(x))] + self.linear(x)

def make_caching():
    return Caching()

def make_by_values():
    net = Net()
    net.threshold = float(net.scale.sum())
    return net

def fail():
    Net()
    raise ValueError("no such size")
"""


def run_of(folder: Path, factory: str, *, allow_code: bool = True, model: bool = True) -> ModelRun:
    (folder / "net.py").write_text(CODE)
    settings = ModelSettings(factory=f"net.py:{factory}") if model else None
    recipe = Recipe("quantize", (), model=settings, source=str(folder / "recipe.yaml"))
    return ModelRun(recipe, torch.device("cpu"), allow_code)


def facts(folder: Path, factory: str = "make") -> ModelFacts:
    return read_facts(run_of(folder, factory))


def devices(folder: Path) -> list[str]:
    """Where each network was built, one after another."""
    return (folder / "built").read_text().split()


def test_a_network_is_built_without_weights(tmp_path: Path) -> None:
    assert facts(tmp_path)
    assert devices(tmp_path) == ["meta"]
    assert torch.ones(()).device.type == "cpu", "what comes after is made where it was"


def test_a_constructor_that_reads_values_is_run_with_weights(tmp_path: Path) -> None:
    assert facts(tmp_path, "make_by_values") == facts(tmp_path)
    assert devices(tmp_path) == ["meta", "cpu", "meta"]


def test_every_tensor_says_what_holds_it(tmp_path: Path) -> None:
    found = facts(tmp_path)
    assert {name: one.module for name, one in found.items()} == {
        "scale": "Net",
        "embed.weight": "Embedding",
        "head.weight": "Linear",
        "attention.in_proj_weight": "MultiheadAttention",
        "attention.in_proj_bias": "MultiheadAttention",
        "attention.out_proj.weight": "NonDynamicallyQuantizableLinear",
        "attention.out_proj.bias": "NonDynamicallyQuantizableLinear",
        **{f"up.{part}": "ConvTranspose1d" for part in ("weight", "bias")},
        **{f"down.{part}": "Conv1d" for part in ("weight", "bias")},
        **{
            f"norm.{part}": "BatchNorm1d"
            for part in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
        },
    }


def test_names_of_a_shared_or_a_renamed_layer_are_told_of_too(tmp_path: Path) -> None:
    found = facts(tmp_path, "make_renamed")
    assert {name: one.module for name, one in found.items()} == {
        **dict.fromkeys(("a.weight", "a.bias", "b.weight"), "Linear"),
        "other": "Renamed",
    }
    assert found["b.weight"].tied_to == "a.weight"


def test_only_what_is_unusual_is_told_of(tmp_path: Path) -> None:
    found = facts(tmp_path)
    assert {name: one.tied_to for name, one in found.items() if one.tied_to} == {"head.weight": "embed.weight"}
    axes = {name: one.axis for name, one in found.items() if one.axis is not None}
    assert {name: axis.axes for name, axis in axes.items()} == {"up.weight": (1,)}
    assert axes["up.weight"].reason == "the model: ConvTranspose1d stores its outputs second"
    assert {name for name, one in found.items() if not one.called} == {
        "attention.out_proj.weight",
        "attention.out_proj.bias",
    }, "attention multiplies by its last weight itself"
    assert found["down.weight"] == TensorFacts("Conv1d", kind="product")
    assert {name: one.kind for name, one in found.items() if one.kind != "else"} == {
        "embed.weight": "table",
        **dict.fromkeys(("head.weight", "up.weight", "down.weight"), "product"),
        **dict.fromkeys(("attention.in_proj_weight", "attention.out_proj.weight"), "inner"),
    }


def test_a_factory_that_fails_either_way_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="fails: ValueError: no such size"):
        facts(tmp_path, "fail")
    assert devices(tmp_path) == ["meta", "cpu"]


def test_a_file_runs_with_leave_only(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--allow-code"):
        read_facts(run_of(tmp_path, "make", allow_code=False))
    assert not (tmp_path / "built").exists()


def test_what_no_forward_pass_calls_is_told_of_where_no_value_decides(tmp_path: Path) -> None:
    run = run_of(tmp_path, "make_two")
    shapes = {f"{name}.{part}": (4, 4)[: 2 - (part == "bias")] for name in ("a", "idle") for part in ("weight", "bias")}
    assert run.recipe.model is not None
    for settings, idle in (
        (ModelSettings(factory="net.py:make_two", input=(4,)), {"idle.weight"}),
        (ModelSettings(factory="net.py:make_two", input=(4,), args={"looks": True}), set()),
        (ModelSettings(factory="net.py:make_two", input=(5,)), set()),
        (ModelSettings(factory="net.py:make_two"), set()),
    ):
        found = read_facts(replace(run, recipe=replace(run.recipe, model=settings)), shapes)
        assert {name for name, one in found.items() if one.kind == "idle"} == idle
        assert found["idle.weight"].called is not bool(idle)


def test_nothing_that_a_network_caches_stays_without_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither what its constructor nor what its forward pass asked a cached function for."""
    run = run_of(tmp_path, "make_caching")
    shutil.copy(tmp_path / "net.py", tmp_path / "network_that_caches.py")
    monkeypatch.syspath_prepend(tmp_path)
    shapes = {"table": (5, 2), "linear.weight": (2, 2), "linear.bias": (2,)}
    # A module, whose caches the next network that is built has too.
    settings = ModelSettings(factory="network_that_caches:make_caching", input=(2,))
    run = replace(run, recipe=replace(run.recipe, model=settings))
    assert read_facts(run, shapes)["linear.weight"].kind == "product"
    network = build_network(run)
    made = type(network).positions(2), type(network).parts(3)[0]["of"]
    assert [one.device.type for one in made] == ["cpu", "cpu"]
    x = torch.zeros(2, 2)
    expected = network.table[torch.arange(2)] + network.linear(x)
    assert torch.equal(network(x), expected)


def test_a_recipe_without_a_model_has_no_facts(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="names no model"):
        read_facts(run_of(tmp_path, "make", model=False))
