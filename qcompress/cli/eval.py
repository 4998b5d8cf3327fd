"""`qcompress eval`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qcompress.cli import options as opt
from qcompress.cli.streams import Streams, refuse_mixed
from qcompress.errors import GateFailed, UsageError

if TYPE_CHECKING:
    from qcompress.model.tasks import Measurement


def evaluate(
    path: Annotated[Path, typer.Argument(metavar="CHECKPOINT_OR_ARTIFACT", help="What to measure.")],
    *,
    recipe: opt.RecipeFile = None,
    overrides: opt.Overrides = None,
    streams: Streams,
    device: opt.DeviceOption = opt.Device.auto,
    seed: opt.Seed = None,
    allow_code: opt.AllowCode = False,
    min_metric: opt.MinMetric = None,
) -> None:
    """Measure a checkpoint or an artifact on a recipe's task.

    qcompress eval model-w2.safetensors -r recipe.yaml

    qcompress eval model.safetensors -r recipe.yaml --min-metric top1=0.9 --json -
    """
    from qcompress.cli.gates import make_gates
    from qcompress.cli.groups import GateFlags
    from qcompress.cli.live import make_setting
    from qcompress.cli.run import make_recipe
    from qcompress.cli.streams import print_result, write_json
    from qcompress.errors import raise_all
    from qcompress.evaluate import evaluate as measure
    from qcompress.recipe import refuse_missing
    from qcompress.report.gates import check_metrics, gate_error

    refuse_mixed(streams.json_to, streams.quiet)
    if recipe is None:
        raise UsageError("qcompress eval", "nothing says how to measure", "add -r RECIPE with model, data and task")
    asked = make_recipe(recipe, None, {}, overrides or [], seed)
    raise_all(refuse_missing(asked, measures=True))
    gates = make_gates(asked.gates, GateFlags(min_metric=min_metric))
    setting = make_setting(asked, device, allow_code, streams)
    measured = measure(path, setting)
    results = check_metrics(gates.min_metric, {one.metric: one.value for one in measured})
    if streams.json_to is not None:
        document = {
            "file": path.name,
            "metrics": [_as_json(one) for one in measured],
            "gates": [
                {"name": one.name, "limit": one.limit, "value": one.value, "passed": one.passed} for one in results
            ],
        }
        write_json(document, streams.json_to)
    if streams.json_to != "-":
        print_result("\n".join(_words(one) for one in measured))
    failed: GateFailed | None = gate_error(results)
    if failed is not None:
        raise failed


def _as_json(one: Measurement) -> dict[str, Any]:
    return {
        "metric": one.metric,
        "value": one.value,
        "interval": [one.low, one.high],
        "samples": one.samples,
    }


def _words(one: Measurement) -> str:
    return f"{one.metric} {one.value:.4g} (95 %: {one.low:.4g} to {one.high:.4g}), {one.samples:,} samples"
