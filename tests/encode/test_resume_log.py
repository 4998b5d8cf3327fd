"""A run that was killed goes on where it stopped, and ends in the bytes of an unbroken run."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from artifact.examples import gaussian, plan_for, recipe, rtn, rule, run, save, save_folder

from qcompress.checkpoint.checkpoint import read_checkpoint
from qcompress.encode import encode_tensor
from qcompress.encode.journal import Journal, run_key
from qcompress.methods import rtn as rtn_method
from qcompress.plan.files import make_shards
from qcompress.types.config import CodingChoice
from qcompress.types.encoded import Affine
from qcompress.types.plan import Recipe

NAMES = [f"layer{index}.weight" for index in range(6)]


class Killed(Exception):
    pass


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    tensors = {name: gaussian(8 + index, 40, seed=index) for index, name in enumerate(NAMES)}
    # A constant weight codes to nothing, so that one of the varying slots is empty.
    tensors["layer3.weight"] = torch.full((11, 40), 0.25)
    return save(tmp_path / "model.safetensors", {**tensors, "bias": gaussian(7)})


class Encoder:
    """Counts the tensors that are encoded, and kills the run before the one numbered `limit`."""

    def __init__(self) -> None:
        self.limit: int | None = None
        self.calls = 0
        self._encode: Callable[..., Affine] = rtn_method.encode

    def encode(self, *arguments: Any) -> Affine:
        if self.calls == self.limit:
            raise Killed
        self.calls += 1
        return self._encode(*arguments)

    def restart(self, limit: int | None = None) -> None:
        self.limit, self.calls = limit, 0


@pytest.fixture
def encoder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Encoder]:
    counting = Encoder()
    # A call for each weight: several small ones share one.
    monkeypatch.setattr(encode_tensor, "STACKED_WEIGHTS", 0)
    monkeypatch.setattr(rtn_method, "encode", counting.encode)
    return counting


def partial(output: Path) -> Path:
    return output.with_name(f".{output.name}.partial")


def kill_after(count: int, encoder: Encoder, source: Path, output: Path, choice: str, **options: Any) -> None:
    encoder.restart(count)
    with pytest.raises(Killed):
        run(source, output, rtn(3), choice, resume=True, **options)
    encoder.restart()


@pytest.mark.parametrize("choice", ["packed", "zstd", "ans", "auto"])
@pytest.mark.parametrize("count", [0, 1, 4, 5])
def test_a_resumed_run_ends_in_the_bytes_of_an_unbroken_one(
    choice: str, count: int, checkpoint: Path, tmp_path: Path, encoder: Encoder
) -> None:
    whole, resumed = tmp_path / "whole.safetensors", tmp_path / "resumed.safetensors"
    expected = run(checkpoint, whole, rtn(3), choice)
    kill_after(count, encoder, checkpoint, resumed, choice)
    assert not resumed.exists()
    report = run(checkpoint, resumed, rtn(3), choice, resume=True)
    assert resumed.read_bytes() == whole.read_bytes()
    assert encoder.calls == len(NAMES) - count
    assert report.layers == expected.layers
    assert report.size == expected.size
    assert not partial(resumed).exists()


def test_a_folder_resumes_within_any_of_its_files(tmp_path: Path, encoder: Encoder) -> None:
    shards = {
        f"model-0000{index}.safetensors": {f"{index}.{name}": gaussian(6, 30, seed=index) for name in "ab"}
        for index in range(3)
    }
    source = save_folder(tmp_path / "in", shards)
    run(source, tmp_path / "whole", rtn(3), "ans")
    for count in (1, 2, 3, 5):
        output = tmp_path / f"resumed{count}"
        kill_after(count, encoder, source, output, "ans")
        run(source, output, rtn(3), "ans", resume=True)
        assert encoder.calls == 6 - count
        for path in (tmp_path / "whole").iterdir():
            assert (output / path.name).read_bytes() == path.read_bytes()
        assert sorted(path.name for path in output.iterdir()) == sorted(p.name for p in (tmp_path / "whole").iterdir())


def test_a_run_may_be_killed_again_and_again(checkpoint: Path, tmp_path: Path, encoder: Encoder) -> None:
    output = tmp_path / "out.safetensors"
    for _ in range(len(NAMES) - 1):
        kill_after(1, encoder, checkpoint, output, "ans")
    run(checkpoint, output, rtn(3), "ans", resume=True)
    assert encoder.calls == 1
    run(checkpoint, tmp_path / "whole.safetensors", rtn(3), "ans")
    assert output.read_bytes() == (tmp_path / "whole.safetensors").read_bytes()


def damage_data(output: Path, checkpoint: Path) -> None:
    path = partial(output) / output.name
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)


def cut_data(output: Path, checkpoint: Path) -> None:
    path = partial(output) / output.name
    path.write_bytes(path.read_bytes()[:-1])


def cut_journal(output: Path, checkpoint: Path) -> None:
    path = partial(output) / f"{checkpoint.name}.journal"
    path.write_text(path.read_text()[:-20])


def lines_of(output: Path, checkpoint: Path) -> tuple[Path, list[str]]:
    path = partial(output) / f"{checkpoint.name}.journal"
    return path, path.read_text().splitlines(keepends=True)


def change_entry(output: Path, checkpoint: Path) -> None:
    """As a bad disk would: another exponent halves the weights, and nothing in the data tells."""
    path, lines = lines_of(output, checkpoint)
    changed = re.sub(r'"exponent":(-?\d+)', lambda found: f'"exponent":{int(found[1]) - 1}', lines[2])
    assert changed != lines[2]
    path.write_text("".join([*lines[:2], changed, *lines[3:]]))


def flip_bit(output: Path, checkpoint: Path) -> None:
    path, lines = lines_of(output, checkpoint)
    raw = bytearray("".join(lines).encode())
    raw[len("".join(lines[:2]).encode()) + 100] ^= 1
    path.write_bytes(raw)


def swap_lines(output: Path, checkpoint: Path) -> None:
    path, lines = lines_of(output, checkpoint)
    path.write_text("".join([*lines[:2], lines[3], lines[2]]))


def take_line_out(output: Path, checkpoint: Path) -> None:
    path, lines = lines_of(output, checkpoint)
    path.write_text("".join([*lines[:2], *lines[3:]]))


def change_input(output: Path, checkpoint: Path) -> None:
    raw = bytearray(checkpoint.read_bytes())
    # The third of the weights: its name comes after the bias and two others, whose data are 4 bytes a value.
    begin = len(raw) - 4 * 40 * (10 + 11 + 12 + 13)
    raw[begin] ^= 1
    checkpoint.write_bytes(raw)


@pytest.mark.parametrize(
    ("spoil", "encoded_again"),
    [
        *((damage_data, 4), (cut_data, 4), (cut_journal, 4), (change_input, 4)),
        *((change_entry, 5), (flip_bit, 5), (swap_lines, 5), (take_line_out, 5)),
    ],
)
def test_what_does_not_hold_any_more_is_done_again(
    spoil: Callable[[Path, Path], None], encoded_again: int, checkpoint: Path, tmp_path: Path, encoder: Encoder
) -> None:
    output, whole = tmp_path / "out.safetensors", tmp_path / "whole.safetensors"
    kill_after(3, encoder, checkpoint, output, "ans")
    spoil(output, checkpoint)
    run(checkpoint, output, rtn(3), "ans", resume=True)
    assert encoder.calls == encoded_again
    run(checkpoint, whole, rtn(3), "ans")
    assert output.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize(("spoil", "dropped"), [(change_entry, 2), (flip_bit, 2), (take_line_out, 1), (cut_journal, 0)])
def test_damaged_lines_are_dropped_with_a_word(
    spoil: Callable[[Path, Path], None], dropped: int, checkpoint: Path, tmp_path: Path, encoder: Encoder
) -> None:
    output = tmp_path / "out.safetensors"
    kill_after(3, encoder, checkpoint, output, "ans")
    spoil(output, checkpoint)
    said: list[str] = []
    run(checkpoint, output, rtn(3), "ans", resume=True, say=said.append)
    lines = [line for line in said if "damaged" in line]
    assert len(lines) == (1 if dropped else 0)
    assert all(f": {dropped} of " in line and "encoded again" in line for line in lines)


def test_another_recipe_or_coding_starts_anew(checkpoint: Path, tmp_path: Path, encoder: Encoder) -> None:
    other_recipe = recipe(rule("layer0*", "rtn", bits=3), rule("*", "rtn", bits=4))
    for asked, choice in ((other_recipe, "ans"), (rtn(4), "ans"), (rtn(3), "packed"), (rtn(3), "zstd")):
        output = tmp_path / "out.safetensors"
        kill_after(3, encoder, checkpoint, output, "ans", force=True)
        run(checkpoint, output, asked, choice, resume=True, force=True)
        assert encoder.calls == len(NAMES)
        run(checkpoint, tmp_path / "whole.safetensors", asked, choice, force=True)
        assert output.read_bytes() == (tmp_path / "whole.safetensors").read_bytes()


def test_without_resume_nothing_is_kept_and_nothing_is_used(checkpoint: Path, tmp_path: Path, encoder: Encoder) -> None:
    output = tmp_path / "out.safetensors"
    kill_after(3, encoder, checkpoint, output, "packed")
    encoder.restart(4)
    with pytest.raises(Killed):
        run(checkpoint, output, rtn(3), "packed")
    assert encoder.calls == 4
    assert not partial(output).exists()


def test_a_journal_speaks_only_to_the_run_of_its_own_key(checkpoint: Path, tmp_path: Path, encoder: Encoder) -> None:
    output = tmp_path / "out.safetensors"
    kill_after(3, encoder, checkpoint, output, "ans")
    path = partial(output) / f"{checkpoint.name}.journal"
    key = json.loads(path.read_text().splitlines()[0])["key"]
    assert [record.tensor for record in Journal(path, key).read()] == NAMES[:3]
    assert Journal(path, "0" * len(key)).read() == []
    assert Journal(path.with_name("missing"), key).read() == []


def test_the_key_changes_with_all_that_decides_the_bytes(checkpoint: Path) -> None:
    def key(asked: Recipe, choice: CodingChoice = "ans", device: str = "cpu") -> str:
        source = read_checkpoint(checkpoint)
        (shard,) = make_shards(source, plan_for(source, asked), choice)
        return run_key(shard.layout, shard.manifest, device)

    others = [key(rtn(4)), key(rtn(3, symmetric=True)), key(rtn(3), "zstd"), key(rtn(3), device="cuda")]
    assert len({key(rtn(3)), *others}) == 5
    assert key(rtn(3)) == key(rtn(3))
