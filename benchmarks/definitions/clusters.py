"""Rows of weight sharing: ResNet-20 and MobileNet by k-means, tuned, and by DKM, from several starts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from ledger import Line, Row, work_file
from tables import Cell, Table, mean, plain_mean

from .training import start
from .words import MOBILENET, RESNET20, live

SETTINGS = ((1, 1), (2, 1), (4, 1), (2, 2), (4, 4))
"""Bits of a code, and weights that share one."""
SHARED = ((2, 1), (2, 2))
"""At which codebooks after DSMM are held against those after L-infinity."""
CLIPPED = ("data.train.samples=4000", "data.eval.samples=2000")
FIGURES = {
    "fp32": "0.accuracy.top1.baseline",
    "kmeans": "0.accuracy.top1.kmeans",
    "top1": "0.accuracy.top1.artifact",
    "bpw": "0.size.bits_per_weight",
}


class Start(NamedTuple):
    """A network to cluster: a checkpoint or the row that trains it, its recipe's stem, and where DKM is run too."""

    title: str
    checkpoint: str
    recipe: str = "cifar10/resnet20"
    reduced: tuple[str, ...] = CLIPPED
    settings: tuple[tuple[int, int], ...] = SETTINGS
    dkm: tuple[tuple[int, int], ...] = SETTINGS
    changes: tuple[str, ...] = ()


STARTS = {
    "resnet20": Start("ResNet-20, the checkpoint", RESNET20),
    "min_squared": Start("trained to two representatives a layer", start("min_squared"), dkm=((1, 1),)),
    "dsmm": Start("fine-tuned with DSMM", start("dsmm"), dkm=SHARED),
    "linf": Start("fine-tuned with L-infinity", start("linf"), settings=SHARED, dkm=SHARED),
    "mobilenet": Start("MobileNetV1 0.75", MOBILENET, "imagenet/mobilenet_v1_075", (), ((4, 1),), ((4, 1),)),
    "mobilenet_channel": Start(
        "MobileNetV1 0.75, a codebook a channel",
        MOBILENET,
        "imagenet/mobilenet_v1_075",
        (),
        ((2, 1), (4, 1)),
        (),
        ("rules.0.kmeans.granularity=channel",),
    ),
}
FAST = (("resnet20", (2, 1)), ("min_squared", (1, 1)))
"""Runs whose entries are tuned at ten times the default rate too."""


def name_of(key: str, method: str, setting: tuple[int, int]) -> str:
    return f"clusters/{key}/{method}/{setting[0]}-{setting[1]}"


def row(key: str, method: str, setting: tuple[int, int], *, fast: bool = False) -> Row:
    about, (_, dim) = STARTS[key], setting
    # The ten channels of ResNet-20's last layer, which has the first rule, make no vectors of four.
    widths = {1: setting, 0: (2, 2) if dim == 4 else setting} if "resnet20" in about.recipe else {0: setting}
    changes = [*about.reduced, *about.changes]
    for index, (width, length) in widths.items():
        changes += [f"rules.{index}.{method}.bits={width}", f"rules.{index}.{method}.dim={length}"]
        changes += [f"rules.{index}.kmeans.tune.learning_rate=0.001"] if fast else []
    changes += ["finetune.epochs=1"] if method == "dkm" else []
    is_row = about.checkpoint.startswith("training/")
    return Row(
        name=name_of(key, "fast" if fast else method, setting),
        commands=(
            live(
                "cluster",
                work_file(about.checkpoint) if is_row else about.checkpoint,
                f"{about.recipe}_{method}",
                changes,
            ),
        ),
        figures=FIGURES | ({"untuned": "0.accuracy.top1.untuned"} if method == "kmeans" else {}),
        seconds=60 if method == "kmeans" else 180,
        needs=(about.checkpoint,) if is_row else (),
    )


def rows() -> Iterator[Row]:
    for key, about in STARTS.items():
        yield from (row(key, "kmeans", setting) for setting in about.settings)
        yield from (row(key, "dkm", setting) for setting in about.dkm)
    yield from (row(key, "kmeans", setting, fast=True) for key, setting in FAST)


ROWS = tuple(rows())


def ratio(lines: list[Line]) -> str:
    """Of the accuracy over that of plain k-means."""
    top1, kmeans = (lines[0].figures[name] for name in ("top1", "kmeans"))
    return f"{top1 / kmeans:.2f}" if kmeans else "-"


COLUMNS = ("start", "FP32:", "bits/dim", "bits a weight:", "k-means:", "entries tuned:", "ratio:", "DKM:", "DKM ratio:")


def table() -> Table:
    lines: dict[str, list[str | Cell]] = {}
    for key, about in STARTS.items():
        for setting in about.settings:
            plain, trained = (name_of(key, "kmeans", setting),), (name_of(key, "dkm", setting),)
            is_first = setting == about.settings[0]
            cells: list[str | Cell] = [about.title, Cell(plain, plain_mean("fp32", ".4f"))] if is_first else ["", ""]
            cells += [f"{setting[0]}/{setting[1]}", Cell(plain, plain_mean("bpw", ".2f")), Cell(plain, mean("kmeans"))]
            cells += [Cell(plain, mean("top1")), Cell(plain, ratio)]
            cells += [Cell(trained, mean("top1")), Cell(trained, ratio)] if setting in about.dkm else ["-", "-"]
            lines[f"{about.title} {setting[0]}/{setting[1]}"] = cells
    return Table(name="clusters", columns=COLUMNS, lines=lines)


def rates() -> Table:
    lines: dict[str, list[str | Cell]] = {}
    for key, setting in FAST:
        usual, fast = (name_of(key, "kmeans", setting),), (name_of(key, "fast", setting),)
        title = f"{STARTS[key].title}, {setting[0]} bit{'s' if setting[0] > 1 else ''}"
        lines[title] = [title, Cell(usual, mean("kmeans")), Cell(usual, mean("top1")), Cell(fast, mean("top1"))]
    columns = ("start", "untuned:", "at 0.0001, the default:", "at 0.001:")
    return Table(name="clusters rates", columns=columns, lines=lines)


TABLES = (table(), rates())
