"""One glossary: it holds every figure, its document is fresh, and a slip of the keyboard finds the figure meant."""

from __future__ import annotations

import csv
import html
import io
import json
from collections import Counter
from dataclasses import fields
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from qcompress.plan.sensitivity import SENSITIVITY
from qcompress.report.compare import COMPARISON, Comparison, FileComparison, LayerComparison, TradeOff, TradePoint
from qcompress.report.document import (
    AccuracyFigures,
    ArtifactFile,
    GateResult,
    LayerFigures,
    LayerReport,
    Report,
    SizeFigures,
    SizeParts,
)
from qcompress.report.document_json import REPORT
from qcompress.report.glossary import (
    FIGURES,
    SECTIONS,
    explain,
    find_term,
    glossary_markdown,
    nearest_terms,
    schema_text,
)
from qcompress.report.html.render_html import render_html
from qcompress.report.render import render
from qcompress.report.training_report import TRAINING
from qcompress.report.words import words
from qcompress.types.plan import Gates
from qcompress.types.run import RunFigures
from report.examples import kept, layer, make_report

DOCUMENT = Path(__file__).parents[2] / "docs" / "glossary.md"
NOUNS = (
    *(Report, ArtifactFile, SizeFigures, SizeParts, AccuracyFigures, GateResult, RunFigures, LayerReport, LayerFigures),
    *(FileComparison, LayerComparison, TradeOff, TradePoint),
)


def test_the_document_is_fresh() -> None:
    assert DOCUMENT.read_text() == glossary_markdown(), "write it anew: python docs/tables.py"


def test_every_key_of_a_report_and_every_gate_is_there() -> None:
    keys = {one.name for noun in NOUNS for one in fields(noun)} - {"points", "size"}
    keys |= {one.name for one in fields(Comparison)} - {"files", "reports"}
    gates = {one.name.replace("_", "-") for one in fields(Gates)} | {"max-growth"}
    assert keys | gates <= set(FIGURES)
    assert find_term("size") == "artifact_bytes"


@pytest.mark.parametrize("name", FIGURES)
def test_a_definition_is_one_line_that_fits(name: str) -> None:
    term = FIGURES[name]
    assert explain(name) == f"{name}: {term.line}"
    assert 8 < len(term.line) <= 120
    assert "\n" not in term.line
    assert not term.line.endswith(".")
    assert term.title


def test_no_name_stands_for_two_figures() -> None:
    assert sum(map(len, SECTIONS.values())) == len(FIGURES)
    folded = Counter("".join(c for c in name.casefold() if c.isalnum()) for name in FIGURES)
    assert max(folded.values()) == 1


@pytest.mark.parametrize("name", FIGURES)
def test_a_name_is_found_in_any_spelling(name: str) -> None:
    for spelling in (name, name.upper(), name.replace("_", " "), name.replace("_", "-"), f" {name} "):
        assert find_term(spelling) == name
    assert all(find_term(other) is not None for other in (*FIGURES[name].other, FIGURES[name].title))


@pytest.mark.parametrize("name", [name for name in FIGURES if len(name) > 4])
def test_a_slip_suggests_the_figure_meant(name: str) -> None:
    for slip in (name[:2] + name[3:], name[:3] + "q" + name[3:], name[:1] + name[2] + name[1] + name[3:]):
        assert find_term(slip) == name or name in nearest_terms(slip), slip
    assert len(nearest_terms(name)) <= 3


@pytest.mark.parametrize(("word", "name"), [("sqnr", "sqnr_db"), ("bpw", "bits_per_weight"), ("dB", "sqnr_db")])
def test_what_people_say(word: str, name: str) -> None:
    assert find_term(word) == name


def test_nonsense_is_unknown() -> None:
    for word in ("", "?", "xyzzy"):
        assert find_term(word) is None
        assert nearest_terms(word) == ()


VALUES: dict[str, Any] = {"text": "abc", "flag": True, "count": 7, "bytes": 7}
SINGLE = [one.name for one in fields(LayerFigures) if FIGURES[one.name].form]


@pytest.mark.parametrize("name", SINGLE)
def test_a_figure_needs_nothing_but_its_row(name: str) -> None:
    """Whatever is one value of a tensor is in JSON, schema, CSV and on the page because its field has a row."""
    value = VALUES.get(FIGURES[name].form, 0.4375)
    report = make_report(layer("w", LayerFigures(**{name: value})), kept("b"))
    document = json.loads(render([report], "json"))
    assert document["layers"][0]["figures"][name] == value
    described = json.loads(schema_text(REPORT))["$defs"]["LayerFigures"]["properties"][name]
    assert described["title"] == FIGURES[name].title
    assert FIGURES[name].line in described["description"]
    first, second = csv.DictReader(io.StringIO(render([report], "csv")))
    assert first[name] == str(value).lower()
    assert second[name] == ""
    shown = f'<dt title="{html.escape(FIGURES[name].line)}">{html.escape(FIGURES[name].title)}</dt>'.replace(
        "&#x27;", "&#39;"
    )
    beside = words(FIGURES[name], value)
    page = render_html([report])
    # The relative error is in the table of all tensors, beside the SQNR that says the same.
    assert f"{shown}<dd>{beside}" in page or (name == "relative_error" and f">{beside}<b" in page)


def test_every_field_of_a_noun_is_described_in_its_schema() -> None:
    for document in (REPORT, COMPARISON, SENSITIVITY, TRAINING):
        schema = json.loads(schema_text(document))
        jsonschema.Draft202012Validator.check_schema(schema)
        nouns = {"": schema, **schema["$defs"]}
        bare = {
            f"{noun}.{name}"
            for noun, described in nouns.items()
            for name, one in described["properties"].items()
            if "description" not in one and name != "schema"
        }
        assert {place.rpartition(".")[2] for place in bare} <= {"size", "points", "files", "reports"}
