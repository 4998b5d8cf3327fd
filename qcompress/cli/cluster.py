"""`qcompress cluster` asks for a run by its recipe, or by one rule from flags."""

from __future__ import annotations

from typing import Annotated

import typer

from qcompress.cli import options as opt
from qcompress.cli.gate_options import GateFlags
from qcompress.cli.options import OutputFlags, RunFlags
from qcompress.cli.output import Streams, refuse_mixed
from qcompress.cli.panels import METHOD
from qcompress.cli.recipe import make_recipe, make_table_rules


def cluster(
    checkpoint: opt.TrainedCheckpoint = None,
    *,
    bits: Annotated[
        int | None,
        typer.Option(
            "--bits",
            "-b",
            metavar="N",
            help="Bits of a code, 1 to 12: a codebook has at most 2^N entries.",
            rich_help_panel=METHOD,
        ),
    ] = None,
    dim: Annotated[
        int | None,
        typer.Option(
            "--dim",
            metavar="D",
            help="Number of neighbouring channels whose weights share one code, 1 to 8. Without it 1.",
            rich_help_panel=METHOD,
        ),
    ] = None,
    bits_embedding: opt.BitsEmbedding = None,
    method: Annotated[str | None, opt.method_option("cluster")] = None,
    granularity: Annotated[
        str | None,
        typer.Option(
            "--granularity",
            metavar="tensor|channel|group",
            help="Which weights share a codebook: a whole tensor (without this option), each output channel, or each "
            "group of --group-size channels.",
            rich_help_panel=METHOD,
        ),
    ] = None,
    group_size: Annotated[
        int | None,
        typer.Option(
            "--group-size",
            metavar="G",
            help="Number of channels that share a codebook. Implies --granularity group.",
            rich_help_panel=METHOD,
        ),
    ] = None,
    share: Annotated[
        str | None,
        typer.Option(
            "--share",
            metavar="layer|type|model",
            help="Use one codebook for all tensors of a layer, of a type (such as q_proj.weight), or of the model.",
            rich_help_panel=METHOD,
        ),
    ] = None,
    target: opt.TargetOption = None,
    recipe: opt.RecipeFile = None,
    overrides: opt.Overrides = None,
    writing: OutputFlags,
    streams: Streams,
    running: RunFlags,
    allow_code: opt.AllowCode = False,
    representatives: opt.Representatives = None,
    statistics: opt.Statistics = None,
    save_statistics: opt.SaveStatistics = None,
    gates: GateFlags,
) -> None:
    """Share weights: a small codebook a tensor, and codes that name its entries.

    qcompress cluster model.safetensors --bits 4

    qcompress cluster model.safetensors --bits 8 --dim 4 --min-sqnr 12

    torchrun --nproc-per-node 2 -m qcompress cluster folder --bits 4
    """
    from qcompress.cli.run import Request, refuse_no_checkpoint, run

    refuse_mixed(streams.json_to, streams.quiet)
    refuse_no_checkpoint("qcompress cluster", checkpoint, recipe)
    flags = {"bits": bits, "dim": dim, "granularity": granularity, "group_size": group_size, "share": share}
    run(
        Request(
            checkpoint=checkpoint,
            recipe=make_recipe(recipe, method, flags, overrides, running.seed, "cluster", target=target),
            recipe_file=recipe,
            table_rules=make_table_rules(recipe, method, flags, "cluster", bits_embedding),
            bits_embedding=bits_embedding,
            suffix=_suffix(bits, dim, method),
            writing=writing,
            running=running,
            gates=gates,
            allow_code=allow_code,
            representatives=representatives,
            statistics=statistics,
            save_statistics=save_statistics,
        ),
        streams,
    )


def _suffix(bits: int | None, dim: int | None, method: str | None) -> str:
    if bits is None:
        return method or "clustered"
    return f"c{bits}" if dim in (None, 1) else f"c{bits}d{dim}"
