"""Rows of text, without and with DSMM: Kundu et al. 2024, Tables 2 and 6.

A small Transformer translates German to English of Multi30k; its weights alone are rounded, all of them, one grid a
tensor. A small network of MobileBERT's shape tells the sentiment of SST-2's sentences, and is shared by DKM.
"""

from __future__ import annotations

import itertools
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


SEEDS = (0, 1, 2)
BITS = (1, 2)
SENTENCES = "python benchmarks/make_sentences.py $WORK/sst2 " + " ".join(
    f"$QCOMPRESS_DATA/text/sst2_{part}.tsv" for part in ("train", "dev")
)
ARRAYS = ("data.train.npz=$WORK/sst2/sst2_train.npz", "data.eval.npz=$WORK/sst2/sst2_dev.npz")


def classifier(name: str, seed: int) -> str:
    """The row that trains."""
    return f"text/sst2/{name}/seed{seed}"


def shared_name(name: str, bits: int, seed: int) -> str:
    return f"{classifier(name, seed)}/dkm/{bits}-1"


def trained_classifier(name: str, seed: int) -> Row:
    changes = (*ARRAYS, "finetune.naive_bits=[]", "finetune.kmeans_bits=[]")
    command = live("finetune-reg", "", f"text/mobilebert_sst2_{name}", changes, f" --seed {seed} --resume")
    figures = {"accuracy": "1.metrics.accuracy"}
    return Row(name=classifier(name, seed), commands=(SENTENCES, command), figures=figures, seconds=300)


def shared(name: str, bits: int, seed: int) -> Row:
    source = classifier(name, seed)
    changes = (*ARRAYS, f"rules.1.dkm.bits={bits}")
    return Row(
        name=shared_name(name, bits, seed),
        commands=(SENTENCES, live("cluster", work_file(source), "text/mobilebert_sst2_dkm", changes)),
        figures={
            "accuracy": "1.accuracy.accuracy.artifact",
            "kmeans": "1.accuracy.accuracy.kmeans",
            "fp32": "1.accuracy.accuracy.baseline",
        },
        seconds=200,
        needs=(source,),
    )


def rows() -> Iterator[Row]:
    for name in TRAININGS:
        yield trained(name)
        yield from (rounded(name, bits) for bits in WIDTHS)
    for seed, name in itertools.product(SEEDS, TRAININGS):
        yield trained_classifier(name, seed)
        yield from (shared(name, bits, seed) for bits in BITS)


ROWS = tuple(rows())


def table() -> Table:
    lines: dict[str, list[str | Cell]] = {}
    for name, title in TRAININGS.items():
        full = Cell((name_of(name, WIDTHS[0]),), mean("fp32", ".1f"))
        lines[title] = [title, full, *(Cell((name_of(name, bits),), mean("bleu", ".1f")) for bits in WIDTHS)]
    return Table(
        name="text multi30k", columns=("trained with", "FP32:", *(f"naive W{b}:" for b in WIDTHS)), lines=lines
    )


def classifiers() -> Table:
    lines: dict[str, list[str | Cell]] = {}
    for name, title in {"none": "no regularizer", "dsmm": "DSMM, strength 1, decoupled"}.items():
        at = {bits: tuple(shared_name(name, bits, seed) for seed in SEEDS) for bits in BITS}
        cells = [Cell(at[bits], mean(figure, ".3f")) for figure in ("kmeans", "accuracy") for bits in BITS]
        lines[title] = [title, Cell(at[BITS[0]], mean("fp32", ".3f")), *cells]
    columns = (f"{method} {bits} bit{'s' * (bits > 1)}:" for method in ("k-means", "DKM") for bits in BITS)
    return Table(name="text sst2", columns=("trained with", "FP32:", *columns), lines=lines)


TABLES = (table(), classifiers())
