"""A diffusers pipeline is compressed component by component, into one folder with one report."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TypeVar

from qcompress.artifact.writer import copy_companions, find_companions
from qcompress.checkpoint.checkpoint import Checkpoint, read_checkpoint
from qcompress.checkpoint.pipeline import other_folders, read_pipeline
from qcompress.checkpoint.staging import staged_output
from qcompress.errors import RecipeError, UsageError, raise_all
from qcompress.plan.axes import stored_roles
from qcompress.plan.network import Network
from qcompress.plan.plan_json import PlanJson
from qcompress.plan.roles import find_roles
from qcompress.plan.rules import find_deciders
from qcompress.types.plan import ROLE_MARK, Recipe, Rule

Made = TypeVar("Made")

NAME_ONE = "leave it out, or name the folder of one component"


def refuse_for_pipeline(recipe: Recipe, given: Mapping[str, object]) -> None:
    """Raise UsageError (UsageErrors where several) for what is of one network, or of one artifact.

    given  flag -> what the command line gave for it, of those that may be so
    """
    budget = recipe.budget
    wrong = {
        "-r": recipe.model is not None,
        "--target-size": budget is not None and budget.size is not None,
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


def _own_rule(rule: Rule, part: str) -> Rule:
    """The rule as it is within a component."""
    head, slash, tail = rule.match.partition("/")
    return replace(rule, match=tail) if slash and fnmatchcase(part, head) else rule


def write_pipeline(
    folder: Path, target: Path, parts: Iterable[str], make: Callable[[str, Path], Made], *, force: bool
) -> dict[str, Made]:
    """Build a pipeline's folder: `make` writes each component to a place, and all other files are copied.

    raises  as `find_companions`, `staged_output` and `make` do; nothing is left behind then
    """
    others = [*other_folders(folder)]
    for each in (folder, *others):
        find_companions(each)
    with staged_output(target, force=force, folder=True) as staged:
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
