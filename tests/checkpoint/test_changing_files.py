"""A file that changes while it is read ends the run with an error: never with a signal, nor with a mixture."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from artifact.examples import gaussian, plan_for, save
from safetensors.torch import load_file

from qcompress.checkpoint.checkpoint import StoredRows, read_checkpoint, tensor_view
from qcompress.compress.compress import compress
from qcompress.errors import CheckpointError
from qcompress.recipe import parse_recipe
from qcompress.types.run import Options


@pytest.fixture
def source(tmp_path: Path) -> Path:
    tensors = {f"{index}.weight": gaussian(16, 40, seed=index) for index in range(4)}
    return save(tmp_path / "m.safetensors", {**tensors, "bias": gaussian(16)})


def cut_short(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def overwrite(path: Path) -> None:
    data = path.read_bytes()
    with path.open("rb+") as file:
        file.seek(len(data) - 100)
        file.write(bytes(100))


def replace_by_another(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(path.read_bytes())
    other.replace(path)


def remove(path: Path) -> None:
    path.unlink()


CHANGES: list[Callable[[Path], None]] = [cut_short, overwrite, replace_by_another, remove]


@pytest.mark.parametrize("change", CHANGES)
def test_each_read_is_held_against_the_file_as_it_was(source: Path, change: Callable[[Path], None]) -> None:
    found = read_checkpoint(source)
    (shard,) = found.shards
    tensor_view(shard, found.tensors[0])
    change(source)
    for info in found.tensors:
        with pytest.raises(CheckpointError, match=r"has changed while it was read|No such file"):
            tensor_view(shard, info)
    with pytest.raises(CheckpointError):
        shard.refuse_changed()


@pytest.mark.parametrize("last", [False, True], ids=["in the middle", "after the last tensor"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_run_whose_input_changes_leaves_nothing(source: Path, change: Callable[[Path], None], last: bool) -> None:
    found = read_checkpoint(source)
    recipe = parse_recipe('version: 1\nrules: [{match: "*.weight", mse: {bits: 3}}]\n', "r.yaml")
    seen: list[str] = []

    def advance(name: str, n_bytes: int) -> None:
        seen.append(name)
        if len(seen) == (len(found.tensors) if last else 2):
            change(source)

    options = replace(Options(source.with_name("a.safetensors")), progress=advance)
    with pytest.raises(CheckpointError, match=r"has changed while it was read|No such file"):
        compress(found, plan_for(found, recipe), options)
    assert {path.name for path in source.parent.iterdir()} <= {"m.safetensors"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_rows_that_are_read_one_by_one_are_those_of_the_weight(tmp_path: Path, dtype: torch.dtype) -> None:
    path = save(tmp_path / "m.safetensors", {"a": gaussian(3), "w": gaussian(7, 3, 5).to(dtype)})
    (shard,) = read_checkpoint(path).shards
    whole = load_file(path)["w"]
    rows = StoredRows(shard, shard.by_name["w"], (7, 3, 5))
    for start, stop in ((0, 7), (0, 1), (3, 5), (6, 7), (5, 99), (7, 7)):
        assert torch.equal(rows[start:stop], whole[start:stop])
    assert rows.numel() == whole.numel()
