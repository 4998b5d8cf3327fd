"""Rows of networks trained from scratch with and without DSMM, then quantized: Kundu et al. 2024, Tables 1, 3 and 4.

ResNet-20 for 30 epochs and a MobileNetV1 of half the width for 20, on 20,000 images of CIFAR-10. Rows that train go on
from their saved state when they are run again.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

from ledger import Row, work_file
from tables import Cell, Table, mean

from .words import TOP1, live

WIDTHS = (4, 3, 2)
GLANCE = ("data.eval.samples=1000",)
"""While a network is trained a thousand images are enough; what is quantized is measured on all of them."""


class Network(NamedTuple):
    """The stem of its recipes, what other recipes are told so that they take it, and seconds of a training."""

    title: str
    recipe: str
    changes: tuple[str, ...]
    layers: tuple[int, ...]
    seconds: int


class Training(NamedTuple):
    """The end of the recipe's name, what is changed in it, and the seeds."""

    title: str
    recipe: str
    changes: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0,)


SEEDS = (0, 1, 2)
NETWORKS = {
    "resnet20": Network("ResNet-20", "cifar10/resnet20_scratch", (), (0, 10, 19), 1200),
    "mobilenet": Network(
        "MobileNetV1",
        "cifar10/mobilenet_v1_scratch",
        ("model.factory=../nets/mobilenet_v1.py:mobilenet_v1_cifar",),
        (0, 13, 27),
        1900,
    ),
}
STRENGTHS = (0.01, 0.03, 0.3, 1.0)


def strong(strength: float) -> Training:
    rule = f"finetune.regularize.0.dsmm.strength={strength:g}"
    return Training(f"DSMM, strength {strength:g}", "dsmm", (rule,))


TRAININGS: dict[str, dict[str, Training]] = {
    "resnet20": {
        "none": Training("no regularizer", "none", (), SEEDS),
        "dsmm": Training("DSMM, strength 0.1", "dsmm", (), SEEDS),
        "heavy_l2": Training("heavy L2", "heavy_l2", (), SEEDS),
        "dsmm_paper": Training("DSMM, paper", "dsmm_paper"),
        "dsmm_alpha10": Training("DSMM, alpha 10", "dsmm_alpha10"),
        **{f"dsmm_{strength:g}": strong(strength) for strength in STRENGTHS},
    },
    "mobilenet": {
        "none": Training("no regularizer", "none", (), SEEDS),
        "dsmm": Training("DSMM, strength 0.1", "dsmm", (), SEEDS),
    },
}


class Way(NamedTuple):
    """A method after training: its name in recipes, the grids it is given, and about the seconds that it takes."""

    method: str
    grains: tuple[str, ...]
    seconds: int


WAYS = {
    "naive": Way("rtn", ("tensor", "channel"), 20),
    "squant": Way("squant", ("tensor", "channel"), 20),
    "dfq": Way("dfq", ("tensor",), 20),
}


def start(network: str, name: str, seed: int = 0) -> str:
    """The row that trains."""
    return f"scratch/{network}/{name}/seed{seed}"


def trained(network: str, name: str, seed: int) -> Row:
    about, training = NETWORKS[network], TRAININGS[network][name]
    changes = (*GLANCE, *training.changes)
    figures = {"top1 of 1000": "0.metrics.top1"}
    figures |= {f"naive channel W{bits}": f"0.naive.{index}.after" for index, bits in enumerate((2, 3, 4))}
    if name.startswith("dsmm"):
        figures |= {f"alpha of layer {layer}": f"0.layers.{layer}.temperature" for layer in about.layers}
    command = live("finetune-reg", "", f"{about.recipe}_{training.recipe}", changes, f" --seed {seed} --resume")
    return Row(name=start(network, name, seed), commands=(command,), figures=figures, seconds=about.seconds)


def name_of(network: str, name: str, seed: int, way: str, grain: str, bits: int) -> str:
    return f"{start(network, name, seed)}/{way}/{grain}/w{bits}"


def quantized(network: str, name: str, seed: int, way: str, grain: str, bits: int) -> Row:
    method = WAYS[way].method
    rule = (f"rules.0.{method}.bits={bits}", f"rules.0.{method}.granularity={grain}")
    changes = (*NETWORKS[network].changes, *rule)
    return Row(
        name=name_of(network, name, seed, way, grain, bits),
        commands=(live("quantize", work_file(start(network, name, seed)), f"cifar10/resnet20_{method}_w4a8", changes),),
        figures=TOP1,
        seconds=WAYS[way].seconds,
        needs=(start(network, name, seed),),
    )


def all_quantized(network: str, name: str, seed: int) -> Iterator[Row]:
    for way, about in WAYS.items():
        for grain, bits in itertools.product(about.grains, WIDTHS):
            yield quantized(network, name, seed, way, grain, bits)


def rows() -> Iterator[Row]:
    """In the order in which they tell most: each network without and with DSMM first, other seeds last."""
    first = [("resnet20", name) for name in ("none", "dsmm", "heavy_l2", "dsmm_paper", "dsmm_alpha10")]
    then = [("mobilenet", name) for name in TRAININGS["mobilenet"]]
    then += [("resnet20", name) for name in TRAININGS["resnet20"] if ("resnet20", name) not in first]
    places = [(network, name, 0) for network, name in (*first, *then)]
    places += [
        (network, name, seed)
        for seed in SEEDS[1:]
        for network, trainings in TRAININGS.items()
        for name, training in trainings.items()
        if seed in training.seeds
    ]
    for network, name, seed in places:
        yield trained(network, name, seed)
        yield from all_quantized(network, name, seed)


ROWS = tuple(rows())


def table(network: str) -> Table:
    columns = {
        f"{way} {grain} W{bits}A8": (way, grain, bits)
        for way, about in WAYS.items()
        for grain, bits in itertools.product(about.grains, WIDTHS)
    }
    lines: dict[str, list[str | Cell]] = {}
    for name, training in TRAININGS[network].items():
        full = tuple(name_of(network, name, seed, "naive", "tensor", 4) for seed in training.seeds)
        cells: list[str | Cell] = [training.title, Cell(full, mean("fp32"))]
        for way, grain, bits in columns.values():
            found = tuple(name_of(network, name, seed, way, grain, bits) for seed in training.seeds)
            cells.append(Cell(found, mean("top1")))
        lines[training.title] = cells
    return Table(name=f"scratch {network}", columns=("trained from scratch with", "FP32", *columns), lines=lines)


TABLES = tuple(table(network) for network in NETWORKS)
