"""A diffusers pipeline is compressed component by component, into one folder with one report."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TypeVar

from qcompress.artifact.writer import copy_companions, find_companions
from qcompress.checkpoint.checkpoint import Checkpoint, read_checkpoint
from qcompress.checkpoint.pipeline import other_folders, read_pipeline
from qcompress.checkpoint.staging import staged_output
from qcompress.errors import BudgetError, RecipeError, UsageError, raise_all
from qcompress.plan.allocate import LEAST_BPW, budget_place, coded_weights, is_open, narrowest, other_bytes
from qcompress.plan.axes import stored_roles
from qcompress.plan.files import planned_files
from qcompress.plan.network import Network
from qcompress.plan.plan_json import PlanJson
from qcompress.plan.roles import find_roles
from qcompress.plan.rules import find_deciders
from qcompress.types.config import CodingChoice
from qcompress.types.plan import ROLE_MARK, Plan, Recipe, Rule
from qcompress.types.ranks import ALONE, World

Made = TypeVar("Made")

NAME_ONE = "leave it out, or name the folder of one component"


def refuse_for_pipeline(recipe: Recipe, given: Mapping[str, object]) -> None:
    """Raise UsageError (UsageErrors where several) for what is of one network, or of one artifact.

    given  flag -> what the command line gave for it, of those that may be so
    """
    budget = recipe.budget
    wrong = {
        "-r": recipe.model is not None,
        "--minimize": budget is not None and budget.minimize is not None,
        **{flag: bool(value) for flag, value in given.items()},
    }
    what = "is for one network and one artifact, and a pipeline has several"
    raise_all([UsageError(flag, what, NAME_ONE) for flag, is_wrong in wrong.items() if is_wrong])


def read_components(folder: Path, strip_prefix: str | None) -> dict[str, Checkpoint]:
    """Each component of a pipeline that holds weights, by name. Raises CheckpointError."""
    return {part.name: read_checkpoint(part, strip_prefix) for part in read_pipeline(folder)}


def component_recipes(
    recipe: Recipe, tables: Sequence[Rule], bits_embedding: int | None, parts: Mapping[str, Checkpoint]
) -> dict[str, Recipe]:
    """The recipe as it is for each component: `unet/*.weight` means tensors of one, `*.weight` those of all.

    Rules that decide nothing in a component are not for it.

    tables  rules for embeddings and heads, where a component stores any
    raises  RecipeError (Refusals where several) for a rule that decides nothing in any, UsageError for --bits-embedding
    """
    found, used = {}, set()
    for part, source in parts.items():
        stored = {f"{ROLE_MARK}{role}" for role in stored_roles(source.tensors, source.config)}
        ahead = (rule for rule in tables if rule.match in stored)
        rules = [_own_rule(rule, part) for rule in (*ahead, *recipe.rules)]
        deciders = find_deciders(rules, find_roles(Network(source.tensors, source.config, {})))
        deciding = {id(rule) for rule in deciders.values()}
        rules = [rule for rule in rules if id(rule) in deciding]
        used |= {(rule.where, rule.match.startswith(ROLE_MARK)) for rule in rules}
        found[part] = replace(recipe, rules=tuple(rules), budget=recipe.budget if rules else None)
    places = {where for where, _ in used}
    if bits_embedding is not None and not any(by_role for _, by_role in used):
        where = f"--bits-embedding {bits_embedding}"
        raise UsageError(where, "the pipeline has no embedding and no head", "leave it out")
    idle = {rule.where: rule.match for rule in recipe.rules if rule.where not in places}
    hint = f"its components are {', '.join(parts)}: match '{next(iter(parts))}/*.weight', or '*.weight' in all"
    raise_all(
        [RecipeError(where, f"match {glob!r} decides no tensor of the pipeline", hint) for where, glob in idle.items()]
    )
    return found


def with_shares(
    recipes: Mapping[str, Recipe], parts: Mapping[str, Checkpoint], plans: Mapping[str, Plan], choice: CodingChoice
) -> dict[str, Recipe]:
    """The recipes with the bytes of the budget dealt out, so that all components have the same bits a weight.

    plans   of each component, under a budget of all the bytes
    raises  BudgetError where they are less than next to nothing takes
    """
    weights = {part: coded_weights(plan) for part, plan in plans.items() if plan.recipe.budget is not None}
    others = {
        part: other_bytes(parts[part], narrowest(plan, choice) if is_open(plan) else plan, choice)
        if part in weights
        else sum(planned_files(parts[part], plan, choice).values())
        for part, plan in plans.items()
    }
    budget = next(plan.recipe.budget for plan in plans.values() if plan.recipe.budget is not None)
    assert budget.size is not None
    other = sum(others.values())
    room, least = budget.size - other, math.ceil(LEAST_BPW * sum(weights.values()) / 8) + len(weights)
    if room < least:
        least += other
        what = (
            f"{budget.size:,} bytes are too few: what all components keep, names and a little for codes take {least:,}"
        )
        place = budget_place(next(iter(plans.values())))
        raise BudgetError(place, what, "ask for more, or compress more tensors")
    shares = {part: others[part] + room * count // sum(weights.values()) for part, count in weights.items()}
    return {
        part: replace(recipe, budget=replace(budget, size=shares[part])) if part in shares else recipe
        for part, recipe in recipes.items()
    }


@contextmanager
def telling_share(part: str, recipe: Recipe) -> Iterator[None]:
    """Errors of a component's budget say that it is a share of the pipeline's."""
    try:
        yield
    except BudgetError as error:
        if recipe.budget is None or recipe.budget.size is None:
            raise
        what = f"the share of {part}, {recipe.budget.size:,} bytes, does not suffice: {error.what}"
        raise BudgetError(error.where, what, "ask for more in all, or compress that component by itself") from error


def _own_rule(rule: Rule, part: str) -> Rule:
    """The rule as it is within a component."""
    head, slash, tail = rule.match.partition("/")
    return replace(rule, match=tail) if slash and fnmatchcase(part, head) else rule


def write_pipeline(
    folder: Path,
    target: Path,
    parts: Iterable[str],
    make: Callable[[str, Path], Made],
    *,
    force: bool,
    world: World = ALONE,
) -> dict[str, Made]:
    """Build a pipeline's folder: `make` writes each component to a place, and all other files are copied.

    raises  as `find_companions`, `staged_output` and `make` do; nothing is left behind then
    """
    others = [*other_folders(folder)]
    for each in (folder, *others):
        find_companions(each)
    with staged_output(target, force=force, folder=True, world=world) as staged:
        if world.is_first:
            copy_companions(folder, staged)
            for each in others:
                place = staged / each.relative_to(folder)
                place.mkdir(parents=True, exist_ok=True)
                copy_companions(each, place)
        return {part: make(part, staged / part) for part in parts}


def join_plans(folder: Path, target: Path, parts: Mapping[str, PlanJson], recipe_hash: str) -> PlanJson:
    """The plans of all components as one, tensors and files by `component/name`."""
    plans = list(parts.values())

    def total(values: Iterator[int | None]) -> int | None:
        known = list(values)
        return None if None in known else sum(value or 0 for value in known)

    document = PlanJson(
        schema=plans[0]["schema"],
        input=str(folder),
        output=str(target),
        baseline_bytes=sum(plan["baseline_bytes"] for plan in plans),
        artifact_bytes=total(plan["artifact_bytes"] for plan in plans),
        exact=all(plan["exact"] for plan in plans),
        files={f"{part}/{name}": size for part, plan in parts.items() for name, size in plan["files"].items()},
        recipe_hash=recipe_hash,
        tensors=[{**row, "name": f"{part}/{row['name']}"} for part, plan in parts.items() for row in plan["tensors"]],
    )
    budget = next((plan["budget"] for plan in plans if "budget" in plan), None)
    if budget is not None:
        document["budget"] = budget
        least = (
            plan["artifact_bytes"] if plan["artifact_bytes"] is not None else plan.get("least_bytes") for plan in plans
        )
        document["least_bytes"] = None if document["artifact_bytes"] is not None else total(least)
    return document
