"""What holds for every method that encodes one weight, whatever it does with it."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from contexts import context_of
from methods.well_formed import assert_same, assert_well_formed
from solvers.second_order import correlated, moments
from torch import Tensor

from qcompress.coding.grids import decode
from qcompress.registry import METHODS, ClusterConfig, GridConfig, Method, RdConfig, SquantConfig
from qcompress.solvers.hessian import LEAST_EXPONENT, grid_exponent
from qcompress.types.config import MethodConfig, Rows
from qcompress.types.encoded import Affine, Coded
from qcompress.types.run import EncodeContext, Gram

ENCODING = [method for method in METHODS.values() if method.encodes]
WEIGHT_METHODS = [m for m in ENCODING if issubclass(m.config, GridConfig) and m.needs == "weights"]
CLUSTERING = [method for method in ENCODING if method.family == "cluster"]

OPTIONS: dict[str, list[dict[str, Any]]] = {
    "rtn": [
        {"symmetric": True, "convention": convention}
        for convention in ("full-range", "narrow", "aimet", "gptq", "mid-rise")
    ],
    "mse": [{"effort": "high"}, {"search": "grid"}, {"search": "grid", "symmetric": True}],
    "squant": [{"preset": "paper"}, {"range": "minmax"}, {"range": "minmax", "symmetric": True}, {"stages": "E"}],
    "hqq": [{"round_zero": True}],
    "kmeans": [{"init": "density"}, {"zero": True}],
    "learned": [{"recentre": False}],
}
"""What a method has to choose beyond its grid."""
QUICK: dict[str, dict[str, Any]] = {"adaround": {"iterations": 20}}
"""What makes a method quick."""

GRIDS: list[dict[str, Any]] = [
    {"granularity": "tensor"},
    {"granularity": "channel"},
    {"group_size": 6},
    {"group_size": 5},
]

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


def some_configs(method: Method, rows: Rows) -> Iterator[MethodConfig]:
    """A few configs of every kind that a weight of shape `rows` can have; a kind of its own has a row to add here."""
    kinds: dict[type[MethodConfig], list[dict[str, Any]]] = {
        GridConfig: [
            {"bits": bits, **grid, **choice}
            for bits, grid, choice in itertools.product((1, 3, 8), GRIDS, ({}, {"symmetric": True}))
        ],
        ClusterConfig: [
            {"bits": bits, **table}
            for bits, table in itertools.product(
                (1, 3, 9),
                (
                    *({}, {"granularity": "channel"}, {"group_size": 2}, {"codebook": "int8"}, {"codebook": "f32"}),
                    *({"dim": 2}, {"dim": 2, "group_size": 2, "codebook": "int8"}),
                ),
            )
        ],
        RdConfig: [{"step": step, "effort": effort} for step in (0.01, 0.5) for effort in ("fast", "normal", "high")],
    }
    (options,) = [options for kind, options in kinds.items() if issubclass(method.config, kind)]
    for choice in ({}, *OPTIONS.get(method.name, [])):
        for one in options:
            try:
                config = method.config(**{**one, **choice, **QUICK.get(method.name, {})})
            except ValueError:
                # Which options exclude each other is for the tests of the configs.
                continue
            if config.refuse(rows) is None:
                yield config


def context_for(method: Method, weight: Tensor, config: MethodConfig, **parts: Any) -> EncodeContext:
    """What the method may draw on, as the registry says that it needs it."""
    if method.needs == "calibration":
        clean = correlated(weight[0].numel(), 200)
        noisy = clean + 0.01 * correlated(weight[0].numel(), 200, seed=1)
        cross = clean.transpose(1, 2) @ noisy / 200
        parts["gram"] = Gram(moments(noisy), cross, noisy.mean(1), clean.mean(1), 200)
    if method.representatives:
        parts["representatives"] = torch.linspace(
            float(weight.min()), float(weight.max()), 2 ** min(config.code_bits, 4)
        )
    return context_of(weight, **parts)


def encode_with(method: Method, weight: Tensor, config: MethodConfig, **parts: Any) -> Coded:
    """The codes, by a context of its own: equal calls draw equal random numbers."""
    encoded = method.load_encode()(weight, config, context_for(method, weight, config, **parts))
    assert isinstance(encoded, Coded)
    return encoded


def encoded_by(method: Method, weight: Tensor, config: Any, context: EncodeContext | None = None) -> Affine:
    encoded = method.load_encode()(weight, config, context or context_of(weight))
    assert isinstance(encoded, Affine)
    return encoded


def rows_of(encoded: Affine, grid_rows: slice, rows: slice) -> list[Tensor]:
    parts = [encoded.codes[rows]]
    return parts + [p[grid_rows] for p in (encoded.scale, encoded.offset, encoded.zero_point) if p is not None]


@pytest.mark.parametrize("method", METHODS.values(), ids=lambda method: method.name)
def test_a_module_holds_the_functions_that_the_registry_names(method: Method) -> None:
    module = vars(importlib.import_module(method.module or f"qcompress.methods.{method.name}"))
    assert ("encode" in module, "fit" in module) == (method.encodes, method.fits)
    assert method.encodes or method.fits
    assert not method.encodes or module["encode"] is method.load_encode()
    assert not method.fits or module["fit"] is method.load_fit()


@pytest.mark.parametrize("method", ENCODING, ids=lambda method: method.name)
def test_a_weight_is_encoded_as_its_config_declares_and_always_the_same(method: Method) -> None:
    for shape in ((6, 4, 3, 3), (6, 12), (1, 6)):
        weight = gaussian(*shape)
        before = weight.clone()
        found = list(some_configs(method, shape))
        assert found
        for config in found:
            encoded = encode_with(method, weight, config)
            assert torch.equal(weight, before), "the input was changed"
            assert_well_formed(encoded, shape, config)
            assert encoded.axis == (0,)
            decoded = decode(encoded)
            assert (decoded.shape, decoded.dtype) == (shape, torch.float32)
            assert bool(decoded.isfinite().all())
            assert_same(encoded, encode_with(method, weight, config))


@pytest.mark.parametrize("method", ENCODING, ids=lambda method: method.name)
def test_zeros_constants_and_numbers_of_any_size_stay_finite(method: Method) -> None:
    one = gaussian(6, 12)
    huge, dead = one.clone(), one.clone()
    huge[1, 5], dead[2] = 1e8, 0
    for weight in (0 * one, torch.full((6, 12), -0.3), huge, dead, 1e-40 * one, 2e37 * one, 1 + 1e-6 * one):
        for config in some_configs(method, (6, 12)):
            encoded = encode_with(method, weight, config)
            assert_well_formed(encoded, (6, 12), config)
            decoded = decode(encoded)
            assert bool(decoded.isfinite().all())
            # What works from second moments keeps its scales normal numbers of float32, above a weight of zeros.
            least = 2.0**LEAST_EXPONENT if method.needs == "calibration" else 0.0
            assert float(decoded.abs().max()) <= 3 * float(weight.abs().max()) + least


@pytest.mark.parametrize("method", [m for m in ENCODING if m.needs == "calibration"], ids=lambda method: method.name)
def test_tiny_weights_have_the_grids_that_a_live_run_gives_them(method: Method) -> None:
    """The least scale stays a normal number of float32, wherever the second moments come from."""
    for weight in (torch.zeros(6, 12), 1e-36 * gaussian(6, 12)):
        for config in some_configs(method, (6, 12)):
            encoded = encode_with(method, weight, config)
            assert isinstance(encoded, Affine) and encoded.exponent == grid_exponent(weight, config)


@pytest.mark.parametrize("method", CLUSTERING, ids=lambda method: method.name)
def test_weighed_codebooks_are_well_formed_and_always_the_same(method: Method) -> None:
    """By sensitivities of the columns, or of each group of channels; some count nothing."""
    weight = gaussian(6, 12)
    columns, groups = torch.arange(12), torch.rand(3, 12, generator=torch.Generator().manual_seed(0))
    for config in some_configs(method, (6, 12)):
        for sensitivity in (columns, groups):
            encoded = encode_with(method, weight, config, sensitivity=sensitivity.double())
            assert_well_formed(encoded, (6, 12), config)
            assert_same(encoded, encode_with(method, weight, config, sensitivity=sensitivity.double()))


@pytest.mark.parametrize("method", WEIGHT_METHODS, ids=lambda method: method.name)
def test_what_comes_back_is_well_formed_and_always_the_same(method: Method) -> None:
    for config in configs(method):
        for shape in SHAPES:
            weight = gaussian(*shape)
            before = weight.clone()
            encoded = encoded_by(method, weight, config)
            assert torch.equal(weight, before), "the input was changed"
            assert_well_formed(encoded, tuple(weight.shape), config)
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
            context = context_of(weight)
            whole = encoded_by(method, weight, config, context)
            for rows in (slice(0, 1), slice(1, 5), slice(5, 7)):
                torch.set_num_threads(2)
                try:
                    block = encoded_by(method, weight[rows].contiguous(), config, context)
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
        assert_well_formed(encoded, tuple(weight.shape), config)
        assert decode(encoded).shape == weight.shape


@pytest.mark.parametrize("method", WEIGHT_METHODS, ids=lambda method: method.name)
@pytest.mark.parametrize("value", [0.0, -0.0, 0.3, -7e4, 1e-38, 3e38])
def test_a_constant_comes_back(method: Method, value: float) -> None:
    """To float16's precision where the grid has an offset or a zero; no method may lose it or overflow."""
    for config in configs(method, bits=(2, 8)):
        if config.symmetric:
            continue
        if isinstance(config, SquantConfig) and config.form == "zero-point":
            # Its flips make up in the sums for what the rounding of the scale does to every weight.
            config = config.changed(stages="E")
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


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("method", WEIGHT_METHODS, ids=lambda method: method.name)
def test_a_shorter_last_group_is_coded_as_by_itself(method: Method, symmetric: bool) -> None:
    """So are the whole groups before it; the stages of SQuant, too, keep to groups of a plain matrix."""
    if not issubclass(method.config, GridConfig) or (symmetric and method.name == "hqq"):
        pytest.skip("has no groups of a row" if not symmetric else "has no symmetric grid")
    weight = gaussian(7, 83)
    for bits, size in itertools.product((2, 4), (16, 82, 100)):
        config = method.config(bits=bits, group_size=size, symmetric=symmetric)
        whole = 83 - 83 % size
        parts = [part for part in (weight[:, :whole], weight[:, whole:]) if part.numel()]
        alone = [decode(encoded_by(method, part.contiguous(), config)) for part in parts]
        assert torch.equal(decode(encoded_by(method, weight, config)), torch.cat(alone, 1))


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
