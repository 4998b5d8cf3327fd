"""One glossary: it holds every figure, its document is fresh, and a slip of the keyboard finds the figure meant."""

from __future__ import annotations

from collections import Counter
from dataclasses import fields
from pathlib import Path

import pytest

from qcompress.report.compare import Comparison, FileComparison, LayerComparison, TradeOff, TradePoint
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
from qcompress.report.glossary import GLOSSARY, SECTIONS, explain, find_term, glossary_markdown, nearest_terms
from qcompress.types.plan import Gates
from qcompress.types.run import RunFigures

DOCUMENT = Path(__file__).parents[2] / "docs" / "glossary.md"
NOUNS = (
    *(Report, ArtifactFile, SizeFigures, SizeParts, AccuracyFigures, GateResult, RunFigures, LayerReport, LayerFigures),
    *(FileComparison, LayerComparison, TradeOff, TradePoint),
)


def test_the_document_is_fresh() -> None:
    assert DOCUMENT.read_text() == glossary_markdown(), "write glossary_markdown() there"


def test_every_key_of_a_report_and_every_gate_is_there() -> None:
    keys = {one.name for noun in NOUNS for one in fields(noun)} - {"points", "size"}
    keys |= {one.name for one in fields(Comparison)} - {"files", "reports"}
    gates = {one.name.replace("_", "-") for one in fields(Gates)} | {"max-growth"}
    assert keys | gates <= set(GLOSSARY)
    assert find_term("size") == "artifact_bytes"


@pytest.mark.parametrize("name", GLOSSARY)
def test_a_definition_is_one_line_that_fits(name: str) -> None:
    term = GLOSSARY[name]
    assert explain(name) == f"{name}: {term.line}"
    assert 8 < len(term.line) <= 120
    assert "\n" not in term.line
    assert not term.line.endswith(".")
    assert term.title


def test_no_name_stands_for_two_figures() -> None:
    assert sum(map(len, SECTIONS.values())) == len(GLOSSARY)
    folded = Counter("".join(c for c in name.casefold() if c.isalnum()) for name in GLOSSARY)
    assert max(folded.values()) == 1


@pytest.mark.parametrize("name", GLOSSARY)
def test_a_name_is_found_in_any_spelling(name: str) -> None:
    for spelling in (name, name.upper(), name.replace("_", " "), name.replace("_", "-"), f" {name} "):
        assert find_term(spelling) == name
    assert all(find_term(other) is not None for other in (*GLOSSARY[name].other, GLOSSARY[name].title))


@pytest.mark.parametrize("name", [name for name in GLOSSARY if len(name) > 4])
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
