"""Rows of methods from weights alone, nothing else done to the network: one run a network."""

from __future__ import annotations

from ledger import Row
from tables import Cell, Table, figure_of

WIDTHS = {
    "resnet20": (4, 3, 2),
    "resnet32": (4, 3, 2),
    "dscnn": (4, 3, 2),
    "mobilenet": (6, 5, 4),
    "stories": (4, 3, 2),
}
TITLES = {
    "resnet20": "ResNet-20",
    "resnet32": "ResNet-32",
    "dscnn": "DS-CNN",
    "mobilenet": "MobileNet",
    "stories": "stories260K",
}
SECONDS = {"resnet20": 330, "resnet32": 520, "dscnn": 120, "mobilenet": 500, "stories": 200}
METHODS = (
    *("rtn", "rtn symmetric", "mse", "mse symmetric", "mse grid", "hqq", "squant", "squant symmetric", "squant EK"),
    *("squant EC", "squant paper", "squant paper EK", "squant minmax", "squant minmax EK"),
)
ERRORS = ("rtn", "mse", "hqq", "squant", "squant EC", "squant paper", "squant minmax")


def row(network: str) -> Row:
    bits = ",".join(map(str, WIDTHS[network]))
    command = (
        f"python benchmarks/accuracy.py --networks {network} --bits {bits} --methods '{','.join(METHODS)}' --json -"
    )
    return Row(
        name=f"alone/{network}", commands=(command,), figures={network: f"0.{network}"}, seconds=SECONDS[network]
    )


GROUPED = ("squant", "mse", "hqq", "rtn")
GROUPS = Row(
    name="alone/mobilenet-groups",
    commands=(
        "python benchmarks/accuracy.py --networks mobilenet --bits 4 --group-size 32 "
        f"--methods '{','.join(GROUPED)}' --json -",
    ),
    figures={"mobilenet": "0.mobilenet"},
    seconds=80,
)
"""Groups of 32, where 32 divides a channel; the kernels of depthwise layers have a grid each."""

ROWS = (*(row(network) for network in WIDTHS), GROUPS)


def scores(name: str, networks: tuple[str, ...], form: str) -> Table:
    columns = {f"{TITLES[network]} W{bits}": (network, bits) for network in networks for bits in WIDTHS[network]}
    lines: dict[str, list[str | Cell]] = {
        method: [method, *(cell(network, method, bits, "score", form) for network, bits in columns.values())]
        for method in METHODS
    }
    return Table(name=f"alone {name}", columns=("method", *(f"{column}:" for column in columns)), lines=lines)


def cell(network: str, method: str, bits: int, figure: str, form: str, row: str = "") -> Cell:
    """A figure of a method, from the row of its network where no other is named."""
    way = f"{network}|{method}|W{bits}|{figure}"
    return Cell((row or f"alone/{network}",), lambda lines: format(figure_of(lines[0], way), form))


def errors() -> Table:
    lines: dict[str, list[str | Cell]] = {
        method: [
            method,
            cell("resnet20", method, 4, "bits_per_weight", ".3f"),
            *(cell("resnet20", method, bits, "relative_error", ".4f") for bits in WIDTHS["resnet20"]),
        ]
        for method in ERRORS
    }
    return Table(name="alone errors", columns=("method", "bits/weight at W4:", "W4:", "W3:", "W2:"), lines=lines)


def groups() -> Table:
    figures = {"bits a weight": ("bits_per_weight", ".2f"), "W4": ("score", ".1%")}
    lines: dict[str, list[str | Cell]] = {
        method: [method, *(cell("mobilenet", method, 4, *figure, GROUPS.name) for figure in figures.values())]
        for method in GROUPED
    }
    return Table(name="alone groups", columns=("method", *(f"{title}:" for title in figures)), lines=lines)


TABLES = (
    scores("resnet", ("resnet20", "resnet32"), ".1%"),
    scores("small", ("dscnn", "mobilenet"), ".1%"),
    scores("stories", ("stories",), ".2f"),
    errors(),
    groups(),
)
