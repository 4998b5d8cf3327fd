"""Rows of quantization-aware training: ResNet-20 trained by LSQ and PACT from two checkpoints."""

from __future__ import annotations

import itertools

from ledger import Row, work_file
from tables import Cell, Table, mean

from .training import start
from .words import RESNET20, TOP1, live

METHODS = {"pact": "PACT", "lsq": "LSQ"}
WIDTHS = (2, 4)
SEEDS = (0,)
EPOCHS = {2: 2, 4: 1}
IMAGES = 10_000
STARTS = {"checkpoint": "the checkpoint", "dsmm": "DSMM"}
WHOLE = "qat/whole/lsq-w2a2"


def name_of(key: str, method: str, bits: int, seed: int) -> str:
    return f"qat/{key}/{method}-w{bits}a{bits}/seed{seed}"


def row(key: str, method: str, bits: int, seed: int) -> Row:
    checkpoint = RESNET20 if key == "checkpoint" else work_file(start(key))
    fewer = (f"finetune.epochs={EPOCHS[bits]}", f"data.train.samples={IMAGES}")
    command = live("quantize", checkpoint, f"cifar10/resnet20_{method}_w{bits}a{bits}", fewer, f" --seed {seed}")
    return Row(
        name=name_of(key, method, bits, seed),
        commands=(command,),
        figures=TOP1,
        seconds=110 * EPOCHS[bits],
        needs=() if key == "checkpoint" else (start(key),),
    )


ROWS = (
    *(row(key, method, bits, seed) for seed, bits, key, method in itertools.product(SEEDS, WIDTHS, STARTS, METHODS)),
    Row(name=WHOLE, commands=(live("quantize", RESNET20, "cifar10/resnet20_lsq_w2a2"),), figures=TOP1, seconds=800),
)


def table() -> Table:
    columns = {f"{METHODS[method]} W{bits}A{bits}": (method, bits) for bits in WIDTHS for method in METHODS}
    lines: dict[str, list[str | Cell]] = {}
    for key, title in STARTS.items():
        names = [tuple(name_of(key, method, bits, seed) for seed in SEEDS) for method, bits in columns.values()]
        full = Cell(names[0], lambda found: f"{found[0].figures['fp32']:.4f}")
        lines[title] = [title, full, *(Cell(each, mean("top1")) for each in names)]
    return Table(name="qat", columns=("start", "FP32", *columns), lines=lines)


WHOLE_TABLE = Table(
    name="qat whole",
    columns=("recipe", "FP32", "LSQ W2A2"),
    lines={
        "LSQ W2A2": [
            "`recipes/cifar10/resnet20_lsq_w2a2.yaml`",
            Cell((WHOLE,), mean("fp32")),
            Cell((WHOLE,), mean("top1")),
        ]
    },
)
TABLES = (table(), WHOLE_TABLE)
