"""A training report as JSON and as a table."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from qcompress.report.render import render_view
from qcompress.report.training_report import TRAINING, TrainedLayer, TrainingReport, TrialFigures, WeightFigures
from qcompress.report.view_training import view_training

WEIGHT = WeightFigures(range=1.5, range_over_std=6.123456789, outlier_share=0.0625, kurtosis=3.5, sqnr_db={"2": None})
REPORT = TrainingReport(
    output="m-kurtosis.safetensors",
    checkpoint=None,
    recipe_hash="ab" * 32,
    steps=2000,
    epochs=2,
    kept_epoch=1,
    loss=0.25,
    epoch_metrics=({"top5": 0.9, "top1": 0.5},),
    accuracy=None,
    metrics={"top5": 0.9, "top1": 0.5},
    naive=(TrialFigures(bits=2, metric="top1", before=None, after=0.4, sqnr_db_before=None, sqnr_db_after=9.0),),
    kmeans=(),
    layers=(TrainedLayer(name="w", shape=(4, 8), before=None, after=WEIGHT, regularizer="kurtosis", dead=3),),
)


def test_what_is_written_is_read_again_with_every_digit() -> None:
    text = TRAINING.text(REPORT)
    assert TRAINING.parse(text, "x") == REPORT
    assert json.loads(text)["layers"][0]["after"]["range_over_std"] == 6.123456789


def test_what_is_no_number_is_null() -> None:
    text = TRAINING.text(replace(REPORT, loss=math.nan))
    assert json.loads(text, parse_constant=pytest.fail)["loss"] is None


def test_the_table_shows_each_weight_before_and_after() -> None:
    text = render_view(view_training(REPORT))
    header, row = (line for line in text.splitlines() if line.startswith(("layer ", "w ")))
    titles = ["layer", "shape", "regularizer", "range/std", "after", "outliers", "after", "kurtosis", "after", "alpha"]
    assert header.split() == [*titles, "dead"]
    assert row.split() == ["w", "4x8", "kurtosis", "-", "6.12", "-", "6.25%", "-", "3.5", "-", "3"]


def test_no_name_of_it_steers_the_terminal() -> None:
    bad = "\x1b[2J"
    layer = replace(REPORT.layers[0], name=bad)
    text = render_view(view_training(replace(REPORT, output=bad, checkpoint=bad, metrics={bad: 1.0}, layers=(layer,))))
    assert "\x1b" not in text
    assert text.count(r"\x1b[2J") == 4
