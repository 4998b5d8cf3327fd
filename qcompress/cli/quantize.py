"""`qcompress quantize`."""

from __future__ import annotations

from typing import Annotated

import typer

from qcompress.cli import options as opt


def quantize(
    checkpoint: opt.Checkpoint,
    bits: Annotated[int | None, typer.Option("--bits", "-b", metavar="N", help="Bits per weight, 1 to 8.")] = None,
    method: opt.MethodOption = None,
    granularity: Annotated[
        str | None, typer.Option("--granularity", metavar="tensor|channel|group", help="What shares a grid.")
    ] = None,
    group_size: Annotated[int | None, typer.Option("--group-size", metavar="G", help="Weights a group.")] = None,
    symmetric: Annotated[
        bool | None, typer.Option("--symmetric/--asymmetric", help="A grid around zero, or any.", show_default=False)
    ] = None,
    recipe: opt.RecipeFile = None,
    overrides: opt.Overrides = None,
    bpw: opt.Bpw = None,
    target_size: opt.TargetSize = None,
    minimize: opt.MinimizeOption = None,
    effort: opt.EffortOption = None,
    coding: opt.CodingOption = opt.Coding.auto,
    output: opt.Output = None,
    force: opt.Force = False,
    dry_run: opt.DryRun = False,
    json_to: opt.Json = None,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
    no_color: opt.NoColor = False,
    device: opt.DeviceOption = opt.Device.auto,
    threads: opt.Threads = None,
    max_memory: opt.MaxMemory = None,
    seed: opt.Seed = None,
    skip_nonfinite: Annotated[
        bool, typer.Option("--skip-nonfinite", help="Keep tensors that hold NaN or Inf instead of refusing them.")
    ] = False,
    resume: opt.Resume = False,
    keep_dtype: opt.KeepDtype = None,
    allow_code: opt.AllowCode = False,
    statistics: opt.Statistics = None,
    save_statistics: opt.SaveStatistics = None,
    sensitivity: opt.Sensitivity = None,
    max_size: opt.MaxSize = None,
    max_bpw: opt.MaxBpw = None,
    min_sqnr: opt.MinSqnr = None,
    min_metric: opt.MinMetric = None,
    max_drop: opt.MaxDrop = None,
) -> None:
    """Quantize the weights of a checkpoint to a small artifact.

    qcompress quantize model.safetensors --bits 2

    qcompress quantize model.safetensors --bpw 2.5 --method squant

    qcompress quantize model.safetensors -r recipe.yaml --min-sqnr 12 --json -
    """
    from qcompress.cli.budget import budget_suffix, make_budget_flag
    from qcompress.cli.run import GateFlags, Request, make_recipe, run
    from qcompress.cli.streams import Streams, refuse_mixed
    from qcompress.recipe import with_effort

    refuse_mixed(json_to, quiet)
    budget = make_budget_flag(bpw, target_size, minimize)
    flags = {"bits": bits, "granularity": granularity, "group_size": group_size, "symmetric": symmetric}
    asked = make_recipe(recipe, method, flags, overrides or [], seed, "quantize", budget, keep_dtype)
    run(
        Request(
            checkpoint=checkpoint,
            recipe=asked if effort is None else with_effort(asked, effort.value),
            recipe_file=recipe,
            suffix=f"w{bits}" if budget is None else budget_suffix(budget),
            gates=GateFlags(max_size, max_bpw, min_sqnr, min_metric or [], max_drop or []),
            output=output,
            coding=coding.value,
            force=force,
            dry_run=dry_run,
            resume=resume,
            device=device,
            threads=threads,
            max_memory=max_memory,
            allow_code=allow_code,
            skip_nonfinite=skip_nonfinite,
            statistics=statistics,
            save_statistics=save_statistics,
            sensitivity=sensitivity,
        ),
        Streams(json_to, quiet, verbose, no_color),
    )
