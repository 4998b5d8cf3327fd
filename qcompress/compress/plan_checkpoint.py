"""A checkpoint is planned here with all that a recipe, its network and other files say of it. Imports no torch."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

from qcompress.checkpoint.checkpoint import Checkpoint
from qcompress.plan.plan import make_plan
from qcompress.types.plan import ModelFacts, Plan, Recipe
from qcompress.types.run import ModelRun


def plan_checkpoint(
    checkpoint: Checkpoint,
    recipe: Recipe,
    model_run: ModelRun | None = None,
    representatives: Path | None = None,
    *,
    facts: ModelFacts | None = None,
    skip_nonfinite: bool = False,
    compact: bool | None = None,
) -> Plan:
    """The plan of a recipe for a checkpoint, from headers and, where they are asked for, from these:

    model_run        the network that the recipe names, which knows axes and ties that headers do not show
    representatives  the file of what finetune-reg has learned, for the methods that take it up
    facts            what that network says, where it is known already
    skip_nonfinite   weights that hold NaN or Inf are kept; reads all weights to compress once
    compact          see Plan; None: where a budget counts all bytes of one file
    raises           what `make_plan` and building the network raise
    """
    if model_run is not None and facts is None:
        from qcompress.model.build import read_facts

        facts = read_facts(model_run, {tensor.name: tensor.shape for tensor in checkpoint.tensors})
    nonfinite = None
    if skip_nonfinite:
        from qcompress.encode.preflight import count_nonfinite_values

        nonfinite = partial(count_nonfinite_values, checkpoint)
    plan = make_plan(
        recipe,
        checkpoint.tensors,
        checkpoint.tied,
        checkpoint.config,
        model=facts,
        representatives=representatives,
        nonfinite=nonfinite,
    )
    budget = recipe.budget
    counts_all = budget is not None and (budget.size is not None or budget.minimize is not None)
    return replace(plan, compact=counts_all and not checkpoint.is_folder if compact is None else compact)
