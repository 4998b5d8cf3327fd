"""Every way in which an artifact can lie, one named case each: exit code 3, and nothing allocated before."""

from __future__ import annotations

import json
import tracemalloc
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import zstandard
from safetensors import safe_open

from artifact.educational_decoder import expand, words
from artifact.examples import (
    Header,
    denses,
    entry,
    framed,
    gaussian,
    make_artifact,
    recipe,
    rewrite,
    rtn,
    rule,
    run,
    same_content,
    save,
    save_folder,
    seal,
    verify,
    write_raw,
)
from qcompress.artifact.layout import INDEX_NAME
from qcompress.artifact.manifest import manifest_frame, manifest_text
from qcompress.artifact.reader import read_artifact
from qcompress.compress.load import load_into, load_state_dict
from qcompress.errors import ArtifactError, Refusals
from qcompress.report.gather import gather_report

Change = Callable[[Header, Header, bytearray], Any]


def refusal(path: Path, read: Callable[[Path], Any] = verify) -> str:
    with pytest.raises((ArtifactError, Refusals)) as caught:
        read(path)
    assert caught.value.exit_code == 3
    assert "\n" not in str(caught.value)
    return str(caught.value)


def field(name: str, key: str, value: Any) -> Change:
    """Set a field of one tensor's entry; None takes it out."""

    def change(_header: Header, manifest: Header, _data: bytearray) -> None:
        manifest["tensors"][name][key] = value

    return change


def number(kind: str, name: str, value: Any) -> Change:
    """Set a number of a tensor that the manifest ends with; every other checksum is as it was."""

    def change(_header: Header, manifest: Header, _data: bytearray) -> None:
        manifest["numbers"][kind][name] = value

    return change


def top(key: str, value: Any) -> Change:
    def change(_header: Header, manifest: Header, _data: bytearray) -> None:
        manifest[key] = value

    return change


def stored(name: str, **values: Any) -> Change:
    """Change what the header says of one stored tensor."""

    def change(header: Header, _manifest: Header, _data: bytearray) -> None:
        header[name] |= values

    return change


def order_others(manifest: Header, more: dict[str, int]) -> None:
    """Add checksums of what is not compressed, in their place."""
    numbers = manifest["numbers"]
    stored = {one: numbers["crc32"][one] for one in manifest["tensors"]}
    others = {one: crc32 for one, crc32 in numbers["crc32"].items() if one not in stored} | more
    numbers["crc32"] = stored | dict(sorted(others.items()))


def tie(name: str, twin: str) -> Change:
    """Call a name tied to a tensor, with a checksum that holds."""

    def change(_header: Header, manifest: Header, _data: bytearray) -> None:
        manifest["tied"] = {name: twin}
        order_others(manifest, {name: zlib.crc32(words(name, {"form": "tied", "to": twin}))})

    return change


def without(*path: str) -> Change:
    def change(_header: Header, manifest: Header, _data: bytearray) -> None:
        place = manifest
        for key in path[:-1]:
            place = place[key]
        del place[path[-1]]

    return change


def add_tensor(name: str, like: Header, content: bytes) -> Change:
    def change(header: Header, manifest: Header, data: bytearray) -> None:
        header[name] = like | {"data_offsets": [len(data), len(data) + len(content)]}
        data += content
        if ".qc." not in name or name == ".qc.side":
            order_others(manifest, {name: 0})

    return change


def drop_tensor(name: str) -> Change:
    """Take a stored tensor out, and its bytes, so that the container stays sound."""

    def change(header: Header, manifest: Header, data: bytearray) -> None:
        begin, end = header.pop(name)["data_offsets"]
        del data[begin:end]
        manifest["numbers"]["crc32"].pop(name, None)
        for key, one in header.items():
            if key != "__metadata__" and one["data_offsets"][0] >= end:
                one["data_offsets"] = [place - (end - begin) for place in one["data_offsets"]]

    return change


def fill(name: str, value: bytes) -> Change:
    """Overwrite the first value of a stored tensor and make the CRC-32 true again."""

    def change(header: Header, manifest: Header, data: bytearray) -> None:
        begin = header[name]["data_offsets"][0]
        data[begin : begin + len(value)] = value
        seal(header, manifest, data, name.split(".qc.")[0])

    return change


ENTRIES: dict[str, tuple[Change, str]] = {
    "bits 0": (field("w", "bits", 0), "tensor 'w' has the bits 0, not a number in [1, 8]"),
    "bits 9": (field("w", "bits", 9), "tensor 'w' has the bits 9, not a number in [1, 8]"),
    "dim of a grid": (field("w", "dim", 2), "tensor 'w' has an entry with 'dim' missing or unknown"),
    "bits true": (field("w", "bits", True), "tensor 'w' has the bits True"),
    "bits real": (field("w", "bits", 3.0), "tensor 'w' has the bits 3.0"),
    "bits of other codes": (field("w", "bits", 4), "tensor 'w' has a codes of shape [6, 4], not [6, 5]"),
    "exponent too high": (number("exponent", "w", 113), "tensor 'w' has the exponent 113"),
    "exponent too low": (number("exponent", "w", -127), "tensor 'w' has the exponent -127"),
    "exponent among the fields": (field("w", "exponent", 1), "tensor 'w' has an entry with 'exponent' missing or un"),
    "crc of something else": (number("crc32", "w", 1), "tensor 'w': its checksum does not hold"),
    "crc of something kept": (number("crc32", "b", 1), "tensor 'b': its checksum does not hold"),
    "no shape": (without("tensors", "w", "shape"), "tensor 'w' has an entry with 'shape' missing or unknown"),
    "unknown field": (field("w", "note", 1), "tensor 'w' has an entry with 'note' missing or unknown"),
    "no entry at all": (top("tensors", {"w": None}), "tensor 'w' has no entry in the manifest"),
    "dtype of integers": (field("w", "dtype", "I32"), "tensor 'w' has the unknown dtype 'I32'"),
    "dtype a list": (field("w", "dtype", ["F32"]), "tensor 'w' has the unknown dtype ['F32']"),
    "unknown form": (field("w", "form", "lattice"), "tensor 'w' has the unknown form 'lattice'"),
    "form a list": (field("w", "form", ["affine"]), "tensor 'w' has the unknown form ['affine']"),
    "another form": (field("w", "form", "unbounded"), "tensor 'w' has an entry with"),
    "unknown grid": (field("w", "grid", "log"), "tensor 'w' has the unknown grid 'log'"),
    "unknown coding": (number("coding", "w", 3), "its manifest has the unknown coding 3"),
    "another coding": (number("coding", "w", 1), "tensor 'w' has a codes of shape [6, 4], not [0]"),
    "group 0": (field("w", "group", 0), "tensor 'w' has the group 0, not tensor, channel or a number"),
    "group true": (field("w", "group", True), "tensor 'w' has the group True, not tensor, channel or a number"),
    "group of text": (field("w", "group", "row"), "tensor 'w' has the group 'row', not tensor, channel or a number"),
    "group of other scales": (field("w", "group", 3), "tensor 'w' has a scale of shape [6, 1], not [6, 4]"),
    "exponents of rows": (field("w", "row_exponents", True), "its manifest has"),
    "row_exponents a number": (field("w", "row_exponents", 1), "tensor 'w' has row_exponents 1, not true or false"),
    "grid without its zero point": (
        field("v", "grid", "zero-point"),
        "tensor 'v' has its zero_point missing or too many",
    ),
    "grid with a zero point too many": (
        field("w", "grid", "full"),
        "tensor 'w' has its zero_point missing or too many",
    ),
    "grid with the wrong side": (field("w", "grid", "offset"), "tensor 'w' has its offset missing or too many"),
    "shape of other codes": (field("w", "shape", [5, 10]), "tensor 'w' has a codes of shape [6, 4], not [5, 4]"),
    "shape negative": (field("w", "shape", [-6, -10]), "tensor 'w' has the shape [-6, -10], not a list of numbers"),
    "shape of text": (field("w", "shape", ["6", 10]), "tensor 'w' has the shape"),
    "shape a number": (field("w", "shape", 60), "tensor 'w' has the shape 60"),
    "shape with a zero": (field("w", "shape", [0, 10]), "tensor 'w' has the shape [0, 10], which is not compressed"),
    "shape beyond 63 bits": (field("w", "shape", [2**63, 1]), "tensor 'w' has the shape"),
    "shape of a hundred sizes": (field("w", "shape", [60] + [1] * 99), "which is not compressed"),
    "axis beyond": (field("w", "axis", [2]), "tensor 'w' of shape [6, 10] has the channel axes [2]"),
    "axis negative": (field("w", "axis", [-1]), "tensor 'w' has the axis [-1]"),
    "axis twice": (field("w", "axis", [0, 0]), "tensor 'w' of shape [6, 10] has the channel axes [0, 0]"),
    "all axes": (field("w", "axis", [0, 1]), "tensor 'w' of shape [6, 10] has the channel axes [0, 1]"),
    "no axis": (field("w", "axis", []), "tensor 'w' of shape [6, 10] has the channel axes []"),
    "axis a number": (field("w", "axis", 0), "tensor 'w' has the axis 0, not a list of numbers"),
    "another axis": (field("w", "axis", [1]), "tensor 'w' has a codes of shape [6, 4], not [10, 3]"),
}

PARTS: dict[str, tuple[Change, str]] = {
    "codes missing": (drop_tensor("w.qc.codes"), "tensor 'w' has its codes missing"),
    "scale missing": (drop_tensor("w.qc.scale"), "tensor 'w' has its scale missing"),
    "zero point missing": (drop_tensor("w.qc.zero_point"), "tensor 'w' has its zero_point missing"),
    "offset too many": (
        add_tensor("w.qc.offset", entry("F16", [6, 1], 0, 0), bytes(12)),
        "tensor 'w' has its offset missing or too many",
    ),
    "unknown part": (
        add_tensor("w.qc.tables", entry("U8", [4], 0, 0), bytes(4)),
        "tensor 'w.qc.tables' has no entry in the manifest",
    ),
    "part of nothing": (
        add_tensor("u.qc.codes", entry("U8", [4], 0, 0), bytes(4)),
        "tensor 'u.qc.codes' has no entry in the manifest",
    ),
    "dense too": (
        add_tensor("w", entry("F32", [1], 0, 0), bytes(4)),
        "tensor 'w' stands beside its codes",
    ),
    "entry missing": (without("tensors", "w"), "its manifest has"),
    "reserved name": (top("tensors", {"w.qc.x": {}}), "tensor 'w.qc.x' has '.qc.' in its name"),
    "scale of bytes": (stored("w.qc.scale", dtype="I16"), "tensor 'w' has a scale of I16, not F16"),
    "scale of BF16": (stored("w.qc.scale", dtype="BF16"), "tensor 'w' has a scale of BF16, not F16"),
    "codes signed": (stored("w.qc.codes", dtype="I8"), "tensor 'w' has a codes of I8, not U8"),
    "zero point signed": (stored("w.qc.zero_point", dtype="I8"), "tensor 'w' has a zero_point of I8, not U8"),
    "codes flat": (stored("w.qc.codes", shape=[24]), "tensor 'w' has a codes of shape [24], not [6, 4]"),
    "codes turned": (stored("w.qc.codes", shape=[4, 6]), "tensor 'w' has a codes of shape [4, 6], not [6, 4]"),
    "scale flat": (stored("w.qc.scale", shape=[6]), "tensor 'w' has a scale of shape [6], not [6, 1]"),
    "scale turned": (stored("w.qc.scale", shape=[1, 6]), "tensor 'w' has a scale of shape [1, 6], not [6, 1]"),
    "scale of half the rows": (
        stored("w.qc.scale", shape=[3, 2]),
        "tensor 'w' has a scale of shape [3, 2], not [6, 1]",
    ),
    "scale of three dimensions": (stored("w.qc.scale", shape=[6, 1, 1]), "tensor 'w' has a scale of shape [6, 1, 1]"),
    "zero point of another shape": (
        stored("w.qc.zero_point", shape=[2, 3]),
        "tensor 'w' has a zero_point of shape [2, 3], not [6, 1]",
    ),
    "scale NaN": (fill("w.qc.scale", b"\x00\x7e"), "tensor 'w': its grid holds NaN or Inf"),
    "scale Inf": (fill("v.qc.scale", b"\x00\x7c"), "tensor 'v': its grid holds NaN or Inf"),
    "scale -Inf": (fill("w.qc.scale", b"\x00\xfc"), "tensor 'w': its grid holds NaN or Inf"),
    "padding bits": (fill("w.qc.codes", b"\0\0\0\x80"), "tensor 'w': the bits that fill up a row are not zero"),
}

MANIFEST: dict[str, tuple[Change, str]] = {
    "format 3": (top("format", 3), "its format 3 is newer than the 2 that this version reads; update qcompress"),
    "format 1": (top("format", 1), "its format 1 is not read any more"),
    "format 0": (top("format", 0), "its manifest has no format number"),
    "format true": (top("format", True), "its manifest has no format number"),
    "format text": (top("format", "1"), "its manifest has no format number"),
    "format missing": (without("format"), "its manifest has no format number"),
    "unknown key": (top("pooled", {}), "its manifest has 'pooled' missing or unknown"),
    "tensors missing": (without("tensors"), "its manifest has 'tensors' missing or unknown"),
    "tensors a list": (top("tensors", []), "its manifest has no object 'tensors'"),
    "defaults a list": (top("defaults", []), "its manifest has no object 'defaults'"),
    "defaults missing": (without("defaults"), "its manifest has 'defaults' missing or unknown"),
    "defaults with an unknown field": (top("defaults", {"axis": [0], "note": 1}), "'note' unknown among its defaults"),
    "defaults with a usual field": (top("defaults", {"axis": [0], "dim": 2}), "'dim' unknown among its defaults"),
    "recipe text": (top("recipe", "{}"), "its manifest has no object 'recipe'"),
    "tool a number": (top("tool", 1), "its manifest has no text 'tool'"),
    "input size negative": (top("input_bytes", -1), "its manifest has no size 'input_bytes'"),
    "input size beyond 63 bits": (top("input_bytes", 10**400), "its manifest has no size 'input_bytes'"),
    "input size real": (top("input_bytes", 1.0), "its manifest has no size 'input_bytes'"),
    "recipe hash of another recipe": (top("recipe", {}), "its manifest has a recipe of another hash than it names"),
    "recipe hash of capitals": (top("recipe_sha256", "A" * 64), "'recipe_sha256' that is not 64 hexadecimal digits"),
    "recipe hash a number": (top("recipe_sha256", 0), "its manifest has no text 'recipe_sha256'"),
    "tied to nothing": (tie("u", "nothing"), "ties 'u' to 'nothing', which it does not hold"),
    "tied to itself": (tie("u", "u"), "ties 'u' to 'u', which it does not hold"),
    "tied to a part": (tie("u", "w.qc.codes"), "ties 'u' to 'w.qc.codes', which it does not hold"),
    "tied and compressed": (tie("w", "v"), "tensor 'w' is called tied and is stored too"),
    "tied and kept": (tie("b", "v"), "tensor 'b' is called tied and is stored too"),
    "tied without a checksum": (top("tied", {"u": "w"}), "bytes of numbers, not"),
    "a number too many": (number("crc32", "z", 0), "bytes of numbers, not"),
    "tied a list": (top("tied", ["w"]), "'tied' that is not a map from text to text"),
    "tied to a number": (top("tied", {"u": 1}), "'tied' that is not a map from text to text"),
    "metadata of numbers": (top("metadata", {"a": 1}), "'metadata' that is not a map from text to text"),
}

CASES = {**ENTRIES, **PARTS, **MANIFEST}


@pytest.mark.parametrize("name", CASES)
def test_an_artifact_that_lies_is_refused(name: str, tmp_path: Path) -> None:
    change, what = CASES[name]
    path = make_artifact(tmp_path)
    text = refusal(rewrite(path, change))
    assert what in text
    assert str(path) in text
    if not what.startswith("ties") and name not in MANIFEST:
        refusal(path, load_state_dict)


def test_a_sound_artifact_is_accepted_after_the_same_rewriting(tmp_path: Path) -> None:
    """What the cases above change is what they are refused for."""
    path = rewrite(make_artifact(tmp_path), lambda *_: None)
    assert {info.name for info in verify(path).files[0].kept} == {"b"}
    assert denses(load_state_dict(path)) == expand(path)


MANIFEST_TEXTS = {
    "not JSON": ("{", "its manifest is not JSON"),
    "a list": ("[]", "its manifest is not a JSON object"),
    "a number": ("1", "its manifest is not a JSON object"),
    "a key twice": ('{"format": 1, "format": 1}', "key 'format' stands twice"),
    "a number that is none": ('{"format": NaN}', "NaN is no number"),
    "half a surrogate pair": ('{"tool": "\\ud800"}', "its manifest is not JSON"),
    "nested": ("[" * 100_000, "nested too deep"),
    "empty": ("", "its manifest is not JSON"),
    "not UTF-8": (b"{\xff}", "its manifest is damaged"),
}

FRAMES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda _: b"", "cannot hold 1"),
    "no zstd": (lambda f: bytes(len(f)), "its manifest is damaged"),
    "cut off": (lambda f: f[:-1], "its manifest is damaged"),
    "longer": (lambda f: f + b"\0", "its manifest is damaged"),
    "another checksum": (lambda f: f[:-1] + bytes([f[-1] ^ 1]), "its manifest is damaged"),
    "without a checksum": (lambda f: zstandard.compress(b"{}\n" + bytes(99)), "the zstd frame has no checksum"),
    "without its size": (
        lambda f: zstandard.ZstdCompressor(write_content_size=False, write_checksum=True).compress(b"{}\n"),
        "its manifest is damaged",
    ),
    "a bomb": (
        lambda f: zstandard.ZstdCompressor(write_checksum=True).compress(bytes(1 << 24)),
        "the zstd frame declares",
    ),
    "no numbers": (lambda f: framed(b"{}"), "its manifest is cut off"),
}


def with_frame(path: Path, frame: bytes) -> Path:
    """A file of one kept tensor with these bytes in place of its manifest."""
    header = {
        "__metadata__": {"format": "pt", "qcompress": "2"},
        "w": entry("F32", [2, 2], 0, 16),
        "qcompress.manifest": entry("U8", [len(frame)], 16, 16 + len(frame)),
    }
    return write_raw(path, header, bytes(16) + frame)


@pytest.mark.parametrize("name", MANIFEST_TEXTS)
def test_a_manifest_that_is_none_is_refused(name: str, tmp_path: Path) -> None:
    text, what = MANIFEST_TEXTS[name]
    content = (text.encode() if isinstance(text, str) else text) + b"\n" + bytes(72)
    assert what in refusal(with_frame(tmp_path / "m.safetensors", framed(content)))


@pytest.mark.parametrize("name", FRAMES)
def test_a_frame_that_is_none_is_refused(name: str, tmp_path: Path) -> None:
    change, what = FRAMES[name]
    path = with_frame(tmp_path / "m.safetensors", change(framed(b"{}\n" + bytes(72))))
    tracemalloc.start()
    assert what in refusal(path)
    assert tracemalloc.get_traced_memory()[1] < 1 << 22
    tracemalloc.stop()


PLACES: dict[str, tuple[Callable[[Header], Any], str]] = {
    "none": (lambda h: h.pop("qcompress.manifest"), "has 0 bytes after its last tensor"),
    "floats": (lambda h: h["qcompress.manifest"].update(dtype="I8"), "is not a list of bytes at its end"),
    "a matrix": (
        lambda h: h["qcompress.manifest"].update(shape=[1, *h["qcompress.manifest"]["shape"]]),
        "is not a list of bytes at its end",
    ),
    "format 1": (lambda h: h["__metadata__"].update(qcompress='{"format": 1}'), "its format 1 is not read any more"),
    "format 0": (lambda h: h["__metadata__"].update(qcompress="0"), "its format 0 is not read any more"),
    "format 3": (lambda h: h["__metadata__"].update(qcompress="3"), "its format 3 is newer than the 2"),
    "format of text": (lambda h: h["__metadata__"].update(qcompress="two"), "its format is no number"),
    "another header": (lambda h: h["__metadata__"].update(note="x"), "its header does not have the CRC-32"),
}


@pytest.mark.parametrize("name", PLACES)
def test_a_manifest_in_another_place_is_refused(name: str, tmp_path: Path) -> None:
    change, what = PLACES[name]
    path = make_artifact(tmp_path)
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    change(header)
    if name == "none":
        what = "bytes after its last tensor"
    assert what in refusal(write_raw(path, header, raw[start:]))


def test_a_manifest_before_other_tensors_is_refused(tmp_path: Path) -> None:
    frame = framed(b"{}\n" + bytes(72))
    header = {
        "__metadata__": {"format": "pt", "qcompress": "2"},
        "qcompress.manifest": entry("U8", [len(frame)], 0, len(frame)),
        "w": entry("F32", [2, 2], len(frame), len(frame) + 16),
    }
    path = write_raw(tmp_path / "m.safetensors", header, frame + bytes(16))
    assert "is not a list of bytes at its end" in refusal(path)


def test_a_plain_checkpoint_is_no_artifact(tmp_path: Path) -> None:
    path = save(tmp_path / "m.safetensors", {"w": gaussian(2, 2)})
    assert "is a plain safetensors file, not an artifact; compress it: qcompress quantize" in refusal(path)
    assert "no such file" in refusal(tmp_path / "missing")


@pytest.mark.parametrize("choice", ["packed", "zstd", "ans"])
def test_every_flipped_bit_is_found(choice: str, tmp_path: Path) -> None:
    """A bit of each byte of length, header, padding and manifest; every bit of kept tensors, codes and grids.

    By every reader: loading and reporting find what verifying finds.
    """
    path = make_artifact(tmp_path, {"w": gaussian(6, 10).sign(), "b": gaussian(2)}, choice)
    assert read_artifact(path).files[0].manifest.tensors["w"].coding == choice
    whole = path.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    end = start + read_artifact(path).files[0].container.spans["qcompress.manifest"][0]
    rest = [*range(start), *range(end, len(whole))]
    once = [(place, place % 8) for place in rest] if choice == "packed" else []
    data = [(place, bit) for place in range(start, end) for bit in range(8)]
    for place, bit in once + data:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << bit
        path.write_bytes(damaged)
        if place >= end and same_content(damaged[end:], whole[end:]):
            verify(path)
            continue
        for read in (verify, load_state_dict, gather_report) if bit == place % 8 else (verify,):
            text = refusal(path, read)
            assert not start <= place < end or "tensor '" in text
    path.write_bytes(whole)
    verify(path)


@pytest.mark.parametrize("choice", ["packed", "zstd", "ans"])
def test_truncated_at_every_byte(choice: str, tmp_path: Path) -> None:
    path = make_artifact(tmp_path, choice=choice)
    whole = path.read_bytes()
    for length in range(0, len(whole), 1 if choice == "packed" else 7):
        path.write_bytes(whole[:length])
        refusal(path, read_artifact)


@pytest.mark.parametrize("coding", ["zstd", "ans"])
@pytest.mark.parametrize("shape", [[2**31, 2**31], [1, 2**40], [2**40, 1], [2**20, 2**20]])
def test_a_small_file_that_declares_much_is_refused_at_once(coding: str, shape: list[int], tmp_path: Path) -> None:
    path = make_artifact(tmp_path, {"w": torch.zeros(2, 8)}, coding)

    def declare(header: Header, manifest: Header, _data: bytearray) -> None:
        manifest["tensors"]["w"]["shape"] = shape

    rewrite(path, declare)
    tracemalloc.start()
    assert "declares" in refusal(path)
    refusal(path, load_state_dict)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_the_most_that_a_byte_can_stand_for_is_still_read(tmp_path: Path) -> None:
    """Codes that are all alike are filled up to a byte for 4,096 of them: that is no bomb."""
    path = make_artifact(tmp_path, {"w": torch.zeros(1 << 11, 1 << 11)}, "ans")
    assert read_artifact(path).files[0].container.by_name["w.qc.codes"].n_bytes == (1 << 22) // 4096
    assert path.stat().st_size < 20_000
    assert not load_state_dict(path)["w"].any()


def test_a_module_of_another_shape_is_refused(tmp_path: Path) -> None:
    path = make_artifact(tmp_path, {"weight": gaussian(3, 5), "bias": gaussian(3)})
    load_into(torch.nn.Linear(5, 3), path)
    words = "tensor 'weight': is [3, 5] in the checkpoint and [3, 4] in Linear"
    assert words in refusal(path, lambda one: load_into(torch.nn.Linear(4, 3), one))


SOURCES = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
A, B = "model.qcompress-00001-of-00002.safetensors", "model.qcompress-00002-of-00002.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shards = {"w": gaussian(6, 10)}, {"v": gaussian(4, 8), "b": gaussian(3)}
    source = save_folder(tmp_path / "in", dict(zip(SOURCES, shards, strict=True)))
    run(source, tmp_path / "out", rtn(3))
    return tmp_path / "out"


def remap(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        index = json.loads((folder / INDEX_NAME).read_text())
        change(index["weight_map"])
        (folder / INDEX_NAME).write_text(json.dumps(index))

    return apply


FOLDERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "shard missing": (lambda f: (f / B).unlink(), f"{B}: no such file"),
    "shard truncated": (lambda f: (f / B).write_bytes((f / B).read_bytes()[:-1]), f"{B}: is truncated"),
    "shard of another model": (
        lambda f: (f / B).write_bytes((f / A).read_bytes()),
        "is wrong about the file that holds",
    ),
    "shard that is plain": (lambda f: save(f / B, {"v": gaussian(4, 8)}), "is a plain safetensors file"),
    "shard too many": (
        lambda f: (f / "c.safetensors").write_bytes((f / A).read_bytes()),
        "holds a tensor in two of its files",
    ),
    "index not JSON": (lambda f: (f / INDEX_NAME).write_text("{"), "has no weight_map"),
    "index a list": (lambda f: (f / INDEX_NAME).write_text("[]"), "has no weight_map"),
    "index nested": (lambda f: (f / INDEX_NAME).write_text("[" * 100_000), "has no weight_map"),
    "index of numbers": (remap(lambda m: m.update({"w.qc.codes": 1})), "names files outside its folder"),
    "index of lists": (remap(lambda m: m.update({"w.qc.codes": []})), "has no weight_map"),
    "index empty": (remap(lambda m: m.clear()), "names files outside its folder, or none"),
    "index lacks a part": (remap(lambda m: m.pop("w.qc.scale")), "is wrong about the file that holds 'w.qc.scale'"),
    "index has a part too many": (remap(lambda m: m.update({"u": A})), "is wrong about the file that holds 'u'"),
    "index swaps files": (
        remap(lambda m: m.update({"w.qc.scale": B})),
        "is wrong about the file that holds 'w.qc.scale'",
    ),
    "file above": (remap(lambda m: m.update({"b": "../x.safetensors"})), "names files outside its folder"),
    "file elsewhere": (remap(lambda m: m.update({"b": "/etc/passwd"})), "names files outside its folder"),
    "the folder above": (remap(lambda m: m.update({"b": ".."})), "is a folder, not a file"),
    "no file name": (remap(lambda m: m.update({"b": "a\0b"})), "no name that a file can have"),
    "tied and stored in another file": (
        lambda f: rewrite(f / A, tie("v", "w")),
        "tensor 'v' is called tied and is stored too",
    ),
    "tied and kept in another file": (
        lambda f: rewrite(f / A, tie("b", "w")),
        "tensor 'b' is called tied and is stored too",
    ),
    "no index": (lambda f: (f / INDEX_NAME).unlink(), f"holds 2 .safetensors files and no {INDEX_NAME}"),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_that_lies_is_refused(name: str, folder: Path) -> None:
    verify(folder)
    change, what = FOLDERS[name]
    change(folder)
    assert what in refusal(folder, read_artifact)


def test_a_tensor_in_two_files_is_refused(folder: Path) -> None:
    """Even where the index agrees: each file holds other parts of a tensor that both call their own."""
    (folder / A).write_bytes((folder / B).read_bytes())
    spans = read_artifact(folder / B).files[0].container.spans
    (folder / INDEX_NAME).write_text(
        json.dumps({"weight_map": {name: B for name in spans if name != "qcompress.manifest"}})
    )
    assert "holds a tensor in two of its files" in refusal(folder)


def test_the_library_opens_what_it_should_and_nothing_is_added(tmp_path: Path) -> None:
    path = make_artifact(tmp_path)
    with safe_open(path, "pt") as library:
        assert library.metadata() == {"format": "pt", "qcompress": "2"}
        parts = {"w.qc.codes", "w.qc.scale", "w.qc.zero_point", "v.qc.codes", "v.qc.scale", "b", "qcompress.manifest"}
        assert set(library.keys()) == parts
        assert torch.equal(library.get_tensor("b"), gaussian(3, seed=2))
        assert library.get_tensor("w.qc.codes").shape == (6, 4)


def test_the_manifest_says_nothing_of_the_order_in_which_tensors_were_finished(tmp_path: Path) -> None:
    # Two grids, each the most frequent one, whose names differ in length.
    tensors = {"a": gaussian(4, 8), "b": gaussian(4, 8, seed=1)}
    asked = recipe(rule("a", "rtn", bits=2, symmetric=False), rule("b", "mse", bits=3, symmetric=True))
    run(save(tmp_path / "m.safetensors", tensors), tmp_path / "out.safetensors", asked)
    manifest = read_artifact(tmp_path / "out.safetensors").files[0].manifest
    assert len({len(entry.grid) for entry in manifest.tensors.values()}) == 2
    turned = replace(manifest, tensors=dict(reversed(manifest.tensors.items())))
    assert list(turned.tensors) != list(manifest.tensors)
    assert manifest_text(turned) == manifest_text(manifest)


def test_the_manifest_is_short_sorted_and_silent_about_the_machine(tmp_path: Path) -> None:
    source = save(tmp_path / "m.safetensors", {"w": gaussian(6, 10), "v": gaussian(4, 7)}, {"note": "kept"})
    run(source, tmp_path / "a.safetensors", recipe(rule("v", "rtn", bits=2), rule("w", "rtn", bits=3)))
    with safe_open(tmp_path / "a.safetensors", "pt") as library:
        frame = library.get_tensor("qcompress.manifest").numpy().tobytes()
    text = zstandard.ZstdDecompressor().decompress(frame).split(b"\n")[0].decode()
    manifest = json.loads(text)
    assert text == json.dumps(manifest, sort_keys=True, separators=(",", ":"))
    assert manifest["metadata"] == {"note": "kept"}
    common = {"axis": [0], "bits": 2, "dtype": "F32", "form": "affine", "grid": "zero-point", "group": "channel"}
    assert manifest["defaults"] == common
    assert manifest["tensors"] == {"v": [4, 7], "w": {"bits": 3, "shape": [6, 10]}}
    assert str(tmp_path) not in text
    assert manifest["input_bytes"] == source.stat().st_size


def test_the_length_of_a_manifest_is_known_before_its_numbers(tmp_path: Path) -> None:
    path = make_artifact(tmp_path)
    manifest = read_artifact(path).files[0].manifest
    blank = replace(
        manifest,
        sha256="f" * 64,
        header_crc32=2**32 - 1,
        tensors={name: replace(entry, exponent=-126, crc32=7) for name, entry in manifest.tensors.items()},
    )
    assert len(manifest_frame(blank)) == len(manifest_frame(manifest))
    assert manifest_frame(blank) != manifest_frame(manifest)


def codebook_artifact(folder: Path) -> Path:
    weight = gaussian(6, 8)
    source = save(folder / "in.safetensors", {"w": weight})
    run(source, folder / "out.safetensors", recipe(rule("w", "kmeans", bits=2, dim=2)))
    return folder / "out.safetensors"


CODEBOOKS: dict[str, tuple[Change, str]] = {
    "no codebook": (drop_tensor("w.qc.codebook"), "has its codebook missing or too many"),
    "scale beside half precision": (
        add_tensor("w.qc.scale", {"dtype": "F16", "shape": [1, 1]}, b"\0\x3c"),
        "has its scale missing or too many",
    ),
    "codebook of integers": (stored("w.qc.codebook", dtype="I16"), "has a codebook of I16"),
    "codebook of two dimensions": (stored("w.qc.codebook", shape=[4, 2]), "has a codebook of shape [4, 2]"),
    "codebook of another dim": (stored("w.qc.codebook", shape=[1, 2, 4]), "has a codebook of shape [1, 2, 4]"),
    "more entries than codes": (field("w", "bits", 1), "tensor 'w' has 4 entries for 1 bits"),
    "no entries": (number("entries", "w", 0), "tensor 'w' has 0 entries for 2 bits"),
    "fewer entries": (number("entries", "w", 3), "tensor 'w' has a codebook of shape [1, 4, 2], not [1, 3, 2]"),
    "values of a table": (field("w", "values", "nf4"), "tensor 'w' has the unknown values 'nf4'"),
    "codebooks that do not divide": (field("w", "group", 4), "tensor 'w' has 6 rows in codebooks of 4"),
    "codebooks that vectors straddle": (field("w", "group", 3), "tensor 'w' has 6 rows in codebooks of 3"),
    "dim 9": (field("w", "dim", 9), "tensor 'w' has the dim 9"),
    "dim that does not divide": (field("w", "dim", 4), "has 6 rows in vectors of 4"),
    "a codebook with NaN": (fill("w.qc.codebook", b"\x00\x7e"), "its grid holds NaN or Inf"),
    "13 bits": (field("w", "bits", 13), "has the bits 13, not a number in [1, 12]"),
}


SHARED: dict[str, tuple[Change, str]] = {
    "of nobody": (field("v", "shared", "u"), "tensor 'v' shares the codebook of 'u', which has none of its own"),
    "of one that shares": (
        field("x", "shared", "v"),
        "tensor 'x' shares the codebook of 'v', which has none of its own",
    ),
    "of a kept one": (field("v", "shared", "b"), "tensor 'v' shares the codebook of 'b', which has none of its own"),
    "its own, which it lacks": (field("v", "shared", "v"), "tensor 'v' shares the codebook 'v', not that of another"),
    "a number": (field("v", "shared", 1), "tensor 'v' shares the codebook 1, not that of another tensor"),
    "of another exponent": (number("exponent", "v", 3), "whose bits, dim or exponent differ"),
    "of other values": (field("v", "values", "F32"), "whose bits, dim or exponent differ"),
    "of other tables": (field("v", "group", "channel"), "which has 1 tables"),
    "of another dim": (field("v", "dim", 2), "whose bits, dim or exponent differ"),
    "of other bits": (field("v", "bits", 3), "whose bits, dim or exponent differ"),
    "owner without it": (drop_tensor("a.qc.codebook"), "tensor 'a' has its codebook missing or too many"),
    "of a grid": (field("v", "grid", "full"), "tensor 'v' has an entry with 'grid' missing or unknown"),
    "changed": (fill("a.qc.codebook", b"\x01\x3c"), "2 tensors, first 'v': its checksum does not hold"),
}


@pytest.mark.parametrize("case", SHARED)
def test_a_shared_codebook_that_lies_is_refused(tmp_path: Path, case: str) -> None:
    change, what = SHARED[case]
    tensors = {"a": gaussian(6, 8), "v": gaussian(4, 8, seed=1), "x": gaussian(2, 8, seed=2), "b": gaussian(3)}
    source, path = save(tmp_path / "in.safetensors", tensors), tmp_path / "out.safetensors"
    run(source, path, recipe(rule("[avx]", "kmeans", bits=2, share="model")))
    assert verify(path).files[0].manifest.tensors["a"].shared is None
    rewrite(path, change)
    assert what in refusal(path)


@pytest.mark.parametrize("case", CODEBOOKS)
def test_a_codebook_that_lies_is_refused(tmp_path: Path, case: str) -> None:
    change, what = CODEBOOKS[case]
    path = codebook_artifact(tmp_path)
    rewrite(path, change)
    assert what in refusal(path)


def test_a_code_beyond_its_codebook_is_refused(tmp_path: Path) -> None:
    path = codebook_artifact(tmp_path)

    def change(header: Header, manifest: Header, data: bytearray) -> None:
        begin, end = header["w.qc.codebook"]["data_offsets"]
        del data[end - 4 : end]
        header["w.qc.codebook"] |= {"shape": [1, 3, 2], "data_offsets": [begin, end - 4]}
        manifest["numbers"]["entries"]["w"] = 3
        for name, one in header.items():
            if name not in ("__metadata__", "w.qc.codebook") and one["data_offsets"][0] >= end:
                one["data_offsets"] = [place - 4 for place in one["data_offsets"]]
        seal(header, manifest, data, "w")

    rewrite(path, change)
    assert "a code is beyond its codebook" in refusal(path, load_state_dict)
    assert "a code is beyond its codebook" in refusal(path)
