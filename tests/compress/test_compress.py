"""Checkpoint to artifact: what is stored is what the method chose, the same bytes every time, or nothing at all."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from artifact.educational_decoder import expand
from artifact.examples import (
    dense,
    denses,
    gaussian,
    plan_for,
    recipe,
    rtn,
    rule,
    run,
    save,
    save_folder,
    verify,
)
from contexts import context_of
from safetensors.torch import load_file

from qcompress.artifact.reader import read_artifact
from qcompress.checkpoint.checkpoint import read_checkpoint
from qcompress.checkpoint.staging import MARKER
from qcompress.coding.grids import decode, take_rows
from qcompress.coding.rows import rows_from_weight, weight_from_rows
from qcompress.compress.compress import compress, compress_within
from qcompress.compress.load import load_state_dict
from qcompress.encode import encode_tensor as worker
from qcompress.encode.preflight import count_nonfinite_values
from qcompress.errors import CheckpointError, OutputError, ResourceError
from qcompress.recipe import parse_recipe
from qcompress.registry import METHODS
from qcompress.report.document import Report
from qcompress.types.encoded import Affine
from qcompress.types.plan import Recipe
from qcompress.types.run import Options

QUANTIZERS = [
    name for name, one in METHODS.items() if one.family == "quantize" and one.needs == "weights" and not one.rates
]
GRIDS: list[dict[str, Any]] = [{"granularity": "tensor"}, {"granularity": "channel"}, {"group_size": 4}]
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
SHAPES_AND_AXES: list[tuple[tuple[int, ...], Any]] = [
    ((12, 8), 0),
    ((8, 12), 1),
    ((3, 4, 8), (0, 1)),
    ((3, 8, 4), (0, 2)),
    ((4, 3, 8), (1, 0)),
    ((6, 4, 2, 2), 0),
    ((24,), None),
    ((), None),
]


def own_output(method: str, weight: torch.Tensor, asked: Recipe, axis: tuple[int, ...]) -> torch.Tensor:
    """What the method makes of a weight, decoded, with no file between."""
    config = asked.rules[0].config
    rows = rows_from_weight(weight.float(), axis).contiguous()
    encoded = METHODS[method].load_encode()(rows, config, context_of(weight))
    decoded = decode(take_rows(encoded, 0, encoded.codes.shape[0]))
    return weight_from_rows(decoded, tuple(weight.shape), axis).to(weight.dtype)


@pytest.mark.parametrize("method", QUANTIZERS)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("choice", ["packed", "zstd", "ans", "auto"])
def test_what_is_read_back_is_what_the_method_chose(
    method: str, grid: dict[str, Any], choice: str, tmp_path: Path
) -> None:
    for bits, dtype in zip((1, 2, 3, 8), DTYPES, strict=True):
        weight = gaussian(12, 8, dtype=dtype)
        # By its name, for 8 bits in groups of 4 save nothing.
        asked = recipe(rule("w", method, bits=bits, **grid))
        run(save(tmp_path / "m.safetensors", {"w": weight}), tmp_path / "a.safetensors", asked, choice, force=True)
        found = load_state_dict(tmp_path / "a.safetensors")["w"]
        assert dense(found) == dense(own_output(method, weight, asked, (0,)))
        assert expand(tmp_path / "a.safetensors") == {"w": dense(found)}


@pytest.mark.parametrize(("shape", "axis"), SHAPES_AND_AXES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("symmetric", [False, True])
def test_every_axis_and_dtype_reads_back(
    shape: tuple[int, ...], axis: Any, dtype: torch.dtype, symmetric: bool, tmp_path: Path
) -> None:
    weight = gaussian(*shape, dtype=dtype)
    asked = recipe(rule("w", "rtn", bits=5, axis=axis, symmetric=symmetric))
    run(save(tmp_path / "m.safetensors", {"w": weight}), tmp_path / "a.safetensors", asked)
    found = load_state_dict(tmp_path / "a.safetensors")["w"]
    assert (found.dtype, found.shape) == (weight.dtype, weight.shape)
    axes = (0,) if axis is None else (axis,) if isinstance(axis, int) else axis
    assert dense(found) == dense(own_output("rtn", weight, asked, axes))
    assert expand(tmp_path / "a.safetensors") == {"w": dense(found)}
    assert (found.double() - weight.double()).abs().max() < 0.25


@pytest.mark.parametrize("convention", ["full-range", "narrow", "aimet", "gptq", "mid-rise"])
def test_every_symmetric_convention_reads_back(convention: str, tmp_path: Path) -> None:
    weight = gaussian(6, 8)
    asked = recipe(rule("w", "rtn", bits=3, symmetric=True, convention=convention))
    run(save(tmp_path / "m.safetensors", {"w": weight}), tmp_path / "a.safetensors", asked)
    found = load_state_dict(tmp_path / "a.safetensors")["w"]
    assert dense(found) == dense(own_output("rtn", weight, asked, (0,)))
    assert expand(tmp_path / "a.safetensors") == {"w": dense(found)}


@pytest.mark.parametrize("value", [0.0, -0.0, 0.3, -7.0, 1e-30, 1e30])
def test_constant_weights_lose_no_more_than_their_grid_must(value: float, tmp_path: Path) -> None:
    weight = torch.full((4, 16), value)
    run(save(tmp_path / "m.safetensors", {"w": weight}), tmp_path / "a.safetensors", rtn(2))
    found = load_state_dict(tmp_path / "a.safetensors")["w"]
    assert bool((found == 0).all()) if value == 0 else torch.allclose(found, weight, rtol=1e-3, atol=0)


@pytest.mark.parametrize("method", QUANTIZERS)
@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_largest_numbers_stay_finite(method: str, bits: int, dtype: torch.dtype, tmp_path: Path) -> None:
    """A grid may reach beyond the largest number of a dtype, and what it decodes to must not."""
    most = min(torch.finfo(dtype).max, torch.finfo(torch.float32).max)
    weight = most * torch.tensor([[1.0, -4e-5, 1e-4, 1e-5], [1.0, 0.99, -1.0, 3e-5]], dtype=torch.float64)
    weight = weight.to(dtype)
    source = save(tmp_path / "m.safetensors", {"w": weight})
    run(source, tmp_path / "a.safetensors", recipe(rule("*", method, bits=bits)))
    found = load_state_dict(tmp_path / "a.safetensors")
    assert torch.isfinite(found["w"]).all()
    assert denses(found) == expand(tmp_path / "a.safetensors")


def mixed() -> dict[str, torch.Tensor]:
    return {
        "a.weight": gaussian(40, 64),
        "b.weight": gaussian(24, 3, 8, seed=1, dtype=torch.float16),
        "c.weight": gaussian(64, 40, seed=2, dtype=torch.bfloat16),
        "d.weight": torch.zeros(16, 16),
        "a.bias": gaussian(40, seed=3),
        "steps": torch.arange(5),
    }


RECIPES = {
    "channels": recipe(*(rule("*.weight", "mse", bits=3),)),
    "groups": recipe(rule("a.*", "hqq", bits=4, group_size=16), rule("*", "rtn", bits=2, group_size=8)),
    "tensors": recipe(rule("*", "squant", bits=3, granularity="tensor")),
}


def figures(report: Report) -> tuple[Any, ...]:
    """All that a report says but what the run took."""
    return (
        replace(report, run=None, artifact=replace(report.artifact, name="")).layers,
        report.size,
        report.artifact.sha256,
    )


@pytest.mark.parametrize("asked", RECIPES.values(), ids=list(RECIPES))
@pytest.mark.parametrize("choice", ["packed", "auto"])
def test_neither_threads_nor_repetition_change_a_byte_or_a_figure(asked: Recipe, choice: str, tmp_path: Path) -> None:
    source = save(tmp_path / "m.safetensors", mixed())
    results = []
    for index, threads in enumerate((1, 1, 2, 4)):
        output = tmp_path / f"{index}.safetensors"
        report = run(source, output, asked, choice, threads=threads)
        results.append((output.read_bytes(), figures(report)))
    assert all(result == results[0] for result in results)


@pytest.mark.parametrize("asked", RECIPES.values(), ids=list(RECIPES))
@pytest.mark.slow
def test_block_sizes_change_no_byte(asked: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save(tmp_path / "m.safetensors", mixed())
    written = []
    for size in (1, 130, 1000, 1 << 18):
        monkeypatch.setattr(worker, "BLOCK_WEIGHTS", size)
        run(source, tmp_path / "a.safetensors", asked, "auto", force=True)
        written.append((tmp_path / "a.safetensors").read_bytes())
    assert all(one == written[0] for one in written)


@pytest.mark.parametrize("choice", ["packed", "zstd", "ans", "auto"])
def test_every_byte_has_an_owner(choice: str, tmp_path: Path) -> None:
    report = run(save(tmp_path / "m.safetensors", mixed()), tmp_path / "a.safetensors", RECIPES["groups"], choice)
    size = (tmp_path / "a.safetensors").stat().st_size
    assert report.size.artifact_bytes == report.size.parts.total == size
    assert report.size.baseline_bytes == (tmp_path / "m.safetensors").stat().st_size
    artifact = verify(tmp_path / "a.safetensors")
    stored = {layer.name: layer.bytes for layer in report.layers}
    for name in artifact.files[0].manifest.tensors:
        assert stored[name] == sum(info.n_bytes for info in artifact.files[0].parts_of(name).values())
    assert sum(stored.values()) + artifact.files[0].overhead_bytes == size
    assert report.artifact.sha256 == artifact.sha256


def test_a_folder_is_counted_with_its_index(tmp_path: Path) -> None:
    names = [f"model-0000{index}-of-00002.safetensors" for index in (1, 2)]
    shards = {names[0]: {"w": gaussian(6, 8)}, names[1]: {"v": gaussian(4, 8), "b": gaussian(3)}}
    source = save_folder(tmp_path / "in", shards, {"model_type": "none"})
    (source / "tokenizer.json").write_text("{}")
    (source / "pytorch_model.bin").write_bytes(b"x")
    report = run(source, tmp_path / "out", rtn(4))
    marked = [name.replace("model", "model.qcompress") for name in names]
    counted = [*marked, "model.qcompress.safetensors.index.json"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*counted, "config.json", "tokenizer.json"}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    told = {"quant_method": "qcompress", "weights": "model.qcompress.safetensors.index.json"}
    assert config == {"model_type": "none", "quantization_config": told}
    assert report.size.artifact_bytes == sum((tmp_path / "out" / name).stat().st_size for name in counted)
    verify(tmp_path / "out")
    state = load_state_dict(tmp_path / "out")
    assert set(state) == {"w", "v", "b"}
    assert denses(state) == expand(tmp_path / "out")


def test_a_checkpoint_of_kept_tensors_alone_is_copied(tmp_path: Path) -> None:
    source = save(tmp_path / "m.safetensors", mixed())
    report = run(source, tmp_path / "a.safetensors", recipe(rule("*")))
    assert not report.compressed
    assert denses(load_state_dict(tmp_path / "a.safetensors")) == denses(mixed())
    stored = load_file(tmp_path / "a.safetensors")
    del stored["qcompress.manifest"]
    assert denses(stored) == denses(mixed())


NONFINITE = {"w": gaussian(8, 8), "v": gaussian(8, 8, seed=1), "b": torch.tensor([float("nan")])}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [float("nan"), -float("nan"), float("inf"), -float("inf")])
def test_values_that_are_no_numbers_are_named_and_counted(value: float, dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {name: tensor.to(dtype, copy=True) for name, tensor in NONFINITE.items()}
    tensors["w"][3, 2:5] = value
    source = save(tmp_path / "m.safetensors", tensors)
    with pytest.raises(
        CheckpointError, match="tensor 'w': 3 of its 64 values are NaN, Inf or beyond float32"
    ) as caught:
        run(source, tmp_path / "a.safetensors", rtn(4))
    assert "--skip-nonfinite" in caught.value.hint
    assert_only(tmp_path, "m.safetensors")


def test_doubles_beyond_float32_are_no_weights(tmp_path: Path) -> None:
    source = save(tmp_path / "m.safetensors", {"w": torch.tensor([[1e39, 1.0]], dtype=torch.float64)})
    with pytest.raises(CheckpointError, match="1 of its 2 values"):
        run(source, tmp_path / "a.safetensors", rtn(4))


def test_tensors_with_values_that_are_no_numbers_can_be_kept(tmp_path: Path) -> None:
    tensors = {name: tensor.clone() for name, tensor in NONFINITE.items()}
    tensors["w"][0, 0] = float("inf")
    checkpoint = read_checkpoint(save(tmp_path / "m.safetensors", tensors))
    plan = plan_for(checkpoint, rtn(4), nonfinite=partial(count_nonfinite_values, checkpoint))
    reasons = {decision.tensor.name: decision.reason for decision in plan.decisions if not decision.compresses}
    assert reasons == {"w": "1 values are NaN or Inf (--skip-nonfinite)", "b": "fewer than two dimensions"}
    compress(checkpoint, plan, Options(tmp_path / "a.safetensors"))
    found = load_state_dict(tmp_path / "a.safetensors")
    assert dense(found["w"]) == dense(tensors["w"])
    assert set(read_artifact(tmp_path / "a.safetensors").files[0].manifest.tensors) == {"v"}


# --- outputs that are in the way --------------------------------------------------------------------------------------


def assert_only(folder: Path, *names: str) -> None:
    """Nothing lies in the folder but these: no staging folder, no half of a file."""
    assert {path.name for path in folder.iterdir()} == set(names)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return save(tmp_path / "m.safetensors", {"w": gaussian(64, 64), "b": gaussian(64)})


def test_an_output_that_exists_stays_unless_forced(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "a.safetensors"
    output.write_bytes(b"old")
    with pytest.raises(OutputError, match="exists already; choose another -o, or replace it with --force"):
        run(source, output, rtn(4))
    assert output.read_bytes() == b"old"
    run(source, output, rtn(4), force=True)
    verify(output)
    assert_only(tmp_path, "m.safetensors", "a.safetensors")


def test_a_dangling_link_is_an_output_that_exists(source: Path, tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").symlink_to(tmp_path / "gone")
    with pytest.raises(OutputError, match="exists already"):
        run(source, tmp_path / "a.safetensors", rtn(4))
    run(source, tmp_path / "a.safetensors", rtn(4), force=True)
    assert not (tmp_path / "gone").exists()
    verify(tmp_path / "a.safetensors")


@pytest.mark.parametrize("kind", ["same", "dotted", "symlink", "hard link", "through a linked folder"])
def test_the_input_is_never_its_own_output(kind: str, source: Path, tmp_path: Path) -> None:
    output = {"same": source, "dotted": tmp_path / "x" / ".." / source.name}.get(kind, tmp_path / "link.safetensors")
    (tmp_path / "x").mkdir()
    if kind == "symlink":
        output.symlink_to(source)
    elif kind == "hard link":
        output.hardlink_to(source)
    elif kind == "through a linked folder":
        (tmp_path / "linked").symlink_to(tmp_path)
        output = tmp_path / "linked" / source.name
    before = source.read_bytes()
    with pytest.raises(OutputError, match="is the input itself"):
        run(source, output, rtn(4), force=True)
    assert source.read_bytes() == before


def test_neither_is_a_folder_around_it_nor_a_shard_of_it(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    folder = save_folder(
        tmp_path / "deep" / "in",
        {"model.safetensors": {"w": gaussian(4, 8)}},
    )
    for output in (folder, folder.parent, tmp_path, folder / "model.safetensors"):
        with pytest.raises(OutputError, match="is the input itself"):
            run(folder, output, rtn(4), force=True)
    for output in (folder, folder.parent, tmp_path):
        with pytest.raises(OutputError, match="is the input itself"):
            run(folder / "model.safetensors", output, rtn(4), force=True)
    assert read_checkpoint(folder).tensors


def test_a_folder_is_not_replaced_by_a_file_nor_a_foreign_folder_by_ours(source: Path, tmp_path: Path) -> None:
    """--force replaces an artifact, not whatever somebody mistyped."""
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "diary.txt").write_text("dear diary")
    with pytest.raises(OutputError, match="is a folder, and the output is a file"):
        run(source, tmp_path / "notes", rtn(4), force=True)
    folder = save_folder(tmp_path / "in", {"model.safetensors": {"w": gaussian(4, 8)}})
    with pytest.raises(OutputError, match=r"is a folder that holds no \.safetensors file"):
        run(folder, tmp_path / "notes", rtn(4), force=True)
    with pytest.raises(OutputError, match="is a file, and the output is a folder"):
        run(folder, tmp_path / "notes" / "diary.txt", rtn(4), force=True)
    assert (tmp_path / "notes" / "diary.txt").read_text() == "dear diary"
    assert_only(tmp_path, "m.safetensors", "notes", "in")


def test_a_folder_replaces_an_older_one_whole(tmp_path: Path) -> None:
    folder = save_folder(tmp_path / "in", {"model.safetensors": {"w": gaussian(4, 8)}})
    run(folder, tmp_path / "out", rtn(4))
    (tmp_path / "out" / "left.txt").touch()
    run(folder, tmp_path / "out", rtn(2), force=True)
    assert_only(tmp_path / "out", "model.qcompress.safetensors")
    assert_only(tmp_path, "in", "out")
    assert verify(tmp_path / "out").files[0].manifest.tensors["w"].bits == 2


def test_what_a_killed_run_left_is_cleaned(source: Path, tmp_path: Path) -> None:
    staging = tmp_path / ".a.safetensors.partial"
    (staging / "a.safetensors").mkdir(parents=True)
    (staging / MARKER).touch()
    (staging / "a.safetensors" / "half").write_bytes(b"x")
    (staging / "other").touch()
    run(source, tmp_path / "a.safetensors", rtn(4))
    assert_only(tmp_path, "m.safetensors", "a.safetensors")


def test_a_link_in_place_of_the_staging_folder_is_not_followed(source: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "precious").touch()
    (tmp_path / ".a.safetensors.partial").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OutputError, match="did not make it"):
        run(source, tmp_path / "a.safetensors", rtn(4))
    assert_only(tmp_path / "elsewhere", "precious")


def test_of_two_runs_the_second_is_refused(source: Path, tmp_path: Path) -> None:
    staging = tmp_path / ".a.safetensors.partial"
    staging.mkdir()
    (staging / MARKER).touch()
    (staging / "half").write_bytes(b"x")
    descriptor = os.open(staging, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        with pytest.raises(OutputError, match="is being written by another run"):
            run(source, tmp_path / "a.safetensors", rtn(4))
        assert (staging / "half").read_bytes() == b"x"
    finally:
        os.close(descriptor)
    run(source, tmp_path / "a.safetensors", rtn(4))


def test_many_runs_at_once_leave_one_whole_output(source: Path, tmp_path: Path) -> None:
    outcomes: list[object] = []
    gate = threading.Barrier(4)

    def attempt(bits: int) -> None:
        gate.wait()
        try:
            outcomes.append(run(source, tmp_path / "a.safetensors", rtn(bits), force=True))
        except OutputError as error:
            outcomes.append(error)

    threads = [threading.Thread(target=attempt, args=(bits,)) for bits in (2, 3, 4, 8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outcomes) == 4
    assert any(isinstance(outcome, Report) for outcome in outcomes)
    verify(tmp_path / "a.safetensors")
    assert_only(tmp_path, "m.safetensors", "a.safetensors")


# --- failures in the middle -------------------------------------------------------------------------------------------


class Broken(Exception):
    pass


@pytest.fixture
def failing_method(monkeypatch: pytest.MonkeyPatch) -> Callable[[Exception], None]:
    """Let rtn encode two tensors, then raise."""

    def install(error: Exception) -> None:
        calls: Iterator[int] = iter(range(100))
        honest = METHODS["rtn"].load_encode()

        def encode(*arguments: Any) -> Affine:
            if next(calls) >= 2:
                raise error
            return honest(*arguments)

        monkeypatch.setattr("qcompress.methods.rtn.encode", encode)
        # A call for each weight: several small ones share one.
        monkeypatch.setattr("qcompress.encode.encode_tensor.STACKED_WEIGHTS", 0)

    return install


@pytest.mark.parametrize("choice", ["packed", "auto"])
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("error", [Broken(), KeyboardInterrupt(), MemoryError()], ids=repr)
def test_a_failure_in_the_middle_leaves_the_old_output_and_nothing_else(
    choice: str, threads: int, error: Exception, tmp_path: Path, failing_method: Callable[[Exception], None]
) -> None:
    source = save(tmp_path / "m.safetensors", {f"w{index}": gaussian(32, 32, seed=index) for index in range(8)})
    (tmp_path / "a.safetensors").write_bytes(b"old")
    failing_method(error)
    before = threading.active_count()
    with pytest.raises(type(error)):
        run(source, tmp_path / "a.safetensors", rtn(4), choice, threads=threads, force=True)
    assert (tmp_path / "a.safetensors").read_bytes() == b"old"
    assert_only(tmp_path, "m.safetensors", "a.safetensors")
    assert threading.active_count() == before


@pytest.mark.parametrize(
    ("code", "hint"),
    [
        (errno.ENOSPC, "free some space"),
        (errno.EDQUOT, "free some of the quota"),
        (errno.EFBIG, "allows no file so large"),
        (errno.EIO, "check the disk"),
    ],
)
@pytest.mark.parametrize("after", [0, 2, 4])
def test_a_disk_that_fails_is_a_resource_that_ran_out(
    code: int, hint: str, after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save(tmp_path / "m.safetensors", {"w": gaussian(32, 32), "v": gaussian(32, 32), "b": gaussian(32)})
    honest, calls = os.pwrite, iter(range(100))

    def pwrite(*arguments: Any) -> int:
        if next(calls) >= after:
            raise OSError(code, os.strerror(code))
        return honest(*arguments)

    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(ResourceError, match=hint) as caught:
        run(source, tmp_path / "a.safetensors", rtn(4))
    assert caught.value.exit_code == 5
    assert os.strerror(code) in str(caught.value)
    assert_only(tmp_path, "m.safetensors")


def test_short_writes_are_continued(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(source, tmp_path / "a.safetensors", rtn(4))
    honest = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, place: honest(file, data[:7], place))
    run(source, tmp_path / "b.safetensors", rtn(4))
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_a_disk_that_stores_other_bytes_is_found_out(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = os.pwrite

    def pwrite(file: int, data: Any, place: int) -> int:
        damaged = bytearray(data)
        damaged[-1] ^= 1
        return honest(file, damaged, place)

    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(ResourceError, match="reads back other bytes than were written"):
        run(source, tmp_path / "a.safetensors", rtn(4))
    assert_only(tmp_path, "m.safetensors")


LIMITED = """
import resource, sys
sys.path[:0] = sys.argv[3:]
from pathlib import Path
from artifact.examples import rtn, run
from qcompress.errors import ResourceError
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    run(Path(sys.argv[1]), Path(sys.argv[2]), rtn(8))
except ResourceError as error:
    sys.exit("File too large" not in str(error))
sys.exit(2)
"""


@pytest.mark.slow
def test_a_limit_on_file_sizes_is_a_resource_that_ran_out(source: Path, tmp_path: Path) -> None:
    tests = Path(__file__).parents[1]
    command = [
        sys.executable,
        "-c",
        LIMITED,
        str(source),
        str(tmp_path / "a.safetensors"),
        str(tests),
        str(tests.parent),
    ]
    assert subprocess.run(command, check=False).returncode == 0
    assert_only(tmp_path, "m.safetensors")


def test_a_disk_without_room_is_refused_before_anything_is_written(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=100))
    with pytest.raises(ResourceError, match="and the disk has 100 left; free some space"):
        run(source, tmp_path / "a.safetensors", rtn(4))
    assert_only(tmp_path, "m.safetensors")


@pytest.mark.parametrize(
    ("budget", "needed"), [("{bpw: 2}", 3000), ("{size: 3KB}", 3000), (None, 4 * 64 * 64 + 3000)], ids=str
)
def test_codes_without_a_width_need_the_room_of_their_budget_or_of_their_weights(
    budget: str | None, needed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their bound, some 40 bytes a weight, would ask for 160 KB."""
    source, options = save(tmp_path / "m.safetensors", {"w": gaussian(64, 64)}), Options(tmp_path / "a.safetensors")
    text = f"budget: {budget}" if budget is not None else ""
    config = "rd: {}" if budget is not None else "rd: {step: 0.4}"
    asked = parse_recipe(f'version: 1\nrules: [{{match: "*", {config}}}]\n{text}\n', "r.yaml")
    checkpoint = read_checkpoint(source)

    def spend(free: int) -> Report:
        monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=free))
        plan = plan_for(checkpoint, asked)
        if budget is None:
            return compress(checkpoint, plan, options)
        return compress_within(checkpoint, plan, options, None, lambda _: None)

    with pytest.raises(ResourceError, match="and the disk has 900 left"):
        spend(900)
    assert_only(tmp_path, "m.safetensors")
    assert spend(needed).size.artifact_bytes <= needed


@pytest.mark.parametrize("place", ["missing/a.safetensors", "m.safetensors/a.safetensors"])
def test_a_folder_that_cannot_be_written_is_named(place: str, source: Path, tmp_path: Path) -> None:
    with pytest.raises(ResourceError) as caught:
        run(source, tmp_path / place, rtn(4))
    assert str((tmp_path / place).parent) in str(caught.value)
    assert_only(tmp_path, "m.safetensors")


def test_a_read_only_place_is_a_resource_error(source: Path) -> None:
    with pytest.raises(ResourceError):
        run(source, Path("/proc/a.safetensors"), rtn(4))


def test_too_little_memory_is_refused_by_name(source: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ResourceError, match="tensor 'w'': needs about .* more than --max-memory 1000".replace("''", "'")
    ):
        run(source, tmp_path / "a.safetensors", rtn(4), max_memory=1000)
    run(source, tmp_path / "a.safetensors", rtn(4), max_memory=1 << 30, threads=4)
    run(source, tmp_path / "b.safetensors", rtn(4))
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert_only(tmp_path, "m.safetensors", "a.safetensors", "b.safetensors")


# --- ties -------------------------------------------------------------------------------------------------------------


def test_a_tie_that_is_not_true_is_refused(tmp_path: Path) -> None:
    tensors = {"embed_tokens.weight": gaussian(8, 4), "lm_head.weight": gaussian(8, 4, seed=1)}
    source = save_folder(tmp_path / "in", {"model.safetensors": tensors}, {"tie_word_embeddings": True})
    with pytest.raises(CheckpointError, match=r"'lm_head.weight'.*called tied to 'embed_tokens.weight'.*differ"):
        run(source, tmp_path / "out", rtn(4))
    assert_only(tmp_path, "in")
    run(source, tmp_path / "out", recipe(rule("lm_head.weight", "rtn", bits=8), rule("*", "rtn", bits=2)))
    state = load_state_dict(tmp_path / "out")
    assert (state["lm_head.weight"] - tensors["lm_head.weight"]).abs().max() < 0.02
    assert state["embed_tokens.weight"].unique(dim=1).shape[1] <= 4


def test_progress_counts_every_byte_once(source: Path, tmp_path: Path) -> None:
    seen: list[tuple[str, int]] = []
    run(source, tmp_path / "a.safetensors", rtn(4), threads=3, progress=lambda *one: seen.append(one))
    assert sorted(seen) == [("b", 256), ("w", 16384)]


@pytest.mark.slow
def test_peak_memory_does_not_grow_with_the_checkpoint(tmp_path: Path) -> None:
    """Eight times the tensors, the same largest one: a few megabytes more at most."""
    program = (
        "import resource, sys; sys.path[:0] = sys.argv[3:]\n"
        "from pathlib import Path\n"
        "from artifact.examples import rtn, run\n"
        "run(Path(sys.argv[1]), Path(sys.argv[2]), rtn(4))\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
    )
    tests = Path(__file__).parents[1]
    peaks = []
    for count in (1, 8):
        source = save(tmp_path / f"{count}.safetensors", {f"w{index}": gaussian(1024, 1024) for index in range(count)})
        arguments = [str(source), str(tmp_path / f"a{count}.safetensors"), str(tests), str(tests.parent)]
        done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout) * 1024 - source.stat().st_size)
    assert peaks[1] - peaks[0] < 16 << 20


@pytest.mark.slow
def test_peak_memory_of_rd_does_not_grow_with_a_tensor(tmp_path: Path) -> None:
    """Eight times the rows, 59 MB more of weights: not one copy of them is held, nor of their codes as integers."""
    peaks, bits = [], []
    for rows in (2048, 16384):
        source = save(tmp_path / f"{rows}.safetensors", {"w": gaussian(rows, 1024)})
        output = tmp_path / f"a{rows}.safetensors"
        words = ["quantize", source, "--bpw", "2", "--threads", "1", "--json", "-", "-o", output]
        command = [sys.executable, "-m", "qcompress", *map(str, words)]
        report = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        peaks.append(report["run"]["peak_memory_bytes"])
        bits.append(report["size"]["bits_per_weight"])
    assert peaks[1] - peaks[0] < 40e6
    assert all(1.95 < one <= 2 for one in bits)


def test_rd_by_rows_is_refused_for_the_memory_of_its_blocks_alone(tmp_path: Path) -> None:
    """A tensor takes what a block of its rows takes, however many rows it has; a long row is a block of its own."""
    needed = {}
    for name, shape in {"one": (2048, 512), "many": (8192, 512), "long": (2, 1 << 20)}.items():
        source = save(tmp_path / f"{name}.safetensors", {"w": torch.zeros(shape)})
        with pytest.raises(ResourceError, match="more than --max-memory 1000") as caught:
            run(source, tmp_path / f"{name}-a.safetensors", recipe(rule("*", "rd", step=0.5)), max_memory=1000)
        found = re.search(r"about (\d+) bytes", str(caught.value))
        assert found
        needed[name] = int(found[1])
    assert needed["many"] - needed["one"] <= 2 * 3 * 1024 * 1024 * 2
    assert needed["long"] > 1.5 * needed["many"]


def test_every_byte_of_a_layer_has_an_owner(tmp_path: Path) -> None:
    source = save(tmp_path / "in.safetensors", {"w": gaussian(6, 40)})
    asked = {"zero": rtn(3), "offset": recipe(rule("*", "mse", bits=3)), "none": rtn(3, symmetric=True)}
    for name, per_row in {"zero": 3, "offset": 4, "none": 2}.items():
        (layer,) = run(source, tmp_path / f"{name}.safetensors", asked[name]).layers
        assert layer.side_information_bytes == 6 * per_row
        assert layer.bytes - layer.side_information_bytes == 6 * 15


def test_a_folder_of_any_name_can_be_replaced(tmp_path: Path) -> None:
    source = save_folder(tmp_path / "in", {"a.safetensors": {"w": gaussian(4, 8)}})
    for bits in (2, 3):
        run(source, tmp_path / "replaced", rtn(bits), force=True)
    assert [entry.bits for _, entry in read_artifact(tmp_path / "replaced").verify()] == [3]
