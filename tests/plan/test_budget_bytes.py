"""The bytes that a budget of steps allows, from headers alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from artifact.examples import gaussian, plan_for, save

from qcompress.checkpoint.checkpoint import Checkpoint, read_checkpoint
from qcompress.errors import BudgetError
from qcompress.plan.allocate import coded_weights, decides_steps, limit_of, most_bytes
from qcompress.plan.files import make_shards
from qcompress.recipe import parse_recipe
from qcompress.types.encoded import ActivationGrid, Fitted, Kept
from qcompress.types.plan import Plan

RECIPE = 'version: 1\nbudget: {%s}\nrules:\n  - {match: "*.weight", %s: {%s}}\n'


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    made = {"a.weight": gaussian(64, 96), "b.weight": gaussian(10, 64), "b.bias": gaussian(10)}
    return read_checkpoint(save(tmp_path / "m.safetensors", made))


def planned(checkpoint: Checkpoint, budget: str, method: str = "rd") -> Plan:
    return plan_for(checkpoint, parse_recipe(RECIPE % (budget, method, ""), "r.yaml"))


@pytest.mark.parametrize("activations", ["", "activations: {bits: 8}\n"])
def test_what_a_budget_allows_holds_all_that_a_live_model_may_name(tmp_path: Path, activations: str) -> None:
    layers = {f"features.{index}.weight": gaussian(8, 8, seed=index) for index in range(40)}
    biases = {f"features.{index}.bias": gaussian(8, seed=index) for index in range(40)}
    checkpoint = read_checkpoint(save(tmp_path / "m.safetensors", layers | biases))
    recipe = RECIPE % ("bpw: 2", "rd", "") + "model: {factory: net.py:net}\n" + activations
    plan = plan_for(checkpoint, parse_recipe(recipe, "r.yaml"))
    grids = {name.removesuffix(".weight"): ActivationGrid(8, 1.2345678e-30, 128) for name in layers}
    fitted = Fitted({name: Kept(value) for name, value in biases.items()}, activations=grids if activations else {})
    layout = make_shards(checkpoint, plan, "ans", fitted)[0].layout
    rest = layout.file_bytes - sum(slot.n_bytes for slot in layout.slots if slot.varies)
    weights = 40 * 64
    assert rest + weights * 2 // 8 <= most_bytes(checkpoint, plan, "ans") < 1.5 * (rest + weights * 2 // 8)


def test_only_budgets_of_methods_without_widths_decide_steps(checkpoint: Checkpoint) -> None:
    assert decides_steps(planned(checkpoint, "bpw: 2"))
    assert not decides_steps(planned(checkpoint, "bpw: 2", method="rtn"))


def test_bits_per_weight_count_what_is_compressed_and_a_size_all_files(checkpoint: Checkpoint) -> None:
    plan = planned(checkpoint, "bpw: 2")
    assert coded_weights(plan) == 64 * 96 + 10 * 64
    limit = limit_of(checkpoint, plan, "ans")
    assert (limit.bits, limit.other_bits, limit.whole) == (2 * coded_weights(plan), 0, False)
    whole = limit_of(checkpoint, planned(checkpoint, "size: 5000"), "ans")
    assert whole.whole and whole.bits == 8 * 5000 and 8 * 40 < whole.other_bits < whole.bits
    assert most_bytes(checkpoint, planned(checkpoint, "size: 5000"), "ans") == 5000


@pytest.mark.parametrize(
    ("budget", "least"), [("bpw: 0.05", "ask for at least 0.1"), ("size: 500", "r.yaml:2: budget")]
)
def test_less_than_next_to_nothing_is_refused(checkpoint: Checkpoint, budget: str, least: str) -> None:
    with pytest.raises(BudgetError, match=least):
        limit_of(checkpoint, planned(checkpoint, budget), "ans")
