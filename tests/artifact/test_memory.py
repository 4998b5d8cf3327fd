"""Readers take memory for a block, not for a tensor, and refuse before they begin what would take more than allowed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Run, process_environment

from artifact import unbounded_method
from artifact.examples import gaussian, recipe, rtn, rule, run, save
from artifact.unbounded_method import RoundedConfig
from qcompress.artifact.memory import BLOCK_BYTES, NUMBER_BYTES, WEIGHT_BYTES
from qcompress.artifact.reader import read_artifact
from qcompress.coding.grids import decode_rows
from qcompress.compress.export import export
from qcompress.compress.load import load_into, load_state_dict
from qcompress.errors import ResourceError
from qcompress.report.gather import gather_report
from qcompress.types.encoded import Blocked
from qcompress.types.plan import Keep, Rule

ROWS, COLUMNS = 4096, 8192
PEAK = """
import json, re, sys
from pathlib import Path

import torch

torch.set_num_threads(1)
from qcompress.artifact.reader import read_artifact
from qcompress.checkpoint.checkpoint import read_checkpoint
from qcompress.compress.load import load_state_dict
from qcompress.compress.export import export
from qcompress.report.gather import gather_report

def peak():
    # What getrusage tells is, after a fork, at least what the parent takes.
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

def read(path):
    yield "verify", lambda: list(read_artifact(path).verify())
    yield "export", lambda: export(read_artifact(path), path.with_suffix(".dense"), force=True)
    yield "report", lambda: gather_report(path)
    yield "baseline", lambda: gather_report(path, read_checkpoint(path.with_name(f"{path.stem}-source.safetensors")))
    yield "load", lambda: load_state_dict(path)

small, large = map(Path, sys.argv[1:])
for _, warm_up in read(small):
    warm_up()
grown = {}
for what, read_large in read(large):
    before = peak()
    read_large()
    grown[what] = peak() - before
print(json.dumps(grown))
"""


def unbounded() -> Rule:
    return Rule("*", "rounded", RoundedConfig(), "rule *")


LARGE: dict[str, tuple[str, Callable[[], Rule]]] = {
    "packed": ("packed", lambda: rule("*", "rtn", bits=3)),
    "groups": ("packed", lambda: rule("*", "rtn", bits=4, group_size=32)),
    "zstd": ("zstd", lambda: rule("*", "rtn", bits=3)),
    "ans": ("ans", lambda: rule("*", "rtn", bits=3)),
    "codebook": ("packed", lambda: rule("*", "kmeans", bits=4, granularity="tensor", dim=2)),
    "unbounded-ans": ("ans", unbounded),
    "unbounded-zstd": ("zstd", unbounded),
    "unbounded-packed": ("packed", unbounded),
    "coded": ("packed", lambda: Rule("*", None, Keep(coding="auto"), "rule *")),
}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="the peak of a process is read from /proc")
@pytest.mark.parametrize("name", LARGE)
def test_a_tensor_takes_no_more_memory_than_a_block(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 33 million weights, 134 MB of float32: by how much the peak of a process of its own grows, once it is warm."""
    unbounded_method.register(monkeypatch)
    choice, make = LARGE[name]
    monkeypatch.setattr("qcompress.encode.encode_tensor.BLOCK_WEIGHTS", 1 << 20)
    weight = torch.randint(-50, 50, (ROWS, COLUMNS), generator=torch.manual_seed(0)).float() / 64
    for stem, values in (("small", gaussian(64, 96)), ("large", weight)):
        source = save(tmp_path / f"{stem}-source.safetensors", {"w": values})
        run(source, tmp_path / f"{stem}.safetensors", recipe(make()), choice)
        (tmp_path / f"{stem}.report.json").unlink(missing_ok=True)
    words = [sys.executable, "-c", PEAK, tmp_path / "small.safetensors", tmp_path / "large.safetensors"]
    ran = subprocess.run(words, env=process_environment(), capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    grown = json.loads(ran.stdout)
    dense = weight.nbytes
    # What is loaded is all there, so that the measure sees what it should.
    assert dense <= sum(grown.values()) < dense + BLOCK_BYTES
    del grown["load"]
    assert all(more < BLOCK_BYTES < dense / 2 for more in grown.values()), grown


def artifact_of(folder: Path, asked: Any = None, **tensors: torch.Tensor) -> Path:
    source = save(folder / "m.safetensors", tensors or {"w": gaussian(200, 1000), "b": gaussian(300)})
    run(source, folder / "a.safetensors", asked or rtn(3, "w*"), "packed")
    (folder / "a.report.json").unlink(missing_ok=True)
    return folder / "a.safetensors"


def needed(numel: int) -> int:
    return min(BLOCK_BYTES, WEIGHT_BYTES * numel)


READERS: dict[str, list[str]] = {
    "verify": ["verify"],
    "export": ["export", "--to", "safetensors"],
    "report": ["report"],
    "report --baseline": ["report", "--baseline", "m.safetensors"],
}


@pytest.mark.parametrize("words", READERS.values(), ids=READERS)
def test_commands_keep_to_what_they_may_take(words: list[str], run: Run, tmp_path: Path) -> None:
    path = artifact_of(tmp_path)
    source = str(tmp_path / "m.safetensors")
    words = [words[0], str(path), *(source if word == "m.safetensors" else word for word in words[1:])]
    least = needed(200_000)
    ran = run(*words, "--max-memory", least - 1)
    assert (ran.code, ran.out) == (5, "")
    told = f"reading it takes about {least:,} bytes of memory, more than the {least - 1:,} that it may"
    assert ran.err == f"error: {path}: tensor 'w': {told}; allow more with --max-memory (in Python max_memory)\n"
    assert run(*words, "--max-memory", least).code == 0
    assert run(*words, "--max-memory", "much").code == 2


def test_the_environment_bounds_every_reader(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = artifact_of(tmp_path)
    run("verify", path)
    monkeypatch.setenv("QCOMPRESS_MAX_MEMORY", "1KB")
    assert run("verify", path).code == run("report", path).code == 5
    assert run("verify", path, "--max-memory", "1GB").code == 0


def test_loading_counts_what_it_gives(tmp_path: Path) -> None:
    """All tensors, a block of the largest, and once more the largest of those whose rows do not lie in order."""
    path = artifact_of(tmp_path, rtn(3, "[wv]"), w=gaussian(200, 1000), v=gaussian(50, 60), b=gaussian(300))
    total = 4 * (200_000 + 3000 + 300) + needed(200_000)
    state = load_state_dict(path, max_memory=total)
    module = torch.nn.ParameterDict(state)
    with pytest.raises(ResourceError) as caught:
        load_state_dict(path, max_memory=total - 1)
    assert caught.value.exit_code == 5
    assert str(caught.value).startswith(
        f"{path}: tensor 'w': loading all 3 tensors, it the largest, takes about {total:,}"
    )
    assert "qcompress export" in str(caught.value)
    with pytest.raises(ResourceError):
        load_into(module, path, max_memory=total - 1)
    turned = artifact_of(tmp_path / "..", recipe(rule("w", "rtn", bits=3, axis=1)), w=gaussian(200, 1000))
    with pytest.raises(ResourceError):
        load_state_dict(turned, max_memory=total)
    load_state_dict(turned, max_memory=8 * 200_000 + needed(200_000))


def test_an_export_of_turned_rows_takes_the_weight_twice(tmp_path: Path) -> None:
    path = artifact_of(tmp_path, recipe(rule("w", "rtn", bits=3, axis=1)), w=gaussian(200, 1000))
    most = 8 * 200_000 + needed(200_000)
    export(read_artifact(path, most), tmp_path / "one.safetensors", force=False)
    with pytest.raises(ResourceError, match="tensor 'w': decoding it, whose rows do not lie one behind another, takes"):
        export(read_artifact(path, most - 1), tmp_path / "two.safetensors", force=False)
    assert not (tmp_path / "two.safetensors").exists()
    assert [name for name, _ in read_artifact(path, needed(200_000)).verify()] == ["w"]


def test_side_information_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row for each weight: the levels and factors of rows are numbers in memory, whatever their bytes."""
    unbounded_method.register(monkeypatch)
    path = artifact_of(tmp_path, recipe(unbounded()), w=gaussian(300_000, 2))
    with pytest.raises(ResourceError, match="tensor 'w': reading its side information takes about"):
        list(read_artifact(path, needed(600_000)).verify())
    assert list(read_artifact(path, needed(600_000) + NUMBER_BYTES * 600_100).verify())
    assert gather_report(path).compressed


def test_a_block_of_sub_blocks_larger_than_a_row_takes_no_more_than_the_row() -> None:
    common: dict[str, Any] = {
        "codes": torch.arange(64 * 12).reshape(64, 12).to(torch.uint8) % 16,
        "bits": 4,
        "scale": gaussian(64, 1).half(),
        "subscale": (torch.arange(64 * 3).reshape(64, 3) % 7).to(torch.uint8),
        "exponent": 0,
        "shape": (64, 12),
        "group_size": 4,
        "convention": "full",
    }
    assert torch.equal(decode_rows(Blocked(**common, sub_blocks=2**31)), decode_rows(Blocked(**common, sub_blocks=3)))
