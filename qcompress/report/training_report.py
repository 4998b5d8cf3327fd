"""A training report says what a run did to a checkpoint: accuracy, layers, naive quantization. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from qcompress.report.document import AccuracyFigures, GateResult
from qcompress.report.view import (
    NOT_MEASURED,
    Column,
    Table,
    View,
    accuracy_line,
    count_words,
    gate_words,
    number_words,
    shape_words,
    share_words,
)
from qcompress.types.run import Json, RunFigures

SCHEMA = "qcompress.training/1"


@dataclass(frozen=True, kw_only=True)
class WeightFigures:
    """One weight as it is.

    range            largest less smallest
    range_over_std   that in standard deviations; None where all weights are equal
    outlier_share    beyond 1.5 interquartile ranges from the quartiles
    kurtosis         3 for a normal distribution; None where all weights are equal
    sqnr_db          bits -> signal-to-noise ratio of naive quantization, per channel; None where it is exact
    """

    range: float
    range_over_std: float | None
    outlier_share: float
    kurtosis: float | None
    sqnr_db: Mapping[str, float | None] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class TrainedLayer:
    """One weight before and after training.

    before       None where there was no checkpoint
    regularizer  None where no rule matches
    temperature  alpha of dsmm, the mean over channels where they have one each
    soft_range   the range that dsmm sees
    dead         representatives that no weight is nearest to
    """

    name: str
    shape: tuple[int, ...]
    before: WeightFigures | None
    after: WeightFigures
    regularizer: str | None = None
    strength: float | None = None
    penalty: float | None = None
    temperature: float | None = None
    soft_range: float | None = None
    dead: int | None = None


@dataclass(frozen=True, kw_only=True)
class TrialFigures:
    """What compressing all layers gives with nothing else done, by naive quantization or by k-means.

    metric   the task's headline; before and after are None where nothing is measured
    sqnr_db  over all layers' weights together
    """

    bits: int
    metric: str | None
    before: float | None
    after: float | None
    sqnr_db_before: float | None
    sqnr_db_after: float | None


@dataclass(frozen=True, kw_only=True)
class TrainingReport:
    """All that is known about one training run. accuracy is of the checkpoint before and after.

    naive   round to nearest on the min-max range, a grid a channel
    kmeans  the codebook of least squared error, one a tensor
    """

    output: str
    checkpoint: str | None
    recipe_hash: str
    steps: int
    epochs: int
    kept_epoch: int
    loss: float
    epoch_metrics: tuple[Mapping[str, float], ...]
    accuracy: tuple[AccuracyFigures, ...] | None
    metrics: Mapping[str, float]
    naive: tuple[TrialFigures, ...]
    kmeans: tuple[TrialFigures, ...]
    layers: tuple[TrainedLayer, ...]
    warnings: tuple[str, ...] = ()
    gates: tuple[GateResult, ...] = ()
    run: RunFigures | None = None


BESIDE = {
    "log.jsonl": "the training log",
    "reg.safetensors": "the file of learned representatives",
    "last-good.safetensors": "the file of last good weights",
}
"""What lies beside a trained checkpoint besides its report, and how it is called."""


def training_path(output: Path, kind: str = "report.json") -> Path:
    """What lies beside a trained checkpoint: `model-dsmm.report.json`, `.log.jsonl`, `.reg.safetensors`."""
    return output.with_name(f"{output.name.removesuffix('.safetensors')}.{kind}")


def training_text(report: TrainingReport) -> str:
    """The report as JSON, ending with a line break."""
    return json.dumps({"schema": SCHEMA, **asdict(report)}, indent=2, ensure_ascii=False) + "\n"


def training_schema() -> dict[str, Json]:
    """The JSON Schema (draft 2020-12) of the report."""
    from pydantic import TypeAdapter

    schema = TypeAdapter(TrainingReport).json_schema()
    schema["properties"] = {"schema": {"const": SCHEMA}, **schema["properties"]}
    schema["required"] = ["schema", *schema["required"]]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def view_training(report: TrainingReport) -> View:
    """The report as a table of what all layers give compressed, and one of the layers."""
    source = report.checkpoint or "nothing: trained from scratch"
    facts = [("from", source), ("steps", f"{report.steps:,} in {count_words(report.epochs, 'epoch')}")]
    facts.append(("loss", number_words(report.loss)))
    if report.accuracy is not None:
        facts += [("accuracy", accuracy_line(one)) for one in report.accuracy]
    elif report.metrics:
        facts += [("accuracy", f"{name} {value:.4g}") for name, value in report.metrics.items()]
    tables = [table for table in (_trial_table(report), _layer_table(report.layers)) if table.rows]
    notes = [gate_words(gate) for gate in report.gates]
    return View(report.output, tuple(facts), tuple(tables), tuple(notes))


def _trial_table(report: TrainingReport) -> Table:
    columns = [Column("compressed by", right=False), Column("metric", right=False)]
    columns += [Column(title) for title in ("before", "after", "SQNR dB before", "after")]
    rows = []
    for name, trials in (("naive", report.naive), ("k-means", report.kmeans)):
        for one in trials:
            values = (one.before, one.after, one.sqnr_db_before, one.sqnr_db_after)
            words = (number_words(value, 4) for value in values)
            rows.append((f"{name}, {count_words(one.bits, 'bit')}", one.metric or NOT_MEASURED, *words))
    return Table(tuple(columns), tuple(rows))


def _layer_table(layers: Sequence[TrainedLayer]) -> Table:
    columns = [Column("layer", right=False), Column("shape", spare=5), Column("regularizer", right=False)]
    columns += [Column("range/std"), Column("after"), Column("outliers", spare=1), Column("after", spare=1)]
    columns += [
        Column("kurtosis", spare=2),
        Column("after", spare=2),
        Column("alpha", spare=3),
        Column("dead", spare=4),
    ]
    rows = []
    for one in layers:
        pairs = []
        for name, words in (
            ("range_over_std", number_words),
            ("outlier_share", share_words),
            ("kurtosis", number_words),
        ):
            pairs += [words(getattr(side, name)) if side else NOT_MEASURED for side in (one.before, one.after)]
        dead = NOT_MEASURED if one.dead is None else str(one.dead)
        regularizer = one.regularizer or NOT_MEASURED
        rows.append((one.name, shape_words(one.shape), regularizer, *pairs, number_words(one.temperature), dead))
    return Table(tuple(columns), tuple(rows))


def view_training_plan(rows: Sequence[Mapping[str, Any]]) -> View:
    """The table that --dry-run prints: weights, regularizers, strengths and why."""
    columns = (
        Column("weight", right=False),
        Column("shape", spare=1),
        Column("regularizer", right=False),
        Column("strength"),
        Column("why", right=False),
    )
    cells = [
        (
            row["name"],
            shape_words(tuple(row["shape"])),
            row["regularizer"] or NOT_MEASURED,
            number_words(row["strength"]),
            row["reason"],
        )
        for row in rows
    ]
    return View("training", (), (Table(columns, tuple(cells)),), ())
