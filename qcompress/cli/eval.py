"""`qcompress eval` measures a checkpoint or an artifact on the task of a recipe."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qcompress.cli import options as opt
from qcompress.cli.options import GateFlags, make_gates
from qcompress.cli.output import Streams, json_document, print_result, refuse_harm, refuse_mixed, write_text
from qcompress.cli.panels import INPUT
from qcompress.cli.recipe import read_given
from qcompress.errors import UsageError, raise_all

if TYPE_CHECKING:
    from qcompress.data.measurement import Measurement
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
    max_memory: opt.MaxMemory = None,
    seed: opt.Seed = None,
    allow_code: opt.AllowCode = False,
    min_metric: opt.MinMetric = None,
) -> None:
    """Measure a checkpoint or an artifact on a recipe's task.

    qcompress eval model-w2.safetensors -r recipe.yaml

    qcompress eval model.safetensors -r recipe.yaml --min-metric top1=0.9 --json -
    """
    from qcompress.cli.run import make_model_run
    from qcompress.compress.evaluate import evaluate as measure
    from qcompress.recipe import refuse_missing
    from qcompress.report.document_json import report_path
    from qcompress.report.gates import check_metrics, raise_failed

    refuse_mixed(streams.json_to, streams.quiet)
    if recipe is None:
        raise UsageError("qcompress eval", "no recipe is given", "add -r RECIPE with model, data.eval and task")
    limit = opt.max_memory_bytes(max_memory)
    asked = read_given(recipe, overrides, seed=seed)
    reads = {"what is measured": path, "its report": report_path(path), "the recipe": recipe}
    refuse_harm(reads, [], streams.json_to, recipe=asked, force=force)
    raise_all(refuse_missing(asked, measures=True))
    gates = make_gates(asked.gates, GateFlags(min_metric=min_metric))
    model_run = make_model_run(asked, device, allow_code, streams)
    measured = measure(path, model_run, limit)
    results = check_metrics(gates.min_metric, {one.metric: one.value for one in measured})
    if streams.json_to is not None:
        document = {
            "schema": "qcompress.eval/1",
            "file": path.name,
            "metrics": [_as_json(one) for one in measured],
            "gates": [asdict(one) for one in results],
        }
        write_text(json_document(document), streams.json_to)
    if streams.json_to != "-":
        print_result("\n".join(_words(one) for one in measured))
    raise_failed(results)


def _as_json(one: Measurement) -> dict[str, Json]:
    return {"metric": one.metric, "value": one.value, "interval": [one.low, one.high], "samples": one.samples}


def _words(one: Measurement) -> str:
    return f"{one.metric} {one.value:.4g} (95 %: {one.low:.4g} to {one.high:.4g}), {one.samples:,} samples"
