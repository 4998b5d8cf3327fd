"""What a run writes never harms what it reads, another of its outputs, or a file that is not this tool's."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest

from qcompress.checkpoint.outputs import Read, Write, is_own_json, refuse_meeting, refuse_own_input
from qcompress.errors import OutputError, Refusals


def spelled(path: Path, how: str) -> Path:
    """Another name of the same file."""
    other = path.with_name(f"other-{path.name}")
    match how:
        case "same":
            return path
        case "through dots":
            return path.parent / "sub" / ".." / path.name
        case "symbolic link":
            other.symlink_to(path)
        case "hard link":
            other.hardlink_to(path)
        case "linked folder":
            (path.parent / "linked").symlink_to(path.parent, target_is_directory=True)
            other = path.parent / "linked" / path.name
    return other


SPELLINGS = ["same", "through dots", "symbolic link", "hard link", "linked folder"]


@pytest.mark.parametrize("how", SPELLINGS)
def test_a_write_is_never_a_read_by_whatever_name(tmp_path: Path, how: str) -> None:
    (tmp_path / "sub").mkdir()
    read = tmp_path / "recipe.yaml"
    read.write_text("version: 1")
    write = Write(spelled(read, how), "--json", streams=True)
    with pytest.raises(OutputError, match="--json would replace the recipe"):
        refuse_meeting([Read(read, "the recipe")], [write], force=True)
    with pytest.raises(OutputError, match="is the input itself"):
        refuse_own_input(read, write.path)


@pytest.mark.parametrize("how", ["same", "through dots", "linked folder"])
def test_two_writes_are_never_one_place_even_before_it_is_there(tmp_path: Path, how: str) -> None:
    (tmp_path / "sub").mkdir()
    first = tmp_path / "k.json"
    second = spelled(first, how)
    with pytest.raises(OutputError, match="-o and --json name the same place"):
        refuse_meeting([], [Write(first, "-o"), Write(second, "--json")], force=True)


@pytest.mark.parametrize("inside", ["model.safetensors", "deep/er/recipe.yaml"])
def test_a_folder_that_is_replaced_holds_nothing_that_is_read(tmp_path: Path, inside: str) -> None:
    read = tmp_path / "out" / inside
    read.parent.mkdir(parents=True)
    read.touch()
    with pytest.raises(OutputError, match="-o would replace the input"):
        refuse_meeting([Read(read, "the input")], [Write(tmp_path / "out", "-o", folder=True)], force=True)


def test_no_file_of_a_folder_that_is_read_is_replaced_but_new_ones_may_join(tmp_path: Path) -> None:
    """As in a cache of models, where the folder's files are links to files elsewhere."""
    blob, folder = tmp_path / "blob", tmp_path / "model"
    folder.mkdir()
    blob.touch()
    (folder / "model.safetensors").symlink_to(blob)
    read = [Read(folder, "the checkpoint")]
    for path in (folder / "model.safetensors", blob):
        with pytest.raises(OutputError, match="would replace the checkpoint"):
            refuse_meeting(read, [Write(path, "--save-statistics")], force=True)
    refuse_meeting(read, [Write(folder / "new.json", "--json"), Write(tmp_path / "other", "-o")])


@pytest.mark.parametrize("inside", ["cat/one.png", "linked/two.png"])
@pytest.mark.parametrize("how", ["same", "symbolic link", "hard link"])
def test_of_a_folder_that_is_read_as_a_whole_no_file_is_replaced(tmp_path: Path, inside: str, how: str) -> None:
    """However deep it lies, and in a folder that the folder links to."""
    images, elsewhere = tmp_path / "images", tmp_path / "elsewhere"
    for folder in (images / "cat", elsewhere):
        folder.mkdir(parents=True)
    (images / "cat" / "one.png").touch()
    (elsewhere / "two.png").touch()
    (images / "linked").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(images)
    target = (images / inside).resolve()
    other = tmp_path / "other"
    if how == "symbolic link":
        other.symlink_to(target)
    elif how == "hard link":
        other.hardlink_to(target)
    write = Write(target if how == "same" else other, "-o")
    with pytest.raises(OutputError, match="-o would replace the images"):
        refuse_meeting([Read(images, "the images", whole=True)], [write], force=True)
    (tmp_path / "free").touch()
    refuse_meeting([Read(images, "the images", whole=True)], [Write(tmp_path / "free", "-o")], force=True)


def test_a_folder_within_what_is_read_as_a_whole_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "data" / "out").mkdir(parents=True)
    (tmp_path / "data" / "out" / "model.safetensors").touch()
    writes = [Write(tmp_path / "data" / "out", "-o", folder=True)]
    refuse_meeting([Read(tmp_path / "data", "the checkpoint")], writes, force=True)
    with pytest.raises(OutputError, match="would replace the data"):
        refuse_meeting([Read(tmp_path / "data", "the data", whole=True)], writes, force=True)


def test_a_replaced_folder_holds_nothing_that_a_folder_links_to(tmp_path: Path) -> None:
    read, out = tmp_path / "model", tmp_path / "out"
    read.mkdir()
    out.mkdir()
    (out / "model.safetensors").touch()
    (read / "model.safetensors").symlink_to(out / "model.safetensors")
    with pytest.raises(OutputError, match="would replace the checkpoint"):
        refuse_meeting([Read(read, "the checkpoint")], [Write(out, "-o", folder=True)], force=True)


def test_nothing_is_read_from_the_work_folder_of_an_output(tmp_path: Path) -> None:
    """Which is emptied before the run begins: what an earlier run left there is no input."""
    left = tmp_path / ".a.safetensors.partial" / "a.safetensors"
    left.parent.mkdir()
    left.touch()
    with pytest.raises(OutputError, match="-o would replace the checkpoint"):
        refuse_meeting([Read(left, "the checkpoint")], [Write(tmp_path / "a.safetensors", "-o")])


@pytest.mark.parametrize("inside", ["out/k.json", ".out.partial/k.json"])
@pytest.mark.parametrize("order", [1, -1])
def test_no_write_lies_in_another_even_before_that_is_there(tmp_path: Path, inside: str, order: int) -> None:
    writes = [Write(tmp_path / "out", "-o", folder=True), Write(tmp_path / inside, "--json")][::order]
    with pytest.raises(OutputError, match="lie one in the other"):
        refuse_meeting([], writes, force=True)


@pytest.mark.parametrize("what", ["read", "write", "folder"])
def test_links_to_themselves_are_told_of_and_no_bug(tmp_path: Path, what: str) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    read = Read(loop if what == "read" else tmp_path / "a", "the checkpoint")
    write = Write({"read": tmp_path / "b", "write": loop, "folder": loop / "b"}[what], "-o")
    if what == "write":
        with pytest.raises(OutputError, match="exists already"):
            refuse_meeting([read], [write])
    else:
        refuse_meeting([read], [write])


def test_what_exists_is_replaced_by_force_or_where_this_tool_wrote_it(tmp_path: Path) -> None:
    target = tmp_path / "y.report.json"
    write = Write(target, "the report", is_own=is_own_json)
    for text in ("dear diary", "[]", '{"schema": 7}', '{"schema": "other/1"}', "[" * 100_000):
        target.write_text(text)
        with pytest.raises(OutputError, match=r"the report would go there.*--force"):
            refuse_meeting([], [write])
        refuse_meeting([], [write], force=True)
    target.write_text(json.dumps({"schema": "qcompress.report/1"}))
    refuse_meeting([], [write])


def test_all_that_is_wrong_is_said_at_once(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.touch()
    two.touch()
    with pytest.raises(Refusals) as caught:
        refuse_meeting([], [Write(one, "-o"), Write(two, "--junit")])
    assert len(caught.value.lines()) == 2


def test_a_pipe_is_written_to_where_asked_and_else_refused(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    refuse_meeting([], [Write(pipe, "--json", streams=True)])
    with pytest.raises(OutputError, match="a device, a pipe"):
        refuse_meeting([], [Write(pipe, "-o")], force=True)


@pytest.mark.parametrize("kind", [stat.S_IFCHR, stat.S_IFBLK], ids=["character device", "block device"])
def test_a_device_node_is_never_replaced(tmp_path: Path, kind: int) -> None:
    """On nodes of this test's own: the null device, and a block device that does not exist."""
    node = tmp_path / "node"
    try:
        os.mknod(node, kind | 0o600, os.makedev(1, 3) if kind == stat.S_IFCHR else os.makedev(240, 240))
    except OSError:
        pytest.skip("making device nodes takes more rights than this process has")
    with pytest.raises(OutputError, match="a device"):
        refuse_meeting([], [Write(node, "-o")], force=True)
