"""Sensitivities become a page here: a curve for each width over the layers, and the table. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qcompress.plan.sensitivity import Sensitivity
from qcompress.report.html.charts import Curves, curves
from qcompress.report.html.parts import Fact, fact, terms_of
from qcompress.report.table import Table
from qcompress.report.view_sensitivity import cost_table, worst_first


@dataclass(frozen=True)
class SensitivityPage:
    """A page of its own: what was measured, a curve for each width over the layers, and the table."""

    title: str
    cards: tuple[Fact, ...]
    chart: Curves | None
    layers: Table
    words: tuple[Fact, ...]


def sensitivity_page(found: Sensitivity) -> SensitivityPage:
    samples = (fact("divergence_samples", found.divergence_samples),)
    cards = (
        fact("layers", len(found.layers)),
        fact("divergence_kind", found.divergence_kind, notes=samples),
        *(
            fact("baseline", value, metric, (fact("metric_samples", found.metric_samples),))
            for metric, value in found.baseline.items()
        ),
    )
    table = cost_table(found, worst_first(found), found.bits[:1])
    return SensitivityPage(
        title=f"Sensitivity of {found.checkpoint}",
        cards=cards,
        chart=curves([(f"{bits} bits", _line(found, bits)) for bits in found.bits]),
        layers=table,
        words=terms_of(cards, (table,)),
    )


def _line(found: Sensitivity, bits: int) -> Sequence[float | None]:
    costs = (layer.by_width.get(bits) for layer in found.layers)
    return [None if cost is None else cost.divergence for cost in costs]
