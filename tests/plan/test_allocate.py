"""A plan's widths under a budget: never beyond it, used as far as widths allow, links held, the reason said."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from artifact.examples import save
from conftest import small_tensors, write_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompress.artifact.layout import make_slots
from qcompress.checkpoint.checkpoint import Checkpoint, read_checkpoint
from qcompress.checkpoint.staging import write_whole
from qcompress.compress.compress import compress
from qcompress.errors import BudgetError, Refusals, ReportError
from qcompress.plan.allocate import (
    Costs,
    allocate,
    bpw_bounds,
    close,
    make_units,
    narrowest,
    read_costs,
    refuse_infeasible,
    with_bpw,
)
from qcompress.plan.files import planned_files
from qcompress.plan.plan import make_plan
from qcompress.plan.sensitivity import SENSITIVITY, LayerCosts, Sensitivity, WidthCost, checkpoint_sha256, grid_words
from qcompress.recipe import BudgetFlag, recipe_from_flags
from qcompress.types.plan import Plan
from qcompress.types.run import Options


def open_plan(source: Checkpoint, flag: BudgetFlag, method: str = "rtn", **options: object) -> Plan:
    recipe = recipe_from_flags(method, options, "quantize", flag)
    return make_plan(recipe, source.tensors, source.tied, source.config)


def bits_per_weight(bpw: float) -> BudgetFlag:
    return BudgetFlag(f"--bpw {bpw}", "bpw", bpw)


def of_size(n_bytes: int) -> BudgetFlag:
    return BudgetFlag(f"--target-size {n_bytes}", "size", str(n_bytes))


def falling(plan: Plan, importance: Mapping[str, float] | None = None) -> Costs:
    """Costs that fall to a quarter with each bit."""
    names = [decision.tensor.name for decision in plan.decisions if decision.is_open]
    of = {name: {bits: (importance or {}).get(name, 1.0) / 4**bits for bits in range(1, 9)} for name in names}
    return Costs(of, "by test")


def widths(plan: Plan) -> dict[str, int]:
    return {decision.tensor.name: decision.config.bits for decision in plan.decisions if decision.compresses}


def taken_bits_per_weight(plan: Plan) -> float:
    compressed = [decision for decision in plan.decisions if decision.compresses]
    stored = sum(slot.n_bytes for decision in compressed for slot in make_slots(decision, "packed"))
    return 8 * stored / sum(decision.tensor.numel for decision in compressed)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    path = tmp_path_factory.mktemp("allocate") / "model.safetensors"
    return read_checkpoint(write_checkpoint(path, small_tensors()))


@given(bpw=st.floats(1.1, 9.0), method=st.sampled_from(["rtn", "squant", "hqq"]), whole=st.booleans())
@settings(max_examples=40)
def test_bits_per_weight_are_never_exceeded_and_no_step_that_fits_is_left(
    source: Checkpoint, bpw: float, method: str, whole: bool
) -> None:
    plan = open_plan(source, bits_per_weight(bpw), method, granularity="tensor" if whole else "channel")
    low, high = bpw_bounds(plan, "packed")
    if bpw < low:
        return
    closed = allocate(source, plan, "packed", falling(plan))
    assert taken_bits_per_weight(closed) <= bpw
    chosen = widths(closed)
    weights = sum(decision.tensor.numel for decision in plan.decisions if decision.compresses)
    left = (bpw - taken_bits_per_weight(closed)) * weights / 8
    for unit in make_units(plan, "packed"):
        bits = chosen[unit.decisions[0].tensor.name]
        assert bits == 8 or unit.size_bytes[bits + 1] - unit.size_bytes[bits] > left - 1
    if bpw >= high:
        assert set(chosen.values()) == {8}


def test_a_budget_is_met_to_the_byte_and_one_byte_less_takes_a_step_back(source: Checkpoint) -> None:
    plan = open_plan(source, bits_per_weight(3.0))
    weights = sum(decision.tensor.numel for decision in plan.decisions if decision.compresses)
    exact = taken_bits_per_weight(allocate(source, plan, "packed", falling(plan)))
    again = allocate(source, with_bpw(plan, exact), "packed", falling(plan))
    assert taken_bits_per_weight(again) == exact
    less = allocate(source, with_bpw(plan, exact - 8 / weights), "packed", falling(plan))
    assert taken_bits_per_weight(less) < exact


@given(share=st.floats(0.0, 1.0))
@settings(max_examples=30)
def test_a_whole_file_is_never_larger_than_its_budget(source: Checkpoint, share: float) -> None:
    plan = open_plan(source, of_size(10**9), "rtn")
    least, most = (
        sum(planned_files(source, allocate(source, with_bpw(plan, bpw), "packed", falling(plan)), "packed").values())
        for bpw in bpw_bounds(plan, "packed")
    )
    limit = int(least + share * (most - least))
    plan = open_plan(source, of_size(limit), "rtn")
    closed = allocate(source, plan, "packed", falling(plan))
    assert sum(planned_files(source, closed, "packed").values()) <= limit


def test_the_foretold_size_is_the_file_s(source: Checkpoint, tmp_path: Path) -> None:
    plan = open_plan(source, of_size(9_000), "rtn")
    closed = allocate(source, plan, "packed", falling(plan))
    foretold = sum(planned_files(source, closed, "packed").values())
    report = compress(source, closed, Options(tmp_path / "out.safetensors", choice="packed"))
    assert report.size.artifact_bytes == foretold == (tmp_path / "out.safetensors").stat().st_size <= 9_000


def test_what_matters_more_gets_more(source: Checkpoint) -> None:
    plan = open_plan(source, bits_per_weight(2.3))
    one = widths(allocate(source, plan, "packed", falling(plan, {"fc.weight": 1e4, "layer.weight": 1e6})))
    other = widths(allocate(source, plan, "packed", falling(plan, {"conv1.weight": 1e4, "layer.weight": 1e6})))
    assert one["fc.weight"] > other["fc.weight"]
    assert one["conv1.weight"] < other["conv1.weight"]


def test_too_small_a_budget_is_refused_with_the_least(source: Checkpoint) -> None:
    plan = open_plan(source, bits_per_weight(0.5), "rtn")
    least = taken_bits_per_weight(narrowest(plan, "packed"))
    with pytest.raises(BudgetError) as caught:
        refuse_infeasible(source, plan, "packed")
    assert f"codes and grids take {least:.4f} at the narrowest widths" in str(caught.value)
    asked = float(str(caught.value).rpartition("ask for at least ")[2])
    enough = open_plan(source, bits_per_weight(asked), "rtn")
    assert set(widths(allocate(source, enough, "packed", falling(enough))).values()) == {1}
    with pytest.raises(BudgetError, match="100 bytes are too few: the artifact takes"):
        allocate(source, open_plan(source, of_size(100), "rtn"), "packed", falling(plan))


def test_widths_that_a_method_lacks_are_not_chosen(source: Checkpoint) -> None:
    """A narrow grid of one bit has no step."""
    recipe = recipe_from_flags("rtn", {"symmetric": True}, "quantize", bits_per_weight(2.0))
    rule = recipe.rules[0]
    configs = {bits: replace(config, convention="narrow") for bits, config in rule.config.configs.items() if bits > 1}
    narrow = replace(recipe, rules=(replace(rule, config=replace(rule.config, configs=configs)),))
    plan = make_plan(narrow, source.tensors, source.tied, source.config)
    with pytest.raises(BudgetError):
        allocate(source, plan, "packed", falling(plan))
    wider = with_bpw(plan, 2.5)
    assert min(widths(allocate(source, wider, "packed", falling(wider))).values()) == 2


def attention(path: Path) -> Checkpoint:
    names = [f"layers.{i}.self_attn.{part}_proj.weight" for i in (0, 1) for part in "qkvo"]
    names += [f"layers.{i}.mlp.{part}_proj.weight" for i in (0, 1) for part in ("gate", "up", "down")]
    names += ["layers.2.self_attn.q_proj.weight"]
    generator = torch.Generator().manual_seed(0)
    save(path, {name: torch.randn(8, 16, generator=generator) for name in names})
    return read_checkpoint(path)


def test_linked_tensors_are_equally_wide(tmp_path: Path) -> None:
    source = attention(tmp_path / "m.safetensors")
    plan = open_plan(source, bits_per_weight(6.0))
    random = np.random.default_rng(0)
    importance = {d.tensor.name: float(10 ** random.uniform(-3, 3)) for d in plan.decisions}
    closed = allocate(source, plan, "packed", falling(plan, importance))
    chosen = widths(closed)
    for i in (0, 1):
        assert len({chosen[f"layers.{i}.self_attn.{part}_proj.weight"] for part in "qkv"}) == 1
        assert len({chosen[f"layers.{i}.mlp.{part}_proj.weight"] for part in ("gate", "up")}) == 1
    assert len(set(chosen.values())) > 2
    reasons = {decision.tensor.name: decision.reason for decision in closed.decisions}
    assert "equal in 3 linked tensors" in reasons["layers.0.self_attn.k_proj.weight"]
    # Without its partners a tensor goes alone.
    assert "linked" not in reasons["layers.2.self_attn.q_proj.weight"]
    assert "linked" not in reasons["layers.0.self_attn.o_proj.weight"]


def test_the_reason_says_width_budget_and_evidence(source: Checkpoint) -> None:
    plan = open_plan(source, bits_per_weight(2.5))
    closed = allocate(source, plan, "packed", falling(plan))
    for decision in closed.decisions:
        if decision.compresses:
            assert f"; {decision.config.bits} bits: budget 2.5 bpw, by test, " in decision.reason
            assert decision.sensitivity is None
    measured = allocate(source, plan, "packed", replace(falling(plan), measured=True))
    for decision in measured.decisions:
        if decision.compresses:
            assert decision.sensitivity == 1 / 4**decision.config.bits


def make_sensitivity(source: Checkpoint, plan: Plan, **changes: object) -> Sensitivity:
    layers = []
    for decision in plan.decisions:
        if decision.is_open:
            costs = tuple(
                WidthCost(bits=bits, bytes=bits, relative_error=0.1, divergence=1 / 4**bits, metrics={})
                for bits in (2, 3, 4)
            )
            layers.append(
                LayerCosts(
                    name=decision.tensor.name,
                    shape=decision.tensor.shape,
                    method="rtn",
                    grid=grid_words(decision),
                    widths=costs,
                )
            )
    found = Sensitivity(
        checkpoint="model.safetensors",
        input_sha256=checkpoint_sha256(source),
        measured_sha256="0" * 64,
        divergence_kind="kl",
        divergence_data="calibration",
        divergence_samples=8,
        metric_samples=0,
        higher={},
        baseline={},
        layers=tuple(layers),
    )
    return replace(found, **changes)  # type: ignore[arg-type]


def test_a_file_of_sensitivities_decides_and_its_widths_alone_are_chosen(source: Checkpoint, tmp_path: Path) -> None:
    plan = open_plan(source, bits_per_weight(8.5))
    path = tmp_path / "s.json"
    write_whole(SENSITIVITY.text(make_sensitivity(source, plan)), path)
    costs = read_costs(source, plan, path)
    closed = allocate(source, plan, "packed", costs)
    assert set(widths(closed).values()) == {4}
    assert all(d.sensitivity == pytest.approx(1 / 256) for d in closed.decisions if d.compresses)
    assert all("measured in s.json" in d.reason for d in closed.decisions if d.compresses)


def test_sensitivities_of_another_checkpoint_or_grid_are_refused(source: Checkpoint, tmp_path: Path) -> None:
    plan = open_plan(source, bits_per_weight(3.0))
    path = tmp_path / "s.json"
    found = make_sensitivity(source, plan)
    write_whole(SENSITIVITY.text(replace(found, input_sha256="f" * 64)), path)
    with pytest.raises(ReportError, match=r"was measured on another checkpoint than .* measure it with"):
        read_costs(source, plan, path)
    write_whole(SENSITIVITY.text(replace(found, layers=found.layers[1:])), path)
    with pytest.raises(BudgetError, match=r"conv1.weight: was not measured; measure again"):
        read_costs(source, plan, path)
    write_whole(SENSITIVITY.text(found), path)
    other = open_plan(source, bits_per_weight(3.0), "rtn", granularity="tensor")
    with pytest.raises(Refusals, match="was measured with a grid of channel zero-point, and is to get tensor zero-poi"):
        read_costs(source, other, path)


def test_closing_keeps_what_is_not_open(source: Checkpoint) -> None:
    plan = open_plan(source, bits_per_weight(3.0))
    units = make_units(plan, "packed")
    closed = close(plan, units, [2] * len(units))
    assert [d.tensor for d in closed.decisions] == [d.tensor for d in plan.decisions]
    assert [d for d in closed.decisions if not d.compresses] == [d for d in plan.decisions if not d.compresses]
