"""A training report says what a run did to a checkpoint: accuracy, layers, naive quantization. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from qcompress.report.document import AccuracyFigures, GateResult
from qcompress.types.document import Document
from qcompress.types.figures import figure
from qcompress.types.run import RunFigures


@dataclass(frozen=True, kw_only=True)
class WeightFigures:
    """One weight as it is. null where all weights are equal."""

    # fmt: off
    range: float = field(metadata=figure("range", "number", "the largest less the smallest weight"))
    range_over_std: float | None = field(metadata=figure(
        "range over deviation", "number", "the range of a weight in its standard deviations", short="range/std"))
    outlier_share: float
    kurtosis: float | None
    sqnr_db: Mapping[str, float | None] = field(default_factory=dict, metadata=figure(
        "SQNR", "", "bits -> SQNR of naive quantization, a grid a channel; null where it is exact"))
    # fmt: on


@dataclass(frozen=True, kw_only=True)
class TrainedLayer:
    """One weight before and after training."""

    # fmt: off
    name: str
    shape: tuple[int, ...]
    before: WeightFigures | None = field(metadata=figure(
        "before", "number", "before training; null where there was no checkpoint"))
    after: WeightFigures = field(metadata=figure("after", "number", "after training"))
    regularizer: str | None = field(default=None, metadata=figure(
        "regularizer", "text", "the penalty on a weight in training", "null where no rule matches"))
    strength: float | None = field(default=None, metadata=figure(
        "strength", "number", "the factor of a weight's penalty"))
    penalty: float | None = field(default=None, metadata=figure(
        "penalty", "number", "the penalty of a weight at the end, without its strength"))
    temperature: float | None = field(default=None, metadata=figure(
        "temperature", "number", "alpha of dsmm, the mean over channels where they have one each",
        short="alpha", spare=3))
    soft_range: float | None = field(default=None, metadata=figure("soft range", "number", "the range that dsmm sees"))
    dead: int | None = field(default=None, metadata=figure(
        "dead", "count", "representatives that no weight is nearest to", spare=4))
    # fmt: on


@dataclass(frozen=True, kw_only=True)
class TrialFigures:
    """What compressing all layers gives with nothing else done, by naive quantization or by k-means.

    `metric` is the task's headline; before and after are null where nothing is measured.
    """

    # fmt: off
    bits: int
    metric: str | None
    before: float | None
    after: float | None
    sqnr_db_before: float | None = field(metadata=figure(
        "SQNR before", "decibels", "of all layers' weights together, before training", short="SQNR dB before"))
    sqnr_db_after: float | None = field(metadata=figure(
        "SQNR after", "decibels", "of all layers' weights together, after training", short="SQNR dB after"))
    # fmt: on


@dataclass(frozen=True, kw_only=True)
class TrainingReport:
    """All that is known about one training run. accuracy is of the checkpoint before and after."""

    # fmt: off
    output: str = field(metadata=figure("output", "text", "file name of the checkpoint that was written"))
    checkpoint: str | None
    recipe_hash: str
    steps: int = field(metadata=figure("steps", "count", "steps of the optimizer"))
    epochs: int = field(metadata=figure("epochs", "count", "times that all training data were seen"))
    kept_epoch: int = field(metadata=figure("kept epoch", "count", "the epoch whose weights were kept"))
    loss: float = field(metadata=figure("loss", "number", "the mean loss of the last epoch, without penalties"))
    epoch_metrics: tuple[Mapping[str, float], ...] = field(metadata=figure(
        "metrics by epoch", "", "the task's metrics after each epoch"))
    accuracy: tuple[AccuracyFigures, ...] | None
    metrics: Mapping[str, float] = field(metadata=figure("metrics", "", "the task's metrics after training"))
    naive: tuple[TrialFigures, ...] = field(metadata=figure(
        "naive quantization", "", "rounding to nearest on the min-max range, a grid a channel, nothing else done"))
    kmeans: tuple[TrialFigures, ...] = field(metadata=figure(
        "k-means", "", "the codebook of least squared error, one a tensor, nothing else done"))
    layers: tuple[TrainedLayer, ...] = field(metadata=figure("layers", "", "every weight before and after"))
    warnings: tuple[str, ...] = ()
    gates: tuple[GateResult, ...] = ()
    run: RunFigures | None = None
    # fmt: on


TRAINING = Document(TrainingReport, "qcompress.training/1", "training report", "train again", digits=None)


BESIDE = {
    "log.jsonl": "the training log",
    "reg.safetensors": "the file of learned representatives",
    "last-good.safetensors": "the file of last good weights",
}
"""What lies beside a trained checkpoint besides its report, and how it is called."""


def training_path(output: Path, kind: str = "report.json") -> Path:
    """What lies beside a trained checkpoint: `model-dsmm.report.json`, `.log.jsonl`, `.reg.safetensors`."""
    return output.with_name(f"{output.name.removesuffix('.safetensors')}.{kind}")
