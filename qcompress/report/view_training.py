"""Training reports become views here. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qcompress.report.glossary import FIGURES
from qcompress.report.table import Column, Table, View, column
from qcompress.report.training_report import TrainedLayer, TrainingReport
from qcompress.report.view import accuracy_line, gate_words
from qcompress.report.words import NOT_MEASURED, cell, count_words, number_words, shape_words

PAIRS = {"range_over_std": 0, "outlier_share": 1, "kurtosis": 2}
"""Figures of a weight that the table shows before and after, and how soon a narrow one drops them."""


def view_training(report: TrainingReport) -> View:
    """The report as a table of what all layers give compressed, and one of the layers."""
    source = report.checkpoint or "nothing: trained from scratch"
    facts = [("from", source), ("steps", f"{report.steps:,} in {count_words(report.epochs, 'epoch')}")]
    facts.append(("loss", number_words(report.loss)))
    if report.accuracy is not None:
        facts += [("accuracy", accuracy_line(one)) for one in report.accuracy]
    elif report.metrics:
        facts += [("accuracy", f"{name} {value:.4g}") for name, value in report.metrics.items()]
    tables = [table for table in (_trial_table(report), _layer_table(report.layers)) if table.rows]
    notes = [gate_words(gate) for gate in report.gates]
    return View(report.output, tuple(facts), tuple(tables), tuple(notes))


def _trial_table(report: TrainingReport) -> Table:
    columns = [Column("compressed by", right=False), Column("metric", right=False)]
    columns += [Column(title) for title in ("before", "after", "SQNR dB before", "after")]
    rows = []
    for name, trials in (("naive", report.naive), ("k-means", report.kmeans)):
        for one in trials:
            values = (one.before, one.after, one.sqnr_db_before, one.sqnr_db_after)
            figures = (number_words(value, 4) for value in values)
            rows.append((f"{name}, {count_words(one.bits, 'bit')}", one.metric or NOT_MEASURED, *figures))
    return Table(tuple(columns), tuple(rows))


def _layer_table(layers: Sequence[TrainedLayer]) -> Table:
    columns = [column("name"), Column("shape", spare=5), column("regularizer")]
    for name, spare in PAIRS.items():
        columns += [Column(title, spare=spare) for title in (FIGURES[name].column, "after")]
    columns += [column("temperature"), Column("dead", spare=4)]
    rows = []
    for one in layers:
        sides = [(name, side) for name in PAIRS for side in (one.before, one.after)]
        pairs = [NOT_MEASURED if side is None else cell(FIGURES[name], getattr(side, name)) for name, side in sides]
        ends = [cell(FIGURES[name], getattr(one, name)) for name in ("temperature", "dead")]
        rows.append((one.name, shape_words(one.shape), one.regularizer or NOT_MEASURED, *pairs, *ends))
    return Table(tuple(columns), tuple(rows))


def view_training_plan(rows: Sequence[Mapping[str, Any]]) -> View:
    """The table that --dry-run prints: weights, regularizers, strengths and why."""
    columns = (Column("weight", right=False), column("shape"), column("regularizer"), column("strength"))
    cells = [
        (
            row["name"],
            shape_words(tuple(row["shape"])),
            row["regularizer"] or NOT_MEASURED,
            row["strength"] if isinstance(row["strength"], str) else number_words(row["strength"]),
            row["reason"],
        )
        for row in rows
    ]
    return View("training", (), (Table((*columns, Column("why", right=False)), tuple(cells)),), ())
