"""A method for tests of the artifact alone: it gives any form of codes, whatever that does to the weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from qcompress.coding.tables import GIVEN_BITS, given_values
from qcompress.registry import METHODS, Method
from qcompress.types.config import Convention, Form, Granularity, MethodConfig, TableValues
from qcompress.types.encoded import Affine, Blocked, Compressed, Constant, Table
from qcompress.types.run import EncodeContext

MOST_HALF = 4096.0


@dataclass(frozen=True, kw_only=True)
class GivenConfig(MethodConfig):
    """The form as configs say it, and all that a config says of it."""

    form: Form = "symmetric"
    bits: int = 4
    granularity: Granularity = "group"
    group_size: int | None = None
    table: TableValues = "nf4"
    sub_blocks: int = 2
    subzero: int = 0
    offsets: bool = False
    row_exponents: bool = False
    convention: Convention = "full"
    axis: int | tuple[int, ...] | None = None

    @property
    def stored_convention(self) -> Convention:
        return self.convention


def encode(rows: Tensor, config: GivenConfig, context: EncodeContext) -> Compressed:
    """The form that the config names, its scales and codes made of the weight [rows, ...] so that no two are alike."""
    matrix = rows.reshape(len(rows), -1)
    count, columns = matrix.shape
    if config.form == "constant":
        return Constant(float(matrix[0, 0]), (count, columns))
    size = {"tensor": columns, "channel": columns, "group": config.group_size or 1}[config.granularity]
    grids = (1 if config.granularity == "tensor" else count, -(-columns // size))
    codes = _codes(matrix, config)
    common: dict[str, Any] = {"codes": codes, "bits": config.bits, "exponent": context.exponent}
    common["shape"] = (count, columns)
    if config.row_exponents:
        common |= {"exponent": 0, "row_exponents": (torch.arange(grids[0]) % 9 - 4).to(torch.int8)}
    if config.form == "blocked":
        common |= {"group_size": size, "sub_blocks": config.sub_blocks, "subzero": config.subzero}
        blocks = (grids[0], -(-grids[1] // config.sub_blocks))
        common |= {"scale": _halves(matrix, blocks), "subscale": _bytes(matrix, grids, 7)}
        if config.offsets:
            return Blocked(**common, offset=-_halves(matrix, blocks), suboffset=_bytes(matrix, grids, 5))
        return Blocked(**common, convention=config.convention)
    common |= {"scale": _halves(matrix, grids), "group_size": config.group_size}
    if config.form == "table":
        if config.table in GIVEN_BITS:
            values = torch.from_numpy(given_values(config.table))
            return Table(**common, values=values, given=config.table)
        dtype = {"f16": torch.float16, "f32": torch.float32, "int8": torch.int8}[config.table]
        return Table(**common, values=(torch.arange(2**config.bits) * 3 - 20).to(dtype))
    zero_point = _bytes(matrix, grids, 3) % 2**config.bits
    return Affine(
        **common,
        zero_point=zero_point if config.form == "zero-point" else None,
        offset=-_halves(matrix, grids) if config.form == "offset" else None,
        convention=config.stored_convention if config.form == "symmetric" else None,
    )


def _codes(matrix: Tensor, config: GivenConfig) -> Tensor:
    codes = (matrix.abs() * 977).long() % 2**config.bits
    if config.form == "table" and config.table in GIVEN_BITS:
        # Some codes of small floats are no numbers.
        codes = torch.where(torch.from_numpy(given_values(config.table)).isfinite()[codes], codes, codes % 64)
    return codes.to(torch.uint8)


def _halves(matrix: Tensor, shape: tuple[int, int]) -> Tensor:
    """float16, none of them 0, and no two alike."""
    size = float(matrix.abs().max())
    numbers = torch.arange(shape[0] * shape[1], dtype=torch.float32).reshape(shape)
    return (MOST_HALF * (1 + numbers / 64) * (1 if size else 0.5)).half()


def _bytes(matrix: Tensor, shape: tuple[int, int], step: int) -> Tensor:
    return (torch.arange(shape[0] * shape[1]).reshape(shape) * step % 64 + len(matrix)).to(torch.uint8)


METHOD = Method("given", "quantize", GivenConfig, "weights", module="artifact.given_method")


def register(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `given` a method of this process."""
    monkeypatch.setitem(METHODS, "given", METHOD)  # type: ignore[arg-type]
