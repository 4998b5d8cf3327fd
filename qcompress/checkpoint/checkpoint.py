"""A checkpoint is its tensors' headers, with weights on demand: a file, a sharded folder, or a Hugging Face folder."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from qcompress.checkpoint.dequantize import DenseContainer, read_dense
from qcompress.checkpoint.foreign import refuse_foreign
from qcompress.checkpoint.hub import local_path
from qcompress.checkpoint.safetensors_file import (
    FOREIGN_MAGIC,
    LFS_HINT,
    OWN_TENSORS,
    RESERVED,
    Container,
    read_container,
    weight_files,
)
from qcompress.errors import CheckpointError
from qcompress.types.files import open_regular
from qcompress.types.plan import TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

INDEX_SUFFIX = ".safetensors.index.json"
USUAL = ("model.safetensors", "diffusion_pytorch_model.safetensors")
"""What is read of a folder that has files of several kinds, such as one in half precision."""
FETCH = "fetch the rest: hf download, or git lfs pull"
LFS_MAGIC = b"version https://git-lfs"


@dataclass(frozen=True)
class Checkpoint:
    """The headers of a checkpoint, and what its surroundings say of them.

    shards  one container a file, in the order of their names
    tied    name without data of its own -> the tensor that stands for it, as metadata say
    config  config.json of a folder; empty where there is none
    """

    path: Path
    shards: tuple[Container, ...]
    tied: Mapping[str, str]
    config: Mapping[str, object]

    @property
    def is_folder(self) -> bool:
        return self.path.is_dir()

    @property
    def is_dequantized(self) -> bool:
        """Whether some of its weights are read as dense ones, and lie in its files as codes."""
        return any(isinstance(shard, DenseContainer) for shard in self.shards)

    @property
    def tensors(self) -> tuple[TensorInfo, ...]:
        return tuple(info for shard in self.shards for info in shard.tensors)

    @property
    def file_bytes(self) -> int:
        return sum(shard.file_bytes for shard in self.shards)

    def shard_of(self, name: str) -> Container:
        return next(shard for shard in self.shards if name in shard.spans)


def read_checkpoint(path: Path, strip_prefix: str | None = None) -> Checkpoint:
    """The checkpoint at `path`, headers only; fp8 and MXFP4 in it are read as dense weights.

    path          a file, a folder, or hf://org/name@revision, of which the path is then that in the cache
    strip_prefix  what is taken off the names that begin so
    raises        CheckpointError, also for weights that another tool has quantized otherwise; UsageError without the
                  package that knows the cache
    """
    path = local_path(path)
    if (path / "model_index.json").is_file():
        raise CheckpointError(str(path), "is a pipeline of several networks", "name the folder of one of them")
    if path.is_dir():
        shards = tuple(_folder_shards(path))
        config = read_json(path / "config.json") if (path / "config.json").is_file() else {}
    else:
        shards = (read_container(path, CheckpointError),)
        config = {}
    for shard in shards:
        if "qcompress" in shard.metadata:
            hint = "expand it first: qcompress export ARTIFACT --to safetensors"
            raise CheckpointError(str(shard.path), "is compressed already", hint)
        names = (info.name for info in shard.tensors)
        reserved = next((name for name in names if RESERVED in name or name in OWN_TENSORS), None)
        if reserved is not None:
            what = f"tensor {reserved!r} has a name that is reserved for artifacts"
            raise CheckpointError(str(shard.path), what, "rename it")
    shards = _stripped(path, shards, strip_prefix) if strip_prefix else shards
    refuse_foreign(path, shards, config)
    shards = read_dense(shards, config)
    return Checkpoint(path, shards, _find_tied(shards), config)


def _stripped(path: Path, shards: Sequence[Container], prefix: str) -> tuple[Container, ...]:
    """The files with other names of tensors. Raises CheckpointError where no name begins so, or two become one."""
    names = [info.name for shard in shards for info in shard.tensors]
    short = [name.removeprefix(prefix) for name in names]
    if short == names:
        raise CheckpointError(str(path), f"has no tensor whose name begins with {prefix!r}", "check --strip-prefix")
    twice = next((name for name, count in Counter(short).items() if count > 1), None)
    if twice is not None:
        what = f"has {twice!r} twice once {prefix!r} is taken off its names"
        raise CheckpointError(str(path), what, "leave --strip-prefix out, or rename one")
    return tuple(
        replace(
            shard,
            tensors=tuple(replace(info, name=info.name.removeprefix(prefix)) for info in shard.tensors),
            spans={name.removeprefix(prefix): span for name, span in shard.spans.items()},
            metadata={key.removeprefix(prefix): value.removeprefix(prefix) for key, value in shard.metadata.items()},
        )
        for shard in shards
    )


def _folder_shards(folder: Path) -> Iterator[Container]:
    indices, files = weight_files(folder, INDEX_SUFFIX), weight_files(folder)
    if len(indices) > 1:
        names = ", ".join(index.name for index in indices)
        raise CheckpointError(str(folder), f"has several indices ({names})", "leave one, or name a file")
    if indices:
        yield from _indexed_shards(indices[0])
    elif (usual := next((folder / name for name in USUAL if (folder / name).is_file()), None)) is not None:
        yield read_container(usual, CheckpointError)
    elif len(files) == 1:
        _refuse_part(files[0])
        yield read_container(files[0], CheckpointError)
    elif files:
        what = f"has {len(files)} .safetensors files and no *{INDEX_SUFFIX}"
        raise CheckpointError(str(folder), what, "name one of the files, or add the index")
    else:
        raise _no_weights(folder)


def _refuse_part(file: Path) -> None:
    """Raise CheckpointError for the one file of a folder that says of itself that there are others."""
    of = re.search(r"-\d+-of-(\d+)$", file.name.removesuffix(".safetensors"))
    if of is not None and int(of[1]) != 1:
        what = f"is one of {int(of[1])} files, and the others and their index are not there: an unfinished download"
        raise CheckpointError(str(file), what, FETCH)


def _no_weights(folder: Path) -> CheckpointError:
    pickles = [path for ending in ("bin", "pt", "pth", "ckpt") for path in folder.glob(f"*.{ending}")]
    if pickles:
        return CheckpointError(
            str(folder), "holds no .safetensors file, only pickles", "convert it to safetensors first"
        )
    if any(folder.glob("*.gguf")):
        hint = "write a dense checkpoint first, with transformers: from_pretrained(gguf_file=...) and save_pretrained"
        return CheckpointError(str(folder), "holds no .safetensors file, only GGUF, which is quantized already", hint)
    return CheckpointError(str(folder), "holds no .safetensors file", "check the path")


def _can_be_called(name: str) -> bool:
    """Whether a file can have a name."""
    return "\0" not in name and name.isprintable()


def _indexed_shards(index: Path) -> Iterator[Container]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(str(index), "has no weight_map from tensor to file", "fetch or save it again")
    files = sorted(set(weight_map.values()))
    for file in files:
        if Path(file).name != file:
            raise CheckpointError(str(index), f"names the file {file!r} outside its folder", "use plain file names")
    if not files:
        raise CheckpointError(str(index), "lists no tensors", "fetch or save the checkpoint again")
    # What no file can be called is refused below, where it is read.
    absent = [file for file in files if _can_be_called(file) and not (index.parent / file).exists()]
    if absent:
        listed = f"{absent[0]} and {len(absent) - 1} more" if len(absent) > 1 else absent[0]
        what = f"promises {listed} of {len(files)} files, which are not there: an unfinished download"
        raise CheckpointError(str(index), what, FETCH)
    for file in files:
        shard = read_container(index.parent / file, CheckpointError)
        promised = {name for name, place in weight_map.items() if place == file}
        missing = sorted(promised - set(shard.spans))
        surplus = sorted(set(shard.spans) - promised)
        if missing:
            what = f"promises {len(missing)} tensors that {file} does not hold, such as {missing[0]!r}"
            raise CheckpointError(str(index), what, "fetch or save the checkpoint again")
        if surplus:
            what = f"does not list {len(surplus)} tensors of {file}, such as {surplus[0]!r}"
            raise CheckpointError(str(index), what, "add them to weight_map or take them out of the file")
        yield shard


def read_json(path: Path) -> dict[str, object]:
    """A JSON object of a checkpoint's folder. Raises CheckpointError."""
    try:
        with open_regular(path) as file:
            raw = file.read()
    except OSError as error:
        raise CheckpointError(str(path), error.strerror or "cannot be read", "check the file") from None
    if raw.startswith(LFS_MAGIC):
        raise CheckpointError(str(path), f"is {FOREIGN_MAGIC[LFS_MAGIC]}", LFS_HINT)
    try:
        value = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError):
        raise CheckpointError(str(path), "is not JSON", "fetch or save it again") from None
    if not isinstance(value, dict):
        raise CheckpointError(str(path), "is not a JSON object", "fetch or save it again")
    return value


def _find_tied(shards: tuple[Container, ...]) -> dict[str, str]:
    own = {name for shard in shards for name in shard.spans}
    return {
        alias: name
        for shard in shards
        for alias, name in shard.metadata.items()
        if alias != "format" and alias not in own and name in own
    }


def write_checkpoint(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write plain tensors as one safetensors file."""
    from safetensors.torch import save_file

    path.touch()
    mode = path.stat().st_mode
    save_file(dict(tensors), path, metadata={"format": "pt", **(metadata or {})})
    # The library makes files that their owner alone may read.
    path.chmod(mode)


def stream_checkpoint(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write float32 tensors as one safetensors file; each is asked for twice, and one at a time is in memory."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    infos, position = [], 0
    for name in sorted(tensors):
        info = TensorInfo(name, tuple(tensors[name].shape), "F32")
        span = [position, position + info.n_bytes]
        header[name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": span}
        infos.append(info)
        position = span[1]
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    room = -(-len(text) // 8) * 8
    with path.open("wb") as file:
        file.write(room.to_bytes(8, "little") + text.ljust(room))
        for info in infos:
            file.write(tensor_bytes(tensors[info.name], info))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Every tensor of one safetensors file, and its metadata. Raises CheckpointError where it is missing or damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(str(path), f"cannot be read: {error}", "check the file, or make it again") from None


def tensor_view(container: Container, info: TensorInfo) -> Tensor:
    """A weight (F64, F32, F16 or BF16) in its own shape and dtype, read now. Raises the container's error."""
    return _as_tensor(container.bytes_of(info.name), info.dtype, info.shape)


def strided_values(container: Container, info: TensorInfo, stride: int) -> Tensor:
    """Every so many-th value of a weight in the order of the file, [values] in its own dtype, the first one among them.

    All values are read, and few are held. Raises the container's error.
    """
    import torch

    parts, start = [], 0
    size = info.n_bytes // max(info.numel, 1)
    for piece in container.pieces_of(info.name):
        count = len(piece) // size
        # A copy, for torch warns of bytes that it must not write to.
        parts.append(_as_tensor(memoryview(bytearray(piece)), info.dtype, (count,))[-start % stride :: stride].clone())
        start += count
    return torch.cat(parts) if parts else _as_tensor(memoryview(b""), info.dtype, (0,))


def _as_tensor(raw: memoryview, dtype: str, shape: tuple[int, ...]) -> Tensor:
    import torch

    from qcompress.coding.grids import TORCH_DTYPES

    if not len(raw):
        return torch.zeros(shape, dtype=TORCH_DTYPES[dtype])
    return torch.frombuffer(raw, dtype=TORCH_DTYPES[dtype]).reshape(shape)


@dataclass(frozen=True)
class StoredRows:
    """A weight [rows, ...] whose rows are read when they are asked for, so that it need not fit the memory.

    shape  its leading dimension counts the rows as they lie in the file
    """

    container: Container
    info: TensorInfo
    shape: tuple[int, ...]

    def __getitem__(self, rows: slice) -> Tensor:
        """Some of the rows, in the weight's own dtype. Raises the container's error."""
        start, stop, _ = rows.indices(self.shape[0])
        row_bytes = self.info.n_bytes // max(self.shape[0], 1)
        raw = self.container.bytes_of(self.info.name, start * row_bytes, stop * row_bytes)
        return _as_tensor(raw, self.info.dtype, (stop - start, *self.shape[1:]))

    def numel(self) -> int:
        return self.info.numel


@dataclass(frozen=True)
class StackedRows:
    """A weight [experts, columns, rows] as [experts * rows, columns], of which one expert at a time is read.

    last  the expert that was read last: blocks of rows are read one after another
    """

    container: Container
    info: TensorInfo
    last: dict[int, Tensor] = field(default_factory=dict, compare=False, repr=False)

    @property
    def shape(self) -> tuple[int, ...]:
        experts, columns, rows = self.info.shape
        return (experts * rows, columns)

    def __getitem__(self, rows: slice) -> Tensor:
        """Some of the rows, in the weight's own dtype. Raises the container's error."""
        import torch

        start, stop, _ = rows.indices(self.shape[0])
        size = self.info.shape[2]
        parts = [
            self._expert(index)[max(start - index * size, 0) : stop - index * size]
            for index in range(start // size, -(-stop // size))
        ]
        return torch.cat(parts)

    def _expert(self, index: int) -> Tensor:
        if index not in self.last:
            experts, columns, rows = self.info.shape
            size = self.info.n_bytes // experts
            raw = self.container.bytes_of(self.info.name, index * size, (index + 1) * size)
            self.last.clear()
            self.last[index] = _as_tensor(raw, self.info.dtype, (columns, rows)).T.contiguous()
        return self.last[index]

    def numel(self) -> int:
        return self.info.numel


def tensor_bytes(value: Tensor, info: TensorInfo) -> memoryview:
    """A value as the bytes of the tensor that `info` describes, in its dtype: what replaces it in a file."""
    import torch

    from qcompress.coding.grids import TORCH_DTYPES

    assert tuple(value.shape) == info.shape, info.name
    stored = value.detach().cpu().to(TORCH_DTYPES[info.dtype]).contiguous()
    # Flat first: a scalar cannot be seen as bytes.
    return stored.reshape(-1).view(torch.uint8).numpy().data
