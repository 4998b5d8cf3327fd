"""SQuant against a literal, one-weight-at-a-time reference in exact arithmetic, and against what flips must achieve."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from contexts import context_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qcompress.coding.grids import decode, from_half
from qcompress.methods import squant
from qcompress.methods.squant import Cut, encode, flipped_codes
from qcompress.registry import SquantConfig
from qcompress.types.encoded import Affine

SHAPES = {
    "conv": (6, 5, 3, 3),
    "depthwise": (7, 1, 3, 3),
    "1x1": (5, 23, 1, 1),
    "5x5": (3, 4, 5, 5),
    "linear": (6, 40),
    "conv1d": (4, 6, 7),
    "conv3d": (3, 4, 2, 3, 3),
    "9x9": (2, 3, 9, 9),
}


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def coded(weight: Tensor, **options: object) -> Affine:
    config = SquantConfig(**{"bits": 4, "range": "minmax", **options})  # type: ignore[arg-type]
    return encode(weight, config, context_of(weight))


def stored_positions(weight: Tensor, encoded: Affine) -> np.ndarray:
    """Where the weights lie on the stored grids, in steps from code 0 rounded to 2**-16; float64 [rows, columns]."""
    rows, groups = encoded.scale.shape
    values = weight.numpy().reshape(rows, groups, -1)
    scale = from_half(encoded.scale, encoded.exponent).numpy()[..., None]
    if encoded.zero_point is None:
        assert encoded.offset is not None
        steps = (values - from_half(encoded.offset, encoded.exponent).numpy()[..., None]) / scale
    else:
        steps = values / scale + encoded.zero_point.numpy()[..., None]
    return np.round(steps * np.float32(65536)).astype(np.float64).reshape(weight.shape[0], -1) / 65536


def steps_error(weight: Tensor, encoded: Affine) -> np.ndarray:
    return encoded.codes.numpy().astype(np.float64) - stored_positions(weight, encoded)


class Reference:
    """One row, literally: Python floats hold multiples of 2**-16 exactly."""

    def __init__(self, positions: list[float], bits: int) -> None:
        self.x, self.top = positions, 2**bits - 1
        self.q = [min(max(round(x), 0), self.top) for x in positions]

    def error(self, index: int) -> float:
        return self.q[index] - self.x[index]

    def candidates(self, indices: list[int], total: float) -> list[int]:
        """Those that a flip against the sum's sign would move to their other neighbour, the largest error first."""
        if total < 0:
            fit = [i for i in indices if self.error(i) < 0 and self.x[i] <= self.top and self.q[i] < self.top]
        else:
            fit = [i for i in indices if self.error(i) > 0 and self.x[i] >= 0 and self.q[i] > 0]
        return sorted(fit, key=lambda i: (-abs(self.error(i)), i))

    def flip(self, indices: list[int], allowed: list[int]) -> int | None:
        """Flip what makes the sum over `indices` small; then the nominee for the next stage."""
        total = math.fsum(self.error(i) for i in indices)
        if total == 0:
            return None
        order = self.candidates(allowed, total)
        count = min(round(abs(total)), len(order))
        for i in order[:count]:
            self.q[i] += 1 if total < 0 else -1
        if count >= abs(total):
            return order[count - 1]
        return order[count] if count < len(order) else None

    def run(self, kernel: int, length: int, stages: str) -> list[int]:
        columns = len(self.x)
        nominees = list(range(columns))
        if "K" in stages and kernel > 1:
            cuts = sorted({*range(0, columns, kernel), *range(0, columns, length), columns})
            parts = [list(range(*ends)) for ends in itertools.pairwise(cuts)]
            nominees = [i for part in parts if (i := self.flip(part, part)) is not None]
        if "C" in stages:
            for start in range(0, columns, length):
                block = range(start, min(start + length, columns))
                self.nominated(list(block), [i for i in nominees if i in block])
        return self.q

    def nominated(self, block: list[int], nominees: list[int]) -> None:
        """Stage C: a nominee that was flipped stands beyond its weight, so its error tells which way it can go back."""
        total = math.fsum(self.error(i) for i in block)
        fit = [i for i in nominees if self.error(i) * total > 0 and 0 <= self.x[i] <= self.top]
        fit.sort(key=lambda i: (-abs(self.error(i)), i))
        for i in fit[: round(abs(total))]:
            self.q[i] += 1 if total < 0 else -1


def reference_codes(positions: np.ndarray, bits: int, kernel: int, length: int, stages: str) -> Tensor:
    rows = [Reference(row.tolist(), bits).run(kernel, length, stages) for row in positions]
    return torch.tensor(rows, dtype=torch.uint8)


@pytest.mark.parametrize("preset", [None, "paper"])
@pytest.mark.parametrize("stages", ["E", "EK", "EC", "EKC"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_codes_are_those_of_the_reference(bits: int, shape: tuple[int, ...], stages: str, preset: str | None) -> None:
    weight = gaussian(*shape, seed=bits)
    encoded = coded(weight, bits=bits, stages=stages, preset=preset)
    kernel, columns = math.prod(shape[2:]), math.prod(shape[1:])
    expected = reference_codes(stored_positions(weight, encoded), bits, kernel, columns, stages)
    assert torch.equal(encoded.codes, expected)


def published(weight: Tensor, bits: int, stages: str) -> Tensor:
    """The weight as the paper's code decodes it, in its own formulas: signed codes on a scale that multiplies.

    Scale S = (2**b - 1) / (max - min) and zero point z = round(S min) + 2**(b-1) for each channel; a weight lies at
    S w - z and comes back as (code + z) / S.
    """
    rows = weight.flatten(1).double().numpy()
    half = 2 ** (bits - 1)
    scale = (2**bits - 1) / (rows.max(1, keepdims=True) - rows.min(1, keepdims=True))
    zero_point = np.round(scale * rows.min(1, keepdims=True)) + half
    positions = scale * rows - zero_point
    kernel = math.prod(weight.shape[2:])
    codes = reference_codes(positions + half, bits, kernel, rows.shape[1], stages).double().numpy() - half
    return torch.from_numpy((codes + zero_point) / scale).float().view(weight.shape)


def on_lattice(weight: Tensor, bits: int) -> Tensor:
    """The weight with every channel clipped so that its range is 2**bits - 1 steps that float16 holds, and with every
    value a multiple of 2**-16 of a step: then nothing is rounded but codes and zero point."""
    rows = weight.flatten(1)
    step = torch.pow(2.0, torch.arange(len(rows)).fmod(5) - 4).unsqueeze(1)
    low = -(2**bits - 1) * (0.3 + 0.4 * torch.rand(len(rows), 1, generator=torch.Generator().manual_seed(bits)))
    low = (low * 65536).round() / 65536
    places = (rows * 2**bits / 4 * 65536).round() / 65536
    places = places.clamp(low, low + 2**bits - 1)
    places[:, 1:2], places[:, 4:5] = low, low + 2**bits - 1
    return (places * step).view(weight.shape)


@pytest.mark.parametrize("stages", ["E", "EK", "EC", "EKC"])
@pytest.mark.parametrize("shape", [(9, 12, 3, 3), (7, 1, 3, 3), (6, 40)])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_preset_gives_the_weights_that_the_published_formulas_give(
    bits: int, shape: tuple[int, ...], stages: str
) -> None:
    weight = on_lattice(gaussian(*shape, seed=bits), bits)
    encoded = coded(weight, bits=bits, stages=stages, preset="paper")
    assert torch.equal(decode(encoded), published(weight, bits, stages))


def test_the_preset_has_a_zero_that_channels_of_one_sign_keep_in_range() -> None:
    weight = gaussian(6, 5, 3, 3)
    weight[:, 2] = 0
    weight[0], weight[1] = weight[0].abs() + 1, -weight[1].abs() - 1
    for bits in (2, 4, 8):
        encoded = coded(weight, bits=bits, stages="E", preset="paper")
        assert encoded.zero_point is not None and encoded.offset is None
        zeros = encoded.zero_point.int().flatten()
        assert (int(zeros[0]), int(zeros[1])) == (0, 2**bits - 1)
        assert bool((decode(encoded)[2:, 2] == 0).all())


def test_the_preset_is_overridden_by_what_is_given_and_refuses_our_range() -> None:
    plain = SquantConfig(bits=4, preset="paper")
    assert (plain.form, plain.unit, plain.range, plain.stages) == ("zero-point", "channel", "minmax", "EKC")
    assert SquantConfig(bits=4, preset="paper", symmetric=True).form == "symmetric"
    assert SquantConfig(bits=4, preset="paper", stages="EK", granularity="tensor").stages == "EK"
    assert SquantConfig(bits=4).range == "clip"
    with pytest.raises(ValueError, match="not the published method"):
        SquantConfig(bits=4, preset="paper", range="clip")


@pytest.mark.parametrize("group_size", [3, 6, 9, 12, 18, 15])
@pytest.mark.parametrize("stages", ["EK", "EKC"])
def test_groups_never_mix_scales(group_size: int, stages: str) -> None:
    weight = gaussian(4, 20, 3, 3) * torch.logspace(-2, 2, 20).view(1, 20, 1, 1)
    for preset in (None, "paper"):
        encoded = coded(weight, bits=3, stages=stages, group_size=group_size, preset=preset)
        expected = reference_codes(stored_positions(weight, encoded), 3, 9, group_size, stages)
        assert torch.equal(encoded.codes, expected)


def test_one_grid_for_the_tensor_flips_within_channels_all_the_same() -> None:
    weight = gaussian(6, 5, 3, 3) * torch.logspace(-1, 1, 6).view(6, 1, 1, 1)
    encoded = coded(weight, granularity="tensor")
    positions = stored_positions(weight.reshape(1, -1), encoded).reshape(6, -1)
    assert torch.equal(encoded.codes, reference_codes(positions, 4, 9, 45, "EKC"))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_codes_are_those_of_the_reference_with_ties_and_far_outside(data: st.DataObject) -> None:
    """Positions on a coarse lattice make equal errors and halves; many lie outside the grid."""
    kernel, kernels = data.draw(st.sampled_from([1, 2, 4, 9, 70])), data.draw(st.integers(1, 4))
    bits, stages = data.draw(st.integers(1, 3)), data.draw(st.sampled_from(["E", "EK", "EC", "EKC"]))
    columns = kernel * kernels
    length = data.draw(st.integers(1, columns))
    unit = data.draw(st.sampled_from([1 << 13, 1 << 14, 1]))
    limit = 12 * 65536 // unit
    seed = data.draw(st.integers(0, 2**16))
    drawn = torch.randint(-limit, limit, (3, columns), generator=torch.Generator().manual_seed(seed)) * unit
    codes = flipped_codes(drawn.to(torch.int32), Cut(3, columns, kernel, length, False), bits, stages)
    assert torch.equal(codes, reference_codes(drawn.double().numpy() / 65536, bits, kernel, length, stages))


def test_worked_example() -> None:
    """Errors -.4 -.4 -.3 -.2 sum to -1.3: one flip, of the first of the two largest; the second would be next."""
    positions = (torch.tensor([[0.4, 0.4, 0.3, 0.2]]) * 65536).round().to(torch.int32)
    assert flipped_codes(positions, Cut(1, 4, 4, 4, False), 1, "EKC").tolist() == [[1, 0, 0, 0]]
    assert flipped_codes(positions, Cut(1, 4, 1, 4, False), 1, "EKC").tolist() == [[1, 0, 0, 0]]
    both = positions.repeat(1, 2)
    # Two kernels are left with -.3 each: -.6 in the channel takes one more flip, of the first nominee.
    assert flipped_codes(both, Cut(1, 8, 4, 8, False), 1, "EKC").tolist() == [[1, 1, 0, 0, 1, 0, 0, 0]]


def test_a_flip_that_met_its_sum_exactly_is_the_one_taken_back() -> None:
    """Sums 1, -3/8, -3/8: one flip in the first kernel, then -3/4 are left and taking it back costs least."""
    errors = torch.tensor([[0.375, 0.375, 0.25, 0, -0.25, -0.125, 0, 0, -0.25, -0.125, 0, 0]])
    positions = ((1 - errors) * 65536).to(torch.int32)
    cut = Cut(1, 12, 4, 12, False)
    assert flipped_codes(positions, cut, 2, "EK").tolist() == [[0, *[1] * 11]]
    assert flipped_codes(positions, cut, 2, "EKC").tolist() == [[1] * 12]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_sums_are_small_where_nothing_is_clipped(bits: int) -> None:
    weight = gaussian(16, 24, 3, 3, seed=bits)
    for stages, per_kernel in (("EK", 0.5), ("EKC", 1.0)):
        encoded = coded(weight, bits=bits, stages=stages)
        error = steps_error(weight, encoded).reshape(16, 24, 9)
        assert np.abs(error).max() < 1
        assert np.abs(error.sum(2)).max() <= per_kernel
    assert np.abs(error.sum((1, 2))).max() <= 0.5


@pytest.mark.parametrize("shape", [(8, 300), (8, 40, 3, 3)])
@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_an_input_of_ones_comes_out_within_half_a_step(shape: tuple[int, ...], granularity: str) -> None:
    weight = gaussian(*shape)
    encoded = coded(weight, granularity=granularity)
    error = (decode(encoded).double() - weight.double()).flatten(1).sum(1)
    half = from_half(encoded.scale, encoded.exponent).double().flatten() / 2
    assert bool((error.abs() <= half * 1.001).all())
    rounded = (decode(coded(weight, granularity=granularity, stages="E")).double() - weight.double()).flatten(1).sum(1)
    assert float(rounded.abs().max()) > float(half.max())


def test_stage_k_flips_the_largest_errors_of_the_sums_sign() -> None:
    weight = gaussian(8, 16, 3, 3)
    rounded, flipped = (coded(weight, bits=3, stages=stages) for stages in ("E", "EK"))
    error = steps_error(weight, rounded).reshape(-1, 9)
    moved = (rounded.codes.int() - flipped.codes.int()).numpy().reshape(-1, 9)
    total = error.sum(1)
    assert (np.abs(moved).sum(1) == np.round(np.abs(total))).all()
    assert (moved * np.sign(total)[:, None] >= 0).all()
    for kernel_error, kernel_moved, sign in zip(error, moved, np.sign(total), strict=True):
        if kernel_moved.any():
            assert (kernel_error * sign)[kernel_moved != 0].min() >= (kernel_error * sign)[kernel_moved == 0].max()


def test_neighbours_make_up_for_a_clipped_weight() -> None:
    """One weight 2.2 steps above the grid: two others go up, and what is left is within half a step."""
    positions = torch.full((1, 9), 1.25)
    positions[0, 4] = 5.2
    fixed = (positions * 65536).round().to(torch.int32)
    plain, flipped = (flipped_codes(fixed, Cut(1, 9, 9, 9, False), 2, stages) for stages in ("E", "EK"))
    assert plain.tolist() == [[1, 1, 1, 1, 3, 1, 1, 1, 1]]
    assert abs(float((flipped - positions).sum())) <= 0.5
    assert int(flipped[0, 4]) == 3


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("symmetric", [False, True])
def test_clipped_channels_sum_right_all_the_same(bits: int, symmetric: bool) -> None:
    """Heavy tails, a least-squares range: sums over channels still come out within half a step."""
    for shape in ((8, 500), (8, 32, 3, 3)):
        weight = gaussian(*shape) ** 3
        encoded = coded(weight, bits=bits, range="clip", symmetric=symmetric)
        error = (decode(encoded).double() - weight.double()).flatten(1).sum(1)
        half = from_half(encoded.scale, encoded.exponent).abs().double().flatten() / 2
        assert bool((error.abs() <= half * 1.01).all())


@pytest.mark.parametrize("granularity", ["channel", "tensor", "group"])
def test_clip_keeps_the_size_of_convolutions(granularity: str) -> None:
    """What is coded has all of the weight in it, up to what flips take; the least-squares grid alone has less."""
    weight = gaussian(16, 32, 3, 3)
    size = {"group_size": 72} if granularity == "group" else {}
    config = {"bits": 2, "range": "clip", "granularity": granularity, **size}

    def share(values: Tensor) -> float:
        inner = values - values.mean((2, 3), keepdim=True)
        own = weight - weight.mean((2, 3), keepdim=True)
        return float((inner * own).sum() / own.square().sum())

    assert share(decode(coded(weight, stages="E", **config))) == pytest.approx(1, abs=0.02)
    assert share(decode(coded(weight.flatten(1), stages="E", **config)).view(weight.shape)) < 0.92


def test_clip_costs_no_more_error_than_the_size_it_keeps() -> None:
    """If v leaves the share e of w unexplained, the least error of a multiple of v that has all of w is e / (1 - e)."""
    weight = gaussian(16, 32, 3, 3) + torch.linspace(-3, 3, 16).view(16, 1, 1, 1)
    inner = weight - weight.mean((1, 2, 3), keepdim=True)

    def relative_error(values: Tensor) -> float:
        return float((decode(coded(values, bits=2, range="clip", stages="E")) - values).square().sum())

    unexplained = relative_error(weight.flatten(1)) / float(inner.square().sum())
    stretched = relative_error(weight) / float(inner.square().sum())
    assert stretched < 1.05 * unexplained / (1 - unexplained)


def test_clip_keeps_the_sums_of_kernels() -> None:
    """Only what varies within a kernel is made up for: means were right already."""
    weight = gaussian(16, 32, 3, 3) + 0.7 * gaussian(16, 32, 1, 1)
    sums = weight.sum((2, 3))
    kept = decode(coded(weight, bits=2, range="clip")).sum((2, 3))
    assert float((kept * sums).sum() / sums.square().sum()) == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("options", [{"range": "minmax"}, {"range": "clip"}, {"preset": "paper"}], ids=str)
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_zeros_and_constants_come_back(bits: int, options: dict[str, str], symmetric: bool) -> None:
    for value in (0.0, 0.7, -0.3, 1e-30):
        weight = torch.full((3, 4, 3, 3), value)
        # Without an offset a scale is off by its rounding, which the flips would make up for in the sums.
        stages = "E" if symmetric or "preset" in options else "EKC"
        decoded = decode(coded(weight, bits=bits, symmetric=symmetric, stages=stages, **options))
        assert torch.allclose(decoded, weight, rtol=2.0**-10, atol=1e-9 * abs(value) if value else 1e-6)


def test_permuting_input_channels_permutes_the_codes() -> None:
    weight, order = gaussian(5, 12, 3, 3), torch.randperm(12, generator=torch.Generator().manual_seed(1))
    straight, permuted = coded(weight), coded(weight[:, order].contiguous())
    assert torch.equal(straight.codes.view(5, 12, 9)[:, order], permuted.codes.view(5, 12, 9))


@pytest.mark.parametrize("options", [{}, {"range": "clip"}, {"preset": "paper"}], ids=str)
@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_chunks_do_not_show(options: dict[str, str], granularity: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = gaussian(11, 8, 3, 3)
    whole = coded(weight, bits=3, granularity=granularity, **options)
    monkeypatch.setattr(squant, "CHUNK_WEIGHTS", 200)
    parts = coded(weight, bits=3, granularity=granularity, **options)
    assert torch.equal(whole.codes, parts.codes)
    assert torch.equal(whole.scale, parts.scale)


def test_ranking_by_pairs_is_ranking_by_sorting(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = (gaussian(4, 6, 5, 5) * 3).round()
    pairs = coded(weight, bits=2)
    monkeypatch.setattr(squant, "PAIRWISE_MAX", 1)
    assert torch.equal(coded(weight, bits=2).codes, pairs.codes)


def test_rows_too_wide_for_keys_of_32_bits() -> None:
    weight = gaussian(1, 5_000, 3, 3)
    encoded = coded(weight)
    assert torch.equal(encoded.codes, reference_codes(stored_positions(weight, encoded), 4, 9, 45_000, "EKC"))
