"""Budgets that decide steps: never exceeded, nearly used, and refused with what can be had."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from artifact.examples import gaussian, plan_for, save, save_folder
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qcompress.artifact.reader import read_artifact
from qcompress.budget.search import AIM, FARTHEST, entropy, first_step, make_at_rate, next_step
from qcompress.checkpoint.checkpoint import read_checkpoint
from qcompress.checkpoint.staging import staging_folder
from qcompress.compress.compress import compress_within
from qcompress.compress.load import load_state_dict
from qcompress.errors import BudgetError
from qcompress.recipe import parse_recipe
from qcompress.report.document import Report
from qcompress.types.plan import Plan
from qcompress.types.run import Options

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
        assert config.pop("quantization_config") == {"quant_method": "qcompress"}
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
    with pytest.raises(BudgetError, match=r"are too few: the smallest of \d+ attempts took"):
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
        make_at_rate(checkpoint, cut_off)(plan, Options(output, resume=resume))
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


@pytest.mark.parametrize("bpw", [1.0, 2.0, 4.0])
def test_the_search_starts_where_rounding_has_the_entropy_of_the_budget(source: Path, bpw: float) -> None:
    checkpoint, plan = planned(source, f"bpw: {bpw}")
    made = tensors(0, 64, 96, 0.0)
    weights = [value.double() for name, value in made.items() if name.endswith("weight")]
    step = first_step(checkpoint, plan, bpw * sum(weight.numel() for weight in weights))
    spent = sum(
        entropy((weight / (step * weight.square().mean().sqrt().sqrt())).round()) * weight.numel() for weight in weights
    )
    assert spent / sum(weight.numel() for weight in weights) == pytest.approx(bpw, rel=0.01)


def test_where_steps_go_to_and_fro_the_middle_is_tried() -> None:
    """Bits that jump at a step of 0.5: from either side the search overshoots, and only the middle comes near."""
    tried = {0.25: 130.0, 1.0: 80.0}
    assert next_step(tried, 100, 0.6) == 0.6
    tried[0.64] = 90.0
    assert next_step(tried, 100, 5.0) == pytest.approx(0.4)
    assert next_step({0.25: 130.0, 0.3: 120.0, 0.4: 110.0}, 100, 0.6) == 0.6
    # Where a finer step takes less, nothing lies between.
    assert next_step({0.5: 130.0, 0.25: 90.0, 0.4: 80.0}, 100, 0.6) == 0.6


@given(st.floats(0.1, 10), st.floats(0.05, 4), st.floats(1.01, 1.5))
def test_while_all_have_spent_too_much_a_law_of_powers_is_followed_to_its_end(
    before: float, power: float, growth: float
) -> None:
    def spent(step: float) -> float:
        return 100 * AIM * (step / (3 * before)) ** -power

    last = before * growth
    found = next_step({before: spent(before), last: spent(last)}, 100, last)
    assert found == pytest.approx(3 * before, rel=1e-6)
    assert next_step({before: 1e9, last: 1e9 - 1}, 1, last) == pytest.approx(FARTHEST * last)
    assert next_step({before: 1e9, last: 1e9}, 1, 7.0) == 7.0


def test_entropy_is_that_of_the_frequencies() -> None:
    assert entropy(torch.zeros(10)) == 0
    assert entropy(torch.tensor([0, 0, 1, -1])) == pytest.approx(1.5)
    assert entropy(torch.arange(256.0)) == pytest.approx(8)
