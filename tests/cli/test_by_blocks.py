"""A network that goes block by block becomes the artifact that it becomes in memory, also after kills."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Ran, Run
from model.architectures import make_architecture
from safetensors.torch import load_file, save_file

from qcompress.artifact.reader import read_artifact
from qcompress.compress.shelf import Shelf
from qcompress.data.user_code import find_callable

NET = """
from collections import OrderedDict
import torch
from torch import nn
import torch.nn.functional as F

class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.register_buffer("waves", torch.arange(width).float().cos(), persistent=False)

    def forward(self, x, scale=1.0):
        return x + scale * self.down(F.gelu(self.up(x + self.waves))), None

class Text(nn.Module):
    def __init__(self, width=16, depth=3):
        super().__init__()
        self.embedding = nn.Embedding(32, width)
        self.blocks = nn.ModuleList([Block(width) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 32, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids):
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x, scale=0.5)[0]
        return self.head(self.norm(x))

class Skipping(Text):
    def forward(self, ids):
        x = first = self.embedding(ids)
        for block in self.blocks:
            x = block(x)[0] + first
        return self.head(self.norm(x))

class Collecting(Text):
    def forward(self, ids):
        x, seen = self.embedding(ids), []
        for block in self.blocks:
            x = block(x)[0]
            seen.append(x)
        return self.head(self.norm(seen[0] + x))

class Deep(Text):
    def __init__(self):
        super().__init__(depth=40)

class Random(Text):
    def __init__(self):
        super().__init__()
        self.blocks[1].register_buffer("waves", torch.rand(16), persistent=False)

def no_blocks():
    return nn.Sequential(OrderedDict(embed=nn.Embedding(32, 16), first=nn.Linear(16, 32, bias=False)))
"""

RECIPE = """
version: 1
model: {factory: "net.py:FACTORY", OFFLOAD}
data:
  calibration: {npz: d.npz, inputs: ids, samples: 12, batch_size: 4}
  eval: {npz: d.npz, inputs: ids}
task: causal-lm
activations: {bits: 8}
rules:
  - {match: "*embed*", mse: {bits: 8}}
  - {match: "*.weight", METHOD}
"""
ADAROUND = "adaround: {bits: 4, iterations: 20, range: mse}"
RD = ("--set", "rules=[{match: '*.weight', rd: {}}]")


def write(folder: Path, factory: str = "Text") -> None:
    """A network's code, its weights and its data."""
    (folder / "net.py").write_text(NET)
    torch.manual_seed(0)
    module = find_callable(f"net.py:{factory}", folder, True, "model")()
    state = {name: value.clone() for name, value in module.state_dict().items() if name != "head.weight"}
    save_file(state, folder / "m.safetensors")
    np.savez(folder / "d.npz", ids=np.random.default_rng(0).integers(0, 32, (16, 10)))


def recipe(
    folder: Path, factory: str = "Text", method: str = "gptq: {bits: 3}", offload: str = "offload: blocks"
) -> Path:
    path = folder / "recipe.yaml"
    text = RECIPE.replace("FACTORY", factory).replace("METHOD", method)
    path.write_text(text.replace(", OFFLOAD", f", {offload}" if offload else ""))
    return path


def quantize(run: Run, folder: Path, output: str, *more: str) -> Ran:
    words = ("quantize", folder / "m.safetensors", "-r", folder / "recipe.yaml", "-o", folder / output)
    return run(*words, "--allow-code", *more)


def contents(path: Path) -> tuple[dict[str, bytes], Any, Any]:
    """All that an artifact holds but its recipe."""
    artifact = read_artifact(path)
    stored = {
        info.name: bytes(file.container.bytes_of(info.name))
        for file in artifact.files
        for info in file.container.tensors
    }
    return (
        {name: value for name, value in stored.items() if name != "qcompress.manifest"},
        artifact.activations,
        artifact.tied,
    )


@pytest.mark.parametrize("method", ["gptq: {bits: 3}", "gptq: {bits: 3, sequential: false}", ADAROUND])
def test_an_artifact_is_that_of_the_network_in_memory(run: Run, tmp_path: Path, method: str) -> None:
    write(tmp_path)
    reports = []
    for output, offload in (("a.safetensors", 'blocks: "blocks.*"'), ("b.safetensors", "offload: blocks")):
        recipe(tmp_path, method=method, offload=offload)
        done = quantize(run, tmp_path, output, "--json", "-")
        assert done.code == 0, done.err
        assert ("block by block" in done.err) is ("offload" in offload)
        reports.append(json.loads(done.out))
    assert contents(tmp_path / "a.safetensors") == contents(tmp_path / "b.safetensors")
    assert reports[0]["accuracy"] == reports[1]["accuracy"]
    figures = [[layer["figures"] for layer in report["layers"]] for report in reports]
    assert figures[0] == figures[1]


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("gptq: {bits: 3}", ()),
        ("gptq: {bits: 3, preset: paper}", ()),
        (ADAROUND, ()),
        ("gptq: {bits: 3}", (*RD, "--bpw", "3")),
        ("gptq: {bits: 3}", ("--save-statistics", "s.safetensors")),
    ],
)
def test_what_waits_in_files_changes_nothing(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, words: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("qcompress.model.filed.SMALLEST_BYTES", 1)
    write(tmp_path)
    recipe(tmp_path, method=method)
    for output in ("held", "filed"):
        if output == "filed":
            monkeypatch.setattr("qcompress.compress.by_blocks.choose_filed", lambda *_: tmp_path)
        done = quantize(run, tmp_path, f"{output}.safetensors", *words)
        assert done.code == 0 and ("waits in files" in done.err) is (output == "filed"), done.err
        if "--save-statistics" in words:
            (tmp_path / "s.safetensors").rename(tmp_path / f"{output}.statistics")
    assert (tmp_path / "held.safetensors").read_bytes() == (tmp_path / "filed.safetensors").read_bytes()
    found = [path.read_bytes() for path in tmp_path.glob("*.statistics")]
    assert found == found[:1] * len(found)


def test_a_network_beyond_max_memory_goes_block_by_block_to_the_same_bytes(run: Run, tmp_path: Path) -> None:
    """Whole; with what flows between blocks in memory, then in files; and refused where a block alone takes more."""
    write(tmp_path, "Deep")
    recipe(tmp_path, "Deep", offload="")
    module = find_callable("net.py:Deep", tmp_path, True, "model")()
    both = 2 * 4 * sum(value.numel() for value in module.parameters())
    refused = quantize(run, tmp_path, "none.safetensors", "--max-memory", "1000")
    assert refused.code == 5 and "blocks.0.down.weight" in refused.err, refused.err
    least = int(re.findall(r"takes about ([\d,]+) bytes", refused.err)[0].replace(",", ""))
    assert least < both
    assert quantize(run, tmp_path, "none.safetensors", "--max-memory", str(least - 1)).code == 5
    for output, memory in (("whole", both), ("held", both - 1), ("filed", least)):
        done = quantize(run, tmp_path, f"{output}.safetensors", "--max-memory", str(memory), "--coding", "packed")
        assert done.code == 0, done.err
        assert ("goes block by block: 40 blocks" in done.err) is (output != "whole")
        assert ("waits in files" in done.err) is (output == "filed")
    found = [(tmp_path / f"{output}.safetensors").read_bytes() for output in ("whole", "held", "filed")]
    assert found[0] == found[1] == found[2]


class Killed(BaseException):
    """As a kill, which nothing catches."""


def test_a_killed_run_goes_on_at_the_last_finished_block(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path)
    recipe(tmp_path)
    assert quantize(run, tmp_path, "whole.safetensors").code == 0
    keep, before = Shelf.add, []

    def killed_at(last: int) -> Any:
        def add(shelf: Shelf, index: int, fitted: Any) -> None:
            if index == last:
                raise Killed
            before.append(index)
            keep(shelf, index, fitted)

        return add

    for last in (2, 4):
        monkeypatch.setattr(Shelf, "add", killed_at(last))
        with pytest.raises(Killed):
            quantize(run, tmp_path, "m2.safetensors", "--resume")
    monkeypatch.setattr(Shelf, "add", killed_at(-1))
    done = quantize(run, tmp_path, "m2.safetensors", "--resume")
    assert done.code == 0 and "4 finished blocks are taken up" in done.err, done.err
    assert before == [0, 1, 2, 3, 4]
    assert (tmp_path / "m2.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_what_a_damaged_or_another_run_has_left_is_done_again(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path)
    recipe(tmp_path)
    assert quantize(run, tmp_path, "whole.safetensors").code == 0
    keep = Shelf.add

    def add(shelf: Shelf, index: int, fitted: Any) -> None:
        if index == 3:
            raise Killed
        keep(shelf, index, fitted)

    monkeypatch.setattr(Shelf, "add", add)
    with pytest.raises(Killed):
        quantize(run, tmp_path, "m2.safetensors", "--resume")
    block = tmp_path / ".m2.safetensors.partial" / "m2.safetensors.blocks" / "00001.safetensors"
    damaged = bytearray(block.read_bytes())
    damaged[-1] ^= 1
    block.write_bytes(damaged)
    monkeypatch.setattr(Shelf, "add", keep)
    done = quantize(run, tmp_path, "m2.safetensors", "--resume", "--coding", "packed")
    assert "1 finished blocks are damaged or of another run" in done.err
    assert quantize(run, tmp_path, "packed.safetensors", "--coding", "packed").code == 0
    assert (tmp_path / "m2.safetensors").read_bytes() == (tmp_path / "packed.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("factory", "error"),
    [
        ("Skipping", "does not give 'blocks.1' what 'blocks.0' has made"),
        ("Collecting", "makes its output of more than what its last block gives"),
        ("Random", "'blocks.1.waves': is a buffer that no checkpoint holds"),
        ("no_blocks", "has no list of modules of one kind"),
    ],
)
def test_networks_that_cannot_go_block_by_block_are_refused(run: Run, tmp_path: Path, factory: str, error: str) -> None:
    write(tmp_path, factory)
    recipe(tmp_path, factory)
    done = quantize(run, tmp_path, "o.safetensors")
    assert done.code == 3 and error in done.err, done.err


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (("--set", "companions=[bias_correction]"), "companions"),
        (("--set", "budget={bpw: 3}", "--set", "rules=[{match: '*.weight', gptq: {}}]"), "that it is spent by"),
        (("--set", "activations.range=noise"), "ranges without calibration data need the whole network"),
        (("--set", "rules=[{match: '*.weight', dfq: {bits: 4}}]"), "dfq works on the whole network"),
    ],
)
def test_what_needs_the_whole_network_is_refused(run: Run, tmp_path: Path, words: tuple[str, ...], error: str) -> None:
    write(tmp_path)
    recipe(tmp_path)
    for more in ((), ("--dry-run",)):
        done = quantize(run, tmp_path, "o.safetensors", *words, *more)
        assert done.code == 3 and error in done.err and "block by block" not in done.err, done.err


@pytest.mark.parametrize(
    ("words", "error"), [(("--bpw", "3"), 0), (("--target-size", "4KB"), 0), (("--set", "budget={bpw: 0.1}"), 3)]
)
def test_rd_keeps_a_budget_block_by_block_and_says_what_it_weighed(
    run: Run, tmp_path: Path, words: tuple[str, ...], error: int
) -> None:
    write(tmp_path)
    recipe(tmp_path)
    done = quantize(run, tmp_path, "o.safetensors", *RD, *words, "--json", "-")
    assert done.code == error, done.err
    if error:
        assert "are too few" in done.err
        return
    report = json.loads(done.out)
    size = report["size"]
    assert size["bits_per_weight"] <= 3 if words[0] == "--bpw" else size["artifact_bytes"] <= 4000
    assert size["bits_per_weight"] > 2
    assert "by the relative error of its block's output" in report["warnings"][0]
    assert abs(report["accuracy"][0]["artifact"] / report["accuracy"][0]["baseline"] - 1) < 0.5


def test_a_killed_run_of_rd_goes_on_to_the_same_bytes(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed while blocks are measured and while they are coded; what is done of either is done once."""
    write(tmp_path)
    recipe(tmp_path)
    keep, added = Shelf.add, [0]

    def killed_at(last: int) -> Any:
        def add(shelf: Shelf, index: int, fitted: Any) -> None:
            if added[0] == last:
                raise Killed
            added[0] += 1
            keep(shelf, index, fitted)

        return add

    words = (*RD, "--bpw", "3", "--resume")
    monkeypatch.setattr(Shelf, "add", killed_at(-1))
    assert quantize(run, tmp_path, "whole.safetensors", *words).code == 0
    in_all, added[0] = added[0], 0
    # Five stages are measured, then five are coded at each attempt.
    for last in (2, 7, in_all - 1):
        monkeypatch.setattr(Shelf, "add", killed_at(last))
        with pytest.raises(Killed):
            quantize(run, tmp_path, "o.safetensors", *words)
    monkeypatch.setattr(Shelf, "add", killed_at(-1))
    done = quantize(run, tmp_path, "o.safetensors", *words)
    assert done.code == 0 and "finished blocks are taken up" in done.err, done.err
    assert added[0] == in_all
    assert (tmp_path / "o.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_training_needs_the_whole_network(run: Run, tmp_path: Path) -> None:
    write(tmp_path)
    recipe(tmp_path)
    words = ("--set", "data.train={npz: d.npz, inputs: ids}", "--set", "finetune={optimizer: {sgd: {lr: 0.1}}}")
    done = run("finetune-reg", tmp_path / "m.safetensors", "-r", tmp_path / "recipe.yaml", "--allow-code", *words)
    assert done.code == 3 and "this needs the whole network at once" in done.err, done.err


def test_eval_gives_the_same_metrics_block_by_block(run: Run, tmp_path: Path) -> None:
    write(tmp_path)
    recipe(tmp_path)
    assert quantize(run, tmp_path, "o.safetensors").code == 0
    for path in ("o.safetensors", "m.safetensors"):
        found = []
        for offload in ("blocks", "none"):
            words = ("-r", tmp_path / "recipe.yaml", "--allow-code", "--set", f"model.offload={offload}")
            done = run("eval", tmp_path / path, *words, "--json", "-")
            assert done.code == 0, done.err
            found.append(json.loads(done.out)["metrics"])
        assert found[0] == found[1]


def test_statistics_are_those_of_the_network_in_memory(run: Run, tmp_path: Path) -> None:
    write(tmp_path)
    for offload in ("none", "blocks"):
        recipe(tmp_path, method="mse: {bits: 4}", offload=f'blocks: "blocks.*", offload: {offload}')
        done = quantize(run, tmp_path, f"{offload}.safetensors", "--save-statistics", str(tmp_path / f"{offload}.s"))
        assert done.code == 0, done.err
    assert (tmp_path / "none.s").read_bytes() == (tmp_path / "blocks.s").read_bytes()
    found = load_file(tmp_path / "blocks.s")
    assert len(found) == 2 * 6
    save_file(found, tmp_path / "library.s", metadata={"format": "pt"})
    assert (tmp_path / "library.s").read_bytes() == (tmp_path / "blocks.s").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama-tied", "mixtral", "gpt2"])
def test_networks_of_transformers_go_block_by_block(run: Run, tmp_path: Path, name: str) -> None:
    """Also folders whose experts the network has as one stack."""
    module = make_architecture(name)
    module.save_pretrained(tmp_path / "m.safetensors")
    config = {
        key: value for key, value in module.config.to_diff_dict().items() if key not in ("architectures", "dtype")
    }
    np.savez(tmp_path / "d.npz", ids=np.random.default_rng(0).integers(0, 64, (16, 10)))
    for output, offload in (("a", "offload: none"), ("b", "offload: blocks")):
        blocks = "transformer.h.*" if name == "gpt2" else "model.layers.*"
        path = recipe(tmp_path, offload=f'args: {json.dumps(config)}, blocks: "{blocks}", {offload}')
        text = path.read_text().replace("net.py:Text", f"transformers:{type(module).__name__}")
        text = text.replace("*embed*", "*wte*") if name == "gpt2" else text
        path.write_text(text.replace("inputs: ids", "inputs: {input_ids: ids}"))
        done = quantize(run, tmp_path, output)
        assert done.code == 0, done.err
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
