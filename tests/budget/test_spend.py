"""Budgets are never exceeded, nearly used, and refused with what can be had; the smallest holds its gates."""

from __future__ import annotations

import itertools
import json
import math
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from artifact.examples import gaussian, plan_for, save, save_folder
from conftest import process_environment
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qcompress.artifact.reader import read_artifact
from qcompress.budget.spend import Workshop, harm_of, spend
from qcompress.budget.weight_costs import weight_costs
from qcompress.checkpoint.checkpoint import read_checkpoint
from qcompress.checkpoint.staging import staging_folder
from qcompress.compress.compress import compress, compress_within
from qcompress.compress.load import load_state_dict
from qcompress.errors import BudgetError
from qcompress.plan.allocate import Costs
from qcompress.recipe import parse_recipe
from qcompress.report.document import AccuracyFigures, GateResult, Report
from qcompress.types.plan import Plan
from qcompress.types.run import Options

NO_COSTS = Costs({}, "")
RECIPE = 'version: 1\nbudget: {%s}\nrules:\n  - {match: "*.weight", %s: {%s}}\n'


def planned(source: Path, budget: str, options: str = "", method: str = "rd") -> tuple[Any, Plan]:
    checkpoint = read_checkpoint(source)
    return checkpoint, plan_for(checkpoint, parse_recipe(RECIPE % (budget, method, options), "r.yaml"))


def compressed(source: Path, output: Path, budget: str, options: str = "", **how: Any) -> Report:
    checkpoint, plan = planned(source, budget, options)
    return compress_within(checkpoint, plan, Options(output, **how), None, lambda _: None)


def tensors(seed: int, rows: int, columns: int, tails: float) -> dict[str, Tensor]:
    """A convolution, a matrix with tails as heavy as asked, a small one, and what is kept."""
    matrix = gaussian(rows, columns, seed=seed)
    return {
        "conv.weight": gaussian(24, 16, 3, 3, seed=seed + 1) * 0.1,
        "matrix.weight": matrix * (tails * gaussian(rows, columns, seed=seed + 2)).exp(),
        "small.weight": gaussian(10, 24, seed=seed + 3) * 3,
        "small.bias": gaussian(10, seed=seed + 4),
    }


# In files of two kilobytes and less a change of tables may cost more than two per cent.
WEIGHTS = st.tuples(
    st.integers(0, 1000), st.integers(100, 250), st.integers(100, 250), st.sampled_from([0.0, 0.5, 1.0])
)


@given(WEIGHTS, st.floats(0.8, 6.0), st.sampled_from(["fast", "normal"]), st.sampled_from(["correlated", "flips"]))
@settings(max_examples=12)
@pytest.mark.slow
def test_bits_per_weight_are_never_exceeded_and_nearly_used(
    drawn: tuple[int, int, int, float], bpw: float, effort: str, prior: str
) -> None:
    with TemporaryDirectory() as folder:
        source, output = save(Path(folder) / "m.safetensors", tensors(*drawn)), Path(folder) / "a.safetensors"
        report = compressed(source, output, f"bpw: {bpw}", f"effort: {effort}, prior: {prior}")
        weights = sum(math.prod(layer.shape) for layer in report.compressed)
        spent = 8 * (report.size.parts.codes + report.size.parts.side_information) / weights
        assert 0.98 * bpw <= spent <= bpw
        assert {path.name for path in Path(folder).iterdir()} == {"m.safetensors", "a.safetensors"}


@given(WEIGHTS, st.floats(0.8, 6.0))
@settings(max_examples=8)
def test_a_file_is_never_larger_than_its_target_and_nearly_as_large(
    drawn: tuple[int, int, int, float], bpw: float
) -> None:
    with TemporaryDirectory() as folder:
        made = tensors(*drawn)
        source, output = save(Path(folder) / "m.safetensors", made), Path(folder) / "a.safetensors"
        target = 3000 + round(bpw * sum(one.numel() for one in made.values()) / 8)
        compressed(source, output, f"size: {target}", "effort: fast")
        assert 0.98 * target <= output.stat().st_size <= target


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return save(tmp_path / "m.safetensors", tensors(0, 64, 96, 0.0))


@pytest.mark.parametrize("prior", ["none", "flips", "correlated"])
@pytest.mark.parametrize("effort", ["fast", "normal", "high"])
def test_every_prior_and_effort_keeps_the_budget(source: Path, tmp_path: Path, prior: str, effort: str) -> None:
    output = tmp_path / "a.safetensors"
    report = compressed(source, output, "bpw: 2.5", f"effort: {effort}, prior: {prior}")
    assert 2.45 <= (report.size.bits_per_weight or 0) <= 2.5
    originals, loaded = tensors(0, 64, 96, 0.0), load_state_dict(output)
    for name, value in originals.items():
        error = float((loaded[name] - value).square().mean() / value.square().mean())
        assert error < (0.5 if name.endswith("weight") else 1e-12), name


def test_equal_runs_give_equal_bytes_on_any_number_of_threads(source: Path, tmp_path: Path) -> None:
    for name, threads in (("a", 1), ("b", 1), ("c", 3)):
        compressed(source, tmp_path / f"{name}.safetensors", "bpw: 2", threads=threads)
    first, *others = ((tmp_path / f"{name}.safetensors").read_bytes() for name in "abc")
    assert others == [first, first]


def test_more_bits_leave_less_error(source: Path, tmp_path: Path) -> None:
    errors = []
    for bpw in (1, 2, 3, 4):
        output = tmp_path / f"{bpw}.safetensors"
        compressed(source, output, f"bpw: {bpw}")
        loaded = load_state_dict(output)
        errors.append(sum(float((loaded[n] - v).square().sum()) for n, v in tensors(0, 64, 96, 0.0).items()))
    assert all(fine < 0.5 * coarse for coarse, fine in itertools.pairwise(errors))


def test_a_sharded_folder_is_streamed_to_one(tmp_path: Path) -> None:
    made = tensors(0, 64, 96, 0.0)
    names = [*made]
    shards = {
        f"model-0000{number}-of-00002.safetensors": {name: made[name] for name in part}
        for number, part in enumerate((names[:2], names[2:]), start=1)
    }
    folder = save_folder(tmp_path / "network", shards, {"model_type": "small"})
    for budget, limit in (("bpw: 2", None), ("size: 9KB", 9000)):
        output = tmp_path / budget.partition(":")[0]
        report = compressed(folder, output, budget, "effort: fast")
        config = json.loads((output / "config.json").read_text())
        assert config.pop("quantization_config") == {
            "quant_method": "qcompress",
            "weights": "model.qcompress.safetensors.index.json",
        }
        assert config == json.loads((folder / "config.json").read_text())
        files = sum(path.stat().st_size for path in output.iterdir() if "config" not in path.name)
        assert files == report.size.artifact_bytes
        assert limit is None or 0.98 * limit <= files <= limit
        assert limit is not None or 1.96 <= (report.size.bits_per_weight or 0) <= 2
        loaded = load_state_dict(output)
        assert {name: value.shape for name, value in loaded.items()} == {n: v.shape for n, v in made.items()}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bpw", "network", "size"]


def test_dead_and_constant_tensors_cost_next_to_nothing(tmp_path: Path) -> None:
    made = tensors(0, 64, 96, 0.0) | {"dead.weight": torch.zeros(64, 64), "same.weight": torch.full((64, 64), 0.5)}
    made["matrix.weight"][3] = 0
    made["matrix.weight"][:, 5] = 0
    output = tmp_path / "a.safetensors"
    report = compressed(save(tmp_path / "m.safetensors", made), output, "bpw: 2")
    taken = {layer.name: layer.bytes for layer in report.compressed}
    assert taken["dead.weight"] < 20 and taken["same.weight"] < 100
    assert not load_state_dict(output)["dead.weight"].any()


def test_one_huge_weight_is_kept_near(tmp_path: Path) -> None:
    made = tensors(0, 64, 96, 0.0)
    made["matrix.weight"][7, 7] = 1e4
    output = tmp_path / "a.safetensors"
    report = compressed(save(tmp_path / "m.safetensors", made), output, "bpw: 3")
    assert (report.size.bits_per_weight or 9) <= 3
    assert float(load_state_dict(output)["matrix.weight"][7, 7]) == pytest.approx(1e4, rel=0.01)


@pytest.mark.parametrize("budget", ["bpw: 0.05", "size: 900"])
def test_too_small_a_budget_is_refused_before_anything_is_written(source: Path, tmp_path: Path, budget: str) -> None:
    with pytest.raises(BudgetError, match="ask for at least"):
        compressed(source, tmp_path / "a.safetensors", budget)
    assert [path.name for path in tmp_path.iterdir()] == ["m.safetensors"]


def test_the_least_size_that_a_refusal_names_can_be_had(source: Path, tmp_path: Path) -> None:
    with pytest.raises(BudgetError) as caught:
        compressed(source, tmp_path / "a.safetensors", "size: 900")
    least = int(str(caught.value).partition("ask for at least ")[2].partition(",")[0])
    compressed(source, tmp_path / "a.safetensors", f"size: {least}")
    assert (tmp_path / "a.safetensors").stat().st_size <= least


def test_budgets_that_side_information_alone_exceeds_are_refused_and_leave_nothing(tmp_path: Path) -> None:
    made = {f"layer{index}.weight": gaussian(4, 5, seed=index) for index in range(4)}
    source = save(tmp_path / "m.safetensors", made)
    with pytest.raises(BudgetError, match=r"are too few: the smallest attempt took"):
        compressed(source, tmp_path / "a.safetensors", "bpw: 0.2")
    assert [path.name for path in tmp_path.iterdir()] == ["m.safetensors"]


def test_a_refused_budget_names_the_smallest_attempt(tmp_path: Path) -> None:
    """Attempts that grow: the least of them is the one to name."""
    made = {f"layer{index}.weight": gaussian(4, 5, seed=index) for index in range(4)}
    source = save(tmp_path / "m.safetensors", made)
    said: list[str] = []
    checkpoint, plan = planned(source, "bpw: 0.2")
    with pytest.raises(BudgetError) as caught:
        compress_within(checkpoint, plan, Options(tmp_path / "a.safetensors"), None, said.append)
    least = min(int(line.partition(" of ")[0].replace(",", "")) for line in said)
    assert f"took {least:,} bytes" in str(caught.value)
    enough = float(str(caught.value).partition("ask for at least ")[2].partition(",")[0])
    report = compressed(source, tmp_path / "a.safetensors", f"bpw: {enough}")
    assert (report.size.bits_per_weight or 0) <= enough


def test_few_bits_a_weight_are_reached(tmp_path: Path) -> None:
    """Where nearly all codes are zero a finer step costs less than the search first takes it to."""
    source = save(tmp_path / "m.safetensors", {f"w{seed}.weight": gaussian(128, 200, seed=seed) for seed in range(3)})
    report = compressed(source, tmp_path / "a.safetensors", "bpw: 0.1", "effort: fast")
    assert (report.size.bits_per_weight or 1) <= 0.1


def test_weights_of_any_size_are_coded_alike(tmp_path: Path) -> None:
    """Squares of these weights leave the range of float32, either way."""
    plain = gaussian(64, 64)
    errors = []
    for name, unit in (("a", 1.0), ("b", 1e27), ("c", 1e-27)):
        source, output = save(tmp_path / f"{name}.safetensors", {"w.weight": plain * unit}), tmp_path / f"{name}-out"
        compressed(source, output, "bpw: 3")
        errors.append(float((load_state_dict(output)["w.weight"] / unit - plain).square().mean()))
    assert errors == pytest.approx([errors[0]] * 3, rel=0.1) and errors[0] < 0.05


@pytest.mark.slow
def test_a_budget_that_no_weights_need_is_not_spent(source: Path, tmp_path: Path) -> None:
    report = compressed(source, tmp_path / "a.safetensors", "bpw: 31", "effort: fast")
    assert (report.size.bits_per_weight or 99) < 31
    loaded = load_state_dict(tmp_path / "a.safetensors")
    for name, value in tensors(0, 64, 96, 0.0).items():
        torch.testing.assert_close(loaded[name], value, rtol=0, atol=1e-5)


def test_resume_starts_anew_and_ends_in_the_same_bytes(source: Path, tmp_path: Path) -> None:
    compressed(source, tmp_path / "a.safetensors", "bpw: 2", "effort: fast")
    compressed(source, tmp_path / "b.safetensors", "bpw: 2", "effort: fast", resume=True)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors", "m.safetensors"]


@pytest.mark.parametrize("resume", [False, True])
def test_what_a_killed_search_leaves_is_cleaned_up_by_the_next(source: Path, tmp_path: Path, resume: bool) -> None:
    output = tmp_path / "a.safetensors"

    class Killed(Exception):
        pass

    def cut_off(_: Plan, options: Options) -> Report:
        assert staging_folder(output) in options.output.parents
        shutil.copytree(staging_folder(output), tmp_path / "kept")
        raise Killed

    checkpoint, plan = planned(source, "bpw: 2", "effort: fast")
    with pytest.raises(Killed):
        spend(checkpoint, plan, Options(output, resume=resume), NO_COSTS, Workshop(cut_off))
    (tmp_path / "kept").rename(staging_folder(output))
    compressed(source, output, "bpw: 2", "effort: fast", resume=resume)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "m.safetensors"]


@pytest.mark.parametrize("force", [False, True])
def test_an_existing_output_is_replaced_only_where_asked(source: Path, tmp_path: Path, force: bool) -> None:
    output = tmp_path / "a.safetensors"
    output.write_text("mine")
    if force:
        compressed(source, output, "bpw: 2", "effort: fast", force=True)
        assert read_artifact(output)
    else:
        with pytest.raises(Exception, match=r"a\.safetensors"):
            compressed(source, output, "bpw: 2")
        assert output.read_text() == "mine"


# Widths, whose codes are entropy coded.


def layers(seed: int, count: int, tails: float) -> dict[str, Tensor]:
    """Matrices of many sizes, with tails as heavy as asked: the heavier, the less is left of their codes."""
    made, generator = {}, torch.Generator().manual_seed(seed)
    for index in range(count):
        matrix, spread = torch.randn(2, 16 + 8 * (index % 5), 24 + 16 * (index % 3), generator=generator)
        made[f"{index}.weight"] = matrix * (tails * spread).exp()
    return made


@given(
    st.integers(0, 1000),
    st.integers(12, 24),
    st.sampled_from([0.0, 0.5, 1.0]),
    st.floats(3.5, 6.0),
    st.sampled_from(["rtn", "squant"]),
    st.sampled_from(["auto", "ans"]),
    st.booleans(),
)
@settings(max_examples=12)
def test_a_budget_of_widths_is_never_exceeded_and_nearly_used(
    seed: int, count: int, tails: float, bpw: float, method: str, coding: Any, whole: bool
) -> None:
    with TemporaryDirectory() as folder:
        made = layers(seed, count, tails)
        source, output = save(Path(folder) / "m.safetensors", made), Path(folder) / "a.safetensors"
        weights = sum(one.numel() for one in made.values())
        limit = 6000 + round((bpw + 1) * weights / 8) if whole else bpw
        checkpoint, plan = planned(source, f"size: {limit}" if whole else f"bpw: {limit}", method=method)
        report = compress_within(checkpoint, plan, Options(output, choice=coding), None, lambda _: None)
        spent = output.stat().st_size if whole else (report.size.bits_per_weight or 0)
        assert spent <= limit
        assert spent >= 0.97 * limit or {layer.bits for layer in report.compressed} == {8}


@pytest.mark.parametrize("coding", ["packed", "auto"])
def test_widths_are_tried_once_each_and_packed_ones_but_once(tmp_path: Path, coding: Any) -> None:
    checkpoint, plan = planned(save(tmp_path / "m.safetensors", layers(0, 3, 1.0)), "bpw: 3", method="rtn")
    tried: list[tuple[int | None, ...]] = []

    def make(plan: Plan, options: Options) -> Report:
        tried.append(tuple(decision.config.bits for decision in plan.decisions))
        return compress(checkpoint, plan, options)

    options = Options(tmp_path / "a.safetensors", choice=coding)
    report = spend(checkpoint, plan, options, weight_costs(checkpoint, plan, options), Workshop(make))
    assert len(tried) == len(set(tried)) <= (1 if coding == "packed" else 6)
    assert (report.size.bits_per_weight or 9) <= 3


def test_what_entropy_coding_saves_is_spent_on_wider_codes(tmp_path: Path) -> None:
    source = save(tmp_path / "m.safetensors", layers(0, 20, 1.0))
    errors = {}
    for coding in ("packed", "auto"):
        checkpoint, plan = planned(source, "bpw: 3", method="rtn")
        output = tmp_path / f"{coding}.safetensors"
        report = compress_within(checkpoint, plan, Options(output, choice=coding), None, lambda _: None)  # type: ignore[arg-type]
        assert 2.91 <= (report.size.bits_per_weight or 9) <= 3
        errors[coding] = sum(layer.figures.relative_error or 0 for layer in report.compressed if layer.figures)
    assert errors["auto"] < 0.8 * errors["packed"]


# The smallest artifact that holds its gates.

GATED = 'version: 1\nbudget: {minimize: size}\ngates: {min_sqnr: %g}\nrules:\n  - {match: "*.weight", %s: {}}\n'


def gated(source: Path, method: str, sqnr: float) -> tuple[Any, Plan]:
    checkpoint = read_checkpoint(source)
    return checkpoint, plan_for(checkpoint, parse_recipe(GATED % (sqnr, method), "r.yaml"))


@pytest.mark.parametrize("method", ["rd", "rtn"])
def test_each_probe_is_one_artifact_and_the_best_of_them_is_the_output(
    source: Path, tmp_path: Path, method: str
) -> None:
    """No artifact is made for a probe that is not the probe's own, and none once the search is over."""
    checkpoint, plan = gated(source, method, 12)
    output, said, sizes = tmp_path / "a.safetensors", list[str](), list[int]()

    def make(plan: Plan, options: Options) -> Report:
        assert staging_folder(output) in options.output.parents
        # A disk has room for two: the best so far, and the one that is being made.
        assert len([*staging_folder(output).rglob("*.safetensors")]) <= 1
        report = compress(checkpoint, plan, options)
        sizes.append(options.output.stat().st_size)
        return report

    shop = Workshop(make, say=said.append)
    report = spend(checkpoint, plan, Options(output), weight_costs(checkpoint, plan, Options(output)), shop)
    held = [size for size, line in zip(sizes, said, strict=True) if line.endswith("per weight: holds")]
    broken = [size for size, line in zip(sizes, said, strict=True) if line.endswith("breaks a gate")]
    assert output.stat().st_size == report.size.artifact_bytes == min(held)
    # Widths change the size of the few tensors here by jumps.
    assert max(broken) < min(held) < (1.03 if method == "rd" else 1.1) * max(broken)
    assert len(sizes) <= 9
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["a.safetensors", "m.safetensors"]
    assert report.worst is not None and 12 <= (report.worst.sqnr_db or 0) < 14


@pytest.mark.parametrize("method", ["rd", "squant"])
def test_equal_searches_give_equal_bytes_on_any_number_of_threads(source: Path, tmp_path: Path, method: str) -> None:
    checkpoint, plan = gated(source, method, 10)
    for name, threads in (("a", 1), ("b", 3)):
        compress_within(checkpoint, plan, Options(tmp_path / name, threads=threads), None, lambda _: None)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("method", ["rd", "rtn"])
def test_a_gate_that_nothing_holds_leaves_the_largest(source: Path, tmp_path: Path, method: str) -> None:
    checkpoint, plan = gated(source, method, 200)
    said: list[str] = []
    report = compress_within(checkpoint, plan, Options(tmp_path / "a.safetensors"), None, said.append)
    assert all(line.endswith("breaks a gate") for line in said)
    assert 7 < (report.size.bits_per_weight or 0) <= 8.3


@pytest.mark.parametrize("method", ["rd", "rtn"])
def test_a_gate_that_everything_holds_leaves_the_smallest(source: Path, tmp_path: Path, method: str) -> None:
    checkpoint, plan = gated(source, method, -100)
    report = compress_within(checkpoint, plan, Options(tmp_path / "a.safetensors"), None, lambda _: None)
    assert (report.size.bits_per_weight or 9) < (0.3 if method == "rd" else 1.5)


@pytest.mark.parametrize("resume", [False, True])
def test_what_a_killed_search_for_the_smallest_leaves_is_cleaned_up_by_the_next(
    source: Path, tmp_path: Path, resume: bool
) -> None:
    """Killed in its third probe, in a process of its own: all lies in the work folder, which the next run empties."""
    output = tmp_path / "a.safetensors"
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    code = subprocess.run([sys.executable, script, source, output], env=process_environment()).returncode
    assert code == -signal.SIGKILL
    script.unlink()
    left = [path for path in tmp_path.iterdir() if path != source]
    assert left == [staging_folder(output)]
    assert len([*staging_folder(output).rglob("*.safetensors")]) == 2
    checkpoint, plan = gated(source, "rtn", 12)
    compress_within(checkpoint, plan, Options(output, resume=resume), None, lambda _: None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "m.safetensors"]


KILLED = """
import os, signal, sys
from pathlib import Path
from qcompress.checkpoint.checkpoint import read_checkpoint
from qcompress.compress.compress import compress, compress_within
from qcompress.compress.plan_checkpoint import plan_checkpoint
from qcompress.recipe import parse_recipe
from qcompress.types.run import Options

source, output = map(Path, sys.argv[1:])
checkpoint = read_checkpoint(source)
plan = plan_checkpoint(checkpoint, parse_recipe(%r, "r.yaml"))
probes = []

def say(line):
    probes.append(line)
    if len(probes) == 3:
        os.kill(os.getpid(), signal.SIGKILL)

compress_within(checkpoint, plan, Options(output), None, say)
""" % (GATED % (12, "rtn"))


def gate(name: str, limit: float, value: float | None, passed: bool) -> GateResult:
    return GateResult(name=name, limit=limit, value=value, passed=passed)


def measured_report(source: Path, folder: Path) -> Report:
    """A report with an accuracy that fell from 0.9 to 0.88."""
    report = compressed(source, folder / "measured.safetensors", "bpw: 2", "effort: fast")
    figures = AccuracyFigures(metric="top1", baseline=0.9, artifact=0.88, drop=0.02, samples=100)
    return replace(report, accuracy=(figures,))


def test_harm_is_told_in_the_same_unit_by_every_gate(source: Path, tmp_path: Path) -> None:
    """The logarithm of how many times what is allowed: half or twice as much, whatever the gate."""
    report = measured_report(source, tmp_path)
    for passed, times in ((True, 0.5), (False, 2.0)):
        decibels = 20 - 10 * math.log10(times)
        for one in (
            gate("max-drop top1", 0.02 / times, 0.02, passed),
            gate("min-metric top1", 0.9 - 0.02 / times, 0.88, passed),
            gate("min-sqnr", 20, decibels, passed),
        ):
            assert harm_of((one,), report) == pytest.approx(math.log(times)), one.name
    worst = harm_of((gate("max-drop top1", 0.01, 0.02, False), gate("min-sqnr", 20, 21, True)), report)
    assert worst == pytest.approx(math.log(2))


@pytest.mark.parametrize(
    ("value", "limit", "passed"),
    [(0.0, 0.0, True), (-0.01, 0.005, True), (0.01, 0.0, False), (None, 0.01, False), (math.nan, 0.01, False)],
)
def test_harm_that_has_no_logarithm_still_has_a_sign(
    source: Path, tmp_path: Path, value: float | None, limit: float, passed: bool
) -> None:
    report = measured_report(source, tmp_path)
    found = harm_of((gate("max-drop top1", limit, value, passed),), report)
    assert math.isfinite(found) and (found <= 0) == passed
