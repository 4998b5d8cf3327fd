"""`qcompress recipe`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qcompress.cli import options as opt

if TYPE_CHECKING:
    from qcompress.types import Recipe

recipe = typer.Typer(help="Check and show recipes.", no_args_is_help=True, rich_markup_mode=None)

RecipeArgument = Annotated[Path, typer.Argument(metavar="RECIPE", help="A YAML file; - reads standard input.")]


def _read(path: Path, overrides: list[str] | None) -> Recipe:
    from qcompress.cli.streams import read_stdin
    from qcompress.recipe import read_recipe

    text = read_stdin() if str(path) == "-" else None
    return read_recipe(None if text is not None else path, overrides or [], text=text)


@recipe.command()
def check(
    path: RecipeArgument,
    checkpoint: Annotated[
        Path | None, typer.Argument(metavar="[CHECKPOINT]", help="Hold it against this checkpoint's headers too.")
    ] = None,
    overrides: opt.Overrides = None,
    quiet: opt.Quiet = False,
) -> None:
    """Say all that is wrong with a recipe, by itself or for a checkpoint."""
    from qcompress.cli.streams import print_result
    from qcompress.report.words import count_words

    checked = _read(path, overrides)
    # A rule with a list of globs is one rule to its writer.
    words = count_words(len({rule.where for rule in checked.rules}), "rule")
    if checkpoint is not None:
        from qcompress.allocate import refuse_infeasible
        from qcompress.checkpoint import read_checkpoint
        from qcompress.plan import make_plan

        source = read_checkpoint(checkpoint)
        plan = make_plan(checked, source.tensors, source.tied, source.axes)
        refuse_infeasible(source, plan, "auto")
        compressed = sum(decision.compresses for decision in plan.decisions)
        words += f", {compressed} of {len(plan.decisions)} tensors compressed"
    if not quiet:
        print_result(f"{path}: sound, {words}")


@recipe.command()
def show(path: RecipeArgument, overrides: opt.Overrides = None, json_to: opt.Json = None) -> None:
    """Print a recipe as it will run: every default filled in."""
    from qcompress.cli.streams import print_result, refuse_mixed, write_json
    from qcompress.recipe import recipe_json, recipe_yaml

    refuse_mixed(json_to, quiet=False)
    resolved = _read(path, overrides)
    if json_to is not None:
        write_json(recipe_json(resolved), json_to)
    if json_to != "-":
        print_result(recipe_yaml(resolved))


@recipe.command()
def schema() -> None:
    """Print the JSON Schema of recipes, for editors and checks."""
    from qcompress.cli.streams import print_result
    from qcompress.recipe import schema_text

    print_result(schema_text())
