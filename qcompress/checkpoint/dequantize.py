"""Weights that a checkpoint holds in 8-bit floats or MXFP4 are read as dense ones, a few rows or an expert at a time.

fp8 as transformers writes it: `X` F8_E4M3 [..., rows, columns] and `X_scale_inv`, a factor for each block of
128 x 128 or of the size that config.json names. MXFP4 as gpt-oss has it: `X_blocks` U8 [experts, rows, groups, 16], two
values a byte and the low nibble first, and `X_scales` U8 [experts, rows, groups], powers of two; the network's own X is
[experts, columns, rows]. The scales are no tensors of the checkpoint any more. Imports no torch until values are read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from math import prod
from typing import TYPE_CHECKING, Protocol

from qcompress.checkpoint.safetensors_file import Container, is_sizes
from qcompress.coding.stored import PIECE_BYTES, Stored
from qcompress.errors import CheckpointError, Subject
from qcompress.types.plan import DTYPE_BITS, TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

SCALE_INV = "_scale_inv"
OF_ACTIVATIONS = ("activation_scale", "input_scale")
"""Beside `X.weight_scale_inv`: grids of what flows in, which a dense weight has no use for."""
FP8_BLOCK = (128, 128)
FP8_SCALES = ("F32", "BF16", "F16", "F8_E8M0")

BLOCKS, SCALES = "_blocks", "_scales"
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
MXFP4_BYTES = 16
"""Of the values of one group."""
E8M0_BIAS = 127

DENSE_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
HINT = "fetch the checkpoint again, or compress the one that it was made from"


@dataclass(frozen=True)
class Part:
    """A stored tensor, in the file that holds it."""

    container: Container
    info: TensorInfo

    def rows(self, start: int, stop: int, columns: int) -> Tensor:
        """Rows of so many columns, float32, or uint8 of bytes."""
        import torch

        size = columns * DTYPE_BITS[self.info.dtype] // 8
        raw = torch.frombuffer(self.container.bytes_of(self.info.name, start * size, stop * size), dtype=torch.uint8)
        kinds = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F8_E4M3": torch.float8_e4m3fn}
        if self.info.dtype == "F8_E8M0":
            found = (raw.float() - E8M0_BIAS).exp2()
        else:
            found = raw if self.info.dtype == "U8" else raw.view(kinds[self.info.dtype]).float()
        return found.reshape(stop - start, columns)


class Dense(Protocol):
    """A weight that is held otherwise than it is read."""

    @property
    def info(self) -> TensorInfo:
        """What it is read as."""

    def read(self, start: int, stop: int) -> memoryview:
        """Bytes of what it is read as."""


@dataclass(frozen=True)
class Fp8:
    """A weight F8_E4M3 with a factor a block of its last two dimensions.

    block  rows and columns of one
    """

    info: TensorInfo
    weight: Part
    scale: Part
    block: tuple[int, int]

    def read(self, start: int, stop: int) -> memoryview:
        size = self.info.shape[-1] * DTYPE_BITS[self.info.dtype] // 8
        first = start // size
        data = _bytes_of(self._rows(first, -(-stop // size)), self.info.dtype)
        return data[start - first * size : stop - first * size]

    def _rows(self, start: int, stop: int) -> Tensor:
        import torch

        height, width = self.info.shape[-2:]
        tall, wide = self.scale.info.shape[-2:]
        rows = torch.arange(start, stop)
        places = rows // height * tall + rows % height // self.block[0]
        first, last = int(places[0]), int(places[-1]) + 1
        factors = self.scale.rows(first, last, wide).repeat_interleave(self.block[1], 1)[:, :width]
        return self.weight.rows(start, stop, width) * factors[places - first]


@dataclass(frozen=True)
class Mxfp4:
    """Experts whose values are powers of two times those of E2M1, each read as the transpose of how it lies.

    last  the expert that was read last, and its bytes: pieces of one are read one after another
    """

    info: TensorInfo
    blocks: Part
    scales: Part
    last: dict[str, tuple[int, memoryview]] = field(default_factory=dict, compare=False, repr=False)

    def read(self, start: int, stop: int) -> memoryview:
        size = prod(self.info.shape[1:]) * DTYPE_BITS[self.info.dtype] // 8
        found = bytearray()
        for expert in range(start // size, -(-stop // size)):
            begin, end = max(start - expert * size, 0), min(stop - expert * size, size)
            found += self._expert(expert)[begin:end]
        return memoryview(found)

    def _expert(self, index: int) -> memoryview:
        held = self.last.get("expert")
        if held is None or held[0] != index:
            held = index, _bytes_of(self._values(index).T, self.info.dtype)
            self.last["expert"] = held
        return held[1]

    def _values(self, index: int) -> Tensor:
        import torch

        columns, rows = self.info.shape[1:]
        codes = self.blocks.rows(index * rows, (index + 1) * rows, columns // 2)
        scales = self.scales.rows(index * rows, (index + 1) * rows, columns // (2 * MXFP4_BYTES)).float() - E8M0_BIAS
        table = torch.tensor((*E2M1, *(-value for value in E2M1)))
        values = torch.stack((table[(codes & 15).int()], table[(codes >> 4).int()]), -1)
        return torch.ldexp(values.reshape(rows, -1, 2 * MXFP4_BYTES), scales.unsqueeze(-1)).reshape(rows, columns)


def _bytes_of(values: Tensor, dtype: str) -> memoryview:
    import torch

    from qcompress.coding.grids import TORCH_DTYPES

    return memoryview(values.to(TORCH_DTYPES[dtype]).contiguous().reshape(-1).view(torch.uint8).numpy().data)


@dataclass(frozen=True)
class DenseContainer(Container):
    """A file some of whose tensors are read as dense ones; its size and state are those of the file."""

    dense: Mapping[str, Dense] = field(kw_only=True, repr=False, compare=False)

    def bytes_of(self, name: str, start: int = 0, stop: int | None = None) -> memoryview:
        if name not in self.dense:
            return super().bytes_of(name, start, stop)
        size = self.dense[name].info.n_bytes
        last = size if stop is None else min(stop, size)
        return self.dense[name].read(start, last) if start < last else memoryview(b"")

    def pieces_of(self, name: str) -> Iterator[memoryview]:
        if name not in self.dense:
            yield from super().pieces_of(name)
            return
        size = self.dense[name].info.n_bytes
        for start in range(0, size, PIECE_BYTES):
            yield self.bytes_of(name, start, start + PIECE_BYTES)

    def stored(self, name: str) -> Stored:
        if name not in self.dense:
            return super().stored(name)
        return Stored(self.dense[name].info.n_bytes, self.dense[name].read)


def read_dense(shards: Sequence[Container], config: Mapping[str, object]) -> tuple[Container, ...]:
    """The files of a checkpoint, fp8 and MXFP4 in them being read as dense weights.

    A weight and its scales may lie in different files. Raises CheckpointError for scales that fit no weight.
    """
    parts = {info.name: Part(shard, info) for shard in shards for info in shard.tensors}
    dtype, block = _dense_dtype(config), _fp8_block(config)
    dense: dict[str, Dense] = {}
    gone: set[str] = set()
    for name, part in parts.items():
        if name.endswith(SCALE_INV):
            weight = name.removesuffix(SCALE_INV)
            dense[weight] = _fp8(part, parts.get(weight), dtype, block)
            module = weight.rpartition(".")[0]
            gone |= {name, *(f"{module}.{leaf}" for leaf in OF_ACTIVATIONS)}
        elif name.endswith(BLOCKS) and name.removesuffix(BLOCKS) + SCALES in parts:
            weight = name.removesuffix(BLOCKS)
            if weight in parts:
                raise _misfit(part, f"holds the blocks of {weight!r}, which is there too")
            dense[name] = _mxfp4(part, parts[weight + SCALES], TensorInfo(weight, (), dtype))
            gone.add(weight + SCALES)
    return tuple(_with_dense(shard, dense, gone) for shard in shards)


def _with_dense(shard: Container, dense: Mapping[str, Dense], gone: set[str]) -> Container:
    """A file that reads what `dense` has for the names in it, and does without those that are `gone`."""
    own = {info.name: dense[info.name] for info in shard.tensors if info.name in dense}
    infos = [own[info.name].info if info.name in own else info for info in shard.tensors if info.name not in gone]
    if not own and len(infos) == len(shard.tensors):
        return shard
    same = {one.name: getattr(shard, one.name) for one in fields(shard)}
    spans = {info.name: shard.spans.get(info.name, (0, info.n_bytes)) for info in infos}
    changed = {"tensors": tuple(infos), "spans": spans}
    return DenseContainer(**(same | changed), dense={one.info.name: one for one in own.values()})


def _fp8(scale: Part, weight: Part | None, dtype: str, block: tuple[int, int]) -> Fp8:
    name = scale.info.name.removesuffix(SCALE_INV)
    if weight is None:
        raise _misfit(scale, f"holds the scales of {name!r}, which no file holds")
    shape, scales = weight.info.shape, scale.info.shape
    if weight.info.dtype != "F8_E4M3" or scale.info.dtype not in FP8_SCALES:
        raise _misfit(scale, f"is {scale.info.dtype}, for a weight {weight.info.dtype}: only F8_E4M3 is known so")
    if len(shape) < 2 or len(scales) != len(shape) or scales[:-2] != shape[:-2] or not weight.info.numel:
        raise _misfit(scale, f"is {list(scales)}, and its weight {list(shape)}")
    if any(-(-size // one) != count for size, one, count in zip(shape[-2:], block, scales[-2:], strict=True)):
        # Blocks of another size, which a config that names none has to have whole.
        if any(not count or size % count for size, count in zip(shape[-2:], scales[-2:], strict=True)):
            raise _misfit(scale, f"is {list(scales)}, which is no grid of blocks of its weight {list(shape)}")
        block = (shape[-2] // scales[-2], shape[-1] // scales[-1])
    return Fp8(TensorInfo(name, shape, dtype), weight, scale, block)


def _mxfp4(blocks: Part, scales: Part, plain: TensorInfo) -> Mxfp4:
    shape = blocks.info.shape
    if blocks.info.dtype != "U8" or scales.info.dtype != "U8" or len(shape) != 4 or shape[-1] != MXFP4_BYTES:
        raise _misfit(blocks, f"is {blocks.info.dtype} {list(shape)}, not U8 [experts, rows, groups, {MXFP4_BYTES}]")
    if scales.info.shape != shape[:-1]:
        raise _misfit(scales, f"is {list(scales.info.shape)}, and its blocks are {list(shape)}")
    experts, rows, groups, _ = shape
    return Mxfp4(TensorInfo(plain.name, (experts, groups * 2 * MXFP4_BYTES, rows), plain.dtype), blocks, scales)


def _misfit(part: Part, what: str) -> CheckpointError:
    return CheckpointError(str(part.container.path), what, HINT, Subject(part.info.name))


def _dense_dtype(config: Mapping[str, object]) -> str:
    """The dtype that config.json says the network computes in, bfloat16 where it says none."""
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    named = (part.get(key) for part in parts for key in ("dtype", "torch_dtype"))
    return next((DENSE_DTYPES[one] for one in named if isinstance(one, str) and one in DENSE_DTYPES), "BF16")


def _fp8_block(config: Mapping[str, object]) -> tuple[int, int]:
    own = config.get("quantization_config")
    size = own.get("weight_block_size") if isinstance(own, dict) else None
    return (size[0], size[1]) if is_sizes(size) and len(size) == 2 and all(size) else FP8_BLOCK
