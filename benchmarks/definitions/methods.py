"""Rows of every method after training: accuracies of ResNet-20 and MobileNet."""

from __future__ import annotations

import itertools
from typing import NamedTuple

from ledger import Row
from tables import Cell, Table, plain_mean, with_seconds

from .words import MOBILENET, RESNET20, TOP1, live

WIDTHS = (4, 3, 2)
GRAINS = ("channel", "tensor")


class Method(NamedTuple):
    """A column: the method's name in recipes, and about the seconds that ResNet-20 and MobileNet take."""

    name: str
    resnet20: int
    mobilenet: int


METHODS = {
    "naive": Method("rtn", 16, 33),
    "dfq": Method("dfq", 16, 19),
    "squant": Method("squant", 16, 18),
    "adaround": Method("adaround", 26, 76),
    "gptq": Method("gptq", 24, 52),
    "pdquant": Method("pdquant", 105, 420),
}
NETWORKS = {"resnet20": (RESNET20, "cifar10/resnet20"), "mobilenet": (MOBILENET, "imagenet/mobilenet_v1_075")}
PDQUANT_OF_MOBILENET = (("channel", 4), ("channel", 2))
"""The grids at which pdquant is run on the large network, with 20 steps a block."""


def name_of(network: str, column: str, grain: str, bits: int) -> str:
    return f"methods/{network}/{column}/{grain}/w{bits}"


def row(network: str, column: str, grain: str, bits: int) -> Row:
    checkpoint, stem = NETWORKS[network]
    method = METHODS[column]
    changes = [f"rules.0.{method.name}.bits={bits}", f"rules.0.{method.name}.granularity={grain}"]
    if column == "pdquant" and network == "mobilenet":
        changes.append("rules.0.pdquant.iterations=20")
    return Row(
        name=name_of(network, column, grain, bits),
        commands=(live("quantize", checkpoint, f"{stem}_{method.name}_w4a8", changes),),
        figures=TOP1 | {"bytes": "0.size.artifact_bytes"},
        seconds=getattr(method, network),
    )


def is_run(network: str, column: str, grain: str, bits: int) -> bool:
    return network == "resnet20" or column != "pdquant" or (grain, bits) in PDQUANT_OF_MOBILENET


ROWS = tuple(
    row(network, column, grain, bits)
    for network, column in itertools.product(NETWORKS, METHODS)
    for grain, bits in itertools.product(GRAINS, WIDTHS)
    if is_run(network, column, grain, bits)
)


def accuracies(network: str) -> Table:
    lines: dict[str, list[str | Cell]] = {}
    for grain, bits in itertools.product(GRAINS, WIDTHS):
        cells = [
            Cell((name_of(network, column, grain, bits),), with_seconds("top1"))
            if is_run(network, column, grain, bits)
            else "-"
            for column in METHODS
        ]
        lines[f"{grain} W{bits}A8"] = [grain, f"W{bits}A8", *cells]
    return Table(name=f"methods {network}", columns=("grid a", "bits", *METHODS), lines=lines)


def full_precision(network: str) -> Table:
    """Accuracy before compression, as any of the rows measured it."""
    cell = Cell((name_of(network, "naive", "channel", 4),), plain_mean("fp32", ".4f"))
    return Table(name=f"{network} fp32", columns=("network", "FP32"), lines={network: [network, cell]})


def memory() -> Table:
    """Peak resident memory of whole runs."""

    def cell(network: str, column: str) -> Cell:
        return Cell(
            (name_of(network, column, "channel", 4),), lambda lines: f"{lines[0].peak_memory_bytes[0] / 1e9:.2f}"
        )

    titles = {"resnet20": "ResNet-20, 1,024 images", "mobilenet": "MobileNetV1 0.75, 256 photos"}
    lines = {network: [title, *(cell(network, column) for column in METHODS)] for network, title in titles.items()}
    return Table(name="memory", columns=("GB", *(f"{column}:" for column in METHODS)), lines=lines)


TABLES = (
    accuracies("resnet20"),
    accuracies("mobilenet"),
    full_precision("resnet20"),
    full_precision("mobilenet"),
    memory(),
)
