"""Every figure of the pages comes from a row that anyone can run again, and the pages say which do not yet."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import tables
from check import BYTES, differences
from conftest import ROOT
from definitions import ROWS, TABLES
from fingerprint import weights_sha256
from ledger import Ledger, Line, Row, definition, look_up, parse_line
from render import DOCS, TEMPLATES, PageError, render_page
from rows import Place, RowError, make, surroundings
from tables import Cell, Pages, Table, mean

LINE = Line(
    row="a/one",
    definition="0" * 16,
    commands=("python measure.py",),
    recipe_sha256=None,
    artifact_sha256="11",
    weights_sha256="22",
    commit="abcdef",
    figures={"top1": 0.5, "nested": {"time": 2.0}},
    cpu_seconds=(3.0, 1.0),
    peak_memory_bytes=(1000, 2000),
    versions={"torch": "2"},
    machine="kind",
)
CHEAP = ("rd/resnet20/free/2.0", "methods/resnet20/naive/channel/w2")
"""Rows that are run again by the tests; where what they give is changed on purpose, `rows.py run` makes their lines."""


def test_the_pages_are_what_the_rows_render_to() -> None:
    pages = Pages(Ledger(ROWS))
    for template in TEMPLATES.glob("*.md"):
        text = render_page(template.read_text(encoding="utf-8"), pages)
        fresh = (DOCS / template.name).read_text(encoding="utf-8") == text
        assert fresh, f"docs/{template.name} is not what its rows render to; run python benchmarks/render.py"


def test_the_table_of_the_readme_is_of_rows() -> None:
    lines = [line.strip("| ").split(" | ") for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines()]
    table = {line[0].split(",")[0]: line[1:] for line in lines if len(line) > 1}
    ledger = Ledger(ROWS)
    rows = [ledger.lines[f"rd/resnet20/free/{rate}"].figures for rate in table["bits a weight"]]
    assert table["accuracy"] == [f"{100 * row['value']:.1f} %" for row in rows]
    assert table["bytes of the file"] == [f"{row['bytes']:,}" for row in rows]


def test_long_trainings_go_on_where_they_stopped_and_read_what_there_is_without_a_checkpoint() -> None:
    """A row that is killed after an hour must not begin anew; from scratch no report compares with a baseline."""
    for row in ROWS:
        for command in row.commands:
            words = command.split()
            if row.name.startswith("scratch/") and row.seconds >= 900 and "adaround" not in row.name:
                assert "--resume" in words, row.name
            if words[1:3] in (["finetune-reg", "-r"], ["quantize", "-r"]):
                assert not any("baseline" in way or "drop" in way for way in row.figures.values()), row.name
            if words[1:3] == ["finetune-reg", "-r"]:
                assert not any(".accuracy." in way for way in row.figures.values()), row.name


def test_rows_tables_and_lines_belong_together() -> None:
    names = [row.name for row in ROWS]
    assert len(set(names)) == len(names)
    rows = {row.name: row for row in ROWS}
    assert {name for table in TABLES.values() for name in table.rows} <= set(rows)
    assert {name for row in ROWS for name in row.needs} <= set(rows)
    assert all(definition(row, rows) for row in ROWS), "reads every recipe that a command names"
    assert set(Ledger(ROWS).lines) <= set(rows), "lines of rows that are gone"
    for name, key, column in tables.read_old():
        titles = [tables.title(one) for one in TABLES[name].columns]
        assert isinstance(TABLES[name].lines[key][titles.index(column)], Cell)


def test_a_line_says_what_made_it() -> None:
    for line in Ledger(ROWS).lines.values():
        assert line.commands and line.commit and line.machine and line.versions
        assert len(line.cpu_seconds) == len(line.commands) and min(line.cpu_seconds) > 0
        writes = any("$OUT" in command for command in line.commands)
        assert (line.artifact_sha256 is not None) == (line.weights_sha256 is not None) == writes
        assert line.recipe_sha256 or not line.commands[0].startswith("qcompress")


def test_the_commits_of_lines_are_in_the_history() -> None:
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("needs git and a clone")
    for commit in {line.commit for line in Ledger(ROWS).lines.values()}:
        known = subprocess.run(["git", "merge-base", "--is-ancestor", commit, "HEAD"], cwd=ROOT, capture_output=True)
        assert known.returncode == 0, f"{commit} is no commit of this branch"


def test_a_line_is_read_as_it_was_written(tmp_path: Path) -> None:
    assert parse_line(LINE.to_json()) == LINE
    with pytest.raises(TypeError):
        parse_line(json.dumps(json.loads(LINE.to_json()) | {"who": "?"}))
    first, second = (Row(name=name, commands=(), figures={}, seconds=1) for name in ("a/one", "a/two"))
    ledger = Ledger((first, second), tmp_path)
    ledger.put(replace(LINE, row="a/two"))
    ledger.put(LINE)
    ledger.put(replace(LINE, commit="later"))
    text = (tmp_path / "a.jsonl").read_text()
    assert [json.loads(line)["row"] for line in text.splitlines()] == ["a/one", "a/two"]
    assert Ledger((first, second), tmp_path).lines["a/one"].commit == "later"


@pytest.fixture
def place(tmp_path: Path) -> Place:
    (tmp_path / "measure.py").write_text(
        "import json, sys, pathlib\n"
        "name, *rest = sys.argv[1:]\n"
        "count = pathlib.Path(name)\n"
        "count.write_text(str(int(count.read_text()) + 1 if count.exists() else 1))\n"
        "if rest: sys.exit('out of paper')\n"
        "print(json.dumps({'runs': int(count.read_text()), 'accuracy': [{'metric': 'top1', 'artifact': 1 / 3}]}))\n"
    )
    (tmp_path / "work").mkdir()
    return Place(tmp_path, tmp_path / "work", {})


def row(name: str, words: str = "", needs: tuple[str, ...] = ()) -> Row:
    command = f"python $QCOMPRESS_DATA/measure.py $WORK/{name.replace('/', '_')}.count {words}".strip()
    figures = {"runs": "0.runs", "top1": "0.accuracy.top1.artifact"}
    return Row(name=name, commands=(command,), figures=figures, seconds=1, needs=needs)


def test_a_row_is_run_and_kept(place: Place, tmp_path: Path) -> None:
    ledger = Ledger([row("a/one")], tmp_path / "rows")
    assert ledger.status("a/one") == "missing"
    line = make(ledger.rows["a/one"], ledger, place, "abcdef")
    assert line.figures == {"runs": 1, "top1": 0.333333}
    assert line.artifact_sha256 is None and line.cpu_seconds[0] > 0 and line.peak_memory_bytes[0] > 1_000_000
    read = Ledger([row("a/one")], tmp_path / "rows")
    assert read.lines == {"a/one": line} and read.status("a/one") == "current"
    make(ledger.rows["a/one"], read, place, None)
    assert Ledger([row("a/one")], tmp_path / "rows").lines["a/one"].figures["runs"] == 1, "a trial is not kept"


def test_what_a_row_needs_is_run_before_it(place: Place, tmp_path: Path) -> None:
    rows = [row("a/one"), row("a/two", needs=("a/one",))]
    ledger = Ledger(rows, tmp_path / "rows")
    make(rows[1], ledger, place, "abcdef")
    assert set(ledger.lines) == {"a/one", "a/two"}
    changed = [replace(rows[0], figures={"runs": "0.runs"}), rows[1]]
    assert Ledger(changed, tmp_path / "rows").status("a/two") == "changed", "it began at another file"


def test_a_failing_command_is_told_in_its_words(place: Place, tmp_path: Path) -> None:
    ledger = Ledger([row("a/one", "fail"), row("a/two", "$NNCODEC")], tmp_path / "rows")
    with pytest.raises(RowError, match="out of paper"):
        make(ledger.rows["a/one"], ledger, place, "abcdef")
    with pytest.raises(RowError, match="--peer NNCODEC=PYTHON"):
        make(ledger.rows["a/two"], ledger, place, "abcdef")
    figures = replace(row("a/three"), figures={"top5": "0.accuracy.top5.artifact"})
    with pytest.raises(RowError, match=r"nothing stands at 0\.accuracy\.top5\.artifact"):
        make(figures, Ledger([figures], tmp_path / "rows"), place, "abcdef")
    assert not (tmp_path / "rows").exists()


def test_a_row_is_no_longer_current_when_its_recipe_says_something_else(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"

    def defined(text: str) -> str:
        recipe.write_text(text)
        from ledger import parse_recipe

        parse_recipe.cache_clear()
        one = Row(name="a/one", commands=(f"qcompress quantize -r {recipe}",), figures={}, seconds=1)
        return definition(one, {"a/one": one})

    first = defined("seed: 1\n")
    assert defined("# why\nseed:   1\n") == first
    assert defined("seed: 2\n") != first


def test_figures_are_found_by_name() -> None:
    document = {"accuracy": [{"metric": "top1", "value": 3}, {"name": "other", "value": 4}], "zero": 0}
    assert look_up([document], ["0", "accuracy", "top1", "value"]) == 3
    assert look_up(document, ["accuracy", "other", "value"]) == 4
    assert look_up(document, ["zero"]) == 0
    assert look_up(document, ["accuracy", "top9", "value"]) is None and look_up(document, ["zero", "deep"]) is None


def seeds(folder: Path, *changes: dict[str, object]) -> tuple[Table, Ledger]:
    """A table of one cell over three seeds, of which as many were run as there are changes of LINE."""
    rows = [Row(name=f"a/b/seed{seed}", commands=(), figures={}, seconds=1) for seed in range(3)]
    ledger = Ledger(rows, folder)
    for one, change in zip(rows, changes, strict=False):
        known = definition(one, ledger.rows)
        ledger.lines[one.name] = replace(LINE, row=one.name, **{"definition": known, **change})  # type: ignore[arg-type]
    cell = Cell(tuple(one.name for one in rows), mean("top1"))
    return Table(name="t", columns=("what", "top1:"), lines={"b": ["b", cell]}), ledger


def test_a_spread_is_of_runs_that_differ(tmp_path: Path) -> None:
    def text(*changes: dict[str, object]) -> str:
        table, ledger = seeds(tmp_path, *changes)
        return Pages(ledger, {}).cell(table, "b", 1).text

    assert text({}) == text({}, {}, {}) == "0.5000", "one run thrice is one run"
    other = {"weights_sha256": "33", "figures": {"top1": 0.7}}
    assert text({}, {}, other) == text({}, other) == "0.6000 ± 0.1414"


def test_marks_say_what_was_not_run(tmp_path: Path) -> None:
    old = {("t", "b", "top1"): ("0.4", "old")}
    table, ledger = seeds(tmp_path)
    assert Pages(ledger, {}).cell(table, "b", 1).marked == "-"
    assert Pages(ledger, old).cell(table, "b", 1).marked == "0.4 †"  # type: ignore[arg-type]
    assert "not run again" in Pages(ledger, old).render(table)  # type: ignore[arg-type]
    table, ledger = seeds(tmp_path, {})
    assert Pages(ledger, old).cell(table, "b", 1).marked == "0.5000"  # type: ignore[arg-type]
    assert "a.jsonl" in Pages(ledger, {}).render(table) and "abcdef" in Pages(ledger, {}).render(table)
    table, ledger = seeds(tmp_path, {"definition": "of before"})
    assert Pages(ledger, {}).cell(table, "b", 1).marked == "0.5000 ‡"


def test_an_older_figure_goes_when_its_row_is_run(tmp_path: Path) -> None:
    table, ledger = seeds(tmp_path)
    old = tmp_path / "old.jsonl"
    text = json.dumps({"table": "t", "line": "b", "column": "top1", "text": "0.4", "mark": "old"}) + "\n"
    old.write_text(text)
    assert tables.prune_old(ledger, {"t": table}) == 0 and old.read_text() == text
    table, ledger = seeds(tmp_path, {})
    assert tables.prune_old(ledger, {"t": table}) == 1 and old.read_text() == ""


def test_a_page_names_cells_that_are_there() -> None:
    pages = Pages(Ledger(ROWS))
    for text in ("{{no table}}", "{{rd resnet20 | none | top1}}", "{{rd resnet20 | gptq W2 | W9}}", "{{qat | DSMM}}"):
        with pytest.raises(PageError):
            render_page(text, pages)
    assert render_page("{{rd resnet20 | gptq W2 | top1}}", pages)[0] == "0"


def test_what_differs_is_named() -> None:
    def told(**changes: object) -> list[str]:
        return list(differences(LINE, replace(LINE, **changes), 0.1))  # type: ignore[arg-type]

    assert told() == told(cpu_seconds=(9.0,), commit="other") == []
    assert told(figures={"top1": 0.5, "nested": {"time": 2.1}}) == []
    assert told(figures={"top1": 0.4, "nested": {"time": 2.1}}) == ["top1 0.5, now 0.4"]
    assert told(figures={"top1": 0.5, "nested": {"time": 3.0}}) == ["nested time 2.0, now 3.0"]
    assert told(figures={"top1": 0.5}) != []
    assert told(artifact_sha256="44") == [BYTES]
    assert told(artifact_sha256="44", weights_sha256="55") == ["other weights"]
    exact = differences(LINE, replace(LINE, figures={"top1": 0.500001, "nested": {"time": 2.0}}), 0.0)
    assert list(exact) == ["top1 0.5, now 0.500001"]


def test_the_hash_of_weights_is_of_their_values(tmp_path: Path) -> None:
    import numpy as np
    from safetensors.numpy import save_file

    hashes = []
    for name, weights in (
        ("a", {"x": np.ones((2, 3), np.float32), "y": np.zeros(2, np.float32)}),
        ("b", {"y": np.zeros(2, np.float32), "x": np.ones((2, 3), np.float32)}),
        ("c", {"x": np.ones((3, 2), np.float32), "y": np.zeros(2, np.float32)}),
        ("d", {"x": np.ones((2, 3), np.float32), "y": np.full(2, -0.0, np.float32)}),
    ):
        save_file(weights, tmp_path / f"{name}.safetensors", metadata={"of": name})
        hashes.append(weights_sha256(tmp_path / f"{name}.safetensors"))
    assert hashes[0] == hashes[1] and len(set(hashes)) == 3


@pytest.mark.slow
@pytest.mark.parametrize("name", CHEAP)
def test_cheap_rows_come_out_again(name: str, tmp_path: Path) -> None:
    if "QCOMPRESS_DATA" not in os.environ:
        pytest.skip("reads QCOMPRESS_DATA")
    ledger = Ledger(ROWS)
    assert ledger.status(name) == "current", f"run python benchmarks/rows.py run {name}"
    before = ledger.lines[name]
    now = make(ledger.rows[name], ledger, Place(Path(os.environ["QCOMPRESS_DATA"]), tmp_path, {}), None)
    if surroundings(before, now):
        # Another version or kind of processor may decide a tie differently.
        assert now.figures["bpw"] == pytest.approx(before.figures["bpw"], rel=0.01)
        return
    assert [one for one in differences(before, now, 0.0) if one != BYTES] == []
