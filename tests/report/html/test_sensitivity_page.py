"""The page of sensitivities, as a browser's parser sees it: well formed, closed to the outside, all of it defined."""

from __future__ import annotations

import math
import re

import pytest

from qcompress.plan.sensitivity import LayerCosts, Sensitivity, WidthCost
from qcompress.report.html.charts import SCATTER, curves
from qcompress.report.html.render_html import render_sensitivity_html
from qcompress.report.render import render_sensitivity
from report.html.test_html import Element, tree_of


def make_sensitivity(layers: int = 3, metric: bool = True, widths: tuple[int, ...] = (2, 3, 4)) -> Sensitivity:
    def costs(index: int) -> tuple[WidthCost, ...]:
        return tuple(
            WidthCost(
                bits=bits,
                bytes=100 * bits,
                relative_error=4.0**-bits,
                divergence=0.0 if index == 1 and bits == 4 else (1 + index) * 4.0**-bits,
                metrics={"top1": 0.9 - 0.1 / bits} if metric else {},
            )
            for bits in widths
        )

    return Sensitivity(
        checkpoint="<b>model</b>\x1b.safetensors",
        input_sha256="0" * 64,
        measured_sha256="1" * 64,
        divergence_kind="kl",
        divergence_data="calibration",
        divergence_samples=256,
        metric_samples=100 if metric else 0,
        higher={"top1": True} if metric else {},
        baseline={"top1": 0.9} if metric else {},
        layers=tuple(
            LayerCosts(name=f"layer.{index}", shape=(8, 4), method="squant", grid="channel offset", widths=costs(index))
            for index in range(layers)
        ),
    )


def page_of(found: Sensitivity) -> Element:
    return tree_of(render_sensitivity_html(found))


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("metric", [True, False])
def test_every_layer_has_its_row_and_every_width_its_curve(layers: int, metric: bool) -> None:
    found = make_sensitivity(layers, metric)
    root = page_of(found)
    (body,) = root.all("tbody")
    names = [row.all("th")[0].text for row in body.all("tr")]
    # The most sensitive first.
    assert names == [f"layer.{index}" for index in reversed(range(layers))]
    heads = [one.text for one in root.all("thead")[0].all("th")]
    assert ("drop at 2" in heads) == metric
    assert {"2 bits", "3 bits", "4 bits"} <= set(heads)
    assert len(root.all("path", "curve")) == 3
    assert root.all("h1")[0].text == r"Sensitivity of <b>model</b>\x1b.safetensors"


def test_nothing_above_zero_draws_no_chart() -> None:
    assert curves([("2 bits", [0.0, None])]) is None
    found = make_sensitivity(2, widths=(4,))
    assert page_of(found).all("svg")


def test_curves_follow_the_logarithm_within_their_box() -> None:
    drawn = curves([("a", [1.0, 0.1, None, 0.01]), ("b", [0.0, 0.1, 0.01, 0.01])])
    assert drawn is not None
    first, second = (
        [tuple(map(float, point.split())) for point in re.split("[ML]", one.path)[1:]] for one in drawn.curves
    )
    assert [len(first), len(second)] == [3, 4]
    assert all(0 <= x <= SCATTER[0] and 0 <= y <= SCATTER[1] for x, y in (*first, *second))
    # A decade is as far as the next, and more stands higher.
    assert math.isclose(first[1][1] - first[0][1], first[2][1] - first[1][1], abs_tol=0.2)
    assert first[0][1] < first[1][1]
    # Nothing lies where the least does, or below.
    assert second[0][1] >= max(y for _, y in first)
    assert float(drawn.curves[0].opacity) > float(drawn.curves[1].opacity) > 0


@pytest.mark.slow
def test_a_thousand_layers_make_a_page_that_can_be_sent() -> None:
    text = render_sensitivity_html(make_sensitivity(1000, widths=tuple(range(1, 9))))
    assert len(text) < 2_000_000
    assert text.count("<tr") > 1000


@pytest.mark.parametrize("form", ["table", "markdown", "csv", "json", "html"])
def test_every_format_names_every_layer_and_ends_its_line(form: str) -> None:
    found = make_sensitivity()
    text = render_sensitivity_html(found) if form == "html" else render_sensitivity(found, form)  # type: ignore[arg-type]
    assert text.endswith("\n")
    assert all(f"layer.{index}" in text for index in range(3))
    assert "\x1b" not in text


def test_many_layers_are_cut_to_the_most_sensitive_in_a_table() -> None:
    table = render_sensitivity(make_sensitivity(100), "table")
    assert "20 of 100 tensors, the most sensitive first" in table
    assert "layer.99 " in table
    assert "layer.1 " not in table
