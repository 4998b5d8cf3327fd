"""What right recipes mean, where they may come from, and what hostile text can do."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qcompress.errors import InputError, RecipeError
from qcompress.recipe import parse_recipe, read_recipe
from qcompress.registry import METHODS, HqqConfig, MseConfig, RtnConfig, SquantConfig
from qcompress.types.plan import Gates, Rule

FULL = """\
version: 1
seed: 7
rules:
  - {match: [stem.weight, "head.*"], squant: {bits: 8}}
  - match: "*.experts"
    rtn: {bits: 4, symmetric: true, axis: [0, 1]}
  - {match: "*.norm", keep: {}}
  - {match: "*", hqq: {bits: 3, group_size: 32, norm: 1, beta: 1e1}}
gates: {max_size: 1.2MB, max_bpw: 3, min_sqnr: -1, min_metric: {top1: 1}, max_drop: {top1: 0.01}}
"""


def test_full_recipe() -> None:
    recipe = parse_recipe(FULL, "r.yaml")
    eight = SquantConfig(bits=8)
    assert recipe.family == "quantize"
    assert recipe.seed == 7
    assert recipe.source == "r.yaml"
    assert recipe.rules == (
        Rule("stem.weight", "squant", eight, "r.yaml:4: rules[0].squant"),
        Rule("head.*", "squant", eight, "r.yaml:4: rules[0].squant"),
        Rule("*.experts", "rtn", RtnConfig(bits=4, symmetric=True, axis=(0, 1)), "r.yaml:6: rules[1].rtn"),
        Rule("*.norm", None, None, "r.yaml:7: rules[2].keep"),
        Rule("*", "hqq", HqqConfig(bits=3, group_size=32, norm=1.0, beta=10.0), "r.yaml:8: rules[3].hqq"),
    )
    assert recipe.gates == Gates(1_200_000, 3.0, -1.0, {"top1": 1.0}, {"top1": 0.01})
    assert isinstance(recipe.gates.max_bpw, float)
    assert isinstance(recipe.rules[-1].config.norm, float)


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if not method.rates])
def test_every_method_needs_nothing_but_bits(method: str) -> None:
    recipe = parse_recipe(f"{{version: 1, rules: [{{match: a, {method}: {{bits: 3}}}}]}}", "r.yaml")
    assert recipe.rules[0].config == METHODS[method].config(bits=3)


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("2.0e+0", 2.0),
        ("2", 2.0),
        ("2E0", 2.0),
        ("+2.", 2.0),
        (".5", 0.5),
        ("5e-1", 0.5),
        ("0x10", 16.0),
        ("017", 17.0),
    ],
)
def test_numbers_are_those_of_yaml_1_2(written: str, value: float) -> None:
    text = f"version: 1\nrules: [{{match: a, mse: {{bits: 4, search: grid, norm: {written}}}}}]"
    assert parse_recipe(text, "r.yaml").rules[0].config == MseConfig(bits=4, search="grid", norm=value)


@pytest.mark.parametrize("word", ["yes", "off", "1:30", "1_000", "0b1", "2001-01-01", "4e", "=", "nan", "1e5x", "é"])
def test_words_that_stay_text(word: str) -> None:
    assert parse_recipe(f"version: 1\nrules: [{{match: {word}, keep: {{}}}}]", "r.yaml").rules[0].match == word


def test_json_is_a_recipe() -> None:
    text = '{"version": 1, "rules": [{"match": "\\ud83d\\ude00\\n", "keep": {}}]}'
    assert parse_recipe(text, "r.json").rules[0].match == "\U0001f600\n"


def test_a_file_with_a_mark_and_windows_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + FULL.replace("\n", "\r\n").encode())
    recipe = read_recipe(path)
    assert recipe.rules[0].where == f"{path}:4: rules[0].squant"
    assert [rule.config for rule in recipe.rules] == [rule.config for rule in parse_recipe(FULL, "x").rules]


def test_text_from_stdin() -> None:
    assert read_recipe(None, text=FULL).rules[-1].where == "stdin:8: rules[3].hqq"
    assert read_recipe(None, ["seed=3"], text=FULL).seed == 3
    with pytest.raises(ValueError, match="path or a text"):
        read_recipe(None)


def test_unreadable_files(tmp_path: Path) -> None:
    (tmp_path / "good.yaml").write_text(FULL)
    (tmp_path / "latin.yaml").write_bytes(b"version: 1\n# \xe4\n")
    (tmp_path / "weights").write_bytes(b"\x80\0\0\0\0\0\0\0{}")
    (tmp_path / "long.yaml").write_text("#" * 2**20 + "\n")

    def error(name: str) -> str:
        with pytest.raises(RecipeError) as caught:
            read_recipe(tmp_path / name)
        return str(caught.value).replace(f"{tmp_path}/", "")

    assert error("god.yaml") == "god.yaml: no such file; did you mean good.yaml?"
    assert error("other.txt") == "other.txt: no such file; check the name"
    assert error("no/r.yaml") == "no/r.yaml: no such file; the folder no is not there either"
    assert error("../" + tmp_path.name).endswith(": is a folder; name a recipe file in it")
    assert error("good.yaml/x").startswith("good.yaml/x: cannot be read: ")
    assert error("nul\0.yaml").startswith("nul\\x00.yaml: cannot be read: ")
    assert error("latin.yaml") == "latin.yaml:2: not UTF-8 text; a recipe is a YAML file in UTF-8"
    assert error("weights") == "weights:1: not UTF-8 text; a recipe is a YAML file in UTF-8"
    assert error("long.yaml") == "long.yaml: larger than 1048576 bytes; a recipe is a short YAML file: use globs"


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("[" * 500_000, "nested more than 32 deep"),
        ("{a: " * 200_000, "nested more than 32 deep"),
        ("- " * 400_000, "nested more than 32 deep"),
        ("".join(" " * level + "a:\n" for level in range(1000)), "nested more than 32 deep"),
        ("? " * 400_000, "a key that is not text"),
        ("a: " + "'" * 300_000, "unknown key `a`"),
        ("version: " + "9" * 500_000, "too large a number"),
        ("a" * 1_000_000 + ": 1", "mapping values are not allowed here"),
        ("[" * 31 + "]" * 31, "a list is not a mapping"),
    ],
)
def test_nesting_and_length_are_refused(text: str, what: str) -> None:
    with pytest.raises(InputError, match=what):
        parse_recipe(text, "r.yaml")


def test_aliases_are_never_followed() -> None:
    """A billion laughs: each level names the one before it nine times."""
    lines = ["a0: &a0 [lol]"]
    lines += [f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 9)}]" for level in range(1, 30)]
    with pytest.raises(InputError) as caught:
        parse_recipe("\n".join(lines), "r.yaml")
    assert caught.value.lines()[0] == "r.yaml:1: a0: anchor `&a0`: a recipe has no anchors; remove it"


WORDS = [
    *("version", "rules", "seed", "gates", "match", "keep", "rtn", "mse", "squant", "hqq", "bits", "axis", "max_size"),
    *("1", "4", "-3", "0.5", "1e999", ".nan", "true", "null", "*", '"*"', "2MB", "chanel", "group", "<<", "é", "\\"),
    *(":", ": ", "- ", ", ", "[", "]", "{", "}", "\n", "\n  ", "\n    ", "#", "&a", "*a", "!!int ", "!x ", "|\n", ">"),
    *('"', "'", "\t", "\0", "\x85", "\u2028", "\ud800", "\ufeff", "---\n", "...\n", "%YAML 1.1\n", "? ", "\\U00110000"),
]
SOUP = st.lists(st.sampled_from(WORDS), max_size=40).map("".join)
ALMOST = st.tuples(st.integers(0, len(FULL)), st.integers(0, 6), SOUP).map(
    lambda cut: FULL[: cut[0]] + cut[2] + FULL[cut[0] + cut[1] :]
)


@settings(max_examples=1500, deadline=None)
@given(st.one_of(SOUP, ALMOST, st.text(max_size=60)))
@example('"\\UFFFFFFFF"')
@example("a: !<")
@example("%TAG ! x\n--- a")
@example("rules: {? : }")
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        recipe = parse_recipe(text, "r.yaml")
    except InputError as error:
        assert all(line.startswith("r.yaml") and "\n" not in line for line in error.lines())
        assert all(line.isprintable() for line in error.lines())
        inner = [word for word in ("pydantic", "Input should be", "Config") if word not in text]
        assert not any(word in line for line in error.lines() for word in inner)
    else:
        assert recipe.rules


def test_nothing_heavy_is_imported_before_a_recipe_is_read() -> None:
    light = "import sys, qcompress.recipe, qcompress.types.plan\n"
    heavy = "qcompress.recipe.read_recipe(None, text='{version: 1, rules: [{match: a, rtn: {bits: 2}}]}')\n"
    show = "print(*(name in sys.modules for name in ('pydantic', 'yaml', 'torch')))\n"
    command = [sys.executable, "-c", light + show + heavy + show]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout.split("\n")[:2] == ["False False False", "True True False"]
