"""Every form of a compressed tensor, of any shape and numbers: what was given comes back, by both decoders."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from artifact.educational_decoder import expand
from artifact.examples import denses, plan_for, recipe, save, verify
from artifact.given_method import GivenConfig, register
from qcompress.artifact.entry import FORMS
from qcompress.artifact.reader import read_artifact
from qcompress.checkpoint.checkpoint import read_checkpoint
from qcompress.coding.grids import TORCH_DTYPES, decode
from qcompress.coding.rows import row_shape
from qcompress.coding.tables import GIVEN_BITS, given_values
from qcompress.compress.compress import compress
from qcompress.compress.export import export
from qcompress.plan.files import planned_files
from qcompress.report.gather import gather_report
from qcompress.types.config import CodingChoice
from qcompress.types.encoded import Affine, Blocked, Codebook, Compressed, Constant, Fitted, Table, Unbounded
from qcompress.types.plan import Rule
from qcompress.types.run import Options

SHAPES: list[tuple[tuple[int, ...], tuple[int, ...]]] = [
    *(((7, 10), (0,)), ((3, 5, 2, 2), (0,)), ((4, 6), (1,)), ((2, 3, 4), (2, 0))),
    *(((9,), ()), ((), ()), ((1, 300), (0,))),
]
"""Shapes and channel axes, none where there is nothing to choose."""
DTYPES = ["F32", "F16", "BF16", "F64"]
CHOICES: list[CodingChoice] = ["packed", "auto", "zstd", "ans"]


@pytest.fixture(autouse=True)
def given(monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch)


class Draw:
    """Numbers of all sorts from one seed, and forms made of them."""

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        shape, self.axis = SHAPES[seed % len(SHAPES)]
        self.shape: tuple[int, ...] = shape
        self.dtype = DTYPES[seed % len(DTYPES)]
        self.rows, *rest = row_shape(shape, self.axis)
        self.columns = int(np.prod(rest))

    def pick(self, *values: Any) -> Any:
        return values[self.random.integers(len(values))]

    def codes(self, below: int, rows: int | None = None) -> torch.Tensor:
        found = self.random.integers(0, below, (self.rows if rows is None else rows, self.columns))
        return torch.from_numpy(found.astype(np.uint8 if below <= 256 else np.int16))

    def halves(self, *shape: int) -> torch.Tensor:
        """float16 of any size, no zero, some of them subnormal, some negative."""
        sizes = np.exp2(self.random.uniform(-20, 14, shape)) * self.random.choice([-1, 1], shape)
        return torch.from_numpy(sizes.astype(np.float16))

    def bytes(self, *shape: int) -> torch.Tensor:
        return torch.from_numpy(self.random.integers(0, 256, shape).astype(np.uint8))

    def common(self, grid_rows: int, *, rows_have: bool) -> dict[str, Any]:
        exponent = int(self.random.integers(-126, 113))
        found: dict[str, Any] = {
            "shape": self.shape,
            "axis": self.axis or (0,),
            "dtype": self.dtype,
            "exponent": exponent,
        }
        if rows_have:
            exponents = torch.from_numpy(self.random.integers(-126, 113, grid_rows).astype(np.int8))
            found |= {"exponent": 0, "row_exponents": exponents}
        return found

    def grouped(self) -> tuple[Compressed, GivenConfig]:
        """An affine form, a table or a blocked form, and the config that lays it out."""
        form = self.pick("symmetric", "zero-point", "offset", "table", "blocked")
        granularity = "group" if form == "blocked" else self.pick("tensor", "channel", "group")
        size = int(self.random.integers(1, self.columns + 3)) if granularity == "group" else None
        grids = (1 if granularity == "tensor" else self.rows, -(-self.columns // size) if size else 1)
        table = self.pick("f16", "f32", "int8", *GIVEN_BITS)
        bits = GIVEN_BITS.get(table, 3) if form == "table" else int(self.random.integers(1, 9))
        rows_have = bool(self.pick(False, True))
        config = GivenConfig(
            form=form,
            bits=bits,
            granularity=granularity,
            group_size=size,
            table=table,
            sub_blocks=int(self.random.integers(1, 5)),
            subzero=int(self.random.integers(0, 256)),
            offsets=bool(self.pick(False, True)),
            row_exponents=rows_have,
            convention=self.pick("narrow", "full", "mid-rise"),
            axis=self.axis or None,
        )
        common = {"bits": bits, "codes": self.codes(2**bits), **self.common(grids[0], rows_have=rows_have)}
        if form == "blocked":
            blocks = (grids[0], -(-grids[1] // config.sub_blocks))
            common |= {"group_size": size, "sub_blocks": config.sub_blocks, "subzero": config.subzero}
            common |= {"scale": self.halves(*blocks), "subscale": self.bytes(*grids)}
            if config.offsets:
                return Blocked(**common, offset=self.halves(*blocks), suboffset=self.bytes(*grids)), config
            return Blocked(**common, convention=config.convention), config
        common |= {"scale": self.halves(*grids), "group_size": size}
        if form != "table":
            return self.affine(config, grids, common), config
        if table in GIVEN_BITS:
            values = torch.from_numpy(given_values(table))
            numbers = torch.nonzero(values.isfinite()).flatten()
            codes = numbers[common.pop("codes").long() % len(numbers)].to(torch.uint8)
            return Table(**common, codes=codes, values=values, given=table), config
        dtype = {"f16": torch.float16, "f32": torch.float32, "int8": torch.int8}[table]
        return Table(**common, values=torch.from_numpy(self.random.normal(0, 40, 2**bits)).to(dtype)), config

    def affine(self, config: GivenConfig, grids: tuple[int, int], common: dict[str, Any]) -> Affine:
        if config.form == "zero-point":
            return Affine(**common, zero_point=self.bytes(*grids))
        if config.form == "offset":
            return Affine(**common, offset=self.halves(*grids))
        return Affine(**common, convention=config.convention)


def write(
    tmp_path: Path, encoded: Compressed, config: GivenConfig, choice: CodingChoice, *, compact: bool = False
) -> Path:
    """An artifact of a kept tensor and of one that has this form, whatever its weights were."""
    dtype = TORCH_DTYPES[encoded.dtype]
    source = save(tmp_path / "in.safetensors", {"w": torch.ones(encoded.shape, dtype=dtype), "b": torch.arange(3)})
    checkpoint = read_checkpoint(source)
    plan = replace(plan_for(checkpoint, recipe(Rule("w", "given", config, "rule w"))), compact=compact)
    options = Options(tmp_path / "out.safetensors", choice=choice, force=True)
    report = compress(checkpoint, plan, options, Fitted({"w": encoded}))
    path = tmp_path / "out.safetensors"
    assert report.size.parts.total == path.stat().st_size
    return path


def check(path: Path, encoded: Compressed, tmp_path: Path) -> None:
    verify(path)
    expected = {"w": decode(encoded), "b": torch.arange(3)}
    assert expand(path) == denses(expected)
    assert denses(load(path)) == denses(expected)
    export(read_artifact(path), tmp_path / "dense.safetensors", force=True)
    from safetensors.torch import load_file

    assert denses(load_file(tmp_path / "dense.safetensors")) == denses(expected)
    gathered = gather_report(path)
    assert gathered.size.parts.total == path.stat().st_size


def load(path: Path) -> dict[str, torch.Tensor]:
    from qcompress.compress.load import load_state_dict

    return load_state_dict(path)


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("seed", range(28))
def test_forms_with_scales_come_back(seed: int, choice: CodingChoice, tmp_path: Path) -> None:
    encoded, config = Draw(seed * 4 + CHOICES.index(choice)).grouped()
    check(write(tmp_path, encoded, config, choice, compact=bool(seed % 2)), encoded, tmp_path)


@pytest.mark.parametrize("seed", range(len(SHAPES)))
@pytest.mark.parametrize("value", [0.0, -0.1, 65504.0, 2.0**-24])
def test_a_constant_comes_back(seed: int, value: float, tmp_path: Path) -> None:
    draw = Draw(seed)
    encoded = Constant(value, draw.shape, draw.axis or (0,), draw.dtype)
    config = GivenConfig(form="constant", granularity="tensor", axis=draw.axis or None)
    path = write(tmp_path, encoded, config, "auto")
    check(path, encoded, tmp_path)
    assert read_artifact(path).files[0].container.by_name["w.qc.codes"].n_bytes == 1


def test_the_forms_of_codebooks_and_unbounded_codes_are_tested_elsewhere() -> None:
    """Here all others are: a form that comes in has to find its place."""
    of = {Affine: "affine", Table: "table", Blocked: "blocked", Constant: "constant"}
    assert set(FORMS) == {*of.values(), "codebook", "unbounded"}
    drawn = {type(Draw(seed).grouped()[0]) for seed in range(112)}
    assert drawn | {Constant} == set(of)
    assert Compressed.__args__ and {Codebook, Unbounded} < set(Compressed.__args__)


@pytest.mark.parametrize("compact", [False, True])
def test_a_plan_foretells_the_size_of_packed_codes_to_the_byte_and_bounds_others(compact: bool, tmp_path: Path) -> None:
    for seed in range(12):
        encoded, config = Draw(seed).grouped()
        for choice in CHOICES:
            size = write(tmp_path, encoded, config, choice, compact=compact).stat().st_size
            checkpoint = read_checkpoint(tmp_path / "in.safetensors")
            plan = replace(plan_for(checkpoint, recipe(Rule("w", "given", config, "rule w"))), compact=compact)
            told = planned_files(checkpoint, plan, choice)["in.safetensors"]
            assert size == told if choice == "packed" else size <= told
