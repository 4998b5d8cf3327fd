"""Rows of budgets: widths chosen tensor by tensor against one width for all, at equal bytes."""

from __future__ import annotations

from ledger import Row
from tables import Cell, Table, mean, plain_mean

from .words import RESNET20, SIZE, TOP1, bare, live

RATES = {2.0834: 2, 2.5: None, 3.0837: 3, 3.5: None}
"""Bits a weight, and the one width for all tensors that takes as many with its grids."""
METHODS = ("squant", "gptq")
RECIPE = "benchmarks/recipes/resnet20"
CHANGES = ("data.calibration.samples=1024", "data.eval.samples=2000")


def name_of(method: str, how: str, rate: float) -> str:
    return f"budgets/{method}/{how}/{rate}"


def uniform(method: str, rate: float, bits: int) -> Row:
    changes = (*CHANGES, f'rules.0={{match: "*.weight", {method}: {{bits: {bits}}}}}')
    command = live("quantize", RESNET20, RECIPE, changes, " --coding packed")
    return Row(name=name_of(method, "uniform", rate), commands=(command,), figures=TOP1 | SIZE, seconds=12)


def measured(method: str, rate: float) -> Row:
    changes = (*CHANGES, f'rules.0={{match: "*.weight", {method}: {{}}}}')
    command = live("quantize", RESNET20, RECIPE, changes, f" --coding packed --bpw {rate}")
    return Row(name=name_of(method, "measured", rate), commands=(command,), figures=TOP1 | SIZE, seconds=45)


def by_weights(rate: float) -> Row:
    """From the checkpoint alone, and measured afterwards."""
    made = bare("quantize", RESNET20, f"--method squant --bpw {rate} --coding packed")
    evaluated = f"qcompress eval $OUT -r {RECIPE}.yaml --set data.eval.samples=2000 --allow-code --json -"
    figures = SIZE | {"top1": "1.metrics.top1.value"}
    return Row(name=name_of("squant", "by-weights", rate), commands=(made, evaluated), figures=figures, seconds=12)


ROWS = (
    *(uniform(method, rate, bits) for method in METHODS for rate, bits in RATES.items() if bits is not None),
    *(by_weights(rate) for rate in RATES),
    *(measured(method, rate) for method in METHODS for rate in RATES),
)

COLUMNS = {
    "squant, one width": ("squant", "uniform"),
    "squant, by weights": ("squant", "by-weights"),
    "squant, measured": ("squant", "measured"),
    "gptq, one width": ("gptq", "uniform"),
    "gptq, measured": ("gptq", "measured"),
}


def table() -> Table:
    lines: dict[str, list[str | Cell]] = {}
    for rate, bits in RATES.items():
        cells: list[str | Cell] = [
            "-" if how == "uniform" and bits is None else Cell((name_of(method, how, rate),), mean("top1"))
            for method, how in COLUMNS.values()
        ]
        lines[f"{rate}"] = [f"{rate}", *cells]
    return Table(name="budgets", columns=("bits per weight", *COLUMNS), lines=lines)


FP32 = Table(
    name="budgets fp32",
    columns=("network", "FP32"),
    lines={"resnet20": ["resnet20", Cell((name_of("squant", "uniform", 2.0834),), plain_mean("fp32", ".4f"))]},
)
TABLES = (table(), FP32)
