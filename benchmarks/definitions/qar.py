"""Rows of regularizers for codebooks: small AlexNet and VGG16, each against k-means alone.

Malchiodi, Ferraretto, Frasca 2026, Figure 3, at a fraction of its size.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

from ledger import Line, Row, work_file
from tables import Cell, Table, mean, spread

from .words import live

SEEDS = (0, 1, 2)
SMALL = (
    "data.train.samples=8000",
    "data.train.batch_size=32",
    "data.eval.samples=2000",
    "finetune.epochs=6",
    "finetune.optimizer={adamw: {lr: 0.001}}",
    "finetune.naive_bits=[]",
    "finetune.kmeans_bits=[]",
)
CLUSTERED = ("data.train.samples=4000", "data.eval.samples=2000")
REGULARIZERS = {
    "sine": "{levels: %d, strength: 0.002, start: 0.2, ramp: 0.4, coupling: decoupled}",
    "cosine": "{levels: %d, strength: 0.002, start: 0.2, ramp: 0.4, coupling: decoupled}",
    "min-squared": "{levels: %d, strength: 2.0, start: 0.2, ramp: 0.4, coupling: decoupled}",
    "exponential": "{levels: %d, strength: 0.05, start: 0.2, ramp: 0.4, coupling: decoupled}",
}
SCOPES = {"all": (), "conv": (1,), "dense": (0,)}
"""Which layers are clustered: the rules that keep instead."""
WHEN = {"before": "untuned", "after": "top1"}
NONE = "none"


class Network(NamedTuple):
    """Arguments that make it small, the patterns of its rules, and the entries a layer that it is shared to."""

    title: str
    arguments: tuple[str, ...]
    layers: tuple[str, ...]
    levels: tuple[int, ...]


NETWORKS = {
    "alexnet": Network("AlexNet", ("model.args.width=0.25",), ("conv*.weight", "fc*.weight"), (2, 4)),
    "vgg16": Network(
        "VGG16",
        ("model.args.width=0.125", "model.args.dropout=0.0"),
        ("features.*.weight", "classifier.*.weight"),
        (4, 8),
    ),
}


def start(network: str, name: str, levels: int, seed: int) -> str:
    """The row that trains; without a regularizer it is one for all numbers of entries."""
    return f"qar/{network}/{name}/seed{seed}" if name == NONE else f"qar/{network}/{name}-{levels}/seed{seed}"


def clustered(network: str, name: str, levels: int, scope: str, seed: int) -> str:
    return f"{start(network, name, levels, seed)}/{levels}-{scope}"


def trained_row(network: str, name: str, levels: int, seed: int) -> Row:
    about = NETWORKS[network]
    changes = (*about.arguments, *SMALL)
    if name != NONE:
        changes = (*changes, f"finetune.regularize.0.{name}={REGULARIZERS[name] % levels}")
    recipe = f"qar/{network}_{name.replace('-', '_')}"
    return Row(
        name=start(network, name, levels, seed),
        commands=(live("finetune-reg", "", recipe, changes, f" --seed {seed} --resume"),),
        figures={"top1": "0.metrics.top1"},
        seconds=130,
    )


def clustered_row(network: str, name: str, levels: int, scope: str, seed: int) -> Row:
    about, trained = NETWORKS[network], start(network, name, levels, seed)
    changes = [*about.arguments, *CLUSTERED]
    changes += [f'rules.{rule}={{match: "{about.layers[rule]}", keep: {{}}}}' for rule in SCOPES[scope]]
    if name == NONE:
        bits = levels.bit_length() - 1
        changes += [f"rules.{rule}.kmeans.bits={bits}" for rule in range(2) if rule not in SCOPES[scope]]
    return Row(
        name=clustered(network, name, levels, scope, seed),
        commands=(live("cluster", work_file(trained), f"qar/{network}_{name.replace('-', '_')}", changes),),
        figures={
            "fp32": "0.accuracy.top1.baseline",
            "untuned": "0.accuracy.top1.untuned",
            "top1": "0.accuracy.top1.artifact",
            "bytes": "0.size.artifact_bytes",
        },
        seconds=40,
        needs=(trained,),
    )


def rows() -> Iterator[Row]:
    for seed, (network, about) in itertools.product(SEEDS, NETWORKS.items()):
        yield trained_row(network, NONE, 0, seed)
        for levels in about.levels:
            for name in (NONE, *REGULARIZERS):
                if name != NONE:
                    yield trained_row(network, name, levels, seed)
                yield from (clustered_row(network, name, levels, scope, seed) for scope in SCOPES)


ROWS = tuple(rows())


def ratio(figure: str, plain: str) -> Callable[[list[Line]], str]:
    """Over the same seed of the rows that `plain` begins: mean and spread over seeds that have both."""

    def text(lines: list[Line]) -> str:
        bases = {line.row.split("/")[3]: line.figures[figure] for line in lines if line.row.startswith(plain)}
        found = [line for line in lines if not line.row.startswith(plain) and line.row.split("/")[3] in bases]
        ratios = [line.figures[figure] / bases[line.row.split("/")[3]] for line in found]
        return spread(ratios, ".2f") if ratios else "-"

    return text


def table(network: str, levels: int) -> Table:
    columns = {f"{scope}, {when}": (scope, when) for scope in SCOPES for when in WHEN}
    lines: dict[str, list[str | Cell]] = {}
    for name in (NONE, *REGULARIZERS):
        full = tuple(clustered(network, name, levels, "all", seed) for seed in SEEDS)
        cells: list[str | Cell] = ["none: k-means" if name == NONE else name, Cell(full, mean("fp32", ".2f"))]
        for scope, when in columns.values():
            own = tuple(clustered(network, name, levels, scope, seed) for seed in SEEDS)
            base = tuple(clustered(network, NONE, levels, scope, seed) for seed in SEEDS)
            figure = WHEN[when]
            way = mean(figure, ".2f") if name == NONE else ratio(figure, f"qar/{network}/{NONE}/")
            cells.append(Cell(own if name == NONE else (*own, *base), way))
        lines[str(cells[0])] = cells
    return Table(
        name=f"qar {network} {levels}", columns=("regularizer", "FP32:", *(f"{c}:" for c in columns)), lines=lines
    )


TABLES = tuple(table(network, levels) for network, about in NETWORKS.items() for levels in about.levels)
