from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import stats

from qcompress.coding.grids import decode_rows, take_rows
from qcompress.report.counts import Counts
from qcompress.report.document import LayerFigures
from qcompress.report.figures import SAMPLE, LayerMeter, sample_stride, unclipped_range
from qcompress.types.encoded import Affine

torch.set_num_threads(1)


def measure_decoded(
    weight: torch.Tensor,
    decoded: torch.Tensor,
    bits: int | None = None,
    *,
    counts: Counts | None = None,
    within: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> LayerFigures:
    """The figures of a whole tensor, added as one block."""
    meter = LayerMeter(weight.numel(), bits)
    meter.add(weight, decoded, counts, within=within)
    return meter.result()


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def quarter_steps(weight: torch.Tensor) -> torch.Tensor:
    return (weight * 4).round() / 4


def assert_figures_of(weight: torch.Tensor, decoded: torch.Tensor) -> None:
    """The figures against their definitions, in float64 and by libraries, for a tensor that is not sampled."""
    figures = measure_decoded(weight, decoded)
    w, d = weight.double().numpy().ravel(), decoded.double().numpy().ravel()
    energy, error = float((w**2).sum()), float(((w - d) ** 2).sum())
    expected = error / energy if energy else 0.0 if error == 0 else math.inf
    assert figures.relative_error == pytest.approx(expected, rel=1e-5)
    assert figures.sqnr_db == (math.inf if error == 0 else pytest.approx(-10 * math.log10(expected), abs=1e-4))
    assert figures.max_error == pytest.approx(np.abs(w - d).max(), rel=1e-6)
    assert figures.range == (w.min(), w.max())
    first, third = np.quantile(w, [0.25, 0.75])
    low, high = first - 1.5 * (third - first), third + 1.5 * (third - first)
    assert figures.fences == pytest.approx((low, high), rel=1e-12, abs=1e-12 * float(np.abs(w).max()))
    assert figures.outlier_share == np.count_nonzero((w < low) | (w > high)) / w.size
    if w.min() == w.max():
        assert figures.kurtosis is None
    else:
        assert figures.kurtosis == pytest.approx(stats.kurtosis(w, fisher=False), rel=1e-3)
    for values, histogram in ((w, figures.histogram_before), (d, figures.histogram_after)):
        edges = np.linspace(w.min(), w.max(), 65)
        slow = [0] * 64
        for value in values:
            slow[sum(1 for edge in edges[1:64] if edge <= value)] += 1
        assert histogram == tuple(slow)
    assert not figures.sampled


finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
weights = st.integers(1, 4).flatmap(
    lambda columns: st.lists(st.lists(finite, min_size=columns, max_size=columns), min_size=1, max_size=12)
)


@settings(deadline=None, max_examples=60)
@given(weights.filter(lambda rows: 1e-30 < np.abs(rows).max() < 1e38))
@example([[1e38, 1.0, -1.0]])
@example([[1e-30, 2e-30, 0.0]])
@example([[0.0, 0.0], [0.0, 1.0]])
def test_figures_of_any_weight_follow_their_definitions(rows: list[list[float]]) -> None:
    weight = torch.tensor(rows, dtype=torch.float32)
    step = float(weight.abs().max()) / 3
    assert_figures_of(weight, ((weight / step).round() * step).float())


def test_figures_of_a_normal_tensor_follow_their_definitions() -> None:
    weight = normal(40, 50)
    weight[0, 0] = 50
    assert_figures_of(weight, quarter_steps(weight))


def test_values_closer_together_than_their_mean_resolves() -> None:
    weight = torch.tensor([[1.0, 1 + 2**-23, 1 + 2**-22, 1 + 2**-23, 1 + 2**-20]])
    assert_figures_of(weight, torch.ones_like(weight))


@pytest.mark.parametrize("least", [1e-45, 1e-42, 1e-38])
def test_the_smallest_numbers_that_there_are(least: float) -> None:
    weight = torch.tensor([[0.0, least, least, -least, 2 * least]])
    figures = measure_decoded(weight, weight)
    in_steps = weight.double().numpy().ravel() / 2**-149
    assert figures.kurtosis == pytest.approx(stats.kurtosis(in_steps, fisher=False), rel=1e-6)
    assert (figures.relative_error, figures.max_error) == (0, 0)


@pytest.mark.parametrize("value", [0.0, 0.1, -3e38])
def test_a_constant_tensor_that_is_met_exactly(value: float) -> None:
    weight = torch.full((5, 7), value)
    assert_figures_of(weight, weight.clone())
    assert measure_decoded(weight, weight.clone()).sqnr_db == math.inf


def test_no_figure_is_a_negative_zero() -> None:
    for weight, decoded in (([-0.0, 1.0], [-0.0, 1.0]), ([-0.0, 0.0], [0.0, -0.0]), ([1.0, 2.0], [0.0, 0.0])):
        figures = measure_decoded(torch.tensor([weight]), torch.tensor([decoded]))
        for value in (figures.max_error, figures.relative_error, figures.sqnr_db):
            assert value is not None
            assert math.copysign(1, value) == 1


def test_zeros_that_decode_to_something_else_are_not_exact() -> None:
    figures = measure_decoded(torch.zeros(2, 2), torch.full((2, 2), 1e-6))
    assert figures.relative_error == math.inf
    assert figures.sqnr_db == -math.inf


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_never_looks_good(bad: float) -> None:
    weight = normal(4, 8)
    weight[1, 2] = bad
    for figures in (measure_decoded(weight, normal(4, 8)), measure_decoded(normal(4, 8), weight)):
        assert figures.sqnr_db is not None
        assert not figures.sqnr_db > -math.inf
    assert measure_decoded(weight, weight).range is None


def test_no_weights_have_no_figures() -> None:
    figures = measure_decoded(torch.zeros(0, 4), torch.zeros(0, 4))
    assert figures.relative_error is None
    assert figures.range is None


def test_errors_of_overflowing_difference_are_finite() -> None:
    weight = torch.tensor([[3e38, -3e38]])
    assert measure_decoded(weight, -weight).relative_error == pytest.approx(4)


def test_long_sums_keep_five_digits() -> None:
    # A naive float32 sum of 2**21 equal squares is off by far more than 1e-5.
    weight = torch.full((2**5, 2**16), 0.1)
    assert measure_decoded(weight, weight * 0.9).relative_error == pytest.approx(0.01, rel=1e-5)


@settings(deadline=None, max_examples=20)
@given(st.lists(st.integers(1, 150), min_size=1, max_size=5), st.booleans())
def test_blocks_and_their_order_do_not_matter(sizes: list[int], backwards: bool) -> None:
    columns = 2111
    rows = sum(sizes)
    weight = normal(rows, columns)
    decoded = quarter_steps(weight).clamp(-1, 1)
    codes = ((decoded + 1) * 4).to(torch.uint8)
    bounds = (torch.full((rows, 1), -1.125), torch.full((rows, 1), 1.125))
    whole = measure_decoded(weight, decoded, 4, counts=np.bincount(codes.numpy().ravel(), minlength=16), within=bounds)
    meter = LayerMeter(weight.numel(), 4)
    starts = np.cumsum([0, *sizes[:-1]]).tolist()
    blocks = list(zip(starts, sizes, strict=True))
    for start, size in reversed(blocks) if backwards else blocks:
        part = slice(start, start + size)
        counts = np.bincount(codes[part].numpy().ravel(), minlength=16)
        meter.add(
            weight[part],
            decoded[part],
            counts,
            row=start if backwards else None,
            within=(bounds[0][part], bounds[1][part]),
        )
    cut = meter.result()
    for name in ("range", "max_error", "levels_used", "entropy", "clipped_share", "histogram_before", "histogram_after",
                 "kurtosis", "outlier_share", "sampled"):  # fmt: skip
        assert getattr(cut, name) == getattr(whole, name), name
    assert cut.relative_error == pytest.approx(whole.relative_error, rel=2e-6)


@pytest.mark.parametrize("shape", [(512, 64 * 9), (1024, 4096), (3, 2**19), (7, 100003)])
def test_the_sample_meets_every_column_equally(shape: tuple[int, int]) -> None:
    rows, columns = shape
    numel = rows * columns
    stride = sample_stride(numel)
    taken = np.arange(0, numel, stride)
    assert SAMPLE / 8 < len(taken) <= SAMPLE
    met = np.bincount(taken % columns, minlength=columns)
    assert met.max() - met.min() <= 1


def test_a_sampled_tensor_says_so_and_stays_close_to_the_whole() -> None:
    weight = normal(1024, 1024, seed=3)
    figures = measure_decoded(weight, quarter_steps(weight))
    assert figures.sampled
    assert figures.histogram_before is not None
    assert sum(figures.histogram_before) == -(-weight.numel() // sample_stride(weight.numel()))
    # 0.698 % of a normal distribution lies beyond; the bound is six standard deviations of the sample.
    assert figures.outlier_share == pytest.approx(0.00698, abs=6 * math.sqrt(0.007 / (SAMPLE / 3)))
    assert figures.kurtosis == pytest.approx(3, abs=0.15)
    few = weight[: SAMPLE // 1024]
    assert not measure_decoded(few, few).sampled


def test_a_missing_a_doubled_and_a_surplus_block_are_refused() -> None:
    def meter_of(*rows: int | None) -> LayerMeter:
        meter = LayerMeter(2 * 12, 1)
        for row in rows:
            meter.add(normal(3, 4), normal(3, 4), np.array([6, 6]), row=row)
        return meter

    with pytest.raises(ValueError, match="12 of 24 weights"):
        meter_of(0).result()
    with pytest.raises(ValueError, match="36 of 24 weights"):
        meter_of(0, 3, 0).result()
    with pytest.raises(ValueError, match="rows 6 to 9"):
        meter_of(None, None, None)


def test_counts_of_another_width_are_refused() -> None:
    with pytest.raises(ValueError, match="codes of 2 bits"):
        LayerMeter(12, 2).add(normal(3, 4), normal(3, 4), np.array([6, 6]))


def test_the_input_is_not_changed() -> None:
    weight, decoded = normal(9, 9), normal(9, 9, seed=1)
    before = weight.clone(), decoded.clone()
    measure_decoded(weight, decoded, within=(torch.zeros(1, 1), torch.ones(1, 1)))
    assert torch.equal(weight, before[0])
    assert torch.equal(decoded, before[1])


def affine(scale: list[list[float]], **grid: object) -> Affine:
    rows = len(scale)
    codes = torch.zeros(rows, 4 * len(scale[0]), dtype=torch.uint8)
    return Affine(
        codes=codes,
        bits=2,
        scale=torch.tensor(scale).half(),
        exponent=-3,
        shape=tuple(codes.shape),
        **grid,  # type: ignore[arg-type]
    )


GRIDS: list[dict[str, object]] = [
    {"zero_point": torch.tensor([[1, 3], [0, 2]], dtype=torch.uint8)},
    {"offset": torch.tensor([[-1.0, 2.0], [0.0, 9.0]]).half()},
    {"convention": "narrow"},
    {"convention": "full"},
    {"convention": "mid-rise"},
]


@pytest.mark.parametrize("grid", GRIDS)
def test_the_unclipped_range_lies_half_a_step_beyond_the_levels(grid: dict[str, object]) -> None:
    encoded = affine([[1.0, -2.0], [0.5, 8.0]], **grid)
    ends = []
    for code in (0, 3):
        encoded.codes.fill_(code)
        ends.append(decode_rows(encoded).reshape(2, 2, 4)[..., 0])
    low, high = unclipped_range(encoded)
    half_step = encoded.scale.float().abs() / 8 / 2
    assert torch.equal(low, torch.minimum(*ends) - half_step)
    assert torch.equal(high, torch.maximum(*ends) + half_step)


@pytest.mark.parametrize("grid", GRIDS)
def test_the_levels_are_those_of_the_mean_grid_however_the_tensor_is_cut(grid: dict[str, object]) -> None:
    encoded = affine([[1.0, -2.0], [0.5, 8.0]], **grid)
    levels = np.zeros((4, 4))
    for code in range(4):
        encoded.codes.fill_(code)
        levels[code] = decode_rows(encoded).double().reshape(4, 4)[:, 0].numpy()
    # A negative scale counts its levels downwards.
    expected = np.sort(levels, axis=0).mean(axis=1)
    weight = decode_rows(encoded)
    for cuts in ([0, 2], [0, 1, 2]):
        meter = LayerMeter(weight.numel(), 2)
        for start, end in itertools.pairwise(cuts):
            low, high = unclipped_range(take_rows(encoded, start, end))
            meter.add(weight[start:end], weight[start:end], None, within=(low, high))
        assert meter.result().levels == pytest.approx(expected, abs=1e-6)


def test_levels_at_zero_are_zero_and_more_levels_than_bins_are_left_out() -> None:
    weight = normal(4, 8)
    step = 0.1
    for bits, middle in ((1, 1), (3, 3), (6, 31)):
        low, high = -(middle + 0.5) * step, (2**bits - middle - 0.5) * step
        figures = measure_decoded(weight, weight, bits, within=(torch.tensor([[low]]), torch.tensor([[high]])))
        assert figures.levels is not None
        assert (len(figures.levels), figures.levels[middle]) == (2**bits, 0.0)
        assert figures.levels == pytest.approx([step * (code - middle) for code in range(2**bits)], rel=1e-4)
    within = (torch.tensor([[-1.0]]), torch.tensor([[1.0]]))
    assert measure_decoded(weight, weight, 7, within=within).levels is None
    assert measure_decoded(weight, weight, 2).levels is None
    assert measure_decoded(weight, weight, within=within).levels is None


def test_clipped_weights_are_counted_grid_by_grid() -> None:
    weight = torch.tensor([[-3.0, 0.0, 3.0, 3.0], [-3.0, 0.0, 3.0, 5.0]])
    low, high = torch.tensor([[-3.0, -9.0], [-2.5, -9.0]]), torch.tensor([[9.0, 2.5], [9.0, 5.0]])
    # Row 0: both of its second group; row 1: only its first value; a weight on the bound is not clipped.
    assert measure_decoded(weight, weight, within=(low, high)).clipped_share == 3 / 8
    one_grid = (torch.tensor([[-2.9]]), torch.tensor([[4.0]]))
    assert measure_decoded(weight, weight, within=one_grid).clipped_share == 3 / 8
    assert measure_decoded(weight, weight).clipped_share is None


@pytest.mark.parametrize("beyond", [-9.0, 9.0])
def test_one_clipped_end_of_one_grid_is_counted(beyond: float) -> None:
    weight = torch.zeros(3, 8)
    weight[1, 2] = beyond
    within = (torch.full((3, 1), -1.0), torch.full((3, 1), 1.0))
    figures = measure_decoded(weight, weight.clamp(-1, 1), within=within)
    assert figures.clipped_share == 1 / 24
