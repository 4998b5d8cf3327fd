"""Errors say where, what and a hint on one line; of many errors each cause is one line."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from conftest import Run, write_checkpoint

from qcompress.errors import (
    LONGEST_PART,
    ArtifactError,
    CheckpointError,
    InputError,
    RecipeError,
    Refusals,
    Subject,
    group_lines,
    raise_all,
)


def about(
    *names: str, where: str = "rule", what: str = "too wide", shape: tuple[int, ...] | None = (2, 3)
) -> list[InputError]:
    return [RecipeError(where, what, "use fewer bits", Subject(name, shape)) for name in names]


def test_one_subject_is_named_with_its_shape() -> None:
    (error,) = about("a.weight")
    assert str(error) == "rule: a.weight [2, 3]: too wide; use fewer bits"
    assert error.lines() == [str(error)]
    assert str(ArtifactError("m.safetensors", "is damaged", "fetch it", Subject("a"))) == (
        "m.safetensors: tensor 'a': is damaged; fetch it"
    )


@pytest.mark.parametrize(
    ("errors", "lines"),
    [
        (about("a", "b", "c"), ["rule: 3 tensors of shape [2, 3], first a: too wide; use fewer bits"]),
        (
            [*about("a"), *about("b", shape=(4,))],
            ["rule: 2 tensors, first a [2, 3]: too wide; use fewer bits"],
        ),
        (about("a", "b", shape=None), ["rule: 2 tensors, first 'a': too wide; use fewer bits"]),
        (
            [*about("a"), *about("b", what="too long"), *about("c")],
            [
                "rule: 2 tensors of shape [2, 3], first a: too wide; use fewer bits",
                "rule: b [2, 3]: too long; use fewer bits",
            ],
        ),
        (
            [*about("a"), *about("a", where="other rule")],
            ["rule: a [2, 3]: too wide; use fewer bits", "other rule: a [2, 3]: too wide; use fewer bits"],
        ),
        ([RecipeError("one", "is wrong", "mend it")] * 3, ["one: is wrong; mend it"]),
        (
            [RecipeError(where, "is wrong", "mend it") for where in ("one", "two", "one", "three")],
            ["one (also two, three): is wrong; mend it"],
        ),
        (
            [RecipeError(str(n), "is wrong", "mend it") for n in range(9)],
            ["0 (also 1, 2, 3 and 5 more): is wrong; mend it"],
        ),
        (
            [RecipeError("one", "is wrong", "mend it"), RecipeError("two", "is wrong", "mend that")],
            ["one: is wrong; mend it", "two: is wrong; mend that"],
        ),
    ],
)
def test_equal_causes_are_one_line(errors: Sequence[InputError], lines: list[str]) -> None:
    assert group_lines(errors) == lines


def test_figures_of_its_own_do_not_keep_a_cause_apart() -> None:
    errors = [
        CheckpointError("m", f"{count} values are NaN", "repair it", Subject(name), "some values are NaN")
        for name, count in (("a", 3), ("b", 5))
    ]
    assert group_lines(errors[:1]) == ["m: tensor 'a': 3 values are NaN; repair it"]
    assert group_lines(errors) == ["m: 2 tensors, first 'a': some values are NaN; repair it"]


def test_no_cause_is_lost_and_none_is_told_twice() -> None:
    errors = [error for n in range(40) for error in about("a", "b", what=f"cause {n % 8}", where=f"rule {n % 5}")]
    lines = group_lines(errors)
    assert len(lines) == len(set(lines)) == 40
    assert all(": 2 tensors of shape [2, 3], first a: cause " in line for line in lines)


def test_raise_all_raises_the_one_error_itself() -> None:
    raise_all([])
    with pytest.raises(RecipeError) as one:
        raise_all(about("a", "a"))
    assert one.value.subject == Subject("a", (2, 3))
    with pytest.raises(Refusals) as several:
        raise_all([Refusals(about("a", "b")), *about("c")])
    assert [error.subject.name for error in several.value.errors if error.subject] == ["a", "b", "c"]
    assert several.value.lines() == ["rule: 3 tensors of shape [2, 3], first a: too wide; use fewer bits"]
    assert str(pickle.loads(pickle.dumps(one.value))) == str(one.value)  # noqa: S301


@pytest.mark.parametrize("part", [0, 1, 2])
def test_long_parts_are_shortened_in_the_middle(part: int) -> None:
    parts = ["where", "what", "hint"]
    parts[part] = "begin " + "x" * 7000 + "\n end"
    line = str(RecipeError(*parts))
    assert len(line) <= LONGEST_PART + 20
    assert "begin xxx" in line and "xxx ... xxx" in line and "xxx end" in line
    assert str(RecipeError("w" * LONGEST_PART, "what", "hint")) == f"{'w' * LONGEST_PART}: what; hint"
    named = RecipeError("where", "what", "hint", Subject("n" * 7000))
    assert len(str(named)) <= LONGEST_PART + 30


def test_many_tensors_that_cannot_have_a_group_size_are_a_line_a_cause(run: Run, tmp_path: Path) -> None:
    shapes = {"q": (64, 128), "k": (32, 128), "down": (64, 64)}
    tensors = {
        f"model.layers.{n}.{name}.weight": np.zeros(shape, np.float32)
        for n in range(20)
        for name, shape in shapes.items()
    }
    path = write_checkpoint(tmp_path / "m.safetensors", tensors)
    ran = run("cluster", path, "--bits", 4, "--group-size", 48, "--dry-run")
    assert (ran.code, ran.out) == (3, "")
    assert len(ran.error_lines) == 2
    assert any("40 tensors, first model.layers.0." in line and "its 64 channels" in line for line in ran.error_lines)
    assert any(
        "20 tensors of shape [32, 128], first model.layers.0.k.weight: group_size 48 does not divide its 32" in line
        for line in ran.error_lines
    )


def test_a_nested_value_of_a_recipe_is_not_printed_whole(run: Run, tmp_path: Path) -> None:
    nested = "[" * 20 + ", ".join(["long"] * 2000) + "]" * 20
    for text in (
        f"keep_dtype: {nested}",
        f"seed: {nested}",
        f"rules: [{{match: {nested}, rtn: {{bits: 4}}}}]",
        f"rules: [{{match: [{', '.join(f'a{n}' for n in range(2000))}], rtn: {{bits: 4}}}}]",
        f"rules: [{{match: a, rtn: {{bits: {nested}}}}}]",
        f"model: {{factory: 'a:{'b' * 7000}'}}",
        f"gates: {{max_size: {'9' * 7000}}}",
    ):
        path = tmp_path / "r.yaml"
        path.write_text(f"version: 1\n{text}\n")
        checkpoint = write_checkpoint(tmp_path / "m.safetensors", {"w": np.zeros((4, 4), np.float32)})
        ran = run("quantize", checkpoint, "-r", path, "--dry-run")
        assert ran.code in (2, 3)
        assert ran.error_lines
        assert all(len(line) < 4 * LONGEST_PART for line in ran.error_lines)
