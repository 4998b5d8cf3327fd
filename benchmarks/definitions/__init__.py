"""Every row and every table of the pages."""

from __future__ import annotations

from ledger import Row
from tables import Table

from . import (
    alone,
    budgets,
    choices,
    clusters,
    deploy,
    methods,
    papers,
    presets,
    qar,
    qat,
    rd,
    scratch,
    speed,
    text,
    training,
)

MODULES = (
    methods,
    presets,
    rd,
    budgets,
    training,
    scratch,
    clusters,
    qar,
    qat,
    alone,
    choices,
    text,
    papers,
    speed,
    deploy,
)

ROWS: tuple[Row, ...] = tuple(row for module in MODULES for row in module.ROWS)
TABLES: dict[str, Table] = {table.name: table for module in MODULES for table in module.TABLES}
