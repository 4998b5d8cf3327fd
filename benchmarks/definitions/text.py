"""Rows of a small translation Transformer trained without and with DSMM, then rounded: Kundu et al. 2024, Table 2.

German to English of Multi30k; weights alone are rounded, all of them, one grid a tensor.
"""

from __future__ import annotations

from collections.abc import Iterator

from ledger import Row, work_file
from tables import Cell, Table, mean

from .words import live

TRAININGS = {"none": "no regularizer", "dsmm": "DSMM, paper"}
WIDTHS = (8, 4)
TOKENIZER = "$WORK/multi30k.tokenizer.json"
MAKE = f"python benchmarks/make_tokenizer.py {TOKENIZER} " + " ".join(
    f"$QCOMPRESS_DATA/text/multi30k_train.{language}.txt" for language in ("de", "en")
)
CHANGES = (
    *(f"data.{part}.tokenizer={TOKENIZER}" for part in ("train", "calibration", "eval")),
    *("finetune.epochs=8", "finetune.naive_bits=[]", "finetune.kmeans_bits=[]"),
)
"""Eight epochs in place of twenty: about an hour of a processor."""


def start(name: str) -> str:
    """The row that trains."""
    return f"text/multi30k/{name}/seed0"


def name_of(name: str, bits: int) -> str:
    return f"{start(name)}/naive/w{bits}"


def trained(name: str) -> Row:
    command = live("finetune-reg", "", f"text/multi30k_{name}", CHANGES, " --seed 0 --resume")
    return Row(name=start(name), commands=(MAKE, command), figures={"bleu": "1.metrics.bleu"}, seconds=4000)


def rounded(name: str, bits: int) -> Row:
    changes = (*CHANGES, *(f"rules.{rule}.rtn.bits={bits}" for rule in (0, 1)))
    command = live("quantize", work_file(start(name)), f"text/multi30k_{name}", changes)
    figures = {"bleu": "1.accuracy.bleu.artifact", "fp32": "1.accuracy.bleu.baseline"}
    return Row(name=name_of(name, bits), commands=(MAKE, command), figures=figures, seconds=200, needs=(start(name),))


def rows() -> Iterator[Row]:
    for name in TRAININGS:
        yield trained(name)
        yield from (rounded(name, bits) for bits in WIDTHS)


ROWS = tuple(rows())


def table() -> Table:
    lines: dict[str, list[str | Cell]] = {}
    for name, title in TRAININGS.items():
        full = Cell((name_of(name, WIDTHS[0]),), mean("fp32", ".1f"))
        lines[title] = [title, full, *(Cell((name_of(name, bits),), mean("bleu", ".1f")) for bits in WIDTHS)]
    return Table(
        name="text multi30k", columns=("trained with", "FP32:", *(f"naive W{b}:" for b in WIDTHS)), lines=lines
    )


TABLES = (table(),)
