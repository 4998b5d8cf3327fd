"""Every way in which the side information and streams of unbounded codes can lie: exit code 3, the tensor named."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from artifact import unbounded_method
from artifact.examples import Header, gaussian, recipe, rewrite, rule, run, save, seal, verify
from artifact.test_hostile import add_tensor, drop_tensor, refusal, stored
from qcompress.artifact.reader import read_artifact
from qcompress.coding.ans import varint
from qcompress.coding.unbounded.side import Matrix, parse_side
from qcompress.compress.load import load_state_dict

NAMES = ["a", "b"]


@pytest.fixture(autouse=True)
def rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    unbounded_method.register(monkeypatch)


def make(folder: Path, choice: str = "ans", *, trellis: bool = False, step: float = 0.1) -> Path:
    """An artifact of unbounded codes "a" [6, 4, 3, 3] and "b" [9, 20], which share a pool."""
    source = save(folder / "in.safetensors", {"a": gaussian(6, 4, 3, 3), "b": gaussian(9, 20, seed=1)})
    asked = recipe(rule("*", "rounded", step=step, trellis=trellis, columns=True))
    run(source, folder / "out.safetensors", asked, choice, force=True)
    return folder / "out.safetensors"


def replaced(name: str, change: Callable[[bytes], bytes]) -> Callable[[Header, Header, bytearray], None]:
    """Give a stored tensor other bytes, perhaps of another length, and make its checksum true again."""

    def apply(header: Header, manifest: Header, data: bytearray) -> None:
        begin, end = header[name]["data_offsets"]
        content = change(bytes(data[begin:end]))
        data[begin:end] = content
        moved = len(content) - (end - begin)
        header[name] |= {"shape": [len(content)], "data_offsets": [begin, end + moved]}
        for key, one in header.items():
            if key != "__metadata__" and key != name and one["data_offsets"][0] >= end:
                one["data_offsets"] = [place + moved for place in one["data_offsets"]]
        seal(header, manifest, data, name.removesuffix(".qc.codes"))

    return apply


def at(place: int, value: int) -> Callable[[bytes], bytes]:
    return lambda data: data[:place] + bytes([value]) + data[place + 1 :]


SIDE = ".qc.side"
LIES: dict[str, tuple[Callable[[Header, Header, bytearray], object], str]] = {
    "no side information": (drop_tensor(SIDE), "'.qc.side' is missing"),
    "side information of floats": (stored(SIDE, dtype="I8"), "'.qc.side' is not a list of bytes"),
    "side information cut off": (replaced(SIDE, lambda d: d[:9]), "9 bytes of side information for 2 tensors"),
    "side information empty": (replaced(SIDE, lambda _: b""), "0 bytes of side information"),
    "an unknown flag": (replaced(SIDE, at(0, 0x40)), "unknown flags 0x40"),
    "the exponent too low": (replaced(SIDE, at(1, 0x81)), "the exponent -127 of a step"),
    "the exponent too high": (replaced(SIDE, at(1, 113)), "the exponent 113 of a step"),
    "a step of 0": (replaced(SIDE, lambda d: d[:3] + b"\0\0" + d[5:]), "a step is not a finite float16"),
    "a negative step": (replaced(SIDE, at(4, 0x80)), "a step is not a finite float16"),
    "an infinite step": (replaced(SIDE, lambda d: d[:3] + b"\0\x7c" + d[5:]), "a step is not a finite float16"),
    "classes beyond the last": (replaced(SIDE, at(11, 31)), "classes that do not exist"),
    "a table of too many bins": (replaced(SIDE, at(12, 200)), "a table of 200 bins"),
    "a class without a table": (replaced(SIDE, at(2, 124)), "has no table"),
    "bytes behind the side information": (replaced(SIDE, lambda d: d + b"\x01"), "tensor '.qc.side'"),
    "a zero byte behind the side information": (replaced(SIDE, lambda d: d + b"\0"), "bytes that no code needs"),
    "codes cut off": (replaced("a.qc.codes", lambda d: d[:-3]), "tensor 'a'"),
    "codes empty": (replaced("a.qc.codes", lambda _: b""), "tensor 'a'"),
    "raw bits longer than the codes": (
        replaced("a.qc.codes", lambda d: varint(5000) + d[1:]),
        "the chunks are longer than the payload",
    ),
    "bytes behind the codes": (replaced("b.qc.codes", lambda d: d + b"\x07"), "tensor 'b'"),
    "a scale beside unbounded codes": (
        add_tensor("a.qc.scale", {"dtype": "F16", "shape": [1, 1]}, b"\0\0"),
        "tensor 'a' has its scale missing or too many",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LIES)
def test_a_tensor_that_lies_is_refused(name: str, tmp_path: Path) -> None:
    change, words = LIES[name]
    assert words in refusal(rewrite(make(tmp_path), change))


@pytest.mark.parametrize("key", ["bits", "exponent", "values", "dim"])
def test_an_entry_has_nothing_that_side_information_has(key: str, tmp_path: Path) -> None:
    def change(_header: Header, manifest: Header, _data: bytearray) -> None:
        manifest["tensors"]["a"] = {"shape": [6, 4, 3, 3], key: 1}

    assert f"tensor 'a' has an entry with {key!r} missing or unknown" in refusal(rewrite(make(tmp_path), change))


def test_another_shape_is_refused(tmp_path: Path) -> None:
    def change(_header: Header, manifest: Header, _data: bytearray) -> None:
        manifest["tensors"]["a"] = [4, 6, 3, 3]

    assert "tensor 'a': its checksum does not hold" in refusal(rewrite(make(tmp_path), change), load_state_dict)


def test_side_information_without_unbounded_codes_is_refused(tmp_path: Path) -> None:
    source = save(tmp_path / "in.safetensors", {"w": gaussian(3, 5)})
    run(source, tmp_path / "out.safetensors", recipe(rule("w", "rtn", bits=3)))
    add = add_tensor(SIDE, {"dtype": "U8", "shape": [2]}, b"ab")
    assert "belongs to no tensor" in refusal(rewrite(tmp_path / "out.safetensors", add))


@pytest.mark.parametrize(("choice", "trellis"), [("ans", False), ("ans", True), ("zstd", False), ("packed", False)])
def test_every_damaged_byte_is_found_by_loading_alone(choice: str, trellis: bool, tmp_path: Path) -> None:
    """Of codes, of side information, and of the manifest; the tensor or the pool is named."""
    path = make(tmp_path, choice, trellis=trellis)
    sound = path.read_bytes()
    start = 8 + int.from_bytes(sound[:8], "little")
    end = start + read_artifact(path).files[0].container.spans["qcompress.manifest"][0]
    generator = np.random.default_rng(0)
    for place in range(start, len(sound)):
        damaged = bytearray(sound)
        damaged[place] ^= 1 << int(generator.integers(8))
        path.write_bytes(damaged)
        assert place >= end or "tensor '" in refusal(path, load_state_dict)


@pytest.mark.parametrize("choice", ["ans", "zstd", "packed"])
def test_truncated_payloads_raise(choice: str, tmp_path: Path) -> None:
    sound = make(tmp_path, choice).read_bytes()
    path = tmp_path / "out.safetensors"
    begin, end = read_artifact(path).files[0].container.spans["a.qc.codes"]
    for length in range(0, end - begin, 3):
        path.write_bytes(sound)
        change = replaced("a.qc.codes", lambda data, n=length: data[:n])
        assert "tensor 'a'" in refusal(rewrite(path, change))


def test_a_small_file_that_declares_many_weights_is_refused_at_once(tmp_path: Path) -> None:
    def change(_header: Header, manifest: Header, _data: bytearray) -> None:
        manifest["tensors"]["b"] = [2**31, 2**20]

    path = rewrite(make(tmp_path), change)
    tracemalloc.start()
    refusal(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 22


def test_random_side_information_never_breaks_the_reader() -> None:
    generator = np.random.default_rng(1)
    matrices = [Matrix(6, 36, 9), Matrix(9, 20, 1)]
    refused = 0
    for _ in range(3000):
        flags = bytes([int(generator.integers(64)), 250, 3, 0, 0x3C])
        tail = generator.integers(0, 40, int(generator.integers(4, 60))).astype(np.uint8).tobytes()
        try:
            parse_side(memoryview(flags + flags + tail), matrices)
        except ValueError:
            refused += 1
    assert refused > 1000


def test_a_sound_tensor_is_accepted_after_the_same_rewriting(tmp_path: Path) -> None:
    verify(rewrite(make(tmp_path), lambda *_: None))
