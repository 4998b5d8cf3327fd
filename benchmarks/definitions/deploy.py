"""Rows of what other tools make of an artifact, and of computing from codes, on language models."""

from __future__ import annotations

from ledger import Row
from tables import Table

from .words import sets

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

ROWS = (Row(name=SHAKESPEARE, commands=(SPLIT, TRAIN), figures={"perplexity": "1.metrics.perplexity"}, seconds=1200),)

TABLES: tuple[Table, ...] = ()
