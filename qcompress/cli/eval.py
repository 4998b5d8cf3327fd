"""`qcompress eval` measures a checkpoint or an artifact on the task of a recipe."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qcompress.cli import options as opt
from qcompress.cli.gate_options import GateFlags, MinMetric, make_gates
from qcompress.cli.output import Streams, json_document, print_result, refuse_harm, refuse_mixed, write_text
from qcompress.cli.panels import INPUT, RUNNING
from qcompress.cli.recipe import read_given
from qcompress.errors import GateFailed, UsageError, raise_all
from qcompress.report.words import size_words
from qcompress.types.ranks import join_world

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qcompress.compress.evaluate import PackedRun
    from qcompress.data.measurement import Measurement
    from qcompress.types.plan import Gates
    from qcompress.types.run import Json


def evaluate(
    path: Annotated[
        Path,
        typer.Argument(
            metavar="CHECKPOINT_OR_ARTIFACT",
            help="A checkpoint, or an artifact that qcompress wrote.",
            rich_help_panel=INPUT,
        ),
    ],
    *,
    recipe: opt.RecipeFile = None,
    overrides: opt.Overrides = None,
    force: opt.Force = False,
    streams: Streams,
    device: opt.DeviceOption = opt.Device.auto,
    threads: opt.Threads = None,
    max_memory: opt.MaxMemory = None,
    seed: opt.Seed = None,
    allow_code: opt.AllowCode = False,
    strip_prefix: opt.StripPrefix = None,
    packed: Annotated[
        bool,
        typer.Option(
            "--packed",
            help="Hold the artifact's weights as codes, as `load_into(module, path, packed=True)` does, and say how "
            "much memory that takes and whether it computes the same. Exit 4 where it does not.",
            rich_help_panel=RUNNING,
        ),
    ] = False,
    min_metric: MinMetric = None,
) -> None:
    """Measure a checkpoint or an artifact on a recipe's task.

    qcompress eval model-w2.safetensors -r recipe.yaml

    qcompress eval model.safetensors -r recipe.yaml --min-metric top1=0.9 --json -

    qcompress eval model-w2.safetensors -r recipe.yaml --packed
    """
    from qcompress.checkpoint.hub import local_path
    from qcompress.cli.run import find_device, make_model_run
    from qcompress.compress.evaluate import evaluate as measure
    from qcompress.compress.evaluate import evaluate_packed
    from qcompress.recipe import refuse_missing
    from qcompress.report.document_json import report_path

    refuse_mixed(streams.json_to, streams.quiet)
    if recipe is None:
        raise UsageError("qcompress eval", "no recipe is given", "add -r RECIPE with model, data.eval and task")
    limit = opt.max_memory_bytes(max_memory)
    path = local_path(path)
    asked = read_given(recipe, overrides, seed=seed)
    reads = {"what is measured": path, "its report": report_path(path), "the recipe": recipe}
    refuse_harm(reads, [], streams.json_to, recipe=asked, force=force)
    raise_all(refuse_missing(asked, measures=True))
    gates = make_gates(asked.gates, GateFlags(min_metric=min_metric))
    with join_world(find_device(device, live=True)) as world:
        heard = replace(streams, quiet=streams.quiet or not world.is_first)
        model_run = replace(make_model_run(asked, device, allow_code, heard, threads), world=world)
        run = evaluate_packed(path, model_run, limit) if packed else None
        measured = measure(path, model_run, limit, strip_prefix) if run is None else run.measured
        if world.is_first:
            _print(path, measured, run, gates, streams)


def _print(path: Path, measured: Sequence[Measurement], run: PackedRun | None, gates: Gates, streams: Streams) -> None:
    """Say what was measured, and hold the gates. Raises GateFailed."""
    from qcompress.report.gates import check_metrics, raise_failed

    results = check_metrics(gates.min_metric, {one.metric: one.value for one in measured})
    if streams.json_to is not None:
        document = {
            "schema": "qcompress.eval/1",
            "file": path.name,
            "metrics": [_as_json(one) for one in measured],
            "gates": [asdict(one) for one in results],
            **({} if run is None else {"packed": _packed_json(run)}),
        }
        write_text(json_document(document), streams.json_to)
    if streams.json_to != "-":
        lines = [_words(one) for one in measured]
        print_result("\n".join(lines if run is None else [*lines, _packed_words(run)]))
    if run is not None and not run.is_equal:
        what = f"held packed, {_unequal(run)}"
        raise GateFailed(str(path), what, "this is a fault of qcompress: please report it with the artifact")
    raise_failed(results)


def _unequal(run: PackedRun) -> str:
    if run.unequal:
        return f"{len(run.unequal)} weights are not those that the artifact decodes to, first {run.unequal[0]!r}"
    return f"the network's outputs differ by up to {run.difference:.3g}"


def _packed_json(run: PackedRun) -> dict[str, Json]:
    return {
        "bytes": run.held.n_bytes,
        "dense_bytes": run.held.dense_bytes,
        "packed": list(run.held.packed),
        "dense": list(run.held.dense),
        "unequal": list(run.unequal),
        "difference": run.difference,
    }


def _packed_words(run: PackedRun) -> str:
    """How many tensors are held as codes, in how much memory, and that they compute the same."""
    held = run.held
    smaller = held.dense_bytes / held.n_bytes if held.n_bytes else 1.0
    words = (
        f"packed: {_count(held.packed)} held as codes; the network takes {size_words(held.n_bytes)} of memory, "
        f"{smaller:.1f} times less than decoded ({size_words(held.dense_bytes)})"
    )
    if held.dense:
        words += f"; {_count(held.dense)} decoded, whose modules cannot compute from codes, first {held.dense[0]!r}"
    return words if not run.is_equal else f"{words}; weights and outputs equal those of the decoded network"


def _count(names: Sequence[str]) -> str:
    return f"{len(names)} tensor{'' if len(names) == 1 else 's'}"


def _as_json(one: Measurement) -> dict[str, Json]:
    return {"metric": one.metric, "value": one.value, "interval": [one.low, one.high], "samples": one.samples}


def _words(one: Measurement) -> str:
    return f"{one.metric} {one.value:.4g} (95 %: {one.low:.4g} to {one.high:.4g}), {one.samples:,} samples"
