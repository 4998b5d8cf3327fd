"""Sensitivities say what each layer alone costs at each bit width; they are kept as JSON, `qcompress.sensitivity/1`.

Imports no torch. budget.sensitivity measures them, plan.allocate spends by them, report.render draws them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

from qcompress.artifact.hashes import artifact_hash, input_hash
from qcompress.errors import BudgetError, ReportError
from qcompress.types.config import Shape
from qcompress.types.document import Document
from qcompress.types.figures import NotNegative, Positive, figure
from qcompress.types.files import is_there
from qcompress.types.plan import Decision, Recipe
from qcompress.types.run import RunFigures

if TYPE_CHECKING:
    from qcompress.checkpoint.checkpoint import Checkpoint

AGAIN = "measure it with `qcompress report CHECKPOINT --sensitivity -r RECIPE`"

DivergenceKind: TypeAlias = Literal["kl", "relative-error"]
"""Between the outputs of both networks: Kullback-Leibler, nats a prediction; or squared error over their energy."""

DivergenceData: TypeAlias = Literal["calibration", "eval"]
"""The part of a recipe's data that divergences are measured on."""


@dataclass(frozen=True, kw_only=True)
class WidthCost:
    """One tensor at one width, everything else as it was."""

    # fmt: off
    bits: int
    bytes: Positive
    relative_error: NotNegative
    divergence: NotNegative = field(metadata=figure(
        "divergence", "number",
        "of the network's output with one layer quantized from its output as it was; 0 is none"))
    metrics: Mapping[str, float] = field(metadata=figure(
        "metrics", "", "the task's metrics with one layer quantized", "empty where the recipe has no task"))
    # fmt: on


@dataclass(frozen=True, kw_only=True)
class LayerCosts:
    """A tensor that the recipe compresses: its grid in words, and what each width costs, ascending."""

    # fmt: off
    name: str
    shape: Shape
    method: str
    grid: str = field(metadata=figure("grid", "text", "granularity and form of a layer's grid, the same at each width"))
    widths: tuple[WidthCost, ...] = field(metadata=figure(
        "measured widths", "", "what one layer costs at each width, ascending"))
    # fmt: on

    def __post_init__(self) -> None:
        bits = [cost.bits for cost in self.widths]
        if not bits or bits != sorted(set(bits)):
            raise ValueError("its widths do not ascend")

    @property
    def by_width(self) -> Mapping[int, WidthCost]:
        return {cost.bits: cost for cost in self.widths}


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """All that was measured of one checkpoint under one recipe."""

    # fmt: off
    checkpoint: str = field(metadata=figure(
        "checkpoint file", "text", "file name of the checkpoint that was measured, or trained from"))
    input_sha256: str
    measured_sha256: str = field(metadata=figure(
        "measured SHA-256", "text",
        "of model, data, task, grids, widths and samples, on which sensitivities depend"))
    divergence_kind: DivergenceKind = field(metadata=figure(
        "kind of divergence", "text",
        "kl: Kullback-Leibler, nats a prediction; relative-error: squared error over energy",
        "kl for tasks that predict classes or tokens; else Σ(y − ŷ)² / Σy² of the outputs"))
    divergence_data: DivergenceData = field(metadata=figure(
        "divergence data", "text", "the part of the recipe's data that divergences were measured on",
        "calibration where there is any"))
    divergence_samples: int = field(metadata=figure(
        "divergence samples", "count", "how many samples divergences were measured on"))
    metric_samples: int = field(metadata=figure(
        "metric samples", "count", "how many samples of data.eval the metrics were measured on", "0 without a task"))
    higher: Mapping[str, bool] = field(metadata=figure("higher", "", "whether more of a metric is better"))
    baseline: Mapping[str, float]
    layers: tuple[LayerCosts, ...]
    run: RunFigures | None = None
    # fmt: on

    def __post_init__(self) -> None:
        if len({layer.name for layer in self.layers}) < len(self.layers):
            raise ValueError("a layer is there twice")
        if self.higher.keys() != self.baseline.keys():
            raise ValueError("a metric is there by half")

    @property
    def metric(self) -> str | None:
        """The task's headline."""
        return next(iter(self.baseline), None)

    @property
    def bits(self) -> tuple[int, ...]:
        """Every width that any layer was measured at, ascending."""
        return tuple(sorted({cost.bits for layer in self.layers for cost in layer.widths}))

    def drop(self, cost: WidthCost) -> float | None:
        """How much worse the headline is at this width of one layer; None where it was not measured."""
        name = self.metric
        if name is None or name not in cost.metrics:
            return None
        sign = 1.0 if self.higher[name] else -1.0
        return sign * (self.baseline[name] - cost.metrics[name])


def sensitivity_file(recipe: Recipe) -> Path | None:
    """The file of sensitivities that a recipe's budget names: from its folder, or from QCOMPRESS_DATA.

    raises  BudgetError where it is in neither
    """
    if recipe.budget is None or recipe.budget.sensitivity is None:
        return None
    base = os.environ.get("QCOMPRESS_DATA")
    for folder in (recipe.root, *([Path(base)] if base else [])):
        if is_there(folder / recipe.budget.sensitivity):
            return folder / recipe.budget.sensitivity
    raise BudgetError(f"{recipe.place('budget')}.sensitivity", f"{recipe.budget.sensitivity!r} is not there", AGAIN)


def sensitivity_path(checkpoint: Path) -> Path:
    """Where a checkpoint's sensitivities are kept: `model.sensitivity.json` beside `model.safetensors` or `model/`."""
    real = checkpoint.resolve() if checkpoint.name in ("", "..") else checkpoint
    return real.with_name(f"{real.name.removesuffix('.safetensors')}.sensitivity.json")


def checkpoint_sha256(checkpoint: Checkpoint) -> str:
    """That of an artifact's input: names, dtypes, shapes and CRC-32s. Reads every byte."""
    hashes = []
    for shard in checkpoint.shards:
        crcs = {info.name: shard.crc32_of(info.name) for info in shard.tensors}
        hashes.append((shard.path.name, input_hash(shard.tensors, crcs)))
    return artifact_hash(hashes)


def grid_words(decision: Decision) -> str:
    """All of a tensor's grid that is the same at each width: "channel offset", "group 64 symmetric"."""
    config = decision.config
    size = f" {config.group_size}" if config.group_size else ""
    return f"{config.granularity}{size} {config.form}"


SENSITIVITY = Document(Sensitivity, "qcompress.sensitivity/1", "file of sensitivities", AGAIN, digits=9)


def read_sensitivity(path: Path) -> Sensitivity:
    """The sensitivities in a file. Raises ReportError where it is missing, damaged, foreign or of another version."""
    return SENSITIVITY.read(path)


def refuse_foreign(found: Sensitivity, path: Path, checkpoint: Checkpoint) -> None:
    """Raise ReportError where sensitivities are of another checkpoint. Reads every byte of it."""
    if found.input_sha256 != checkpoint_sha256(checkpoint):
        what = f"was measured on another checkpoint than {checkpoint.path} (its hash differs)"
        raise ReportError(str(path), what, AGAIN)
