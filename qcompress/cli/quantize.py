"""`qcompress quantize` asks for a run by its recipe, or by one rule from flags, with or without a budget."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from qcompress.cli import options as opt
from qcompress.cli.budget_options import Bpw, MinimizeOption, TargetSize, budget_suffix, make_budget_flag
from qcompress.cli.gate_options import GateFlags
from qcompress.cli.options import OutputFlags, RunFlags
from qcompress.cli.output import Streams, refuse_mixed
from qcompress.cli.panels import METHOD
from qcompress.cli.recipe import make_recipe, make_table_rules
from qcompress.errors import UsageError
from qcompress.types.words import suggest

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from qcompress.recipe import BudgetFlag
    from qcompress.types.plan import Recipe


def quantize(
    checkpoint: opt.TrainedCheckpoint = None,
    *,
    bits: Annotated[
        int | None,
        typer.Option("--bits", "-b", metavar="N", help="Bits per weight, 1 to 8.", rich_help_panel=METHOD),
    ] = None,
    bits_embedding: opt.BitsEmbedding = None,
    method: Annotated[str | None, opt.method_option("quantize")] = None,
    granularity: Annotated[
        str | None,
        typer.Option(
            "--granularity",
            metavar="tensor|channel|group",
            help="Which weights share a scale: a whole tensor, each output channel (without this option), or each "
            "group of --group-size weights of a channel.",
            rich_help_panel=METHOD,
        ),
    ] = None,
    group_size: Annotated[
        int | None,
        typer.Option(
            "--group-size",
            metavar="G",
            help="Number of weights in a group; the last one of a channel may have fewer. Implies --granularity group.",
            rich_help_panel=METHOD,
        ),
    ] = None,
    symmetric: Annotated[
        bool | None,
        typer.Option(
            "--symmetric/--asymmetric",
            help="Quantization levels lie symmetrically around zero and need a scale alone, or lie anywhere and need a "
            "zero point or an offset too (asymmetric, without this option).",
            show_default=False,
            rich_help_panel=METHOD,
        ),
    ] = None,
    lossless: opt.Lossless = False,
    target: opt.TargetOption = None,
    recipe: opt.RecipeFile = None,
    overrides: opt.Overrides = None,
    bpw: Bpw = None,
    target_size: TargetSize = None,
    minimize: MinimizeOption = None,
    effort: opt.EffortOption = None,
    writing: OutputFlags,
    streams: Streams,
    running: RunFlags,
    keep_dtype: opt.KeepDtype = None,
    keep_coding: opt.KeepCoding = None,
    allow_code: opt.AllowCode = False,
    statistics: opt.Statistics = None,
    save_statistics: opt.SaveStatistics = None,
    sensitivity: opt.Sensitivity = None,
    gates: GateFlags,
) -> None:
    """Quantize the weights of a checkpoint to a small artifact.

    qcompress quantize model.safetensors --bits 2

    qcompress quantize model.safetensors --bpw 2.5 --method squant

    qcompress quantize model.safetensors -r recipe.yaml --min-sqnr 12 --json -

    qcompress quantize model.safetensors --lossless

    torchrun --nproc-per-node 2 -m qcompress quantize folder --bits 4
    """
    from qcompress.cli.run import Request, refuse_no_checkpoint, run

    refuse_mixed(streams.json_to, streams.quiet)
    refuse_no_checkpoint("qcompress quantize", checkpoint, recipe)
    budget = make_budget_flag(bpw, target_size, minimize)
    flags = {"bits": bits, "granularity": granularity, "group_size": group_size, "symmetric": symmetric}
    if lossless:
        lossy = {**flags, "method": method, "bits_embedding": bits_embedding, "for": target, "effort": effort}
        _refuse_lossy({**lossy, "keep_dtype": keep_dtype, "statistics": statistics}, recipe, budget, writing.coding)
        keep_coding = keep_coding or writing.coding.value
    asked = make_recipe(recipe, method, flags, overrides, running.seed, "quantize", budget, target, lossless=lossless)
    tables = make_table_rules(recipe, method, flags, "quantize", bits_embedding, budget, target)
    if tables and effort is not None:
        tables = _with_flags(replace(asked, rules=tables), effort).rules
    run(
        Request(
            checkpoint=checkpoint,
            recipe=_with_flags(asked, effort, keep_dtype, keep_coding),
            recipe_file=recipe,
            table_rules=tables,
            bits_embedding=bits_embedding,
            suffix="lossless" if lossless else _suffix(bits, target, None if budget is None else budget_suffix(budget)),
            lossless=lossless,
            writing=writing,
            running=running,
            gates=gates,
            allow_code=allow_code,
            statistics=statistics,
            save_statistics=save_statistics,
            sensitivity=sensitivity,
        ),
        streams,
    )


def _suffix(bits: int | None, target: str | None, budget: str | None) -> str:
    width = None if bits is None else f"w{bits}"
    return "-".join(part for part in (budget or width, target) if part)


def _refuse_lossy(
    flags: Mapping[str, object], recipe: Path | None, budget: BudgetFlag | None, coding: opt.Coding
) -> None:
    """Raise UsageError for what says how weights lose bits beside --lossless, or that nothing is coded."""
    given = [f"--{name.replace('_', '-')}" for name, value in flags.items() if value is not None]
    given += [budget.text] if budget is not None else []
    if recipe is not None:
        hint = "leave --lossless out, and write `keep_coding: auto` into the recipe"
        raise UsageError(f"-r {recipe} --lossless", "the recipe decides what becomes of the weights", hint)
    if given:
        raise UsageError(f"--lossless {given[0]}", "weights that are stored without loss have neither", "keep one")
    if coding is opt.Coding.packed:
        what = "packed codes save nothing where no weight is compressed"
        raise UsageError("--lossless --coding packed", what, "use --coding auto, zstd or ans")


def _with_flags(
    recipe: Recipe, effort: opt.Effort | None, keep_dtype: str | None = None, keep_coding: str | None = None
) -> Recipe:
    """The recipe with what goes with flags and with a file alike. Raises UsageError."""
    from qcompress.recipe import with_effort
    from qcompress.types.plan import KEEP_CODINGS

    if keep_dtype not in (None, "f16"):
        raise UsageError(f"--keep-dtype {keep_dtype}", "not a dtype to keep tensors in", "use --keep-dtype f16")
    if keep_dtype is not None:
        recipe = replace(recipe, keep_dtype="f16")
    if keep_coding is not None:
        found = next((one for one in KEEP_CODINGS if one == keep_coding), None)
        if found is None:
            what = "not a coding to keep tensors in"
            raise UsageError(f"--keep-coding {keep_coding}", what, suggest(keep_coding, KEEP_CODINGS))
        recipe = replace(recipe, keep_coding=found)
    return recipe if effort is None else with_effort(recipe, effort.value)
