"""Several ranks write the files that one process writes, to the same bytes, and go on where they were killed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from artifact.examples import gaussian, plan_for, recipe, rtn, rule, save, save_folder
from conftest import files_under
from worlds import together

from qcompress.checkpoint.checkpoint import Checkpoint, read_checkpoint
from qcompress.compress.compress import compress, compress_within
from qcompress.encode import write_files
from qcompress.errors import CheckpointError, ResourceError
from qcompress.methods import rtn as rtn_method
from qcompress.plan.files import Shard
from qcompress.recipe.flags import BudgetFlag, recipe_from_flags
from qcompress.report.document import Report
from qcompress.types.config import CodingChoice
from qcompress.types.encoded import Affine
from qcompress.types.plan import Recipe, Rule
from qcompress.types.ranks import World
from qcompress.types.run import Options

RECIPES = {
    "rtn": rtn(3),
    "a grid for the tensor": recipe(rule("*", "mse", bits=4, granularity="tensor")),
    "groups": recipe(rule("*", "rtn", bits=4, granularity="group", group_size=16)),
    "k-means": replace(recipe(rule("*", "kmeans", bits=3)), family="cluster"),
    "shared codebook": replace(recipe(rule("*", "kmeans", bits=3, share="model")), family="cluster"),
    "steps": recipe(rule("*", "rd", step=0.25)),
    "steps among grids": recipe(rule("*1.weight", "rd", step=0.25), rule("*", "rtn", bits=3)),
}


def tensors() -> dict[str, torch.Tensor]:
    found = {f"layer{index}.weight": gaussian(8 + 3 * index, 32, seed=index) for index in range(5)}
    # A constant weight, half precision, rows that one exponent does not hold, and what is kept.
    found["constant.weight"] = torch.full((11, 32), 0.25)
    found["half.weight"] = gaussian(12, 32, seed=9).bfloat16()
    found["spread.weight"] = gaussian(6, 32, seed=10) * torch.logspace(-9, 9, 6).unsqueeze(1)
    return found | {"bias": gaussian(7), "count": torch.arange(5)}


@pytest.fixture
def single(tmp_path: Path) -> Checkpoint:
    return read_checkpoint(save(tmp_path / "model.safetensors", tensors()))


@pytest.fixture
def folder(tmp_path: Path) -> Checkpoint:
    of, files = tensors(), ("1", "2", "3")
    names = [*of]
    parts = {f"model-{n}.safetensors": {k: of[k] for k in names[i::3]} for i, n in enumerate(files)}
    return read_checkpoint(save_folder(tmp_path / "model", parts))


Made = tuple[dict[str, bytes], list[Report]]


def made(source: Checkpoint, asked: Recipe, output: Path, size: int = 1, **options: object) -> Made:
    """The bytes under the output's folder, and the report of each rank."""
    output.parent.mkdir(exist_ok=True)
    plan = plan_for(source, asked)

    def run(world: World) -> Report:
        return compress(source, plan, replace(Options(output, **options), world=world))  # type: ignore[arg-type]

    reports = together(size, run)
    return files_under(output.parent), [replace(report, run=None) for report in reports]


@pytest.mark.parametrize("choice", ["packed", "auto", "ans"])
@pytest.mark.parametrize("name", RECIPES)
def test_ranks_share_the_tensors_of_one_file(
    name: str, choice: CodingChoice, single: Checkpoint, tmp_path: Path
) -> None:
    alone, (report,) = made(single, RECIPES[name], tmp_path / "one" / "a.safetensors", choice=choice)
    for size in (2, 3):
        files, reports = made(single, RECIPES[name], tmp_path / f"{size}" / "a.safetensors", size, choice=choice)
        assert files == alone
        assert reports == [report] * size, "every rank knows what all have made"


def test_codes_that_share_tables_and_others_go_their_own_ways(
    single: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first rank encodes those of the pool, whoever the others."""
    monkeypatch.setattr("qcompress.coding.unbounded.tables.POOLED_WEIGHTS", 400)
    alone, (report,) = made(single, RECIPES["steps"], tmp_path / "one" / "a.safetensors")
    files, reports = made(single, RECIPES["steps"], tmp_path / "many" / "a.safetensors", 3)
    assert files == alone and reports == [report] * 3


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", ["rtn", "shared codebook", "steps"])
def test_ranks_share_the_files_of_a_folder(name: str, size: int, folder: Checkpoint, tmp_path: Path) -> None:
    """Two ranks take whole files, four the tensors of each."""
    alone, (report,) = made(folder, RECIPES[name], tmp_path / "one" / "a")
    files, reports = made(folder, RECIPES[name], tmp_path / "many" / "a", size)
    assert files == alone and reports == [report] * size


def test_more_ranks_than_tensors_leave_some_idle(tmp_path: Path) -> None:
    source = read_checkpoint(save(tmp_path / "model.safetensors", {"a": gaussian(8, 32), "b": gaussian(4)}))
    alone, _ = made(source, rtn(), tmp_path / "one" / "a.safetensors")
    assert made(source, rtn(), tmp_path / "many" / "a.safetensors", 5)[0] == alone


@pytest.mark.parametrize("choice", ["packed", "ans"])
@pytest.mark.parametrize("rules", [[rule("*")], [rule("*.weight", "rtn", bits=3), rule("*")]])
def test_kept_tensors_are_coded_alike(rules: list[Rule], choice: CodingChoice, tmp_path: Path) -> None:
    """With and without weights that are compressed beside them."""
    found = {"a.weight": gaussian(40, 40), "b.weight": gaussian(9, 32), "c": gaussian(2000), "d": gaussian(1100)}
    source = read_checkpoint(save(tmp_path / "model.safetensors", found))
    asked = replace(recipe(*rules), keep_coding="auto")
    alone, (report,) = made(source, asked, tmp_path / "one" / "a.safetensors", choice=choice)
    for size in (2, 5):
        files, reports = made(source, asked, tmp_path / f"{size}" / "a.safetensors", size, choice=choice)
        assert files == alone
        assert reports == [report] * size


@pytest.mark.parametrize("budget", [BudgetFlag("--bpw 5", "bpw", 5.0), BudgetFlag("--target-size 5KB", "size", 5000)])
@pytest.mark.parametrize("method", ["mse", "rd"])
def test_a_budget_is_spent_alike_by_all(budget: BudgetFlag, method: str, single: Checkpoint, tmp_path: Path) -> None:
    plan = plan_for(single, recipe_from_flags(method, {}, "quantize", budget))
    found = []
    for size in (1, 3):
        output = tmp_path / f"{size}" / "a.safetensors"
        output.parent.mkdir()

        def run(world: World, output: Path = output) -> Report:
            return compress_within(single, plan, Options(output, world=world), None, lambda _: None)

        assert len({report.artifact.sha256 for report in together(size, run)}) == 1
        found.append(files_under(output.parent))
    assert found[0] == found[1]


def test_an_error_of_one_rank_ends_all_and_leaves_nothing(single: Checkpoint, tmp_path: Path) -> None:
    broken = {**tensors(), "layer2.weight": torch.full((14, 32), torch.nan)}
    source = read_checkpoint(save(tmp_path / "broken.safetensors", broken))
    output = tmp_path / "out" / "a.safetensors"
    with pytest.raises(CheckpointError, match=r"layer2\.weight.*NaN"):
        made(source, rtn(), output, 3)
    assert files_under(output.parent) == {}


def test_ranks_that_plan_differently_are_refused(single: Checkpoint, tmp_path: Path) -> None:
    def run(world: World) -> Report:
        plan = plan_for(single, rtn(3 + world.rank))
        return compress(single, plan, Options(tmp_path / "a.safetensors", world=world))

    with pytest.raises(ResourceError, match="different plans"):
        together(2, run)


class Killed(Exception):
    pass


@pytest.mark.parametrize("choice", ["packed", "ans"])
def test_a_killed_run_of_ranks_goes_on_to_the_same_bytes(
    choice: CodingChoice, single: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone, _ = made(single, rtn(3), tmp_path / "one" / "a.safetensors", choice=choice)
    output, calls, encode = tmp_path / "many" / "a.safetensors", [0], rtn_method.encode

    def killing(*arguments: object, most: int) -> Affine:
        calls[0] += 1
        if calls[0] > most:
            raise Killed
        return encode(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr("qcompress.encode.encode_tensor.STACKED_WEIGHTS", 0)
    monkeypatch.setattr(rtn_method, "encode", lambda *given: killing(*given, most=4))
    with pytest.raises(Killed):
        made(single, rtn(3), output, 2, choice=choice, resume=True)
    assert not output.exists()
    calls[0] = 0
    monkeypatch.setattr(rtn_method, "encode", lambda *given: killing(*given, most=1000))
    assert made(single, rtn(3), output, 2, choice=choice, resume=True)[0] == alone
    weights = sum(value.ndim > 1 for value in tensors().values())
    assert calls[0] < weights, "what was finished is not encoded again"


def test_what_another_rank_wrote_is_held_against_what_it_said(
    single: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where ranks see different folders of one name."""
    wrote: Callable[..., object] = write_files._put_together

    def elsewhere(shard: Shard, path: Path, *others: object) -> object:
        part = next(path.parent.glob("*.part-1"))
        part.write_bytes(bytes(part.stat().st_size))
        return wrote(shard, path, *others)

    monkeypatch.setattr(write_files, "_put_together", elsewhere)
    with pytest.raises(ResourceError, match=r"reads other bytes of tensor .* than another rank wrote"):
        made(single, rtn(3), tmp_path / "out" / "a.safetensors", 2, choice="ans")
