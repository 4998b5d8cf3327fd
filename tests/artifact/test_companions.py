"""What travels with the weights of a folder is its own: no link takes anything else along."""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path

import pytest
from conftest import Run, files_under, small_tensors, write_checkpoint

from qcompress.artifact.writer import copy_companions, find_companions
from qcompress.errors import CheckpointError, Refusals

SECRET = "a secret of this user"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    network = tmp_path / "network"
    network.mkdir()
    (network / "config.json").write_text("{}")
    (tmp_path / "secret").write_text(SECRET)
    return network


def copied(source: Path) -> dict[str, bytes]:
    target = source.with_name("copied")
    target.mkdir()
    copy_companions(source, target)
    return files_under(target)


@pytest.mark.parametrize("link", ["../secret", "absolute", "through another link", "through a folder"])
def test_a_link_that_leads_out_is_refused(folder: Path, link: str) -> None:
    other = folder / "other"
    match link:
        case "absolute":
            link = str(folder.parent / "secret")
        case "through another link":
            other.symlink_to("../secret")
            link = "other"
        case "through a folder":
            other.symlink_to("..", target_is_directory=True)
            link = "other/secret"
    (folder / "notes.txt").symlink_to(link)
    with pytest.raises(CheckpointError, match=r"notes.txt: is a link that leads out of the checkpoint's folder; copy"):
        find_companions(folder)


def test_every_link_that_leads_out_or_nowhere_is_told(folder: Path) -> None:
    (folder / "a.json").symlink_to("../secret")
    (folder / "b.json").symlink_to("gone.json")
    (folder / "c.json").symlink_to("c.json")
    with pytest.raises(Refusals) as caught:
        copied(folder)
    told = "\n".join(caught.value.lines())
    assert "a.json: is a link that leads out" in told and "leads nowhere" in told and "c.json" in told
    assert files_under(folder.with_name("copied")) == {}


def test_links_within_the_folder_are_followed(folder: Path) -> None:
    (folder / "sub").mkdir()
    (folder / "sub" / "vocab").write_text("a b")
    (folder / "vocab.txt").symlink_to("sub/vocab")
    assert copied(folder) == {"config.json": b"{}", "vocab.txt": b"a b"}


def test_a_folder_that_is_a_link_itself_is_one_like_others(folder: Path) -> None:
    (folder / "vocab.txt").symlink_to("config.json")
    linked = folder.with_name("linked")
    linked.symlink_to(folder)
    assert copied(linked) == {"config.json": b"{}", "vocab.txt": b"{}"}


@pytest.mark.parametrize("component", ["", "unet"])
def test_a_cache_of_hugging_face_keeps_its_files_elsewhere(tmp_path: Path, component: str) -> None:
    """Whose snapshots link to blobs; from there no link leads further."""
    repository = tmp_path / "models--org--name"
    blobs, snapshot = repository / "blobs", repository / "snapshots" / "0123" / component
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (blobs / "abc").write_text('{"a": 1}')
    (tmp_path / "secret").write_text(SECRET)
    (snapshot / "config.json").symlink_to(os.path.relpath(blobs / "abc", snapshot))
    assert copied(snapshot) == {"config.json": b'{"a": 1}'}
    for target in (tmp_path / "secret", repository / "refs"):
        target.touch()
        (snapshot / "notes.txt").symlink_to(target)
        with pytest.raises(CheckpointError, match="leads out"):
            find_companions(snapshot)
        (snapshot / "notes.txt").unlink()
    (blobs / "def").symlink_to(tmp_path / "secret")
    (snapshot / "notes.txt").symlink_to(blobs / "def")
    with pytest.raises(CheckpointError, match="leads out"):
        find_companions(snapshot)


def test_pipes_and_devices_do_not_travel(folder: Path) -> None:
    """Nor are they waited for. The device is a node of this test's own, of the null device."""
    os.mkfifo(folder / "pipe.txt")
    try:
        os.mknod(folder / "device.json", stat.S_IFCHR | 0o600, os.makedev(1, 3))
    except OSError:
        shutil.copyfile(folder / "config.json", folder / "device.bin")
    (folder / "folder.json").mkdir()
    assert copied(folder) == {"config.json": b"{}"}


@pytest.mark.parametrize(
    "words",
    [
        ("quantize", "network", "--bits", "2", "-o", "out"),
        ("quantize", "network", "--bpw", "2", "-o", "out"),
        ("quantize", "network", "-r", "live.yaml", "-o", "out"),
        ("cluster", "network", "--bits", "2", "-o", "out"),
        ("finetune-reg", "network", "-r", "live.yaml", "-o", "out"),
        ("export", "artifact", "--to", "safetensors", "-o", "out"),
    ],
    ids=" ".join,
)
def test_no_command_takes_a_file_of_elsewhere_along(
    run: Run, folder: Path, words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does it begin its work before it says so."""
    from fuzz.commands import LIVE

    from qcompress.checkpoint import checkpoint
    from qcompress.demo import DigitsNet

    monkeypatch.chdir(folder.parent)
    if "live.yaml" in words:
        checkpoint.write_checkpoint(DigitsNet().state_dict(), folder / "model.safetensors")
        Path("live.yaml").write_text(LIVE)
        Path("x.npz").touch()
    else:
        write_checkpoint(folder / "model.safetensors", small_tensors())
        assert run("quantize", "network", "--bits", "2", "-o", "artifact", "-q").code == 0
    for name in ("network", "artifact"):
        if Path(name).is_dir():
            (Path(name) / "notes.txt").symlink_to("../secret")
    before = files_under(folder.parent)
    ran = run(*words, "-q")
    assert (ran.code, ran.out) == (3, "")
    assert ran.err.startswith("error: ") and "notes.txt: is a link that leads out" in ran.err
    assert files_under(folder.parent) == before
