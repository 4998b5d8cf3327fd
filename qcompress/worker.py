"""One tensor on its way: surveyed, cut into row blocks, encoded, packed, measured, and handed to the writer.

Runs on a thread of its own for each tensor. Every block fits the cache, so that the passes over it cost little.
"""

from __future__ import annotations

import threading
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch

from qcompress.artifact.layout import PARTS, grid_of, lattice_entry, part_name
from qcompress.artifact.manifest import Entry
from qcompress.artifact.writer import SlotWriter
from qcompress.books import Evidence
from qcompress.checkpoint import tensor_view
from qcompress.coding.affine import Coded, decode_rows, row_spans, take_rows
from qcompress.coding.codebook import centroid_values, with_entries
from qcompress.coding.half import exponent_for
from qcompress.coding.lattice import step_value
from qcompress.coding.lattice_payload import encode_pool, join_side
from qcompress.coding.packing import pack, row_bytes
from qcompress.coding.payload import Coding, CodingChoice, encode_payload
from qcompress.coding.rows import dim_of, rows_from_weight, stored_codebook_shape
from qcompress.container import Container
from qcompress.encoded import Affine, Codebook, Encoded, Lattice
from qcompress.errors import CheckpointError
from qcompress.model.live import seeded_generator
from qcompress.model.statistics import read_statistics, refuse_misfit
from qcompress.registry import METHODS
from qcompress.report.codebooks import codebook_figures
from qcompress.report.counts import count_values
from qcompress.report.document import LayerFigures
from qcompress.report.figures import LayerMeter, unclipped_range
from qcompress.representatives import read_representatives
from qcompress.types import Decision, TensorInfo, row_shape

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

Payload: TypeAlias = bytes | memoryview

BLOCK_WEIGHTS = 1 << 19
SURVEY_BYTES = 1 << 20
FLOAT32_MAX = float(np.finfo(np.float32).max)

FIELDS = {**{part: part for part in PARTS}, "codebook": "centroids"}
"""Part of a stored tensor -> the field of Affine or Codebook that it holds."""

MAGNITUDES = {"F64": ("i8", "u8"), "F32": ("i4", "u4"), "F16": ("i2", "u2"), "BF16": ("i2", "u2")}


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


def survey_bytes(raw: memoryview, dtype: str) -> Survey:
    """The survey of a tensor's bytes; `largest` is 0 for dtypes that are not weights."""
    crc, signed_top, unsigned_top = 0, 0, 0
    formats = MAGNITUDES.get(dtype)
    for start in range(0, len(raw), SURVEY_BYTES):
        piece = raw[start : start + SURVEY_BYTES]
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


@dataclass(frozen=True)
class Finished:
    """One tensor, encoded: what manifest and report say of it, and its codes if they still have to be written.

    lattice     codes that wait for the others of their pool
    side_bytes  what of the payload is side information
    """

    decision: Decision
    entry: Entry
    figures: LayerFigures
    input_crc32: int
    payload: Payload | None
    lattice: Lattice | None = None
    side_bytes: int = 0


@dataclass(frozen=True)
class Job:
    """One weight to encode.

    ready      its codes, where a method on a live model has chosen them already
    reference  the float weight that those codes stand for, where that is not the checkpoint's
    pooled     whether the codes, of a lattice, wait for others
    """

    source: Container
    decision: Decision
    writer: SlotWriter
    choice: CodingChoice
    device: str
    ready: Encoded | None = None
    reference: Tensor | None = None
    evidence: Evidence = field(default_factory=Evidence)
    pooled: bool = False


def encode_tensor(job: Job, stop: threading.Event) -> Finished:
    """Encode one weight. Its grid goes to the writer, and its codes too where nothing but packing awaits them.

    Raises CheckpointError where the weight holds NaN or Inf; Stopped once `stop` is set.
    """
    source, decision, writer = job.source, job.decision, job.writer
    tensor = decision.tensor
    survey = survey_bytes(source.bytes_of(tensor.name), tensor.dtype)
    weight = tensor_view(source, tensor)
    if not survey.finite:
        raise nonfinite_error(source, tensor, count_nonfinite(weight))
    rows = rows_from_weight(weight if job.reference is None else job.reference, decision.axis)
    if decision.config.form == "lattice":
        return _encode_lattice(job, rows, survey, stop)
    meter = LayerMeter(tensor.numel, decision.config.bits)
    codes = _Codes(writer, tensor.name, job.choice)
    grids: dict[str, list[Tensor]] = {}
    ready = job.ready
    exponent = exponent_for(survey.largest)
    method = METHODS[decision.method or ""]
    if ready is None and method.needs != "weights":
        ready = _from_statistics(job, weight)
    elif ready is None and method.family == "cluster":
        # A 16-bit weight stays one: its few distinct values are what makes clustering exact and fast.
        ready = encode_rows(rows, decision, exponent, job.evidence)
    about_book: dict[str, Any] = {}
    if isinstance(ready, Codebook):
        ready = with_entries(ready, stored_codebook_shape(decision)[1])
        about_book = codebook_figures(ready.codes.numpy(), centroid_values(ready).cpu().numpy())
    if isinstance(ready, (Affine, Codebook)):
        exponent = ready.exponent
        blocks = _ready_blocks(rows, ready)
    else:
        blocks = _encoded_blocks(rows, job, exponent)
    for block, encoded in blocks:
        if stop.is_set():
            raise Stopped
        assert not isinstance(encoded, Lattice)
        # Centroids of full precision need no exponent.
        exponent = encoded.exponent
        packed = pack(encoded.codes.numpy(), encoded.bits)
        counts = torch.bincount(encoded.codes.reshape(-1), minlength=2**encoded.bits).numpy()
        meter.add(block, decode_rows(encoded), counts, within=unclipped_range(encoded))
        codes.add(packed)
        if decision.config.granularity != "tensor" or not grids:
            _collect_grid(grids, encoded)
    crc = codes.crc32
    for part in PARTS[1:]:
        if part in grids:
            data = torch.cat(grids[part]).numpy().data
            crc = zlib.crc32(data, crc)
            if decision.book.stored_in is None:
                writer.put(part_name(tensor.name, part), data)
    coding, payload = codes.finish(decision)
    entry = Entry(
        shape=tensor.shape,
        dtype=tensor.dtype,
        axis=decision.axis,
        bits=decision.config.bits,
        grid=grid_of(decision),
        coding=coding,
        exponent=exponent,
        crc32=crc,
        dim=dim_of(decision),
        codebook=decision.book.stored_in,
    )
    return Finished(decision, entry, replace(meter.result(), **about_book), survey.crc32, payload)


def _encode_lattice(job: Job, rows: Tensor, survey: Survey, stop: threading.Event) -> Finished:
    """A weight as a lattice; its codes are coded here unless they wait for others."""
    decision, tensor = job.decision, job.decision.tensor
    lattice = job.ready
    if lattice is None:
        weight = _float_rows(rows, job.device)
        lattice = _to_cpu(encode_rows(weight, decision, exponent_for(survey.largest), job.evidence))
    assert isinstance(lattice, Lattice)
    lattice = replace(lattice, shape=tensor.shape, axis=decision.axis, dtype=tensor.dtype)
    meter = LayerMeter(tensor.numel)
    for block, part in _ready_blocks(rows, lattice):
        if stop.is_set():
            raise Stopped
        meter.add(block, decode_rows(part), None)
    figures = replace(meter.result(count_values(lattice.codes.numpy())), step=step_value(lattice))
    finished = Finished(decision, lattice_entry(decision, "ans"), figures, survey.crc32, None, lattice)
    if job.pooled:
        return finished
    coded = encode_pool([lattice], job.choice)
    payload = join_side(coded.side, coded.payloads[0])
    return replace(
        finished,
        entry=lattice_entry(decision, coded.codings[0]),
        figures=replace(figures, classes=coded.uses[0]),
        payload=payload,
        lattice=None,
        side_bytes=len(payload) - len(coded.payloads[0]),
    )


def nonfinite_error(source: Container, tensor: TensorInfo, count: int) -> CheckpointError:
    """What to say of a weight that cannot be compressed because `count` of its values are no numbers."""
    what = f"{count} of its {tensor.numel} values are NaN, Inf or beyond float32"
    mend = "repair the checkpoint, or pass --skip-nonfinite to keep this tensor as it is"
    return CheckpointError(f"{source.path}: tensor {tensor.name!r}", what, mend)


def encode_rows(rows: Tensor, decision: Decision, exponent: int, evidence: Evidence) -> Coded:
    """A weight [rows, ...] encoded by a method that needs weights alone, float32 unless the method clusters.

    exponent  of what is stored in half precision
    """
    method, name = METHODS[decision.method or ""], decision.tensor.name
    encode: Callable[..., Coded] = method.load()
    if method.family == "quantize":
        return encode(rows, decision.config, exponent)
    learned: tuple[Tensor, ...] = ()
    if method.representatives:
        # The plan knows that they are there.
        assert evidence.representatives is not None
        learned = (read_representatives(evidence.representatives)[name],)
    return encode(rows, decision.config, exponent, evidence.of_book(decision), *learned)


def _encoded_blocks(rows: Tensor, job: Job, exponent: int) -> Iterator[tuple[Tensor, Coded]]:
    """Row blocks as float32 [rows, columns] on the CPU, each with its codes and grid."""
    decision = job.decision
    how = (decision, exponent, job.evidence)
    if decision.config.granularity == "tensor":
        yield from _ready_blocks(rows, encode_rows(_float_rows(rows, job.device), *how))
        return
    count = rows.shape[0]
    step = max(1, BLOCK_WEIGHTS * count // max(rows.numel(), 1))
    for start in range(0, count, step):
        block = _float_rows(rows[start : start + step], "cpu")
        yield block.reshape(len(block), -1), _to_cpu(encode_rows(block.to(job.device), *how))


def _from_statistics(job: Job, weight: Tensor) -> Affine:
    """The codes of a weight by a method that works from saved input statistics. Raises DataError."""
    assert job.evidence.statistics is not None
    name = job.decision.tensor.name
    gram = read_statistics(job.evidence.statistics).gram(name)
    refuse_misfit(gram, row_shape(job.decision.tensor.shape, job.decision.axis), f"tensor {name!r}")
    encode = METHODS[job.decision.method or ""].load_encode()
    found: Affine = encode(
        _float_rows(weight, "cpu"), job.decision, gram, seeded_generator(job.evidence.seed, name, "cpu")
    )
    return found


def _ready_blocks(rows: Tensor, ready: Coded) -> Iterator[tuple[Tensor, Coded]]:
    """Row blocks of a weight that has its codes already, as `_encoded_blocks` gives them."""
    ready = _to_cpu(ready)
    for start, stop in row_spans(ready, BLOCK_WEIGHTS):
        block = _float_rows(rows[start:stop], "cpu")
        yield block.reshape(len(block), -1), take_rows(ready, start, stop)


def _float_rows(rows: Tensor, device: str) -> Tensor:
    return rows.to(device=device, dtype=torch.float32).contiguous()


def _to_cpu(encoded: Coded) -> Coded:
    if encoded.codes.device.type == "cpu":
        return encoded
    values: dict[str, Any] = {part.name: getattr(encoded, part.name) for part in fields(encoded)}
    moved: Any = {name: value.cpu() for name, value in values.items() if isinstance(value, torch.Tensor)}
    return replace(encoded, **moved)


def _collect_grid(grids: dict[str, list[Tensor]], encoded: Coded) -> None:
    for part in PARTS[1:]:
        value = getattr(encoded, FIELDS[part], None)
        if value is not None:
            grids.setdefault(part, []).append(value)


class _Codes:
    """Packed codes of one tensor: straight to their slot, or gathered until entropy coding can see them all."""

    def __init__(self, writer: SlotWriter, tensor: str, choice: CodingChoice) -> None:
        self.crc32 = 0
        self._slot = part_name(tensor, "codes")
        self._writer = writer
        self._choice = choice
        self._gathered: list[NDArray[np.uint8]] = []

    def add(self, packed: NDArray[np.uint8]) -> None:
        self.crc32 = zlib.crc32(packed.data, self.crc32)
        if self._choice == "packed":
            self._writer.put(self._slot, packed.data)
        else:
            self._gathered.append(packed)

    def finish(self, decision: Decision) -> tuple[Coding, Payload | None]:
        """The coding that was chosen, and the payload unless it is written already."""
        if self._choice == "packed":
            return "packed", None
        bits = decision.config.bits
        shape = row_shape(decision.tensor.shape, decision.axis)
        columns = decision.tensor.numel // shape[0]
        packed = np.concatenate(self._gathered)
        self._gathered.clear()
        assert packed.shape == (shape[0] // dim_of(decision), row_bytes(columns, bits))
        return encode_payload(packed, bits, columns, self._choice)
