"""Whatever is wrong anywhere in a recipe is said in words, and the schema refuses nothing that is read."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

import jsonschema
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompress.errors import InputError
from qcompress.recipe import parse_recipe, recipe_schema

VALIDATOR = jsonschema.Draft202012Validator(recipe_schema())
TRAINED = {
    "version": 1,
    "seed": 3,
    "keep_dtype": "f16",
    "keep_coding": "ans",
    "model": {"factory": "a:b", "args": {"width": 2}, "blocks": "layers.*", "input": [3, 8, 8]},
    "data": {
        "calibration": {"images": "folder", "crop": 8},
        "eval": {"text": "t.txt", "tokenizer": "t", "length": 8},
        "train": {"npz": "e.npz", "inputs": {"x": "a"}, "samples": 8, "augment": ["flip", {"mixup": {"alpha": 0.5}}]},
        "normalize": {"mean": [0.5], "std": [0.5]},
    },
    "task": {"classification": {"metric": "top5"}},
    "activations": {"bits": 4, "range": "percentile", "percentile": 99.5},
    "companions": ["batch_norm"],
    "rules": [
        {"match": ["a", "b*"], "lsq": {"bits": 4, "learning_rate": 0.5}},
        {"match": "c", "rtn": {"bits": 2, "group_size": 8, "axis": [0, 1]}},
        {"match": "*", "keep": {"dtype": "f16"}},
    ],
    "finetune": {
        "epochs": 2,
        "naive_bits": [],
        "optimizer": {"adamw": {"lr": 0.5, "betas": [0.5, 0.9]}},
        "schedule": "cosine",
        "distil": {"share": 0.5},
        "regularize": [{"match": "*", "sine": {"levels": 4, "range": [-1, 1]}}, {"match": "a", "keep": {}}],
    },
    "gates": {"max_size": "2MB", "max_bpw": 2.5, "max_drop": {"top1": 0.5}},
}
BUDGETED = {
    "version": 1,
    "budget": {"size": "1MB", "sensitivity": "s.json"},
    "rules": [{"match": "a", "mse": {"group_size": 8}}, {"match": "*", "gptq": {"damping": 0.5, "preset": "paper"}}],
}
# 1.0 is an integer to JSON Schema and not to a recipe, so no real number is whole.
SCALARS = [None, True, False, 0, 1, -1, 9, 10**9, 0.5, 1.5, "", "a", "4", "2MB", "rtn", "flip", "bits"]
VALUES = st.sampled_from([*SCALARS, [], {}, [1], ["a", 2], {"bits": 4}, {"a": None}, [[]], {"rtn": 3}, {"lr": 1}]).map(
    copy.deepcopy
)

KEYS = st.sampled_from(["bits", "match", "epoch", "npz", "rtn", "keep", "source", "x", "\0"])


def paths(data: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """The path of every value."""
    yield path
    for step in data if isinstance(data, dict) else range(len(data)) if isinstance(data, list) else ():
        yield from paths(data[step], (*path, step))


@st.composite
def changed(draw: st.DrawFn) -> Any:
    """A sound recipe of which some values were replaced, taken out or added."""
    data = copy.deepcopy(draw(st.sampled_from([TRAINED, BUDGETED])))
    for _ in range(draw(st.integers(0, 2))):
        *above, step = draw(st.sampled_from([*paths(data)][1:]))
        place: Any = data
        for one in above:
            place = place[one]
        match draw(st.sampled_from(["replace", "remove", "add"])):
            case "replace":
                place[step] = draw(VALUES)
            case "remove":
                place.pop(step)
            case "add" if isinstance(place, dict):
                place[draw(st.sampled_from(["bits", "match", "epoch", "npz", "rtn", "keep", "source", "x"]))] = draw(
                    VALUES
                )
            case _:
                place.append(draw(VALUES))
    return data


def has_empty_kind(data: Any) -> bool:
    """Whether a mapping holds a null, which stands for no options under the name of a kind."""
    if isinstance(data, dict):
        return any(value is None or has_empty_kind(value) for value in data.values())
    return isinstance(data, list) and any(has_empty_kind(item) for item in data)


@settings(max_examples=1500, deadline=None)
@given(changed())
def test_a_changed_recipe_is_read_or_refused_in_words(data: Any) -> None:
    try:
        parse_recipe(json.dumps(data), "r.yaml")
    except InputError as error:
        for line in error.lines():
            assert line.startswith("r.yaml:1") and "; " in line and line.isprintable()
            assert not any(word in line for word in ("pydantic", "Input should", "Config", "Settings", "function-"))
    else:
        assert VALIDATOR.is_valid(data) or has_empty_kind(data)


def test_the_recipes_are_sound_before_they_are_changed() -> None:
    for data in (TRAINED, BUDGETED):
        parse_recipe(json.dumps(data), "r.yaml")
        VALIDATOR.validate(data)
