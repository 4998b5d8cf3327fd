"""Files of other formats, damaged or made to harm, end as one error of the file: no bug, no hang, no full memory."""

from __future__ import annotations

import json
import os
import random
import resource
import shlex
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Run, process_environment, program

from qcompress.data.batches import Batches, Source
from qcompress.data.foreign import parse_label, reading
from qcompress.data.sources import read_data
from qcompress.errors import DataError, QcompressError, ResourceError
from qcompress.types.data_settings import Data, HubData, ImagesData, NpzData, TextData

Image = pytest.importorskip("PIL.Image")


def opened(folder: Path, settings: Data) -> Batches:
    return read_data(settings, Source(folder, "data.eval"), 0)


def read_all(folder: Path, settings: Data) -> None:
    for _ in opened(folder, settings):
        pass


def save_npz(path: Path, compress: bool = False) -> None:
    rng = np.random.default_rng(0)
    x = rng.integers(0, 255, (20, 8, 8, 3), dtype=np.uint8)
    (np.savez_compressed if compress else np.savez)(path, x=x, y=np.arange(20))


@pytest.mark.parametrize("compress", [False, True], ids=["stored", "deflated"])
@pytest.mark.parametrize("held", [0, 1 << 20], ids=["rows", "held"])
def test_no_damage_to_an_npz_file_is_a_bug_or_changes_a_value_unseen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compress: bool, held: int
) -> None:
    monkeypatch.setattr("qcompress.data.npz.HELD_BYTES", held)
    path = tmp_path / "x.npz"
    save_npz(path, compress)
    whole = path.read_bytes()
    right = next(iter(opened(tmp_path, NpzData(npz="x.npz"))))
    chance = random.Random(0)
    for _ in range(300):
        data = bytearray(whole)
        match chance.randrange(3):
            case 0:
                data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
            case 1:
                del data[chance.randrange(len(data)) :]
            case 2:
                start = chance.randrange(len(data))
                data[start : start + chance.randrange(1, 64)] = chance.randbytes(chance.randrange(1, 64))
        path.write_bytes(data)
        try:
            batch = next(iter(opened(tmp_path, NpzData(npz="x.npz"))))
        except QcompressError as error:
            assert len(error.lines()) == 1 and len(str(error)) < 600
        else:
            # What the checksum of the archive does not cover is times, attributes and names.
            assert torch.equal(batch.args[0], right.args[0])


def test_an_array_that_declares_more_than_there_is_takes_no_memory(tmp_path: Path) -> None:
    header = str({"descr": "<f8", "fortran_order": False, "shape": (1 << 40, 8)}).encode().ljust(117) + b"\n"
    member = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("x.npy", member)
    with pytest.raises(DataError, match="its header declares"):
        read_all(tmp_path, NpzData(npz="x.npz"))


def test_more_data_than_memory_is_refused_before_they_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_npz(tmp_path / "x.npz", compress=True)
    monkeypatch.setattr(os, "sysconf", lambda name: 16)
    with pytest.raises(ResourceError, match="256 of memory"):
        read_all(tmp_path, NpzData(npz="x.npz"))


def wide_image(folder: Path) -> None:
    """A picture of 169 million pixels in some 20 KB."""
    Image.new("1", (13_000, 13_000)).save(folder / "a.png")


def long_image(folder: Path) -> None:
    """A picture that is small, and immense once its shorter side is brought to 224."""
    Image.new("L", (60_000, 1)).save(folder / "a.png")


def cut_image(folder: Path) -> None:
    Image.effect_noise((64, 64), 50).save(folder / "a.png")
    (folder / "a.png").write_bytes((folder / "a.png").read_bytes()[:500])


def piped_image(folder: Path) -> None:
    os.mkfifo(folder / "a.png")


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (wide_image, "more than 100,000,000"),
        (long_image, "more than 100,000,000"),
        (cut_image, "is no image that can be read"),
        (piped_image, "is neither a file nor a folder"),
    ],
)
def test_images_that_cannot_be_used_are_named(tmp_path: Path, make: Callable[[Path], None], error: str) -> None:
    make(tmp_path)
    with pytest.raises(DataError, match=error) as caught:
        read_all(tmp_path, ImagesData(images=str(tmp_path), resize=224))
    assert "a.png" in str(caught.value)


def test_a_table_in_the_current_folder_names_nothing_outside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    (tmp_path / "in" / "metadata.csv").write_text("file_name,label\n../secret.png,1\n")
    monkeypatch.chdir(tmp_path / "in")
    with pytest.raises(DataError, match="outside its folder"):
        read_all(Path(), ImagesData(images=".", crop=8))


@pytest.mark.parametrize(
    ("table", "error"),
    [
        ("file_name,label\na.png,7e3\n", "is no number of a class"),
        ("file_name,label\na.png," + "9" * 5000 + "\n", "is no number of a class"),
        ("file_name,label\na.png,-1\n", "is no number of a class"),
        ("file_name,label\na.png\n", "is no number of a class"),
        ("file_name,label\n../secret.png,1\n", "outside its folder"),
        ("file_name,label\nsub/../../secret.png,1\n", "outside its folder"),
        ("file_name,label\n/etc/passwd,1\n", "outside its folder"),
        ("file_name,label\n,1\n", "outside its folder"),
        ("file_name,label\nb.png,1\n", "which is not there"),
        ("name,label\na.png,1\n", "has no column 'file_name'"),
        (b"file_name,label\n\xff\xfe.png,1\n", "is no table in UTF-8"),
        ("file_name,label\n" + "a" * 200_000 + ",1\n", "is no table in UTF-8"),
    ],
)
def test_tables_of_images_that_cannot_be_used_are_named(tmp_path: Path, table: str | bytes, error: str) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for path in (folder / "a.png", tmp_path / "secret.png"):
        Image.new("RGB", (8, 8)).save(path)
    (folder / "metadata.csv").write_bytes(table if isinstance(table, bytes) else table.encode())
    with pytest.raises(DataError, match=error) as caught:
        read_all(folder, ImagesData(images=str(folder), crop=8))
    assert "metadata.csv" in str(caught.value) and len(str(caught.value)) < 600


WORDS = {"[UNK]": 0, "a": 1}
SOUND: dict[str, Any] = {
    "version": "1.0",
    "model": {"type": "WordLevel", "vocab": WORDS, "unk_token": "[UNK]"},
    "pre_tokenizer": {"type": "Whitespace"},
}


@pytest.mark.parametrize(
    "change",
    [
        {"model": {"type": "WordLevel", "vocab": {"a": -1}, "unk_token": "[UNK]"}},
        {"model": {"type": "WordLevel", "vocab": {"a": 1}, "unk_token": "absent"}},
        {"model": {"type": "Nothing"}},
        {"model": None},
        {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Removed", "invert": False}},
    ],
)
def test_tokenizers_that_cannot_be_used_are_named(tmp_path: Path, change: dict[str, Any]) -> None:
    pytest.importorskip("tokenizers")
    (tmp_path / "tokenizer.json").write_text(json.dumps({**SOUND, **change}))
    (tmp_path / "text.txt").write_text("a b c\n" * 10)
    with pytest.raises(DataError, match=r"tokenizer\.json"):
        read_all(tmp_path, TextData(text="text.txt", tokenizer="tokenizer.json", length=2))


def test_a_dataset_whose_rows_cannot_be_read_is_named(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"x": [[1.0, 2.0], [3.0, 4.0]], "label": [0, 1]}).save_to_disk(tmp_path / "set")
    settings = HubData(dataset="set", inputs=("x",))
    read_all(tmp_path, settings)
    arrow = next((tmp_path / "set").glob("*.arrow"))
    whole = arrow.read_bytes()
    for length in range(0, len(whole), max(1, len(whole) // 40)):
        arrow.write_bytes(whole[:length])
        with pytest.raises(DataError):
            read_all(tmp_path, settings)
    for text in ("", "[]", "{", "null"):
        (tmp_path / "set" / "state.json").write_text(text)
        with pytest.raises(DataError, match="is no dataset on disk"):
            read_all(tmp_path, settings)


def test_a_pipe_is_no_data_and_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.npz")
    with pytest.raises(DataError, match="is neither a file nor a folder"):
        read_all(tmp_path, NpzData(npz="x.npz"))


class Panic(BaseException):
    """As libraries in other languages raise it."""


@pytest.mark.parametrize("raised", [Panic("at line 7"), OverflowError("too large"), RecursionError()])
def test_whatever_a_library_raises_is_an_error_of_the_file(raised: BaseException) -> None:
    with pytest.raises(DataError, match=r"f\.bin: is unreadable"), reading("f.bin", "is unreadable", "replace it"):
        raise raised


@pytest.mark.parametrize("raised", [KeyboardInterrupt(), MemoryError(), ResourceError("a", "b", "c")])
def test_what_is_no_fault_of_the_file_passes(raised: BaseException) -> None:
    with pytest.raises(type(raised)), reading("f.bin", "is unreadable", "replace it"):
        raise raised


def test_labels_are_numbers_from_0() -> None:
    assert [parse_label(text, "x") for text in ("0", "17", " 3 ", str(2**31 - 1))] == [0, 17, 3, 2**31 - 1]
    for text in (None, "", "1.5", "-1", str(2**31), "9" * 10_000):
        with pytest.raises(DataError):
            parse_label(text, "x")


def test_what_a_library_prints_past_python_is_not_heard(capfd: pytest.CaptureFixture[str]) -> None:
    """Nested and in several threads; before and after it, stderr is what it was."""

    def read(depth: int) -> None:
        with reading("f.bin", "is unreadable", "replace it"):
            os.write(2, b"a panic and its trace")
            if depth:
                read(depth - 1)
            os.write(2, b"another")

    sys.stderr.write("before, ")
    threads = [threading.Thread(target=read, args=(3,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with pytest.raises(DataError), reading("f.bin", "is unreadable", "replace it"):
        os.write(2, b"a panic")
        raise KeyError("x")
    os.write(2, b"after")
    assert capfd.readouterr().err == "before, after"


@pytest.mark.parametrize("closed", [False, True])
def test_a_tokenizer_that_panics_is_one_line(run_process: Run, tmp_path: Path, closed: bool) -> None:
    """The library, which is not Python, prints a trace of its own; also where there is no stderr at all."""
    tokenizers = pytest.importorskip("tokenizers")
    processor = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "[BOS]", "type_id": 0}}],
        "pair": [],
        "special_tokens": {},
    }
    made = json.loads(tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a")).to_str())
    (tmp_path / "t.json").write_text(json.dumps({**made, "post_processor": processor}))
    (tmp_path / "t.txt").write_text("a a a a")
    (tmp_path / "r.yaml").write_text(
        'version: 1\nmodel: {factory: "qcompress.demo:DigitsNet"}\ntask: causal-lm\n'
        "data: {eval: {text: t.txt, tokenizer: t.json}}\nrules: [{match: '*', mse: {bits: 3}}]\n"
    )
    words = ("recipe", "check", tmp_path / "r.yaml")
    if closed:
        command = " ".join(map(shlex.quote, program(*words)))
        done = subprocess.run(["sh", "-c", f"{command} 2>&-"], env=process_environment(RUST_BACKTRACE="1"))
        assert done.returncode == 3
        return
    ran = run_process(*words, env={"RUST_BACKTRACE": "1"})
    assert ran.code == 3
    assert ran.err.count("\n") == 1 and "t.json" in ran.err, ran.err


def test_a_part_of_an_image_that_declares_gigabytes_takes_none(tmp_path: Path) -> None:
    """A PNG of 69 bytes whose data are said to have 2 GB, in a process that may have half of one more."""
    header = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\0\x10\0\0\0\x10\x08\x02\0\0\0\x90\x91h6"
    (tmp_path / "a.png").write_bytes(header + b"\x7f\xff\x03\x13IDATx\x9c%\xcbKH\xfa")
    held = resource.getrlimit(resource.RLIMIT_DATA)
    used = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_DATA, (used + (1 << 29), held[1]))
    try:
        with pytest.raises(DataError, match="is no image that can be read"):
            read_all(tmp_path, ImagesData(images=str(tmp_path), crop=8))
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, held)
