"""Gates on the command line, over those of the recipe."""

from __future__ import annotations

from qcompress.cli.groups import GateFlags
from qcompress.errors import UnmeasuredError, UsageError, raise_all
from qcompress.types import Gates

_METRIC_MEND = "use --max-size, --max-bpw or --min-sqnr"


def make_gates(base: Gates, flags: GateFlags) -> Gates:
    """The recipe's gates with those of the command line in their place. Raises UsageError."""
    from qcompress.recipe import parse_size

    size = base.max_size
    if flags.max_size is not None:
        try:
            size = parse_size(flags.max_size)
        except ValueError as error:
            raise UsageError(f"--max-size {flags.max_size}", str(error), "write it like 2MB or 4GiB") from None
    return Gates(
        max_size=size,
        max_bpw=base.max_bpw if flags.max_bpw is None else flags.max_bpw,
        min_sqnr=base.min_sqnr if flags.min_sqnr is None else flags.min_sqnr,
        min_metric={**base.min_metric, **dict(_named("--min-metric", text) for text in flags.min_metric or [])},
        max_drop={**base.max_drop, **dict(_named("--max-drop", text) for text in flags.max_drop or [])},
    )


def refuse_unmeasurable(gates: Gates) -> None:
    """Raise UnmeasuredError (Refusals where several) for gates on metrics, which a run from weights alone never has."""
    raise_all(
        [
            UnmeasuredError(
                f"gate {kind} {metric}", "this run measures no metric: it has weights, but no data", _METRIC_MEND
            )
            for kind, limits in (("min-metric", gates.min_metric), ("max-drop", gates.max_drop))
            for metric in limits
        ]
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
