"""The schema agrees with the parser, on the ready recipes and on what is wrong."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompress.errors import InputError
from qcompress.recipe import parse_recipe, read_recipe, recipe_schema, recipe_yaml, schema_text
from qcompress.registry import DEFAULT_METHOD, METHODS

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
DOCS = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
VALIDATOR = jsonschema.Draft202012Validator(recipe_schema())


def test_schema_is_fresh() -> None:
    assert (ROOT / "recipes" / "schema.json").read_bytes() == schema_text().encode()


def test_schema_is_a_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(recipe_schema())


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_ready_recipe(path: Path) -> None:
    recipe = read_recipe(path)
    text = path.read_text(encoding="utf-8")
    VALIDATOR.validate(yaml.safe_load(text))
    VALIDATOR.validate(yaml.safe_load(recipe_yaml(recipe)))
    head = text.partition("version:")[0]
    place = path.relative_to(ROOT / "recipes")
    up = "../" * (len(place.parts) - 1)
    assert head.startswith(f"# yaml-language-server: $schema={up}schema.json\n")
    assert f"-r recipes/{place.as_posix()}" in head
    assert f"(../recipes/{place.parts[0]})" in DOCS


def test_commands_of_ready_recipes_are_valid() -> None:
    for path in RECIPES:
        for override in re.findall(r"--set '?(.+?)'?$", path.read_text(encoding="utf-8"), flags=re.MULTILINE):
            read_recipe(path, [override])


def test_recipes_in_the_docs_are_valid() -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", DOCS, flags=re.DOTALL)
    overrides = re.findall(r"--set ((?!key\.path)[a-z]\S+=\S+)", DOCS)
    assert blocks
    assert len(overrides) == 2
    parse_recipe(blocks[0], "docs", overrides)
    for block in blocks:
        VALIDATOR.validate(yaml.safe_load(block))
        parse_recipe(block, "docs")


@pytest.mark.parametrize("method", METHODS)
def test_docs_name_every_option_and_choice(method: str) -> None:
    shared, own = (
        DOCS.partition(f"<!-- options of {name} -->\n")[2].partition("\n\n")[0]
        for name in ({"quantize": "grids", "cluster": "clusters"}[METHODS[method].family], method)
    )
    assert own and f"| `{method}` |" in DOCS
    for option in dataclasses.fields(METHODS[method].config):
        rows = [line for line in f"{shared}\n{own}".splitlines() if line.startswith(f"| `{option.name}` |")]
        # `axis` of rd stands in its own table too: it takes no other of the shared ones.
        assert len(rows) == 1 + (method == "rd" and option.name == "axis"), option.name
        for choice in re.findall(r"'([^']+)'", str(option.type)) + re.findall(r'"([^"]+)"', str(option.type)):
            assert f"`{choice}`" in rows[0], (option.name, choice)


def test_docs_name_the_frame() -> None:
    gates = recipe_schema()["$defs"]["Gates"]["properties"]
    for key in [*recipe_schema()["properties"], *gates]:
        assert f"| `{key}` |" in DOCS, key
    assert f"| `{DEFAULT_METHOD}` |" in DOCS


def agree(data: Any) -> None:
    """Assert that schema and parser judge alike."""
    text = json.dumps(data)
    try:
        parse_recipe(text, "r.yaml")
        parsed = True
    except InputError:
        parsed = False
    assert VALIDATOR.is_valid(data) == parsed, text


RIGHT: dict[str, Any] = {"version": 1, "rules": [{"match": "a", "rtn": {"bits": 4}}]}
RULE = RIGHT["rules"][0]
WRONG: list[Any] = [
    {},
    [],
    None,
    {"version": 1},
    {"rules": [RULE]},
    {"version": 1, "rules": []},
    {"version": 1, "rules": {}},
    RIGHT | {"version": 2},
    RIGHT | {"model": {}},
    RIGHT | {"seed": -1},
    RIGHT | {"seed": "1"},
    RIGHT | {"rules": [{"match": "a"}]},
    RIGHT | {"rules": [{"rtn": {"bits": 4}}]},
    RIGHT | {"rules": [RULE | {"mse": {"bits": 4}}]},
    RIGHT | {"rules": [RULE | {"keep": {}}]},
    RIGHT | {"rules": [{"match": "", "keep": {}}]},
    RIGHT | {"rules": [{"match": [], "keep": {}}]},
    RIGHT | {"rules": [{"match": "a", "keep": {"bits": 1}}]},
    RIGHT | {"rules": [{"match": "a", "rtn": {"bits": 9}}]},
    RIGHT | {"rules": [{"match": "a", "rtn": {"bit": 4}}]},
    RIGHT | {"rules": [{"match": "a", "rtn": {}}]},
    RIGHT | {"rules": [{"match": "a", "rtm": {"bits": 4}}]},
    RIGHT | {"gates": {"max_size": "2M"}},
    RIGHT | {"gates": {"max_bpw": 0}},
    RIGHT | {"gates": {"min_metric": 1}},
    RIGHT | {"gates": {"max_sqnr": 1}},
]


@pytest.mark.parametrize("data", WRONG, ids=str)
def test_what_is_wrong_is_wrong_to_both(data: Any) -> None:
    assert not VALIDATOR.is_valid(data)
    agree(data)


# 1.0 is an integer to JSON Schema and not to a recipe, so no real number here is whole.
LEAVES = st.sampled_from([None, True, False, 0, 1, 2, 8, 9, -1, 0.5, 1.5, "", "a", "4", "2MB", "als", "EKC"])
LEAF = LEAVES | st.just({}) | st.lists(LEAVES, max_size=2)


def options_of(method: str) -> st.SearchStrategy[dict[str, Any]]:
    """One option of a method beside its bits: two might exclude each other, which the schema does not say."""
    names = [option.name for option in dataclasses.fields(METHODS[method].config)]
    excluding = {"convention", "norm", "symmetric", "group_size"}
    option = st.sampled_from([*(name for name in names if name not in excluding), "bit"])
    return st.tuples(option, LEAF).map(lambda pair: {"bits": 4, pair[0]: pair[1]})


ACTIONS = st.sampled_from([*METHODS]).flatmap(lambda m: options_of(m).map(lambda options: {m: options}))
DATA = st.fixed_dictionaries(
    {
        "version": st.just(1) | LEAF,
        "rules": st.lists(
            st.tuples(st.fixed_dictionaries({"match": LEAF}), ACTIONS | st.just({"keep": {}}) | LEAF).map(
                lambda pair: pair[0] | pair[1] if isinstance(pair[1], dict) else pair[0]
            ),
            max_size=2,
        ),
    },
    optional={
        "seed": LEAF,
        "gates": st.dictionaries(
            st.sampled_from(["max_size", "max_bpw", "min_sqnr", "min_metric", "max_drop", "x"]),
            LEAF | st.dictionaries(st.sampled_from(["top1", "a b"]), LEAF, max_size=1),
            max_size=2,
        ),
    },
)


@settings(max_examples=300, deadline=None)
@given(DATA)
def test_schema_and_parser_judge_alike(data: Any) -> None:
    agree(data)
