"""`qcompress cluster`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qcompress.cli import options as opt
from qcompress.registry import METHODS

NAMES = [name for name, method in METHODS.items() if method.family == "cluster"]


def _complete_method(incomplete: str) -> list[str]:
    return [name for name in NAMES if name.startswith(incomplete)]


def cluster(
    checkpoint: opt.Checkpoint,
    bits: Annotated[int | None, typer.Option("--bits", "-b", metavar="N", help="Bits of a code, 1 to 12.")] = None,
    dim: Annotated[int | None, typer.Option("--dim", metavar="D", help="Weights a vector, 1 to 8.")] = None,
    method: Annotated[
        str | None,
        typer.Option("--method", "-m", metavar="|".join(NAMES), autocompletion=_complete_method, help="With --bits."),
    ] = None,
    granularity: Annotated[
        str | None, typer.Option("--granularity", metavar="tensor|channel|group", help="What shares a codebook.")
    ] = None,
    group_size: Annotated[
        int | None, typer.Option("--group-size", metavar="G", help="Channels that share a codebook.")
    ] = None,
    share: Annotated[
        str | None, typer.Option("--share", metavar="layer|type|model", help="Tensors that have one codebook together.")
    ] = None,
    recipe: opt.RecipeFile = None,
    overrides: opt.Overrides = None,
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
    allow_code: opt.AllowCode = False,
    representatives: Annotated[
        Path | None,
        typer.Option(
            "--representatives", metavar="FILE", help="What finetune-reg learned; beside the checkpoint if absent."
        ),
    ] = None,
    statistics: opt.Statistics = None,
    save_statistics: opt.SaveStatistics = None,
    max_size: opt.MaxSize = None,
    max_bpw: opt.MaxBpw = None,
    min_sqnr: opt.MinSqnr = None,
    min_metric: opt.MinMetric = None,
    max_drop: opt.MaxDrop = None,
) -> None:
    """Share weights: a small codebook a tensor, and codes that name its entries.

    qcompress cluster model.safetensors --bits 4

    qcompress cluster model.safetensors --bits 8 --dim 4 --min-sqnr 12
    """
    from qcompress.cli.run import GateFlags, Request, make_recipe, run
    from qcompress.cli.streams import Streams, refuse_mixed

    refuse_mixed(json_to, quiet)
    flags = {"bits": bits, "dim": dim, "granularity": granularity, "group_size": group_size, "share": share}
    run(
        Request(
            checkpoint=checkpoint,
            recipe=make_recipe(recipe, method, flags, overrides or [], seed, "cluster"),
            recipe_file=recipe,
            suffix=_suffix(bits, dim, method),
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
            representatives=representatives,
            statistics=statistics,
            save_statistics=save_statistics,
        ),
        Streams(json_to, quiet, verbose, no_color),
    )


def _suffix(bits: int | None, dim: int | None, method: str | None) -> str:
    if bits is None:
        return method or "clustered"
    return f"c{bits}" if dim in (None, 1) else f"c{bits}d{dim}"
