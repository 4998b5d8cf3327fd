"""Every way in which a safetensors header can lie is refused; what is true is read as the library reads it."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import pytest
import torch
from artifact.examples import Header, entry, gaussian, write_raw
from artifact.examples import save as save_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save

from qcompress.checkpoint.safetensors_file import FOREIGN_MAGIC, MAX_HEADER_BYTES, read_container
from qcompress.errors import ArtifactError, CheckpointError, InputError
from qcompress.types.plan import DTYPE_BITS

W = entry("F32", [2, 3], 0, 24)
DATA = bytes(range(24))


def refusal(path: Path, error: type[InputError] = CheckpointError) -> str:
    with pytest.raises(error) as caught:
        read_container(path, error)
    assert caught.value.exit_code == 3
    assert caught.value.where == str(path)
    assert "\n" not in str(caught.value)
    assert caught.value.hint
    return caught.value.what


HEADERS: dict[str, tuple[Header | bytes, bytes, str]] = {
    "not JSON": (b"{" + b"x" * 20, b"", "not JSON"),
    "no object": (b"{]", b"", "not JSON"),
    "not UTF-8": (b'{"\xff\xfe": 1}', b"", "not UTF-8"),
    "half a surrogate pair": (b'{"\\ud800": %s}' % json.dumps(W).encode(), DATA, "not JSON"),
    "half a surrogate pair in metadata": (b'{"__metadata__": {"a": "\\udfff"}}', b"", "not JSON"),
    "a number that is none": (b'{"w": NaN}', b"", "NaN is no number"),
    "a key twice": (b'{"w": %s, "w": %s}' % ((json.dumps(W).encode(),) * 2), DATA, "key 'w' stands twice"),
    "a field twice": (
        b'{"w": {"dtype": "F32", "dtype": "I32", "shape": [], "data_offsets": [0, 4]}}',
        b"1234",
        "'dtype' stands twice",
    ),
    "deep nesting": (b'{"w": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", b"", "nested too deep"),
    "an integer of 10,000 digits": (b'{"w": ' + b"9" * 10_000 + b"}", b"", "not JSON"),
    "metadata of numbers": ({"__metadata__": {"a": 1}}, b"", "metadata that is not a map from text to text"),
    "metadata of lists": ({"__metadata__": ["a"]}, b"", "metadata that is not a map from text to text"),
    "entry that is a list": ({"w": [1]}, b"", "tensor 'w' does not have just dtype, shape and data_offsets"),
    "entry without shape": ({"w": {"dtype": "F32", "data_offsets": [0, 0]}}, b"", "tensor 'w' does not have just"),
    "entry with more": ({"w": W | {"strides": [1]}}, DATA, "tensor 'w' does not have just"),
    "unknown dtype": ({"w": entry("F33", [2, 3], 0, 24)}, DATA, "tensor 'w' has the unknown dtype 'F33'"),
    "dtype that is a list": ({"w": entry(["F32"], [2, 3], 0, 24)}, DATA, "tensor 'w' has the unknown dtype"),
    "negative size": ({"w": entry("F32", [-2, -3], 0, 24)}, DATA, "tensor 'w' has the shape [-2, -3]"),
    "size that is text": ({"w": entry("F32", ["2", 3], 0, 24)}, DATA, "tensor 'w' has the shape"),
    "size that is real": ({"w": entry("F32", [2.0, 3], 0, 24)}, DATA, "tensor 'w' has the shape"),
    "size that is true": ({"w": entry("F32", [True, 6], 0, 24)}, DATA, "tensor 'w' has the shape"),
    "shape that is no list": ({"w": entry("F32", 6, 0, 24)}, DATA, "tensor 'w' has the shape 6"),
    "size beyond 63 bits": ({"w": entry("F32", [2**63], 0, 24)}, DATA, "tensor 'w' has the shape"),
    "product beyond 64 bits": ({"w": entry("F32", [2**62, 2**62], 0, 24)}, DATA, f"needs {2**126} bytes"),
    "product that wraps to zero": ({"w": entry("U8", [2**32, 2**32], 0, 0)}, b"", f"needs {2**64} bytes"),
    "a thousand dimensions": ({"w": entry("F32", [1] * 1000, 0, 4)}, b"1234", "tensor 'w' has the shape"),
    "too few bytes": (
        {"w": entry("F32", [2, 3], 0, 20)},
        DATA[:20],
        "tensor 'w' of shape [2, 3] needs 24 bytes of F32 and has 20",
    ),
    "too many bytes": (
        {"w": entry("F32", [2, 2], 0, 24)},
        DATA,
        "tensor 'w' of shape [2, 2] needs 16 bytes of F32 and has 24",
    ),
    "bytes for no elements": ({"w": entry("F32", [0, 3], 0, 4)}, b"1234", "tensor 'w' of shape [0, 3] needs 0 bytes"),
    "offsets backwards": ({"w": entry("F32", [2, 3], 24, 0)}, DATA, "tensor 'w' has the data offsets [24, 0]"),
    "negative offsets": ({"w": entry("F32", [2, 3], -24, 0)}, DATA, "tensor 'w' has the data offsets [-24, 0]"),
    "three offsets": (
        {"w": {"dtype": "F32", "shape": [6], "data_offsets": [0, 24, 48]}},
        DATA,
        "tensor 'w' has the data offsets",
    ),
    "end beyond the file": (
        {"w": entry("F32", [2, 4], 0, 32)},
        DATA,
        "is truncated: tensor 'w' should end at byte 32 of the data, and there are 24",
    ),
    "end beyond 63 bits": ({"w": entry("F32", [2, 3], 2**64, 2**64 + 24)}, DATA, "tensor 'w' has the data offsets"),
    "overlap": ({"w": W, "v": entry("F32", [3], 20, 32)}, DATA + bytes(8), "tensors 'w' and 'v' overlap"),
    "the same bytes": ({"w": W, "v": W}, DATA, "overlap"),
    "one within another": ({"w": W, "v": entry("F32", [1], 4, 8)}, DATA, "tensors 'w' and 'v' overlap"),
    "hole in front": ({"w": entry("F32", [2, 3], 4, 28)}, bytes(28), "hole of 4 bytes before tensor 'w'"),
    "hole between": ({"w": W, "v": entry("F32", [1], 28, 32)}, bytes(32), "hole of 4 bytes before tensor 'v'"),
    "bytes at the end": ({"w": W}, DATA + b"x", "1 bytes after its last tensor"),
    "data and no tensor": ({}, b"x", "1 bytes after its last tensor"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_that_lies_is_refused(name: str, tmp_path: Path) -> None:
    header, data, what = HEADERS[name]
    assert what in refusal(write_raw(tmp_path / "m.safetensors", header, data))


STARTS = {
    "empty": (b"", "is empty"),
    "three bytes": (b"\x08\0\0", "has 3 bytes, fewer than the 8"),
    "length alone": ((2).to_bytes(8, "little"), "is truncated: its header should have 2 bytes"),
    "no length": (bytes(8) + b"{}", "is truncated: its header should have 0 bytes"),
    "length beyond the file": ((1000).to_bytes(8, "little") + b"{}", "is truncated: its header should have 1000 bytes"),
    "huge length": ((2**63).to_bytes(8, "little") + b"{}", f"declares a header of {2**63} bytes"),
    "length above the limit": ((MAX_HEADER_BYTES + 1).to_bytes(8, "little") + b"{}", "more than the"),
    "no brace": ((4).to_bytes(8, "little") + b" {} ", "no header begins at byte 8"),
    "text": (b"These are notes on a model, not the model itself.", "no header begins at byte 8"),
    "zip": (b"PK\x03\x04" + bytes(60), "a zip archive, most likely a PyTorch pickle"),
    "old pickle": (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", "a pickle"),
    "pickle": (b"\x80\x04\x95" + bytes(60), "a pickle"),
    "GGUF": (b"GGUF\x03\0\0\0" + bytes(60), "a GGUF file"),
    "HDF5": (b"\x89HDF\r\n\x1a\n" + bytes(60), "an HDF5 file"),
    "Git LFS": (b"version https://git-lfs.example/spec/v1\noid sha256:00\nsize 12\n", "a Git LFS pointer"),
}


@pytest.mark.parametrize("name", STARTS)
def test_a_file_that_is_something_else_is_refused(name: str, tmp_path: Path) -> None:
    data, what = STARTS[name]
    path = tmp_path / "m.safetensors"
    path.write_bytes(data)
    assert what in refusal(path)


def test_what_cannot_be_opened_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path / "missing") == "no such file"
    assert refusal(tmp_path) == "is a folder, not a file"
    (tmp_path / "file").touch()
    assert refusal(tmp_path / "file" / "m.safetensors") == "Not a directory"
    with pytest.raises(CheckpointError, match="no name that a file can have"):
        read_container(tmp_path / "a\0b", CheckpointError)


def test_the_caller_chooses_the_error(tmp_path: Path) -> None:
    assert refusal(tmp_path / "missing", ArtifactError) == "no such file"


def test_truncated_at_every_byte(tmp_path: Path) -> None:
    whole = save({"w": gaussian(2, 3), "b": gaussian(3)}, {"format": "pt"})
    path = tmp_path / "m.safetensors"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        assert refusal(path)


def test_a_small_file_that_declares_much_costs_nothing(tmp_path: Path) -> None:
    path = write_raw(tmp_path / "m.safetensors", {"w": entry("F64", [2**40], 0, 2**43)}, DATA)
    tracemalloc.start()
    refusal(path)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


@pytest.mark.parametrize("magic", [magic for magic in FOREIGN_MAGIC if len(magic) == 2])
def test_a_header_whose_length_looks_like_a_pickle_is_read(magic: bytes, tmp_path: Path) -> None:
    header = json.dumps({"w": W}).encode().ljust(int.from_bytes(magic, "little"))
    path = write_raw(tmp_path / "m.safetensors", header, DATA)
    assert path.read_bytes().startswith(magic)
    assert read_container(path, CheckpointError).bytes_of("w") == DATA


@pytest.mark.parametrize("padding", range(8))
def test_tensors_come_in_the_order_of_their_data_at_any_alignment(padding: int, tmp_path: Path) -> None:
    header = {"z": entry("U8", [4], 0, 4), "none": entry("F32", [0, 5], 24, 24), "a": entry("F32", [5], 4, 24)}
    raw = json.dumps(header).encode() + b" " * padding
    container = read_container(write_raw(tmp_path / "m.safetensors", raw, DATA), CheckpointError)
    assert [info.name for info in container.tensors] == ["z", "a", "none"]
    assert container.bytes_of("z") == DATA[:4]
    assert container.bytes_of("a") == DATA[4:]
    assert container.bytes_of("none") == b""
    assert container.file_bytes == 8 + len(raw) + 24


def test_a_file_without_data_has_tensors_of_no_bytes(tmp_path: Path) -> None:
    container = read_container(save_checkpoint(tmp_path / "m.safetensors", {"a": torch.empty(0, 3)}), CheckpointError)
    assert container.bytes_of("a") == b""
    assert container.tensors[0].shape == (0, 3)
    assert read_container(write_raw(tmp_path / "n.safetensors", {}), CheckpointError).tensors == ()


@pytest.mark.parametrize("dtype", DTYPE_BITS)
def test_every_dtype_has_the_size_that_the_library_gives_it(dtype: str, tmp_path: Path) -> None:
    n_bytes = DTYPE_BITS[dtype]
    path = write_raw(tmp_path / "m.safetensors", {"w": entry(dtype, [8], 0, n_bytes)}, bytes(n_bytes))
    container = read_container(path, CheckpointError)
    assert container.tensors[0].n_bytes == n_bytes
    with safe_open(path, "np") as library:
        assert list(library.keys()) == ["w"]


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12).filter(lambda name: name != "__metadata__")


@given(
    st.dictionaries(texts, st.lists(st.integers(0, 4), max_size=4), max_size=6),
    st.dictionaries(texts, texts, max_size=3),
)
@settings(deadline=None, max_examples=60)
def test_any_file_of_the_library_is_read_alike(
    tmp_path_factory: pytest.TempPathFactory, shapes: dict[str, list[int]], metadata: dict[str, str]
) -> None:
    path = tmp_path_factory.mktemp("any") / "m.safetensors"
    tensors = {name: gaussian(*shape, seed=index) for index, (name, shape) in enumerate(shapes.items())}
    save_checkpoint(path, tensors, metadata or None)
    container = read_container(path, CheckpointError)
    assert container.metadata == metadata
    assert {info.name: list(info.shape) for info in container.tensors} == shapes
    for name, tensor in tensors.items():
        assert container.bytes_of(name) == tensor.numpy().tobytes()
