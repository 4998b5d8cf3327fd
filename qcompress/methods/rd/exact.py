"""RD stores weights on few values as they are: a code for each value, of the tensor or of each row."""

from __future__ import annotations

import torch
from torch import Tensor

from qcompress.registry import ExactConfig
from qcompress.types.encoded import Codebook, Constant


def encode_exact(weight: Tensor, config: ExactConfig) -> Codebook | Constant:
    """The weight, float32 [rows, ...], in codes of its own values, ascending; the last of a row with fewer repeated."""
    shape, rows = tuple(weight.shape), weight.flatten(1)
    if config.form == "constant":
        return Constant(float(rows[0, 0]), shape)
    assert config.bits is not None
    dtype = torch.uint8 if config.bits <= 8 else torch.int16
    if config.granularity == "tensor":
        values = torch.unique(rows)
        codes = torch.searchsorted(values, rows.contiguous()).to(dtype)
        return Codebook(codes, config.bits, values.view(1, -1, 1), 0, shape)
    ordered = rows.sort(1).values
    starts = torch.ones_like(ordered, dtype=torch.bool)
    starts[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    places = starts.long().cumsum(1) - 1
    tables = ordered[:, -1:].repeat(1, int(places.max()) + 1).scatter_(1, places, ordered)
    codes = torch.searchsorted(tables, rows.contiguous()).to(dtype)
    return Codebook(codes, config.bits, tables.unsqueeze(2), 0, shape)
