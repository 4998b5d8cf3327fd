"""Rows of methods as published, `preset: paper`, beside what they are without it: ResNet-20, one grid a channel."""

from __future__ import annotations

import itertools
from typing import NamedTuple

from ledger import Row
from tables import Cell, Table, figure_of, with_seconds

from .words import RESNET20, TOP1, live

WIDTHS = (4, 3, 2)
IMAGES = "data.eval.samples=1000"


class Column(NamedTuple):
    """A method with or without its preset.

    options  beside the width
    widths   at which it is run
    seconds  that a run takes, about
    """

    method: str
    options: str
    widths: tuple[int, ...]
    seconds: int


QUICK = "iterations: 300, correction_steps: 20"
COLUMNS = {
    "squant": Column("squant", "", WIDTHS, 6),
    "squant paper": Column("squant", "preset: paper", WIDTHS, 6),
    "dfq": Column("dfq", "", WIDTHS, 20),
    "dfq paper": Column("dfq", "preset: paper, granularity: channel", WIDTHS, 20),
    "gptq": Column("gptq", "", WIDTHS, 25),
    "gptq paper": Column("gptq", "preset: paper", WIDTHS, 25),
    "adaround": Column("adaround", "", WIDTHS, 25),
    "adaround paper": Column("adaround", "preset: paper, granularity: channel, iterations: 2000", WIDTHS, 700),
    "pdquant": Column("pdquant", "", (2,), 100),
    "pdquant paper": Column("pdquant", f"preset: paper, {QUICK}", (2,), 400),
}


def name_of(column: str, bits: int) -> str:
    return f"presets/{column.replace(' ', '/')}/w{bits}"


def row(column: str, bits: int) -> Row:
    method, options, _, seconds = COLUMNS[column]
    rule = f"rules.0.{method}={{bits: {bits}{', ' if options else ''}{options}}}"
    return Row(
        name=name_of(column, bits),
        commands=(live("quantize", RESNET20, f"cifar10/resnet20_{method}_paper", (IMAGES, rule)),),
        figures=TOP1,
        seconds=seconds,
    )


CHECKPOINTS = {"resnet20": 150, "resnet32": 250}
FLIPS = ("squant", "squant minmax", "squant minmax EK", "squant paper", "squant paper EK")
FORMULAS = {"official formulas": "EKC", "official formulas EK": "EK"}
"""What benchmarks/squant_formulas.py reads literally, by its stages."""


def alone(network: str) -> Row:
    """SQuant from weights alone, activations as they are, at the size that the official code was measured at."""
    shared = f"--networks {network} --limit 1000"
    return Row(
        name=f"presets/alone/{network}",
        commands=(
            f"python benchmarks/accuracy.py {shared} --methods '{','.join(FLIPS)}' --json -",
            f"python benchmarks/squant_formulas.py {shared} --json -",
        ),
        figures={"methods": f"0.{network}", "formulas": f"1.{network}"},
        seconds=CHECKPOINTS[network],
    )


ROWS = (
    *(row(column, bits) for column, bits in itertools.product(COLUMNS, WIDTHS) if bits in COLUMNS[column].widths),
    *(alone(network) for network in CHECKPOINTS),
)


def accuracies() -> Table:
    lines: dict[str, list[str | Cell]] = {
        column: [
            column,
            *(
                Cell((name_of(column, bits),), with_seconds("top1")) if bits in COLUMNS[column].widths else "-"
                for bits in WIDTHS
            ),
        ]
        for column in COLUMNS
    }
    return Table(name="presets", columns=("method", *(f"W{bits}A8" for bits in WIDTHS)), lines=lines)


def flips() -> Table:
    places = [(network, bits) for network in CHECKPOINTS for bits in WIDTHS]
    ways = {method: f"methods|{method}" for method in FLIPS}
    ways |= {title: f"formulas|{stages}" for title, stages in FORMULAS.items()}
    lines: dict[str, list[str | Cell]] = {
        title: [title, *(_cell(network, f"{way}|W{bits}|score", ".3f") for network, bits in places)]
        for title, way in ways.items()
    }
    differing = (_cell(network, f"formulas|EKC|W{bits}|differing", ".2%") for network, bits in places)
    lines["differing"] = ["codes apart, squant paper and official formulas", *differing]
    titles = (f"{network.replace('resnet', 'ResNet-')} W{bits}:" for network, bits in places)
    return Table(name="presets alone", columns=("method", *titles), lines=lines)


def _cell(network: str, way: str, form: str) -> Cell:
    return Cell((f"presets/alone/{network}",), lambda lines: format(figure_of(lines[0], way), form))


TABLES = (accuracies(), flips())
