"""A plan becomes JSON here, `qcompress.plan/1`: every tensor, what happens to it and why, and the size to the byte.

Imports no torch.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import NotRequired, TypedDict

from qcompress.artifact.layout import make_slots
from qcompress.checkpoint.checkpoint import Checkpoint
from qcompress.plan.allocate import is_open, limits_steps, most_bytes, narrowest, refuse_infeasible
from qcompress.plan.files import planned_files
from qcompress.plan.targets import target_figures
from qcompress.recipe import recipe_hash
from qcompress.types.config import CodingChoice
from qcompress.types.plan import Decision, Plan

SCHEMA = "qcompress.plan/1"


class TensorJson(TypedDict):
    """One decision; what a kept tensor has not is left out, and `widths` are those that a budget may choose."""

    name: str
    shape: list[int]
    dtype: str
    role: str
    method: str
    bytes: int
    reason: str
    bits: NotRequired[int | None]
    granularity: NotRequired[str]
    group_size: NotRequired[int | None]
    form: NotRequired[str]
    axis: NotRequired[list[int]]
    widths: NotRequired[list[int]]


class TargetJson(TypedDict):
    """What the target's file will hold in codes, so many weights of so many tensors; `kept` is reason -> tensors."""

    name: str
    tensors: int
    weights: int
    bytes: int
    bits_per_weight: float
    kept: dict[str, list[str]]


class PlanJson(TypedDict):
    """A plan. `exact` false: sizes are the most that entropy coding can need.

    While a budget has yet to choose widths, sizes are those of the narrowest, `artifact_bytes` is null, and
    `least_bytes` is not. Where it decides steps, the whole is what it allows, and a tensor's bytes are the most that
    any codes could take.
    """

    schema: str
    input: str
    output: str
    baseline_bytes: int
    artifact_bytes: int | None
    exact: bool
    files: dict[str, int]
    recipe_hash: str
    tensors: list[TensorJson]
    target: NotRequired[TargetJson]
    budget: NotRequired[dict[str, float | int | str]]
    least_bytes: NotRequired[int | None]


def plan_json(source: Checkpoint, plan: Plan, output: Path, choice: CodingChoice) -> PlanJson:
    """The plan of an artifact at `output` as JSON data. Raises BudgetError for a budget that no width could keep."""
    refuse_infeasible(source, plan, choice)
    least = narrowest(plan, choice)
    sizes = {d.tensor.name: sum(slot.n_bytes for slot in make_slots(d, choice)) for d in least.decisions}
    files = planned_files(source, least, choice)
    total = sum(files.values())
    budget = plan.recipe.budget
    if limits_steps(plan):
        total = min(total, most_bytes(source, plan, choice))
        files = {name: min(size, total) for name, size in files.items()}
    document = PlanJson(
        schema=SCHEMA,
        input=str(source.path),
        output=str(output),
        baseline_bytes=source.file_bytes,
        artifact_bytes=None if is_open(plan) else total,
        exact=choice == "packed" and not is_open(plan),
        files=files,
        recipe_hash=recipe_hash(plan.recipe),
        tensors=[_tensor_json(decision, sizes[decision.tensor.name]) for decision in plan.decisions],
    )
    figures = target_figures(plan)
    if figures is not None:
        document["target"] = TargetJson(
            name=figures.name,
            tensors=figures.tensors,
            weights=figures.weights,
            bytes=figures.n_bytes,
            bits_per_weight=figures.bits_per_weight,
            kept={reason: [*names] for reason, names in figures.kept.items()},
        )
    if budget is not None:
        document["budget"] = {name: limit for name, limit in asdict(budget).items() if limit is not None}
        document["least_bytes"] = total if is_open(plan) else None
    return document


def _tensor_json(decision: Decision, n_bytes: int) -> TensorJson:
    tensor = decision.tensor
    row = TensorJson(
        name=tensor.name,
        shape=list(tensor.shape),
        dtype=tensor.dtype,
        role=decision.role,
        method=decision.method or "kept",
        bytes=n_bytes,
        reason=decision.reason,
    )
    if decision.compresses:
        config = decision.config
        row["bits"] = config.bits
        row["granularity"] = config.unit
        row["group_size"] = config.group_size
        row["form"] = config.form
        row["axis"] = list(decision.axis)
    if decision.is_open:
        row["widths"] = list(decision.widths.configs)
    return row
