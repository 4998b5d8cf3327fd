"""`qcompress recipe check | show | schema`."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest
import yaml
from conftest import ROOT, Run

RECIPE = 'version: 1\nrules: [{match: "*", squant: {bits: 2}}]\n'
READY = sorted((ROOT / "recipes").glob("*.yaml"))


def test_check_by_itself_and_against_a_checkpoint(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(RECIPE)
    assert run("recipe", "check", path).out == f"{path}: sound, 1 rule\n"
    assert run("recipe", "check", path, checkpoint).out == f"{path}: sound, 1 rule, 3 of 6 tensors compressed\n"
    assert run("recipe", "check", path, checkpoint, "-q") == run("recipe", "check", "-", "-q", stdin=RECIPE)
    listed = 'version: 1\nrules: [{match: [a, b], keep: {}}, {match: "*", rtn: {bits: 3}}]'
    assert run("recipe", "check", "-", stdin=listed).out == "-: sound, 2 rules\n"
    wrong = run("recipe", "check", path, checkpoint, "--set", "rules.0.match=nothing")
    assert (wrong.code, wrong.out, len(wrong.error_lines)) == (3, "", 1)


def test_check_says_all_that_is_wrong(run: Run) -> None:
    ran = run("recipe", "check", "-", stdin="version: 1\nruls: []\nseed: x\n")
    assert (ran.code, ran.out) == (3, "")
    assert len(ran.error_lines) == ran.err.count("\n") >= 2


def test_show_is_a_recipe_that_shows_itself(run: Run) -> None:
    shown = run("recipe", "show", "-", stdin=RECIPE)
    assert shown.code == 0
    assert run("recipe", "show", "-", stdin=shown.out).out == shown.out
    document = json.loads(run("recipe", "show", "-", "--json", "-", stdin=RECIPE).out)
    assert document == yaml.safe_load(shown.out)
    changed = run("recipe", "show", "-", "--set", "rules.0.squant.bits=3", stdin=RECIPE)
    assert yaml.safe_load(changed.out)["rules"][0]["squant"]["bits"] == 3


def test_the_schema_accepts_what_check_accepts(run: Run) -> None:
    schema = json.loads(run("recipe", "schema").out)
    validator = jsonschema.Draft202012Validator(schema)
    validator.check_schema(schema)
    validator.validate(yaml.safe_load(RECIPE))
    assert not validator.is_valid({"version": 1, "rules": [{"match": "*", "squant": {"bits": 9}}]})
    assert (ROOT / "recipes" / "schema.json").read_text() == run("recipe", "schema").out


@pytest.mark.parametrize("path", READY, ids=lambda path: path.stem)
def test_every_ready_recipe_is_sound(run: Run, path: Path) -> None:
    assert run("recipe", "check", path).code == 0


def test_a_missing_recipe_is_3(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    for arguments in (["recipe", "check"], ["recipe", "show"], ["quantize", checkpoint, "-r"]):
        ran = run(*arguments, tmp_path / "none.yaml")
        assert (ran.code, ran.out, len(ran.error_lines)) == (3, "", 1)
        assert "none.yaml" in ran.err
