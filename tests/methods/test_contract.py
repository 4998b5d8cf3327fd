"""What holds for every method on grids that needs weights alone, whatever it does with them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from qcompress.coding.affine import decode
from qcompress.coding.half import exponent_for
from qcompress.coding.rows import grid_shape
from qcompress.encoded import Affine
from qcompress.registry import METHODS, Method

WEIGHT_METHODS = [
    method
    for method in METHODS.values()
    if method.family == "quantize" and method.needs == "weights" and method.has_widths
]

OPTIONS: dict[str, list[dict[str, Any]]] = {
    "rtn": [
        {"symmetric": True, "convention": convention}
        for convention in ("full-range", "narrow", "aimet", "gptq", "mid-rise")
    ],
    "mse": [{"effort": "high"}, {"search": "grid"}, {"search": "grid", "symmetric": True}],
    "squant": [{"range": "minmax"}, {"range": "minmax", "symmetric": True}, {"stages": "E"}],
    "hqq": [{"round_zero": True}],
}
"""What a method has to choose beyond its grid."""

GRIDS: list[dict[str, Any]] = [{"granularity": "tensor"}, {"granularity": "channel"}, {"group_size": 6}]

SHAPES = ((5, 4, 3, 3), (5, 12), (3, 2, 6), (1, 6))


def gaussian(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))


def configs(method: Method, bits: tuple[int, ...] = tuple(range(1, 9))) -> Iterator[Any]:
    """Every width on every grid, plain and symmetric, and every option; what the config refuses is left out."""
    choices = [{}, {"symmetric": True}, *OPTIONS.get(method.name, [])]
    for width, grid, choice in itertools.product(bits, GRIDS, choices):
        try:
            yield method.config(bits=width, **grid, **choice)
        except ValueError:
            assert choice.get("symmetric"), "only symmetry may be refused here"


def encoded_by(method: Method, weight: Tensor, config: Any, exponent: int | None = None) -> Affine:
    if exponent is None:
        exponent = exponent_for(float(weight.abs().max()) if weight.numel() else 0.0)
    encoded = method.load()(weight, config, exponent)
    assert isinstance(encoded, Affine)
    return encoded


def assert_well_formed(encoded: Affine, weight: Tensor, config: Any) -> None:
    """Shapes, dtypes, the grid's form, and codes that the width can hold."""
    shape = tuple(weight.shape)
    assert encoded.codes.dtype == torch.uint8
    assert encoded.codes.shape == (shape[0], math.prod(shape[1:]))
    assert encoded.codes.is_contiguous()
    assert not encoded.codes.numel() or int(encoded.codes.max()) < 2**config.bits
    assert (encoded.bits, encoded.shape, encoded.axis, encoded.dtype) == (config.bits, shape, (0,), "F32")
    assert encoded.scale.dtype == torch.float16
    assert tuple(encoded.scale.shape) == grid_shape(shape, config.granularity, config.group_size)
    assert bool((encoded.scale != 0).all()) and bool(encoded.scale.isfinite().all())
    present = {
        "zero-point": encoded.zero_point is not None,
        "offset": encoded.offset is not None,
        "symmetric": encoded.convention is not None,
    }
    assert [form for form, there in present.items() if there] == [config.form]
    assert encoded.convention == (config.stored_convention if config.symmetric else None)
    if encoded.offset is not None:
        assert (encoded.offset.dtype, encoded.offset.shape) == (torch.float16, encoded.scale.shape)
        assert bool(encoded.offset.isfinite().all())
    if encoded.zero_point is not None:
        assert (encoded.zero_point.dtype, encoded.zero_point.shape) == (torch.uint8, encoded.scale.shape)


def assert_same(one: Affine, other: Affine) -> None:
    for name in ("codes", "scale", "offset", "zero_point"):
        first, second = getattr(one, name), getattr(other, name)
        assert (first is None) == (second is None), name
        assert first is None or torch.equal(first, second), name
    assert (one.convention, one.exponent) == (other.convention, other.exponent)


def rows_of(encoded: Affine, grid_rows: slice, rows: slice) -> list[Tensor]:
    parts = [encoded.codes[rows]]
    return parts + [p[grid_rows] for p in (encoded.scale, encoded.offset, encoded.zero_point) if p is not None]


@pytest.mark.parametrize("method", WEIGHT_METHODS, ids=lambda method: method.name)
def test_what_comes_back_is_well_formed_and_always_the_same(method: Method) -> None:
    for config in configs(method):
        for shape in SHAPES:
            weight = gaussian(*shape)
            before = weight.clone()
            encoded = encoded_by(method, weight, config)
            assert torch.equal(weight, before), "the input was changed"
            assert_well_formed(encoded, weight, config)
            decoded = decode(encoded)
            assert decoded.shape == weight.shape
            assert decoded.dtype == torch.float32
            assert bool(decoded.isfinite().all())
            assert_same(encoded, encoded_by(method, weight, config))


@pytest.mark.parametrize("method", WEIGHT_METHODS, ids=lambda method: method.name)
def test_a_row_block_is_coded_as_in_the_whole(method: Method) -> None:
    """Rows may come in any blocks, even one by one, and on any number of threads."""
    threads = torch.get_num_threads()
    for config in configs(method, bits=(2, 4)):
        if config.granularity == "tensor":
            continue
        for shape in ((7, 6, 3, 3), (7, 600), (7, 12_000)):
            weight = gaussian(*shape)
            exponent = exponent_for(float(weight.abs().max()))
            whole = encoded_by(method, weight, config, exponent)
            for rows in (slice(0, 1), slice(1, 5), slice(5, 7)):
                torch.set_num_threads(2)
                try:
                    block = encoded_by(method, weight[rows].contiguous(), config, exponent)
                finally:
                    torch.set_num_threads(threads)
                everything = slice(None)
                for one, other in zip(rows_of(whole, rows, rows), rows_of(block, everything, everything), strict=True):
                    assert torch.equal(one, other)


@pytest.mark.parametrize("shape", [(0, 6), (4, 0), (0, 2, 3, 3), (4, 0, 3, 3), (4, 2, 0, 3)])
@pytest.mark.parametrize("method", WEIGHT_METHODS, ids=lambda method: method.name)
def test_a_weight_without_elements(method: Method, shape: tuple[int, ...]) -> None:
    for config in configs(method, bits=(1, 4)):
        weight = torch.zeros(shape)
        encoded = encoded_by(method, weight, config)
        assert_well_formed(encoded, weight, config)
        assert decode(encoded).shape == weight.shape


@pytest.mark.parametrize("method", WEIGHT_METHODS, ids=lambda method: method.name)
@pytest.mark.parametrize("value", [0.0, -0.0, 0.3, -7e4, 1e-38, 3e38])
def test_a_constant_comes_back(method: Method, value: float) -> None:
    """To float16's precision where the grid has an offset or a zero; no method may lose it or overflow."""
    for config in configs(method, bits=(2, 8)):
        if config.symmetric:
            continue
        weight = torch.full((2, 3, 2, 2), value)
        decoded = decode(encoded_by(method, weight, config))
        assert torch.allclose(decoded, weight, rtol=2e-3, atol=0)


@pytest.mark.parametrize("method", WEIGHT_METHODS, ids=lambda method: method.name)
def test_awkward_weights_decode_to_finite_numbers_within_the_range(method: Method) -> None:
    """One huge value, a dead row, values closer than float16 can tell apart, subnormal and largest numbers."""
    huge, dead, close = gaussian(4, 3, 2, 2), gaussian(4, 3, 2, 2), 1 + 1e-6 * gaussian(4, 3, 2, 2)
    huge[1, 2, 0, 1] = 1e8
    dead[2] = 0
    for weight in (huge, dead, close, 1e-40 * gaussian(4, 3, 2, 2), 2e37 * gaussian(4, 3, 2, 2)):
        largest = float(weight.abs().max())
        for config in configs(method, bits=(1, 2, 4, 8)):
            decoded = decode(encoded_by(method, weight, config))
            assert bool(decoded.isfinite().all())
            assert float(decoded.abs().max()) <= 3 * largest


@pytest.mark.parametrize("method", WEIGHT_METHODS, ids=lambda method: method.name)
def test_more_bits_leave_less_error(method: Method) -> None:
    weight = gaussian(8, 8, 3, 3)
    for grid in GRIDS:
        errors = [
            float((decode(encoded_by(method, weight, method.config(bits=bits, **grid))) - weight).square().mean())
            for bits in (2, 4, 6, 8)
        ]
        assert all(fine < coarse / 4 for coarse, fine in itertools.pairwise(errors))
        assert errors[-1] < 1e-3


@pytest.mark.parametrize("method", WEIGHT_METHODS, ids=lambda method: method.name)
def test_everything_is_made_where_the_weight_lies(method: Method) -> None:
    """A tensor made without a device would be on `meta` here, as it would be on the CPU beside a weight on a GPU."""
    for weight in (gaussian(5, 4, 3, 3), gaussian(5, 12), gaussian(2, 3, 5, 30)):
        for config in configs(method, (1, 2, 4)):
            if weight.shape[1:] == (3, 5, 30) and config.granularity == "group":
                continue
            expected = encoded_by(method, weight, config)
            with torch.device("meta"):
                encoded = encoded_by(method, weight, config)
            assert torch.equal(decode(encoded), decode(expected))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("method", WEIGHT_METHODS, ids=lambda method: method.name)
def test_a_gpu_codes_as_well_as_a_cpu(method: Method) -> None:
    weight = gaussian(16, 8, 3, 3)
    for config in configs(method, (2, 4)):
        here, there = encoded_by(method, weight, config), encoded_by(method, weight.cuda(), config)
        assert there.codes.is_cuda
        assert there.codes.cpu().eq(here.codes).float().mean() > 0.99
