"""Folders as people have them: half fetched, from a cache, with what a disk or a wrapper left in them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Run, refused
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import qcompress
from qcompress.data.user_code import import_package

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n"
APPLE = b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X        " + bytes(64)


def sharded(folder: Path, files: int = 3) -> Path:
    folder.mkdir(parents=True)
    places = {}
    for index in range(files):
        file = f"model-{index + 1:05d}-of-{files:05d}.safetensors"
        name = f"layers.{index}.weight"
        save_file({name: torch.randn(8, 16)}, folder / file)
        places[name] = file
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    (folder / "config.json").write_text("{}")
    return folder


def test_missing_shards_are_an_unfinished_download(run: Run, tmp_path: Path) -> None:
    folder = sharded(tmp_path / "m")
    (folder / "model-00002-of-00003.safetensors").unlink()
    line = refused(run, tmp_path, "quantize", folder, "--bits", 4)
    assert (
        "index.json: promises model-00002-of-00003.safetensors of 3 files, which are not there: an unfinished" in line
    )
    (folder / "model-00003-of-00003.safetensors").unlink()
    assert "promises model-00002-of-00003.safetensors and 1 more" in refused(
        run, tmp_path, "quantize", folder, "--bits", 4
    )
    (folder / "model.safetensors.index.json").unlink()
    line = refused(run, tmp_path, "quantize", folder, "--bits", 4)
    assert "model-00001-of-00003.safetensors: is one of 3 files, and the others and their index are not there" in line


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_a_pointer_of_git_lfs_says_how_to_fetch_the_file(file: str, run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    save_file({"w": torch.randn(8, 16)}, folder / "model.safetensors")
    (folder / file).write_bytes(POINTER)
    line = refused(run, tmp_path, "quantize", folder, "--bits", 4)
    assert f"{file}: is a Git LFS pointer, not the file it stands for; fetch the file itself: git lfs pull" in line


def test_what_macos_leaves_beside_files_is_ignored(run: Run, tmp_path: Path) -> None:
    folder = sharded(tmp_path / "m")
    for file in list(folder.iterdir()):
        file.with_name(f"._{file.name}").write_bytes(APPLE)
    assert run("quantize", folder, "--bits", 4, "-q", "-o", tmp_path / "a").code == 0
    assert not [file for file in (tmp_path / "a").iterdir() if file.name.startswith("._")]
    for file in list((tmp_path / "a").iterdir()):
        file.with_name(f"._{file.name}").write_bytes(APPLE)
    assert run("verify", tmp_path / "a").code == 0
    assert len(qcompress.load_state_dict(tmp_path / "a")) == 3
    line = refused(run, tmp_path, "quantize", folder / "._model-00001-of-00003.safetensors", "--bits", 4)
    assert "is what macOS keeps beside a file" in line


def test_a_folder_of_gguf_is_quantized_already(run: Run, tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "model.Q4_K_M.gguf").write_bytes(b"GGUF" + bytes(60))
    for path in (tmp_path / "m", tmp_path / "m" / "model.Q4_K_M.gguf"):
        assert "GGUF" in (line := refused(run, tmp_path, "quantize", path, "--bits", 4))
        assert "from_pretrained(gguf_file=...)" in line


def cached(root: Path, org: str, name: str, files: dict[str, bytes], commit: str = "c" * 40) -> Path:
    """A repository as huggingface_hub keeps it: blobs, links to them by revision, and the names of revisions."""
    repository = root / f"models--{org}--{name}"
    snapshot = repository / "snapshots" / commit
    for folder in (repository / "blobs", repository / "refs", snapshot):
        folder.mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    for index, (file, data) in enumerate(files.items()):
        (repository / "blobs" / f"{index:040d}").write_bytes(data)
        (snapshot / file).symlink_to(Path("../../blobs") / f"{index:040d}")
    return snapshot


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    constants = import_package("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    source = sharded(tmp_path / "source")
    files = {file.name: file.read_bytes() for file in source.iterdir()}
    cached(tmp_path / "hub", "org", "net", files)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("revision", ["", "@main", "@" + "c" * 40])
def test_a_repository_is_found_in_the_cache(revision: str, run: Run, hub: Path) -> None:
    done = run("quantize", f"hf://org/net{revision}", "--bits", 4, "-q")
    assert (done.code, done.out.strip()) == (0, "net-w4"), done.err
    assert qcompress.load_state_dict(hub / "net-w4").keys() == {f"layers.{index}.weight" for index in range(3)}
    assert not any(file.is_symlink() for file in (hub / "net-w4").iterdir())
    assert (hub / "net-w4" / "config.json").is_file() and (hub / "net-w4.report.json").is_file()
    again = run("report", "net-w4", "--baseline", f"hf://org/net{revision}", "--format", "json")
    assert again.code == 0, again.err


def test_a_repository_that_is_not_there_is_one_line(run: Run, hub: Path) -> None:
    for path, words in (
        ("hf://org/other", "hf://org/other: is not in the cache, and cannot be fetched; "),
        ("hf://org/net@other", "hf://org/net@other: is not in the cache, and cannot be fetched; "),
        ("hf://net", "hf://net: names no repository; write hf://org/name"),
        ("hf://../../net", "names no repository"),
    ):
        assert words in refused(run, hub, "quantize", path, "--bits", 4)
        assert words in refused(run, hub, "quantize", path, "--bits", 4, "--dry-run")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        head: Tensor = self.head(self.body(x).relu())
        return head


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod."])
def test_a_wrappers_prefix_is_proposed_and_stripped(prefix: str, run: Run, tmp_path: Path) -> None:
    net = Net()
    save_file({f"{prefix}{name}": value for name, value in net.state_dict().items()}, tmp_path / "m.safetensors")
    (tmp_path / "net.py").write_text(
        "from torch import nn\nclass Net(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        "        self.body, self.head = nn.Linear(6, 8), nn.Linear(8, 3)\n"
        "    def forward(self, x):\n        return self.head(self.body(x).relu())\n"
    )
    np.savez(tmp_path / "d.npz", x=np.random.default_rng(0).standard_normal((8, 6), "float32"), y=np.arange(8) % 3)
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        "version: 1\nmodel: {factory: 'net.py:Net'}\ndata: {calibration: {npz: d.npz}, eval: {npz: d.npz}}\n"
        "task: {classification: {metric: top1}}\nrules: [{match: '*.weight', gptq: {bits: 8}}]\n"
    )
    asked = ("-r", recipe, "--allow-code")
    hint = f"its names begin with '{prefix}': compress it with --strip-prefix {prefix}"
    assert hint in refused(run, tmp_path, "quantize", tmp_path / "m.safetensors", *asked)
    assert hint in refused(run, tmp_path, "eval", tmp_path / "m.safetensors", *asked)
    stripped = ("--strip-prefix", prefix)
    done = run("quantize", tmp_path / "m.safetensors", *asked, *stripped, "-o", tmp_path / "a.safetensors", "-q")
    assert done.code == 0, done.err
    other = Net()
    qcompress.load_into(other, tmp_path / "a.safetensors")
    assert torch.allclose(other.body.weight, net.body.weight, atol=0.01)
    assert run("eval", tmp_path / "m.safetensors", *asked, *stripped).code == 0
    assert run("recipe", "check", recipe, tmp_path / "m.safetensors", "--allow-code", *stripped).code == 0
    measured = ("--sensitivity", *asked, "--cache", tmp_path / "c.json", "--samples", 4, "--widths", 4)
    assert run("report", tmp_path / "m.safetensors", *measured, *stripped).code == 0
    against = ("report", tmp_path / "a.safetensors", "--baseline", tmp_path / "m.safetensors")
    assert run(*against).code == 3
    assert run(*against, *stripped).code == 0
    line = refused(run, tmp_path, "report", tmp_path / "a.safetensors", *stripped, code=2)
    assert "--strip-prefix: takes --baseline or --sensitivity" in line
    assert run("cluster", tmp_path / "m.safetensors", "--bits", 2, *stripped, "-q").code == 0
    assert qcompress.load_state_dict(tmp_path / "m-c2.safetensors").keys() == net.state_dict().keys()


def test_a_prefix_must_be_there_and_leave_names_apart(run: Run, tmp_path: Path) -> None:
    save_file({"module.w": torch.randn(4, 8), "w": torch.randn(4, 8)}, tmp_path / "m.safetensors")
    command = ("quantize", tmp_path / "m.safetensors", "--bits", 4, "--strip-prefix")
    assert "has no tensor whose name begins with 'net.'" in refused(run, tmp_path, *command, "net.")
    assert "has 'w' twice once 'module.' is taken off" in refused(run, tmp_path, *command, "module.")


def test_training_writes_stripped_names_and_their_index(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    state = {f"module.{name}": value for name, value in nn.Linear(6, 3).state_dict().items()}
    save_file(state, folder / "model-00001-of-00001.safetensors")
    index = {"weight_map": dict.fromkeys(state, "model-00001-of-00001.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    np.savez(tmp_path / "d.npz", x=np.random.default_rng(0).standard_normal((8, 6), "float32"), y=np.arange(8) % 3)
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        "version: 1\nmodel: {factory: 'torch.nn:Linear', args: {in_features: 6, out_features: 3}}\n"
        "data: {train: {npz: d.npz, batch_size: 4}}\ntask: {classification: {metric: top1}}\n"
        "finetune: {epochs: 1, optimizer: {sgd: {lr: 0.01}}}\n"
    )
    asked = ("-r", recipe, "--allow-code", "--strip-prefix", "module.", "-o", tmp_path / "t", "-q")
    done = run("finetune-reg", folder, *asked)
    assert done.code == 0, done.err
    assert load_file(tmp_path / "t" / "model-00001-of-00001.safetensors").keys() == {"weight", "bias"}
    written = json.loads((tmp_path / "t" / "model.safetensors.index.json").read_text())["weight_map"]
    assert written.keys() == {"weight", "bias"}
    assert run("quantize", tmp_path / "t", "--bits", 4, "-q").code == 0
