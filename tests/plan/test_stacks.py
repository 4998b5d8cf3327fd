"""Rows of one tensor of a network, apart in the checkpoint: together by a method that sees that tensor, or alone."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qcompress.plan.allocate import make_units
from qcompress.plan.plan import make_plan
from qcompress.recipe import read_recipe
from qcompress.types.plan import Decision, Plan, TensorFacts, TensorInfo

STACK = "m.experts.gate_up_proj"
NAMES = [f"m.experts.{expert}.{matrix}.weight" for expert in range(2) for matrix in ("w1", "w3")]
FACTS = dict.fromkeys(NAMES, TensorFacts("Experts", kind="inner", merged=True, stack=STACK))
DATA = "model: {factory: 'torchvision.models:resnet18'}\ndata: {calibration: {npz: x.npz}}\n"


def planned(rules: str, bad: str = "", more: str = "") -> dict[str, Decision]:
    """The decisions on four parts of a stack, one of which may hold a value that is not finite."""
    recipe = read_recipe(None, text=f"version: 1\n{DATA}rules: {rules}\n{more}")
    tensors = [TensorInfo(name, (64, 128), "F32") for name in NAMES]
    plan = make_plan(recipe, tensors, {}, {}, model=FACTS, nonfinite=lambda tensor: int(tensor.name == bad))
    return {one.tensor.name: one for one in plan.decisions}


@pytest.mark.parametrize("options", ["{bits: 4}", "{bits: 4, group_size: 64}"])
def test_one_rule_takes_the_stack_whole(options: str) -> None:
    found = planned(f"[{{match: '*', gptq: {options}}}]")
    assert {one.stack for one in found.values()} == {STACK}
    assert {one.method for one in found.values()} == {"gptq"}


@pytest.mark.parametrize(
    ("rules", "more"),
    [
        ("[{match: '*', gptq: {bits: 4, granularity: tensor}}]", ""),
        ("[{match: '*.w1.*', gptq: {bits: 4}}, {match: '*', gptq: {bits: 4}}]", ""),
        ("[{match: '*', squant: {bits: 4}}]", ""),
    ],
    ids=["one grid a tensor", "several rules", "a method that needs weights alone"],
)
def test_otherwise_each_part_is_rounded_alone(rules: str, more: str) -> None:
    found = planned(rules, more=more)
    assert {one.stack for one in found.values()} == {None}
    assert {one.method for one in found.values()} <= {"mse", "squant"}


def test_a_budget_gives_a_stack_one_width() -> None:
    found = planned("[{match: '*', gptq: {}}]", more="budget: {bpw: 4}\n")
    assert {(one.method, one.stack, one.is_open) for one in found.values()} == {("gptq", STACK, True)}
    plan = Plan(
        read_recipe(None, text="version: 1\nbudget: {bpw: 4}\nrules: [{match: '*', squant: {}}]\n"),
        tuple(found.values()),
    )
    (unit,) = make_units(plan, "packed")
    assert [one.tensor.name for one in unit.decisions] == NAMES


def test_a_part_that_is_kept_keeps_the_others() -> None:
    """Their codes would be of a tensor that is not compressed."""
    found = planned("[{match: '*', gptq: {bits: 4}}]", bad=NAMES[0])
    assert not any(one.compresses for one in found.values())
    assert STACK in found[NAMES[1]].reason and "NaN" in found[NAMES[0]].reason
    alone = planned("[{match: '*', mse: {bits: 4}}]", bad=NAMES[0])
    assert [one.compresses for one in alone.values()] == [False, True, True, True]


def test_a_stack_that_no_forward_pass_reaches_is_rounded_alone() -> None:
    idle = {name: replace(fact, kind="idle", called=False) for name, fact in FACTS.items()}
    recipe = read_recipe(None, text=f"version: 1\n{DATA}rules: [{{match: '*', gptq: {{bits: 4}}}}]\n")
    plan = make_plan(recipe, [TensorInfo(name, (64, 128), "F32") for name in NAMES], {}, {}, model=idle)
    assert {(one.method, one.stack) for one in plan.decisions} == {("mse", None)}
