"""A plan is laid out with what came of its conditions, and stays what it was."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from artifact.examples import gaussian, plan_for, recipe, rule, save

from qcompress.checkpoint.checkpoint import Checkpoint, read_checkpoint
from qcompress.plan.files import carried_out, make_shards, planned_files
from qcompress.types.plan import Decision, Outcomes, Plan

NONE = Outcomes()


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    tensors = {"w": gaussian(8, 16), "v": gaussian(8, 16, seed=1), "bias": gaussian(8), "norm": gaussian(8, seed=2)}
    return read_checkpoint(save(tmp_path / "m.safetensors", tensors))


@pytest.fixture
def plan(checkpoint: Checkpoint) -> Plan:
    """A codebook, a grid, and two tensors that are kept in half precision."""
    asked = recipe(rule("w", "kmeans", bits=4), rule("v", "kmeans", bits=2))
    return plan_for(checkpoint, replace(asked, family="cluster", keep_dtype="f16"))


def named(decisions: tuple[Decision, ...]) -> dict[str, Decision]:
    return {decision.tensor.name: decision for decision in decisions}


def test_a_condition_that_came_to_nothing_changes_no_decision(plan: Plan) -> None:
    others = Outcomes({"other": 3}, frozenset({"other"}), frozenset({"other"}))
    for decision in plan.decisions:
        assert carried_out(decision, NONE) == decision
        assert carried_out(decision, others) == decision


def test_a_codebook_has_as_many_entries_as_differ(plan: Plan) -> None:
    found = named(plan.decisions)
    after = carried_out(found["w"], Outcomes(entries={"w": 5}))
    assert after == replace(found["w"], codebook=replace(found["w"].codebook, entries=5))
    assert found["w"].codebook.entries is None


def test_a_tensor_that_float16_cannot_hold_is_stored_as_it_is_and_says_so(plan: Plan) -> None:
    before = named(plan.decisions)["bias"]
    assert (before.stored, before.reason) == ("F16", "no rule matches; stored as F16")
    after = carried_out(before, Outcomes(too_wide=frozenset({"bias"})))
    assert (after.stored, after.reason) == (None, "no rule matches; float16 cannot hold its values")
    assert before.stored == "F16"


def test_an_adjusted_tensor_says_so_whatever_else_came_of_it(plan: Plan) -> None:
    before = named(plan.decisions)["norm"]
    adjusted = frozenset({"norm"})
    after = carried_out(before, Outcomes(adjusted=adjusted))
    assert after == replace(before, reason="no rule matches; stored as F16; values adjusted")
    both = carried_out(before, Outcomes(too_wide=adjusted, adjusted=adjusted))
    assert (both.stored, both.reason) == (None, "no rule matches; float16 cannot hold its values; values adjusted")


def test_a_tensor_that_stands_for_another_may_have_an_exponent_a_row(plan: Plan) -> None:
    before = named(plan.decisions)["v"]
    names = frozenset({"v"})
    after = carried_out(before, Outcomes(aimed=names, spread=names))
    assert after.row_exponents and not carried_out(before, Outcomes(aimed=names)).row_exponents
    assert "its codes stand for" in after.reason and "an exponent a row" in after.reason


def test_files_are_laid_out_with_the_outcomes_and_the_plan_stays_as_it_was(checkpoint: Checkpoint, plan: Plan) -> None:
    again = plan_for(checkpoint, plan.recipe)
    outcomes = Outcomes({"w": 5}, frozenset({"bias"}), frozenset({"norm"}))
    (bare,), (shard,) = make_shards(checkpoint, plan, "packed"), make_shards(checkpoint, plan, "packed", None, outcomes)
    assert plan == again
    assert bare.decisions == plan.decisions
    assert shard.decisions == tuple(carried_out(decision, outcomes) for decision in plan.decisions)
    assert (bare.manifest.adjusted, shard.manifest.adjusted) == ([], ["norm"])
    slots, before = ({slot.name: slot for slot in one.layout.slots} for one in (shard, bare))
    assert (slots["w.qc.codebook"].shape, before["w.qc.codebook"].shape) == ((1, 5, 1), (1, 16, 1))
    assert (slots["bias"].dtype, before["bias"].dtype, slots["norm"].dtype) == ("F32", "F16", "F16")
    assert slots["w.qc.codes"] == before["w.qc.codes"]


def test_what_is_not_known_yet_takes_the_most_that_it_can(checkpoint: Checkpoint, plan: Plan) -> None:
    """But for halves, which are planned as they are asked for."""
    planned = planned_files(checkpoint, plan, "packed")
    (shard,) = make_shards(checkpoint, plan, "packed", None, Outcomes({"w": 5, "v": 4}))
    assert planned == {"m.safetensors": planned["m.safetensors"]}
    assert shard.layout.file_bytes <= planned["m.safetensors"]


def test_one_file_stores_a_shared_codebook_once(checkpoint: Checkpoint) -> None:
    """The first of those that share a codebook stores it, with the entries that it was given."""
    asked = recipe(rule("?", "kmeans", bits=4, share="model"))
    shared = plan_for(checkpoint, replace(asked, family="cluster"))
    (shard,) = make_shards(checkpoint, shared, "packed", None, Outcomes({"w": 7, "v": 7}))
    found = named(shard.decisions)
    owner, other = (found[name] for name in sorted(("v", "w"), key=[*found].index))
    assert (owner.codebook.stored_in, other.codebook.stored_in) == (None, owner.tensor.name)
    assert owner.codebook.entries == other.codebook.entries == 7
    assert all(decision.codebook.stored_in is None for decision in shared.decisions)
