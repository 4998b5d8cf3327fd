"""Sensitivities say what each layer alone costs at each bit width; they are kept as JSON, `qcompress.sensitivity/1`.

Imports no torch. budget.sensitivity measures them, plan.allocate spends by them, report.render draws them.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from qcompress.artifact.manifest import artifact_hash, input_hash
from qcompress.errors import ReportError
from qcompress.types.config import Shape
from qcompress.types.plan import Decision
from qcompress.types.run import RunFigures

if TYPE_CHECKING:
    from pydantic import TypeAdapter

    from qcompress.checkpoint.checkpoint import Checkpoint

SCHEMA = "qcompress.sensitivity/1"
AGAIN = "measure it with `qcompress report CHECKPOINT --sensitivity -r RECIPE`"

DivergenceKind: TypeAlias = Literal["kl", "relative-error"]
"""Between the outputs of both networks: Kullback-Leibler, nats a prediction; or squared error over their energy."""

DivergenceData: TypeAlias = Literal["calibration", "eval"]
"""The part of a recipe's data that divergences are measured on."""


@dataclass(frozen=True, kw_only=True)
class WidthCost:
    """One tensor at one width, everything else as it was.

    bytes           of its codes, packed, and its side information
    relative_error  of the weights: squared error over their energy
    divergence      of the network's output
    metrics         the task's, each by name; empty where the recipe has no task
    """

    bits: int
    bytes: int
    relative_error: float
    divergence: float
    metrics: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class LayerCosts:
    """A tensor that the recipe compresses: its grid in words, and what each width costs, ascending."""

    name: str
    shape: Shape
    method: str
    grid: str
    widths: tuple[WidthCost, ...]

    @property
    def by_width(self) -> Mapping[int, WidthCost]:
        return {cost.bits: cost for cost in self.widths}


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """All that was measured of one checkpoint under one recipe.

    checkpoint          its file name
    input_sha256        of its names, dtypes, shapes and CRC-32s, as in an artifact's manifest
    measured_sha256     of all that the figures depend on besides: model, data, task, the rules' grids, samples, widths
    divergence_data     the part of the recipe's data that divergences were measured on
    divergence_samples  how many of it
    metric_samples      how many samples of data.eval the metrics were measured on; 0 without a task
    higher              metric -> whether more is better
    baseline            metric -> the checkpoint's, on the same samples
    """

    checkpoint: str
    input_sha256: str
    measured_sha256: str
    divergence_kind: DivergenceKind
    divergence_data: DivergenceData
    divergence_samples: int
    metric_samples: int
    higher: Mapping[str, bool]
    baseline: Mapping[str, float]
    layers: tuple[LayerCosts, ...]
    run: RunFigures | None = None

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


def sensitivity_path(checkpoint: Path) -> Path:
    """Where a checkpoint's sensitivities are kept: `model.sensitivity.json` beside `model.safetensors` or `model/`."""
    real = checkpoint.resolve() if checkpoint.name in ("", "..") else checkpoint
    return real.with_name(f"{real.name.removesuffix('.safetensors')}.sensitivity.json")


def checkpoint_sha256(checkpoint: Checkpoint) -> str:
    """That of an artifact's input: names, dtypes, shapes and CRC-32s. Reads every byte."""
    hashes = []
    for shard in checkpoint.shards:
        crcs = {info.name: zlib.crc32(shard.bytes_of(info.name)) for info in shard.tensors}
        hashes.append((shard.path.name, input_hash(shard.tensors, crcs)))
    return artifact_hash(hashes)


def grid_words(decision: Decision) -> str:
    """All of a tensor's grid that is the same at each width: "channel offset", "group 64 symmetric"."""
    config = decision.config
    size = f" {config.group_size}" if config.group_size else ""
    return f"{config.granularity}{size} {config.form}"


def read_sensitivity(path: Path) -> Sensitivity:
    """The sensitivities in a file. Raises ReportError where it is missing, damaged, foreign or of another version."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ReportError(str(path), f"cannot read the sensitivities: {error.strerror}", AGAIN) from None
    except (ValueError, RecursionError):
        raise ReportError(str(path), "is not JSON", AGAIN) from None
    schema = document.get("schema") if isinstance(document, dict) else None
    if schema != SCHEMA:
        newer = isinstance(schema, str) and schema.startswith("qcompress.sensitivity/")
        what = f"has schema {schema!r}, and this version reads {SCHEMA}" if newer else "holds no sensitivities"
        raise ReportError(str(path), what, AGAIN)
    return _checked(document, path)


def _checked(document: Mapping[str, object], path: Path) -> Sensitivity:
    """The nouns of a document. Raises ReportError for figures that cannot be."""
    from pydantic import ValidationError

    fields = {key: value for key, value in document.items() if key != "schema"}
    try:
        found = _reader().validate_json(json.dumps(fields))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise ReportError(str(path), f"is damaged at {place}: {first['msg']}", AGAIN) from None
    names = [layer.name for layer in found.layers]
    for layer in found.layers:
        bits = [cost.bits for cost in layer.widths]
        sound = all(cost.bytes > 0 and cost.divergence >= 0 and cost.relative_error >= 0 for cost in layer.widths)
        if not bits or bits != sorted(set(bits)) or not sound:
            raise ReportError(str(path), f"is damaged at layer {layer.name!r}: widths or costs that cannot be", AGAIN)
    if len(set(names)) < len(names) or found.higher.keys() != found.baseline.keys():
        raise ReportError(str(path), "is damaged: a layer or a metric is there twice, or half", AGAIN)
    return found


@cache
def _reader() -> TypeAdapter[Sensitivity]:
    from pydantic import TypeAdapter

    return TypeAdapter(Sensitivity)


def sensitivity_schema() -> dict[str, Any]:
    """The JSON Schema of a file of sensitivities."""
    schema = _reader().json_schema()
    schema["properties"] = {"schema": {"const": SCHEMA}, **schema["properties"]}
    schema["required"] = ["schema", *schema["required"]]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "qcompress sensitivities"}


def refuse_foreign(found: Sensitivity, path: Path, checkpoint: Checkpoint) -> None:
    """Raise ReportError where sensitivities are of another checkpoint. Reads every byte of it."""
    if found.input_sha256 != checkpoint_sha256(checkpoint):
        what = f"was measured on another checkpoint than {checkpoint.path} (its hash differs)"
        raise ReportError(str(path), what, AGAIN)
