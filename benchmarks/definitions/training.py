"""Rows of ResNet-20 fine-tuned with each regularizer, then quantized; other rows begin at these checkpoints."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from ledger import Row, work_file
from tables import Cell, Table, mean

from .words import RESNET20, TOP1, live

TITLES = {
    "none": "no regularizer",
    "heavy_l2": "heavy L2",
    "dsmm_alpha10": "DSMM, alpha 10",
    "dsmm_paper": "DSMM, paper",
    "dsmm": "DSMM, practical",
    "linf": "L-infinity",
    "margin": "margin",
    "kurtosis": "kurtosis",
    "sine": "sine on the grid",
}
SEEDS = (0,)
DEEP = ("none", "dsmm")
"""Rows that also get the methods with a graph or calibration."""
METHODS = {"naive": "rtn", "squant": "squant", "dfq": "dfq", "adaround": "adaround", "pdquant": "pdquant"}
SECONDS = {"rtn": 16, "squant": 16, "dfq": 16, "adaround": 26, "pdquant": 105}
WIDTHS = (4, 2)
GLANCE = ("data.eval.samples=500", "finetune.naive_bits=[]")
"""Rows that quantize measure; where a network is trained a glance is enough."""


def start(name: str, seed: int = 0) -> str:
    """The row that trains."""
    return f"training/{name}/seed{seed}"


def trained(name: str, seed: int = 0) -> Row:
    command = live("finetune-reg", RESNET20, f"cifar10/resnet20_train_{name}", GLANCE, f" --seed {seed}")
    return Row(
        name=start(name, seed), commands=(command,), figures={"top1 of 500": "0.accuracy.top1.artifact"}, seconds=260
    )


def quantized(name: str, seed: int, method: str, bits: int) -> Row:
    command = live("quantize", work_file(start(name, seed)), f"cifar10/resnet20_{method}_w{bits}a8")
    return Row(
        name=f"{start(name, seed)}/{method}/w{bits}",
        commands=(command,),
        figures=TOP1,
        seconds=SECONDS[method],
        needs=(start(name, seed),),
    )


def seeds_of(name: str, column: str) -> tuple[int, ...]:
    return SEEDS if column in ("naive", "squant") or name in DEEP else ()


def rows() -> Iterator[Row]:
    for seed, name in itertools.product(SEEDS, TITLES):
        yield trained(name, seed)
        for (column, method), bits in itertools.product(METHODS.items(), WIDTHS):
            if seed in seeds_of(name, column):
                yield quantized(name, seed, method, bits)
    yield trained("min_squared")


ROWS = tuple(rows())


def table() -> Table:
    columns = {f"{column} W{bits}A8": (column, bits) for column, bits in itertools.product(METHODS, WIDTHS)}
    lines: dict[str, list[str | Cell]] = {}
    for name, title in TITLES.items():
        full = Cell(tuple(f"{start(name, seed)}/rtn/w4" for seed in SEEDS), mean("fp32"))
        cells: list[str | Cell] = [title, full]
        for column, bits in columns.values():
            found = tuple(f"{start(name, seed)}/{METHODS[column]}/w{bits}" for seed in seeds_of(name, column))
            cells.append(Cell(found, mean("top1")) if found else "-")
        lines[title] = cells
    return Table(name="training", columns=("trained with", "FP32", *columns), lines=lines)


TABLES = (table(),)
