"""Weights that lie on few values are stored as they are, a code for each value, where rounding them takes no less.

Ternary networks, integers times a scale, decoded artifacts, what other tools have pruned and shared: every value gets a
code, of the whole tensor or of each row, and codes are entropy coded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from qcompress.checkpoint.checkpoint import Checkpoint, StoredRows, tensor_view
from qcompress.coding.payload import entropy_bits
from qcompress.coding.rows import rows_from_weight
from qcompress.registry import ExactConfig
from qcompress.types.plan import CodebookSpec, Decision, row_shape

MOST_VALUES = 1 << 12
"""That codes can name."""
MOST_VALUES_A_ROW = 1 << 8
LOOK_VALUES = 1 << 16
LOOK_ROWS = 4
VALUE_BITS = 32
"""What a value takes, as float32."""


@dataclass(frozen=True)
class Values:
    """What a weight takes that is stored as it is.

    bits  a weight, its values included
    most  values that differ, in the tensor or in the row that has the most of them
    """

    bits: float
    most: int
    by_row: bool


@dataclass(frozen=True)
class ExactWeights:
    """The weights of a checkpoint, looked at no further than is asked."""

    checkpoint: Checkpoint
    _found: dict[str, Values | None] = field(default_factory=dict)
    _by_row: dict[str, float] = field(default_factory=dict)

    def of(self, decision: Decision, bits: float) -> Decision | None:
        """The decision that stores the weight as it is, where that takes at most so many bits a weight; else None."""
        name = decision.tensor.name
        if not decision.tensor.numel or min(bits, self._look_at_rows(decision)) == bits < math.inf:
            return None
        if name not in self._found:
            self._found[name] = find_values(rows_from_weight(self._weight(decision), decision.axis).flatten(1))
        found = self._found[name]
        if found is None or found.bits > bits:
            return None
        reason = f"{decision.reason}; stored as it is, on {found.most} values{' a row' if found.by_row else ''}"
        if found.most == 1 and not found.by_row:
            return replace(decision, config=ExactConfig(form="constant"), reason=reason)
        config = ExactConfig(
            bits=max(1, math.ceil(math.log2(found.most))), granularity="channel" if found.by_row else "tensor"
        )
        return replace(decision, config=config, codebook=CodebookSpec(entries=found.most), reason=reason)

    def _weight(self, decision: Decision) -> Tensor:
        return tensor_view(self.checkpoint.shard_of(decision.tensor.name), decision.tensor)

    def _look_at_rows(self, decision: Decision) -> float:
        """The least bits a weight that rows on few values may take, from some of them; infinite where they are not."""
        name, tensor = decision.tensor.name, decision.tensor
        if name not in self._by_row:
            self._by_row[name] = math.inf
            if decision.axis == (0,) and len(tensor.shape) > 1:
                rows = StoredRows(self.checkpoint.shard_of(name), tensor, row_shape(tensor.shape, decision.axis))
                places = range(0, tensor.shape[0], max(1, tensor.shape[0] // LOOK_ROWS))
                found = _values_by_row(torch.cat([rows[place : place + 1].flatten(1) for place in places]))
                self._by_row[name] = math.inf if found is None else 0.5 * found.bits
        return self._by_row[name]


def find_values(rows: Tensor) -> Values | None:
    """What a weight [rows, columns] takes as it is, the cheaper of one set of values and one a row; None: too many."""
    if rows.dtype == torch.float64 and not torch.equal(rows.float().double(), rows):
        return None
    found = [one for one in (_values(rows.reshape(-1)), _values_by_row(rows)) if one is not None]
    return min(found, key=lambda one: one.bits, default=None)


def _values(flat: Tensor) -> Values | None:
    known = torch.unique(flat[:LOOK_VALUES])
    for start in range(LOOK_VALUES, flat.numel(), LOOK_VALUES):
        if len(known) > MOST_VALUES:
            return None
        known = torch.unique(torch.cat((known, flat[start : start + LOOK_VALUES])))
    if len(known) > MOST_VALUES:
        return None
    counts = torch.bincount(torch.searchsorted(known, flat), minlength=len(known))
    return Values(entropy_bits(counts.numpy()) + VALUE_BITS * len(known) / flat.numel(), len(known), by_row=False)


def _values_by_row(rows: Tensor) -> Values | None:
    """Of rows whose values are few beside their columns."""
    columns = rows.shape[1]
    ordered = rows.sort(1).values
    starts = torch.ones_like(ordered, dtype=torch.bool)
    starts[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    most = int(starts.sum(1).max())
    if most > min(MOST_VALUES_A_ROW, columns // 4):
        return None
    # Codes count places among a row's values: one table for the codes of all rows.
    codes = starts.long().cumsum(1) - 1
    counts = torch.bincount(codes.reshape(-1), minlength=most)
    return Values(entropy_bits(counts.numpy()) + VALUE_BITS * most / columns, most, by_row=True)
