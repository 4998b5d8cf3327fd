"""Costs of bit widths from weights alone."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from artifact.examples import gaussian, plan_for, save
from conftest import small_tensors, write_checkpoint

from qcompress.budget.weight_costs import ROUNDED_WIDTH, Rounded, round_weight, stand_in, weight_costs
from qcompress.checkpoint.checkpoint import Checkpoint, read_checkpoint
from qcompress.compress.compress import compress
from qcompress.recipe import BudgetFlag, recipe_from_flags
from qcompress.registry import GptqConfig, MseConfig, RtnConfig, SquantConfig
from qcompress.types.plan import Decision, Plan, TensorInfo, Widths
from qcompress.types.run import Options


def open_plan(source: Checkpoint, method: str, **options: object) -> Plan:
    return plan_for(source, recipe_from_flags(method, options, "quantize", BudgetFlag("--bpw 3", "bpw", 3.0)))


def test_costs_fall_with_the_width_and_come_from_the_weights_alone(tmp_path: Path) -> None:
    source = read_checkpoint(write_checkpoint(tmp_path / "model.safetensors", small_tensors()))
    plan = open_plan(source, "squant")
    costs = weight_costs(source, plan, Options(Path("a"), threads=2))
    assert costs == weight_costs(source, plan, Options(Path("a")))
    for of_width in costs.of.values():
        errors = [of_width[bits] for bits in range(2, 9)]
        assert errors == sorted(errors, reverse=True)
        # Half a step less: a quarter of the error, from 3 bits on nearly.
        assert 3 < errors[2] / errors[3] < 5
        assert all(of_width[bits + 1] == of_width[bits] / 4 for bits in range(ROUNDED_WIDTH, 8))


def test_a_cost_is_the_error_over_the_norm(tmp_path: Path) -> None:
    """Weights twice as large leave four times the error: that over twice the norm is twice the cost."""
    weight = gaussian(16, 32)
    source = read_checkpoint(save(tmp_path / "m.safetensors", {"a": weight, "b": 2 * weight}))
    costs = weight_costs(source, open_plan(source, "rtn"), Options(Path("a"), choice="packed")).of
    assert costs["b"] == pytest.approx({bits: 2 * cost for bits, cost in costs["a"].items()})


@pytest.mark.parametrize("method", ["rtn", "squant"])
def test_what_entropy_coding_leaves_is_foretold(tmp_path: Path, method: str) -> None:
    """Of every tensor at every width that is tried, what the artifact has, and about that at wider ones."""
    plain, matrix, spread = torch.randn(3, 96, 256, generator=torch.Generator().manual_seed(0))
    source = read_checkpoint(save(tmp_path / "m.safetensors", {"a": plain * 0.1, "b": matrix * spread.exp()}))
    plan = open_plan(source, method)
    costs = weight_costs(source, plan, Options(Path("a")))
    for bits in range(2, 9):
        at = replace(plan, decisions=tuple(replace(d, config=d.widths.at(bits)) for d in plan.decisions))
        report = compress(source, at, Options(tmp_path / f"{bits}.safetensors"))
        for layer in report.compressed:
            assert costs.coded[layer.name][bits] == pytest.approx(
                layer.bytes, rel=0.01 if bits <= ROUNDED_WIDTH else 0.1
            )


@pytest.mark.parametrize("value", [0.0, math.inf, math.nan])
def test_a_weight_without_finite_energy_costs_nothing(tmp_path: Path, value: float) -> None:
    weight = torch.zeros(8, 8)
    weight[3, 3] = value
    source = read_checkpoint(save(tmp_path / "m.safetensors", {"w": weight}))
    plan = open_plan(source, "rtn")
    assert set(weight_costs(source, plan, Options(Path("a"))).of["w"].values()) == {0.0}
    assert round_weight(weight, plan.decisions[0], (2,), 0) == {2: Rounded(0.0, 0.0)}


@pytest.mark.parametrize(
    ("method", "config", "stands_in"),
    [
        ("squant", SquantConfig(bits=3), ("squant", SquantConfig(bits=3))),
        ("gptq", GptqConfig(bits=3, group_size=4), ("mse", MseConfig(bits=3, group_size=4, effort="normal"))),
        ("gptq", GptqConfig(bits=3, range="minmax", symmetric=True), ("rtn", RtnConfig(bits=3, symmetric=True))),
    ],
)
def test_a_method_on_a_live_model_is_stood_in_for_by_its_grid(
    method: str, config: object, stands_in: tuple[str, object]
) -> None:
    decision = Decision(TensorInfo("w", (8, 8), "F32"), method, Widths({3: config}), "test")
    found = stand_in(decision, 3)
    assert (found.method, found.config) == stands_in
