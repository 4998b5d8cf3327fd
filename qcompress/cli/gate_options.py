"""Gates on the command line: limits that turn a finished run into exit code 4."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer

from qcompress.cli.options import parse_size_flag
from qcompress.cli.panels import GATES
from qcompress.errors import UnmeasuredError, UsageError
from qcompress.types.plan import Gates

NO_METRIC_HINT = "use --max-size, --max-bpw or --min-sqnr"
MaxSize = Annotated[
    str | None,
    typer.Option(
        "--max-size",
        metavar="SIZE",
        help="Fail (exit code 4) if the artifact is larger than SIZE, as 2MB.",
        rich_help_panel=GATES,
    ),
]
MaxBpw = Annotated[
    float | None,
    typer.Option(
        "--max-bpw",
        metavar="X",
        help="Fail if compressed weights take more than X bits each, side information counted.",
        rich_help_panel=GATES,
    ),
]
MinSqnr = Annotated[
    float | None,
    typer.Option(
        "--min-sqnr",
        metavar="DB",
        help="Fail if the worst tensor's signal-to-quantization-noise ratio is below DB decibels.",
        rich_help_panel=GATES,
    ),
]
MinMetric = Annotated[
    list[str] | None,
    typer.Option(
        "--min-metric",
        metavar="NAME=X",
        help="Fail if a metric of the recipe's task is below X, as top1=0.70.",
        rich_help_panel=GATES,
    ),
]
MaxDrop = Annotated[
    list[str] | None,
    typer.Option(
        "--max-drop",
        metavar="NAME=X",
        help="Fail if a metric falls by more than X from the checkpoint's, as top1=0.01.",
        rich_help_panel=GATES,
    ),
]


@dataclass(frozen=True)
class GateFlags:
    """The gates of the command line."""

    max_size: MaxSize = None
    max_bpw: MaxBpw = None
    min_sqnr: MinSqnr = None
    min_metric: MinMetric = None
    max_drop: MaxDrop = None


def make_gates(base: Gates, flags: GateFlags) -> Gates:
    """The recipe's gates with those of the command line in their place. Raises UsageError."""
    return Gates(
        max_size=base.max_size if flags.max_size is None else parse_size_flag("--max-size", flags.max_size),
        max_bpw=base.max_bpw if flags.max_bpw is None else flags.max_bpw,
        min_sqnr=base.min_sqnr if flags.min_sqnr is None else flags.min_sqnr,
        min_metric={**base.min_metric, **dict(_named("--min-metric", text) for text in flags.min_metric or [])},
        max_drop={**base.max_drop, **dict(_named("--max-drop", text) for text in flags.max_drop or [])},
    )


def _named(flag: str, text: str) -> tuple[str, float]:
    name, equals, value = text.partition("=")
    try:
        number = float(value)
    except ValueError:
        number = float("nan")
    if not (name and equals) or number != number:
        raise UsageError(f"{flag} {text}", "is not NAME=NUMBER", f"write it like {flag} top1=0.7")
    return name, number


def unmeasurable(gates: Gates) -> list[UnmeasuredError]:
    """An error for each gate on a metric, which a run from weights alone never has."""
    what = "this run measures no metric: it has weights, but no data"
    return [
        UnmeasuredError(f"gate {kind} {metric}", what, NO_METRIC_HINT)
        for kind, limits in (("min-metric", gates.min_metric), ("max-drop", gates.max_drop))
        for metric in limits
    ]
