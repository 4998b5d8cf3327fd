"""Rows of what other tools make of an artifact, and of computing from codes, on language models."""

from __future__ import annotations

from collections.abc import Mapping

from ledger import Line, Row, work_file
from tables import Cell, Table, figure_of

from .words import STORIES, sets

SHAKESPEARE = "deploy/shakespeare"
TEXT = "$WORK/shakespeare"
SPLIT = f"python benchmarks/make_text.py {TEXT} $QCOMPRESS_DATA/text/tinyshakespeare.txt"
READS = tuple(
    f"data.{part}.{key}={TEXT}/{name}"
    for part in ("train", "eval")
    for key, name in (("text", f"{part}.txt"), ("tokenizer", "tokenizer.json"))
)
RECIPE = "benchmarks/recipes/shakespeare_llama.yaml"
TRAIN = f"qcompress finetune-reg -r {RECIPE}{sets(READS)} --seed 0 --resume --threads 1 --force -o $OUT --json -"

FOLDERS = {
    "stories": f"python benchmarks/make_llama.py stories $WORK/stories {STORIES} --hidden 192",
    "shakespeare": f"python benchmarks/make_llama.py recipe $WORK/shakespeare-llama {work_file(SHAKESPEARE)} {RECIPE} "
    f"{TEXT}/tokenizer.json",
    "random": "python benchmarks/make_llama.py random $WORK/random",
}
TEXTS = {
    "stories": "$WORK/stories --npz $QCOMPRESS_DATA/stories/stories.npz",
    "shakespeare": f"$WORK/shakespeare-llama --text {TEXT}/eval.txt --rows 40",
}
GROUPS = {"stories": 32, "random": 64}


def consumers(network: str) -> Row:
    command = f"python benchmarks/consumers.py {TEXTS[network]} --work $WORK/consumers-{network} --json -"
    return Row(
        name=f"deploy/consumers/{network}",
        commands=(FOLDERS[network], command),
        figures={"all": "1"},
        seconds=150 if network == "stories" else 400,
        needs=(SHAKESPEARE,) if network == "shakespeare" else (),
    )


def held(network: str) -> Row:
    command = f"python benchmarks/held.py $WORK/{network} --group {GROUPS[network]} --work $WORK/held --json -"
    return Row(
        name=f"deploy/held/{network}",
        commands=(FOLDERS[network], command),
        figures={"all": "1"},
        seconds=100 if network == "stories" else 300,
        tolerance=0.25,
    )


ROWS = (
    Row(name=SHAKESPEARE, commands=(SPLIT, TRAIN), figures={"perplexity": "1.metrics.perplexity"}, seconds=1200),
    *(consumers(network) for network in TEXTS),
    *(held(network) for network in GROUPS),
)

KINDS = {
    "dense, float32": "dense",
    **{f"llama.cpp, {kind}": f"gguf, {kind}" for kind in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")},
    **{f"mlx-lm, {bits} bits": f"mlx, {bits} bits" for bits in (2, 3, 4, 8)},
    **{f"compressed-tensors, {bits} bits": f"compressed-tensors, {bits} bits" for bits in (3, 4, 8)},
}
"""Tool and grid -> the measurement."""
QUALITY = {
    "artifact, bytes": ("artifact", ",.0f"),
    "export, bytes": ("bytes", ",.0f"),
    "the tool's own, bytes": ("own bytes", ",.0f"),
    "perplexity": ("perplexity", ".4g"),
    "of the tool's own": ("own perplexity", ".4g"),
}
COST = {
    "MB held": ("MB", ".3g"),
    "times less": ("times smaller", ".2f"),
    "CPU ms a token": ("ms", ".3g"),
    "times the dense": ("ratio", ".2f"),
}
HELD = tuple(
    f"{dtype}, {way}"
    for dtype, ways in {
        "float32": ("dense", "decode", "compiled decode"),
        "bfloat16": ("dense", "decode", "compiled decode", "kernel"),
    }.items()
    for way in ways
)


def table(row: str, name: str, first: str, columns: Mapping[str, tuple[str, str]], lines: Mapping[str, str]) -> Table:
    """A line a measurement of a row, whose figures are a list of named ones."""

    def cell(key: str, form: str, measurement: str) -> Cell:
        def text(found: list[Line]) -> str:
            try:
                return format(figure_of(found[0], f"all|{measurement}|{key}"), form)
            except TypeError:
                return "-"

        return Cell((row,), text)

    cells: dict[str, list[str | Cell]] = {
        title: [title, *(cell(key, form, measurement) for key, form in columns.values())]
        for title, measurement in lines.items()
    }
    return Table(name=name, columns=(first, *(f"{column}:" for column in columns)), lines=cells)


TABLES = (
    *(
        table(f"deploy/consumers/{network}", f"consumers {network}", "tool and grid", QUALITY, KINDS)
        for network in TEXTS
    ),
    *(
        table(f"deploy/held/{network}", f"held {network}", "way", COST, dict(zip(HELD, HELD, strict=True)))
        for network in GROUPS
    ),
)
