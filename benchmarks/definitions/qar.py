"""Rows of regularizers for codebooks: AlexNet and VGG16, each against k-means of the same training without one.

Malchiodi, Ferraretto, Frasca 2026, Figure 3, on 20,000 images of CIFAR-10 and networks that are narrowed to what learns
them on a processor. A regularizer acts on the layers that are shared: on all of them for three seeds, on convolutions
alone and on dense layers alone for one.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

from ledger import Line, Row, work_file
from tables import Cell, Table, mean, plain_mean, spread

from .words import CHANCE, live

SEEDS = (0, 1, 2)
SMALL = (
    "data.eval.samples=2000",
    "finetune.warm_up=0.05",
    "finetune.precision=bfloat16",
    "finetune.memory_format=channels_last",
    "finetune.naive_bits=[]",
    "finetune.kmeans_bits=[]",
)
CLUSTERED = ("data.train.samples=8000", "data.eval.samples=2000")
REGULARIZERS = {
    "sine": "strength: 0.002, start: 0.2, ramp: 0.4, coupling: decoupled",
    "cosine": "strength: 0.002, start: 0.2, ramp: 0.4, coupling: decoupled",
    "min-squared": "strength: 2.0, start: 0.2, ramp: 0.4, coupling: decoupled",
    "exponential": "strength: 0.05, start: 0.2, ramp: 0.4, coupling: decoupled",
}
NONE, PAPER = "none", "paper-qar"
PAPER_OPTIONS = "preset: paper-qar"
"""Of the sine, whose row stands for the paper's settings as far as they are known."""
SCOPES = {"all": (), "conv": (1,), "dense": (0,)}
"""Which layers are shared: the rules that keep instead."""
WHEN = {"before": "untuned", "after": "top1"}


class Network(NamedTuple):
    """Arguments that make it small, how it is trained, its rules' patterns, and the entries a layer is shared to."""

    title: str
    arguments: tuple[str, ...]
    training: tuple[str, ...]
    seconds: int
    layers: tuple[str, ...]
    levels: tuple[int, ...]


NETWORKS = {
    "alexnet": Network(
        "AlexNet",
        ("model.args.width=0.5", "model.args.stride=1", "model.args.dropout=0.2"),
        ("finetune.epochs=16", "finetune.optimizer={adamw: {lr: 0.001}}"),
        440,
        ("conv*.weight", "fc*.weight"),
        (2, 4),
    ),
    "vgg16": Network(
        "VGG16",
        ("model.args.width=0.25", "model.args.dropout=0.0"),
        ("finetune.epochs=16", "finetune.optimizer={adamw: {lr: 0.002}}"),
        290,
        ("features.*.weight", "classifier.*.weight"),
        (4,),
    ),
}


def seeds_of(scope: str) -> tuple[int, ...]:
    return SEEDS if scope == "all" else SEEDS[:1]


def start(network: str, name: str, levels: int, scope: str, seed: int) -> str:
    """The row that trains; without a regularizer it is one for all numbers of entries and all layers."""
    return f"qar/{network}/{name}/seed{seed}" if name == NONE else f"qar/{network}/{name}-{levels}-{scope}/seed{seed}"


def clustered(network: str, name: str, levels: int, scope: str, seed: int) -> str:
    return f"{start(network, name, levels, scope, seed)}/{levels}-{scope}"


def recipe_of(network: str, name: str) -> str:
    return f"qar/{network}_{'sine' if name == PAPER else name.replace('-', '_')}"


def trained_row(network: str, name: str, levels: int, scope: str, seed: int) -> Row:
    about = NETWORKS[network]
    changes = (*about.arguments, *about.training, *SMALL)
    if name != NONE:
        kind, options = ("sine", PAPER_OPTIONS) if name == PAPER else (name, REGULARIZERS[name])
        rule = f"finetune.regularize.0.{kind}={{levels: {levels}, layers: {scope}, {options}}}"
        changes = (*changes, rule)
    return Row(
        name=start(network, name, levels, scope, seed),
        commands=(live("finetune-reg", "", recipe_of(network, name), changes, f" --seed {seed} --resume"),),
        figures={"top1": "0.metrics.top1"},
        seconds=about.seconds,
    )


def clustered_row(network: str, name: str, levels: int, scope: str, seed: int) -> Row:
    about, trained = NETWORKS[network], start(network, name, levels, scope, seed)
    changes = [*about.arguments, *CLUSTERED]
    changes += [f'rules.{rule}={{match: "{about.layers[rule]}", keep: {{}}}}' for rule in SCOPES[scope]]
    if name == NONE:
        bits = levels.bit_length() - 1
        changes += [f"rules.{rule}.kmeans.bits={bits}" for rule in range(2) if rule not in SCOPES[scope]]
    return Row(
        name=clustered(network, name, levels, scope, seed),
        commands=(live("cluster", work_file(trained), recipe_of(network, name), changes),),
        figures={
            "fp32": "0.accuracy.top1.baseline",
            "untuned": "0.accuracy.top1.untuned",
            "top1": "0.accuracy.top1.artifact",
            "bytes": "0.size.artifact_bytes",
        },
        seconds=60,
        needs=(trained,),
    )


def rows() -> Iterator[Row]:
    """The first seed of all layers, then their parts, then the other seeds."""
    for seed, scope, (network, about) in itertools.product(SEEDS, SCOPES, NETWORKS.items()):
        if seed not in seeds_of(scope):
            continue
        if scope == "all":
            yield trained_row(network, NONE, 0, scope, seed)
        for levels in about.levels:
            yield clustered_row(network, NONE, levels, scope, seed)
            for name in REGULARIZERS:
                yield trained_row(network, name, levels, scope, seed)
                yield clustered_row(network, name, levels, scope, seed)
    for make in (trained_row, clustered_row):
        yield make("alexnet", PAPER, NETWORKS["alexnet"].levels[0], "all", 0)


ROWS = tuple(rows())


def ratio(figure: str, plain: str) -> Callable[[list[Line]], str]:
    """Over the same seed of the rows that `plain` begins: mean and spread over seeds that have both.

    Where k-means is left with chance a ratio means nothing: the accuracy itself, in brackets.
    """

    def text(lines: list[Line]) -> str:
        bases = {line.row.split("/")[3]: line.figures[figure] for line in lines if line.row.startswith(plain)}
        found = [line for line in lines if not line.row.startswith(plain) and line.row.split("/")[3] in bases]
        if not found:
            return "-"
        if min(bases.values()) < CHANCE:
            return f"({spread([line.figures[figure] for line in found], '.2f')})"
        return spread([line.figures[figure] / bases[line.row.split("/")[3]] for line in found], ".2f")

    return text


def table(network: str, levels: int) -> Table:
    columns = {f"{scope}, {when}": (scope, when) for scope in SCOPES for when in WHEN}
    lines: dict[str, list[str | Cell]] = {}
    titles = {NONE: "none: k-means", **{name: name for name in REGULARIZERS}}
    if network == "alexnet" and levels == NETWORKS[network].levels[0]:
        titles[PAPER] = "sine, `preset: paper-qar`"
    for name, title in titles.items():
        full = tuple(clustered(network, name, levels, "all", seed) for seed in SEEDS[: 1 if name == PAPER else None])
        cells: list[str | Cell] = [title, Cell(full, mean("fp32", ".2f"))]
        for scope, when in columns.values():
            if name == PAPER and scope != "all":
                cells.append("-")
                continue
            seeds = SEEDS[:1] if name == PAPER else seeds_of(scope)
            own = tuple(clustered(network, name, levels, scope, seed) for seed in seeds)
            base = tuple(clustered(network, NONE, levels, scope, seed) for seed in seeds)
            figure = WHEN[when]
            way = mean(figure, ".2f") if name == NONE else ratio(figure, f"qar/{network}/{NONE}/")
            cells.append(Cell(own if name == NONE else (*own, *base), way))
        cells.append(Cell(full, plain_mean("bytes", ".0f")))
        lines[title] = cells
    return Table(
        name=f"qar {network} {levels}",
        columns=("regularizer", "FP32:", *(f"{c}:" for c in columns), "bytes, all:"),
        lines=lines,
    )


TABLES = tuple(table(network, levels) for network, about in NETWORKS.items() for levels in about.levels)
