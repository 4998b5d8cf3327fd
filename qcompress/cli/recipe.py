"""`qcompress recipe`, and how the other commands come to their recipe: from a file, or from flags."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qcompress.cli import options as opt
from qcompress.cli.gate_options import unmeasurable
from qcompress.cli.output import (
    json_document,
    print_note,
    print_result,
    read_stdin,
    refuse_harm,
    refuse_mixed,
    write_text,
)
from qcompress.errors import UsageError, raise_all

if TYPE_CHECKING:
    from qcompress.recipe import BudgetFlag
    from qcompress.types.plan import Family, Recipe, Rule

recipe = typer.Typer(help="Check and show recipes.", no_args_is_help=True, rich_markup_mode=None)

RecipeArgument = Annotated[
    Path, typer.Argument(metavar="RECIPE", help="The recipe, a YAML file; - reads standard input.")
]


@recipe.command()
def check(
    path: RecipeArgument,
    checkpoint: Annotated[
        Path | None,
        typer.Argument(metavar="[CHECKPOINT]", help="A checkpoint whose headers the recipe is held against."),
    ] = None,
    overrides: opt.Overrides = None,
    allow_code: opt.AllowCode = False,
    strip_prefix: opt.StripPrefix = None,
    statistics: opt.Statistics = None,
    representatives: opt.Representatives = None,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Print nothing where the recipe is sound: the exit code tells.")
    ] = False,
) -> None:
    """Say all that is wrong with a recipe, by itself or for a checkpoint.

    It looks for files, packages, code and data that a run would need, and builds the network without weights.
    """
    from qcompress.compress.check import check_recipe, plan_checked
    from qcompress.report.words import count_words

    checked = read_given(path, overrides)
    source = None
    if checkpoint is not None:
        from qcompress.checkpoint.checkpoint import read_checkpoint

        source = read_checkpoint(checkpoint, strip_prefix)
    found = check_recipe(checked, source, allow_code=allow_code, statistics=statistics is not None)
    if checked.model is None:
        found.errors += unmeasurable(checked.gates)
    for line in found.unchecked:
        print_note(f"not checked: {line}")
    # A rule with a list of globs is one rule to its writer.
    words = count_words(len({rule.where for rule in checked.rules}), "rule")
    if source is not None and checkpoint is not None and checked.rules:
        from qcompress.plan.allocate import refuse_infeasible

        plan = plan_checked(found, source, checked, find_representatives(checked, checkpoint, representatives))
        refuse_infeasible(source, plan, "auto")
        compressed = sum(decision.compresses for decision in plan.decisions)
        words += f", {compressed} of {len(plan.decisions)} tensors compressed"
    raise_all(found.errors)
    if not quiet:
        sound = "sound" if not found.unchecked else "sound as far as it was checked"
        print_result(f"{path}: {sound}, {words}")


@recipe.command()
def show(
    path: RecipeArgument, overrides: opt.Overrides = None, json_to: opt.Json = None, force: opt.Force = False
) -> None:
    """Print a recipe as it will run: every default filled in."""
    from qcompress.recipe import recipe_json, recipe_yaml

    refuse_mixed(json_to, quiet=False)
    resolved = read_given(path, overrides)
    refuse_harm({"the recipe": path}, [], json_to, recipe=resolved, force=force)
    if json_to is not None:
        write_text(json_document(recipe_json(resolved)), json_to)
    if json_to != "-":
        print_result(recipe_yaml(resolved))


@recipe.command()
def schema() -> None:
    """Print the JSON Schema of recipes, for editors and checks."""
    from qcompress.recipe import schema_text

    print_result(schema_text())


def read_given(
    path: Path,
    overrides: list[str] | None,
    *,
    seed: int | None = None,
    family: Family = "quantize",
    budget: BudgetFlag | None = None,
    target: str | None = None,
) -> Recipe:
    """The recipe in a file, or in standard input for "-". Raises RecipeError.

    seed, budget, target  in place of the recipe's
    family                of a recipe whose rules do not tell
    """
    from qcompress.recipe import read_recipe

    text = read_stdin() if str(path) == "-" else None
    file = path if text is None else None
    found = read_recipe(file, overrides or [], text=text, family=family, budget=budget, target=target)
    return found if seed is None else replace(found, seed=seed)


def make_recipe(
    path: Path | None,
    method: str | None,
    flags: Mapping[str, int | str | bool | None],
    overrides: list[str] | None,
    seed: int | None,
    family: Family,
    budget: BudgetFlag | None = None,
    target: str | None = None,
    *,
    lossless: bool = False,
) -> Recipe:
    """The one visible recipe: from the file, or of one rule from the flags. Raises UsageError, RecipeError.

    flags     option of a rule -> its value
    family    that its methods must be of
    budget, target  in place of the recipe's
    lossless  whether the rule keeps all tensors, coded
    """
    from qcompress.recipe import lossless_recipe, recipe_from_flags

    given = [f"--{name.replace('_', '-')}" for name, value in {"method": method, **flags}.items() if value is not None]
    if path is None:
        if overrides:
            raise UsageError(f"--set {overrides[0]}", "there is no recipe to change", "add -r RECIPE")
        if not given and budget is None and target is None and not lossless:
            raise UsageError(f"qcompress {family}", "no bit width or recipe is given", "add --bits N, or -r RECIPE")
        made = lossless_recipe(family) if lossless else recipe_from_flags(method, flags, family, budget, target)
        return made if seed is None else replace(made, seed=seed)
    if given:
        key = given[0].removeprefix("--").replace("-", "_")
        hint = f"say it in the recipe, or with --set rules.0.METHOD.{key}=VALUE"
        raise UsageError(f"-r {path} {given[0]}", "the recipe decides this", hint)
    made = read_given(path, overrides, seed=seed, family=family, budget=budget, target=target)
    if made.family != family:
        raise UsageError(f"-r {path}", f"its methods are of family {made.family}", f"use `qcompress {made.family}`")
    return made


def make_table_rules(
    path: Path | None,
    method: str | None,
    flags: Mapping[str, int | str | bool | None],
    family: Family,
    bits_embedding: int | None,
    budget: BudgetFlag | None = None,
    target: str | None = None,
) -> tuple[Rule, ...]:
    """The rules for embeddings and heads that the flags of `make_recipe` stand for too. Raises UsageError."""
    from qcompress.recipe import table_rules

    where = f"--bits-embedding {bits_embedding}"
    if path is not None or budget is not None:
        if bits_embedding is None:
            return ()
        if path is not None:
            hint = 'say it there, in a rule with `match: ["@embedding", "@head"]`'
            raise UsageError(f"-r {path} {where}", "the recipe decides this", hint)
        assert budget is not None
        raise UsageError(f"{where} {budget.text}", "the budget decides the bits", "leave one of them out")
    return table_rules(method, flags, family, bits_embedding, target)


def find_representatives(recipe: Recipe, checkpoint: Path | None, named: Path | None) -> Path | None:
    """The file of learned representatives, where a method takes it up."""
    from qcompress.registry import METHODS

    if any(rule.method is not None and METHODS[rule.method].representatives for rule in recipe.rules):
        from qcompress.checkpoint.side_files import representatives_path

        return named or (representatives_path(checkpoint) if checkpoint is not None else None)
    return None
