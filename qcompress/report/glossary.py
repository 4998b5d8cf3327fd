"""Every figure by its name, gathered from the nouns that hold them: for --explain, tables, HTML and docs/glossary.md.

Imports no torch.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from typing import Any

from qcompress.plan.sensitivity import LayerCosts, Sensitivity, WidthCost
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
from qcompress.report.training_report import TrainedLayer, TrainingReport, TrialFigures, WeightFigures
from qcompress.types.document import Document
from qcompress.types.encoded import ClassUse
from qcompress.types.figures import Figure, figures_of
from qcompress.types.run import RunFigures

NOUNS: Mapping[str, tuple[type, ...]] = {
    "Report": (ArtifactFile, Report),
    "Size": (SizeFigures, SizeParts),
    "Accuracy": (AccuracyFigures,),
    "Layers": (LayerReport,),
    "Errors and distributions": (LayerFigures, ClassUse),
    "Gates": (GateResult,),
    "Run": (RunFigures,),
    "Comparison": (Comparison, FileComparison, LayerComparison, TradeOff, TradePoint),
    "Sensitivity": (Sensitivity, LayerCosts, WidthCost),
    "Training": (TrainingReport, TrainedLayer, TrialFigures, WeightFigures),
}
"""Section -> the dataclasses whose fields it explains."""

GATES = {
    "max-size": Figure("max-size", "bytes", "gate: artifact_bytes are at most so many"),
    "max-bpw": Figure("max-bpw", "bits", "gate: bits_per_weight are at most so many"),
    "min-sqnr": Figure("min-sqnr", "decibels", "gate: the SQNR of the worst compressed tensor is at least so many dB"),
    "min-metric": Figure("min-metric", "metric", "gate: a metric of the artifact is at least so high"),
    "max-drop": Figure(
        "max-drop",
        "metric",
        "gate: a metric's drop is at most so large; with --baseline-report, beyond that report's drop",
    ),
    "max-growth": Figure(
        "max-growth", "share", "gate: artifact_bytes grow over those of the --baseline-report by at most this share"
    ),
}
"""Figures that no field holds, but the name of a gate's result."""


def _sections() -> dict[str, dict[str, Figure]]:
    """Section -> name -> row; of two rows of one name the first, which the other's document refines."""
    found: dict[str, dict[str, Figure]] = {}
    known: set[str] = set()
    for section, nouns in NOUNS.items():
        rows = {name: row for noun in nouns for name, row in figures_of(noun).items() if name not in known}
        found[section] = rows | (GATES if section == "Gates" else {})
        known |= set(rows)
    return found


SECTIONS: Mapping[str, Mapping[str, Figure]] = _sections()
FIGURES: Mapping[str, Figure] = {name: row for rows in SECTIONS.values() for name, row in rows.items()}
"""Names as the report's JSON and the command line spell them."""


def schema_text(document: Document[Any]) -> str:
    """The JSON Schema of a kind of document as text, a line for each field.

    A field without a row of its own is described by that of its name.
    """
    schema = document.json_schema()
    for noun in (schema, *schema["$defs"].values()):
        for name, option in noun.get("properties", {}).items():
            if name in FIGURES and "description" not in option:
                option |= {"title": FIGURES[name].title, "description": FIGURES[name].line}
    return f"{_opened(schema, 0)}\n"


def _opened(schema: Mapping[str, Any], depth: int) -> str:
    """A schema with each of its keys on a line; what holds fields, and what holds such by name, is opened too."""
    lines = []
    for key, value in schema.items():
        is_open = key in ("properties", "$defs") or (isinstance(value, dict) and "properties" in value)
        text = _opened(value, depth + 1) if is_open else json.dumps(value, ensure_ascii=False)
        lines.append(f"{'  ' * (depth + 1)}{json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(lines) + f"\n{'  ' * depth}}}"


def find_term(word: str) -> str | None:
    """The name of the figure that `word` means, in any case, with any of its names; None for an unknown one."""
    return _names().get(_folded(word))


def nearest_terms(word: str) -> tuple[str, ...]:
    """Up to three figures whose names look or begin like `word`, nearest first."""
    known, folded = _names(), _folded(word)
    close = difflib.get_close_matches(folded, known, n=6, cutoff=0.6)
    close += [name for name in known if folded and folded in name]
    return tuple(dict.fromkeys(known[name] for name in close))[:3]


def explain(name: str) -> str:
    """One line: the name and the definition of a figure."""
    return f"{name}: {FIGURES[name].line}"


def glossary_markdown() -> str:
    """The text of docs/glossary.md."""
    lines = [
        "# Glossary",
        "",
        "Every figure of reports and comparisons in one line, as `qcompress report --explain NAME` prints it.",
        "w is a weight, ŵ what its code decodes to; `null` means not measured, or not a finite number.",
    ]
    for section, rows in SECTIONS.items():
        lines += ["", f"## {section}", "", "| figure | unit | | formula, and what else holds |", "|---|---|---|---|"]
        for name, row in rows.items():
            lines.append(f"| `{name}` | {row.unit} | {_markdown(row.line)} | {_markdown(row.formula)} |")
    return "\n".join(lines) + "\n"


def _markdown(line: str) -> str:
    return line.replace("*", "\\*").replace("|", "\\|")


def _names() -> dict[str, str]:
    """Folded spelling -> name; a figure's own name goes before another's title."""
    spelt: dict[str, str] = {}
    for name in FIGURES:
        spelt.setdefault(_folded(name), name)
    for name, row in FIGURES.items():
        for spelling in (*row.other, row.column, row.title):
            if _folded(spelling):
                spelt.setdefault(_folded(spelling), name)
    return spelt


def _folded(word: str) -> str:
    return "".join(letter for letter in word.casefold() if letter.isalnum())
