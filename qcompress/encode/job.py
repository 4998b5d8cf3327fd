"""One weight on its way through an encoder: what it is read from, what a look at it tells, and what it became."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import numpy as np
import torch

from qcompress.artifact.entry import Entry
from qcompress.artifact.writer import SlotWriter
from qcompress.checkpoint.checkpoint import StackedRows, StoredRows, tensor_view
from qcompress.checkpoint.safetensors_file import Container
from qcompress.coding.rows import rows_from_weight
from qcompress.coding.stored import Stored
from qcompress.encode.encode_weight import ContextSources
from qcompress.errors import CheckpointError, Subject
from qcompress.report.document import LayerFigures
from qcompress.types.config import CodingChoice
from qcompress.types.encoded import Compressed, Constant, Encoded, Unbounded
from qcompress.types.plan import Decision, TensorInfo, row_shape

if TYPE_CHECKING:
    from torch import Tensor

BLOCK_WEIGHTS = 1 << 19
FLOAT32_MAX = float(np.finfo(np.float32).max)
FLOAT32_LEAST = float(np.finfo(np.float32).tiny)
MAGNITUDES = {"F64": ("i8", "u8"), "F32": ("i4", "u4"), "F16": ("i2", "u2"), "BF16": ("i2", "u2")}
CompressedT = TypeVar("CompressedT", bound=Compressed)

Rows: TypeAlias = "Tensor | StoredRows | StackedRows"
"""A weight [rows, ...], read row block by row block where it lies so that it can be."""


class Stopped(Exception):
    """Another part of the run failed or was interrupted."""


@dataclass(frozen=True)
class Survey:
    """What a pass over a tensor's bytes tells: their CRC-32, and of weights the largest |weight|, maybe NaN or Inf."""

    crc32: int
    largest: float

    @property
    def finite(self) -> bool:
        return self.largest <= FLOAT32_MAX


@dataclass(frozen=True)
class Job:
    """One weight to encode.

    ready      its codes, where a method on a live model has chosen them already
    reference  the float weight that those codes stand for, where that is not the checkpoint's
    pooled     whether the codes, unbounded ones, wait for others
    """

    source: Container
    decision: Decision
    writer: SlotWriter
    choice: CodingChoice
    device: str
    ready: Encoded | None = None
    reference: Tensor | None = None
    sources: ContextSources = field(default_factory=ContextSources)
    pooled: bool = False


@dataclass(frozen=True)
class Finished:
    """One tensor, encoded: what manifest and report say of it, and its codes if they still have to be written.

    unbounded   codes that wait for the others of their pool
    side_bytes  what of the payload is side information
    """

    decision: Decision
    entry: Entry
    figures: LayerFigures
    input_crc32: int
    payload: Stored | None
    unbounded: Unbounded | None = None
    side_bytes: int = 0


def survey_of(job: Job) -> Survey:
    """The survey of a job's weight. Raises CheckpointError where float32 does not hold it."""
    source, tensor = job.source, job.decision.tensor
    survey = survey_bytes(source.pieces_of(tensor.name), tensor.dtype)
    refuse_out_of_range(source, tensor, survey)
    return survey


def survey_bytes(pieces: Iterable[memoryview], dtype: str) -> Survey:
    """The survey of a tensor's bytes, in pieces of whole values; `largest` is 0 for dtypes that are not weights."""
    crc, signed_top, unsigned_top = 0, 0, 0
    formats = MAGNITUDES.get(dtype)
    for piece in pieces:
        crc = zlib.crc32(piece, crc)
        if formats is not None:
            # Bit patterns of floats of one sign are ordered like their magnitudes, NaN and Inf above all.
            top = int(np.frombuffer(piece, dtype=f"<{formats[0]}").max())
            signed_top = max(signed_top, top & ((1 << (8 * int(formats[0][1]) - 1)) - 1))
            unsigned_top = max(unsigned_top, int(np.frombuffer(piece, dtype=f"<{formats[1]}").max()))
    if formats is None:
        return Survey(crc, 0.0)
    size = int(formats[0][1])
    bits = max(signed_top, unsigned_top & ((1 << (8 * size - 1)) - 1))
    return Survey(crc, _float_from_bits(bits, dtype, size))


def _float_from_bits(bits: int, dtype: str, size: int) -> float:
    if dtype == "BF16":
        bits, size = bits << 16, 4
    return float(np.frombuffer(bits.to_bytes(size, "little"), dtype=f"<f{size}")[0])


def count_nonfinite(weight: Tensor) -> int:
    """How many values are NaN, Inf, or beyond float32."""
    flat = weight.reshape(-1)
    parts = (flat[start : start + BLOCK_WEIGHTS] for start in range(0, flat.numel(), BLOCK_WEIGHTS))
    return sum(part.numel() - int(torch.isfinite(part.float()).sum()) for part in parts)


def refuse_out_of_range(source: Container, tensor: TensorInfo, survey: Survey) -> None:
    """Raise CheckpointError for a weight that is not finite, or whose largest value float32 does not hold any more."""
    if not survey.finite:
        raise nonfinite_error(source, tensor, count_nonfinite(tensor_view(source, tensor)))
    if tensor.dtype == "F64" and 0 < survey.largest < FLOAT32_LEAST:
        what = f"its largest value, {survey.largest:.3g}, is below those that float32 holds"
        hint = "scale the weight, or keep it by a rule"
        cause = "their largest values are below those that float32 holds"
        raise CheckpointError(str(source.path), what, hint, Subject(tensor.name), cause)


def nonfinite_error(source: Container, tensor: TensorInfo, count: int) -> CheckpointError:
    """What to say of a weight that cannot be compressed because `count` of its values are no numbers."""
    what = f"{count} of its {tensor.numel} values are NaN, Inf or beyond float32"
    hint = "repair the checkpoint, or keep such tensors, by rules or, without a model, by --skip-nonfinite"
    cause = "some of their values are NaN, Inf or beyond float32"
    return CheckpointError(str(source.path), what, hint, Subject(tensor.name), cause)


def rows_of(job: Job) -> Rows:
    """What the codes stand for as [rows, ...]: read row block by row block where the channels lead in the file."""
    if job.reference is not None:
        return rows_from_weight(job.reference, job.decision.axis)
    return stored_rows(job.source, job.decision)


def stored_rows(source: Container, decision: Decision) -> Rows:
    """The weight of a decision as [rows, ...], as it lies in its file."""
    tensor, axis = decision.tensor, decision.axis
    if len(tensor.shape) > 1 and axis == tuple(range(len(axis))):
        return StoredRows(source, tensor, row_shape(tensor.shape, axis))
    if len(tensor.shape) == 3 and axis == (0, 2) and tensor.numel:
        return StackedRows(source, tensor)
    return rows_from_weight(tensor_view(source, tensor), axis)


def float_rows(rows: Tensor) -> Tensor:
    return rows.to(device="cpu", dtype=torch.float32).contiguous()


def coded_on_cpu(encoded: CompressedT) -> CompressedT:
    """The codes and their grid on the CPU."""
    if isinstance(encoded, Constant) or encoded.codes.device.type == "cpu":
        return encoded
    values: dict[str, Any] = {part.name: getattr(encoded, part.name) for part in fields(encoded)}
    moved: Any = {name: value.cpu() for name, value in values.items() if isinstance(value, torch.Tensor)}
    return replace(encoded, **moved)
