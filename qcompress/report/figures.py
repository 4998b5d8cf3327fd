"""The figures of one tensor are gathered here row block by row block, while the block is still in the cache.

Range, errors, clipping and the histogram of codes cover every weight. Quartiles, kurtosis and histograms cover a
sample: every weight up to SAMPLE of them, else a fixed stride through the weights in the order of the rows. Neither
the sample nor anything but the last bits of a sum depends on how the tensor was cut into blocks.
"""

from __future__ import annotations

import math
import platform
import resource
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qcompress.artifact.entry import Entry, part_name
from qcompress.coding.grids import exponent_of, from_half, middle
from qcompress.report.counts import Counts, measure_counts
from qcompress.report.document import BINS, LayerFigures, LayerReport
from qcompress.types import VERSION
from qcompress.types.encoded import Affine, Coded
from qcompress.types.plan import Decision
from qcompress.types.ranks import World
from qcompress.types.run import Clock, RunFigures

Sample: TypeAlias = NDArray[Any]

SAMPLE = 2**15
"""Weights that quartiles, kurtosis and histograms look at, at most."""

RUN = 1024
"""Squares that are summed in float32."""

ROUNDING = 1e-5
"""A level nearer to zero than this share of a step is zero."""

SQUARES = (1e-15, 1e15)
"""Between these ends a largest weight has a square that float32 holds."""


class _Block(NamedTuple):
    """What one block of rows adds; `ends` are the mean lowest and highest level of its grids."""

    weights: int
    energy: float
    error_energy: float
    low: float
    high: float
    max_error: float
    clipped: int | None
    ends: tuple[float, float] | None
    counts: Counts | None


class LayerMeter:
    """Adds up what happened to one tensor of `numel` weights whose codes have `bits` bits.

    Blocks may come from several threads and in any order if each names its first row.
    """

    def __init__(self, numel: int, bits: int | None = None) -> None:
        self.numel = numel
        self.bits = bits
        self._stride = sample_stride(numel)
        size = -(-numel // self._stride)
        self._before = np.empty(size, np.float32)
        self._after = np.empty(size, np.float32)
        self._blocks: list[_Block] = []
        self._rows = 0

    def add(
        self,
        weight: Tensor,
        decoded: Tensor,
        counts: Counts | None,
        *,
        row: int | None = None,
        within: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """Count one block of rows.

        weight, decoded  float32 [rows, columns], on the CPU; not changed
        counts           int64 [2**bits], how often each code occurs in the block; None: not known
        row              the block's first row within the tensor; None: right after the blocks added so far
        within           float32 [1 or rows, groups] twice: lowest and highest weight that is not clipped, as
                         `unclipped_range` gives them; None: not known
        """
        if counts is not None and self.bits is not None and len(counts) != 2**self.bits:
            raise ValueError(f"{len(counts)} counts for codes of {self.bits} bits")
        rows, columns = weight.shape
        first = self._rows if row is None else row
        if (first + rows) * columns > self.numel:
            raise ValueError(f"rows {first} to {first + rows} of {columns} in a tensor of {self.numel} weights")
        self._rows = first + rows
        if not weight.numel():
            return
        flat, flat_decoded = weight.reshape(-1), decoded.reshape(-1)
        self._take_sample(first * columns, flat, flat_decoded)
        grids = within[0].shape if within is not None else (1, 1)
        by_grid = weight.reshape(*grids, -1)
        lowest, highest = by_grid.amin(2), by_grid.amax(2)
        low, high = float(lowest.amin()), float(highest.amax())
        error_energy, max_error = _error(flat, flat_decoded)
        clipped = None
        if within is not None:
            any_clipped = bool((lowest < within[0]).any()) or bool((highest > within[1]).any())
            clipped = _clipped(by_grid, *within) if any_clipped else 0
        self._blocks.append(
            _Block(
                weights=weight.numel(),
                energy=_energy(flat, max(-low, high)),
                error_energy=error_energy,
                low=low,
                high=high,
                max_error=max_error,
                clipped=clipped,
                ends=None if within is None else _mean_ends(within, self.bits),
                counts=counts,
            )
        )

    def _take_sample(self, position: int, flat: Tensor, flat_decoded: Tensor) -> None:
        start = -position % self._stride
        place = (position + start) // self._stride
        taken = flat[start :: self._stride]
        self._before[place : place + len(taken)] = taken.numpy()
        self._after[place : place + len(taken)] = flat_decoded[start :: self._stride].numpy()

    def result(self, counts: Counts | None = None) -> LayerFigures:
        """The figures of the whole tensor. Raises ValueError unless every weight was added once.

        counts  how often each code of the whole tensor occurs, where the blocks could not say
        """
        blocks = self._blocks
        added = sum(block.weights for block in blocks)
        if added != self.numel:
            raise ValueError(f"{added} of {self.numel} weights were added")
        if not self.numel:
            return LayerFigures()
        energy = math.fsum(block.energy for block in blocks)
        error_energy = math.fsum(block.error_energy for block in blocks)
        codes = measure_counts(*([counts] if counts is not None else [block.counts for block in blocks]))
        figures = LayerFigures(
            relative_error=_relative(error_energy, energy),
            max_error=float(np.max([block.max_error for block in blocks])),
            levels=self._levels(),
            clipped_share=_share([block.clipped for block in blocks], self.numel),
            sampled=self._stride > 1,
            levels_used=codes.levels_used,
            entropy=codes.entropy,
        )
        low, high = float(np.min([block.low for block in blocks])), float(np.max([block.high for block in blocks]))
        if not (math.isfinite(low) and math.isfinite(high)):
            return figures
        self._before.sort()
        self._after.sort()
        return replace(figures, range=(low, high), **_sample_figures(self._before, self._after, low, high))

    def _levels(self) -> tuple[float, ...] | None:
        if self.bits is None or 2**self.bits > BINS:
            return None
        ends = [block.ends for block in self._blocks]
        if any(end is None for end in ends):
            return None
        shares = [block.weights / self.numel for block in self._blocks]
        low, high = (math.fsum(s * e[i] for s, e in zip(shares, ends, strict=True) if e) for i in (0, 1))
        step = (high - low) / (2**self.bits - 1)
        if not math.isfinite(step):
            return None
        levels = (low + step * code for code in range(2**self.bits))
        # A level at zero would else show what rounding left of it.
        return tuple(0.0 if abs(level) < ROUNDING * step else level for level in levels)


def _mean_ends(within: tuple[Tensor, Tensor], bits: int | None) -> tuple[float, float] | None:
    """The mean lowest and highest level of the grids whose unclipped ranges these are."""
    if bits is None:
        return None
    low, high = float(within[0].double().mean()), float(within[1].double().mean())
    half = (high - low) / 2 ** (bits + 1)
    return (low + half, high - half)


def unclipped_range(encoded: Coded) -> tuple[Tensor, Tensor] | None:
    """Lowest and highest weight that a grid does not clip: half a step beyond its end levels; nothing else clips.

    returns  two float32 tensors shaped like the scale, [1 or rows, groups]
    """
    # Groups of different lengths are no array; then what is clipped is not counted.
    if not isinstance(encoded, Affine) or encoded.codes.shape[1] % encoded.scale.shape[1]:
        return None
    exponent = exponent_of(encoded)
    scale = from_half(encoded.scale, exponent)
    if encoded.offset is not None:
        lowest = from_half(encoded.offset, exponent)
    elif encoded.zero_point is not None:
        lowest = -scale * encoded.zero_point.float()
    else:
        assert encoded.convention is not None
        lowest = -scale * middle(encoded.convention, encoded.bits)
    start, end = lowest - scale / 2, lowest + scale * (2**encoded.bits - 0.5)
    # A scale may be negative: the codes then run downwards.
    return torch.minimum(start, end), torch.maximum(start, end)


def sample_stride(numel: int, most: int = SAMPLE) -> int:
    """The smallest stride that takes at most so many of `numel` weights and has no factor in common with numel.

    Sharing no factor, it meets every column of the rows and every position of a kernel equally often.
    """
    stride = max(1, -(-numel // most))
    while math.gcd(stride, numel) > 1:
        stride += 1
    return stride


def _energy(flat: Tensor, largest: float) -> float:
    """The sum of squares: float32 within runs short enough for a relative 1e-5, float64 where squares leave float32."""
    if largest == 0:
        return 0.0
    if not SQUARES[0] < largest < SQUARES[1]:
        return float(flat.double().square().sum())
    whole = len(flat) // RUN * RUN
    if not whole:
        return float(torch.linalg.vector_norm(flat).double().square())
    norms = torch.linalg.vector_norm(flat[:whole].reshape(-1, RUN), dim=1).double()
    rest = torch.linalg.vector_norm(flat[whole:]).double()
    return float(norms.square().sum() + rest.square())


def _error(flat: Tensor, flat_decoded: Tensor) -> tuple[float, float]:
    """The sum of squared errors and the largest error."""
    error = flat - flat_decoded
    # Adding zero makes of a negative zero a plain one.
    largest = max(-float(error.amin()), float(error.amax())) + 0.0
    if not math.isfinite(largest):
        error = flat.double() - flat_decoded.double()
        largest = float(error.abs().amax())
    return _energy(error, largest), largest


def _clipped(by_grid: Tensor, low: Tensor, high: Tensor) -> int:
    """How many weights, float32 [1 or rows, groups, length], lie outside [low, high] of their grid."""
    # numpy compares some three times faster than torch here.
    values = by_grid.numpy()
    below = values < low.unsqueeze(-1).numpy()
    return int(np.count_nonzero(below | (values > high.unsqueeze(-1).numpy())))


def _relative(error_energy: float, energy: float) -> float:
    """Squared error over squared weight: 0 without error, infinite where a zero tensor decodes to anything else."""
    if error_energy == 0:
        return 0.0
    return error_energy / energy if energy else math.inf


def _share(parts: list[int | None], whole: int) -> float | None:
    total = 0
    for part in parts:
        if part is None:
            return None
        total += part
    return total / whole


def _sample_figures(before: Sample, after: Sample, low: float, high: float) -> dict[str, Any]:
    """Outlier share, kurtosis and histograms, all read off the samples, float32 and sorted."""
    first, third = _quantile(before, 0.25), _quantile(before, 0.75)
    reach = 1.5 * (third - first)
    fences = _least_float32(np.array([first - reach, -(third + reach)]))
    below = np.searchsorted(before, fences[0], "left")
    above = len(before) - np.searchsorted(before, -fences[1], "right")
    edges = _least_float32(np.linspace(low, high, BINS + 1)[1:-1])
    return {
        "fences": (first - reach, third + reach),
        "outlier_share": int(below + above) / len(before),
        "kurtosis": _kurtosis(before),
        "histogram_before": _histogram(before, edges),
        "histogram_after": _histogram(after, edges),
    }


def _least_float32(values: Sample) -> Sample:
    """The least float32 at or above each float64: a float32 is below the one exactly where it is below the other."""
    with np.errstate(over="ignore"):
        nearest = values.astype(np.float32)
    return np.where(nearest < values, np.nextafter(nearest, np.float32(np.inf)), nearest)


def _quantile(ordered: Sample, share: float) -> float:
    """Interpolated linearly between the two nearest of the sorted values, as numpy's default does."""
    position = share * (len(ordered) - 1)
    left = math.floor(position)
    low, high = float(ordered[left]), float(ordered[min(left + 1, len(ordered) - 1)])
    return low + (position - left) * (high - low)


def _kurtosis(ordered: Sample) -> float | None:
    """Pearson's, 3 for a normal distribution; None where all values are equal."""
    if ordered[0] == ordered[-1]:
        return None
    # In float64 neither the mean of close values nor the fourth power of any float32 is lost.
    squares = ordered.astype(np.float64)
    squares -= squares.mean()
    squares *= squares
    return float(np.dot(squares, squares)) * len(squares) / float(squares.sum()) ** 2


def _histogram(ordered: Sample, inner_edges: Sample) -> tuple[int, ...]:
    """Counts between the inner edges; a value on an edge belongs to the bin above it."""
    places = [0, *np.searchsorted(ordered, inner_edges, "left").tolist(), len(ordered)]
    return tuple(after - before for before, after in pairwise(places))


def kept_layer(decision: Decision, n_bytes: int) -> LayerReport:
    """A tensor that was kept in `n_bytes`, or, with none, is tied to another."""
    tensor = decision.tensor
    return LayerReport(
        name=tensor.name,
        shape=tensor.shape,
        dtype=tensor.dtype,
        bytes=n_bytes,
        baseline_bytes=tensor.n_bytes,
        tied_to=decision.tied_to,
        reason=decision.reason,
    )


def compressed_layer(
    decision: Decision, sizes: Mapping[str, int], entry: Entry, figures: LayerFigures, side_bytes: int = 0
) -> LayerReport:
    """A compressed tensor; `sizes` are the bytes of its stored parts by their full names.

    side_bytes  of its codes: side information among them
    """
    config, total = decision.config, sum(sizes.values())
    return replace(
        kept_layer(decision, total),
        method=decision.method or "",
        bits=config.bits,
        dim=entry.dim,
        granularity=config.granularity,
        group_size=config.group_size,
        form=config.form,
        sensitivity=decision.sensitivity,
        coding=entry.coding,
        codebook_in=entry.shared,
        side_information_bytes=total - sizes[part_name(decision.tensor.name, "codes")] + side_bytes,
        figures=figures,
    )


def run_figures(clock: Clock, device: str) -> RunFigures:
    """What a run has taken, with the largest resident memory of this process so far and all that figures depend on."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return RunFigures(
        seconds=clock.seconds,
        cpu_seconds=clock.cpu_seconds,
        peak_memory_bytes=peak if platform.system() == "Darwin" else peak * 1024,
        device=device,
        versions={
            "qcompress": VERSION,
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "numpy": np.__version__,
        },
    )


def add_up_ranks(run: RunFigures, world: World) -> RunFigures:
    """What a run has taken, with the processor seconds of all ranks, and the peak of that which took the most memory.

    Every rank calls it.
    """
    told = world.tell([run.cpu_seconds, run.peak_memory_bytes])
    seconds, peaks = zip(*told, strict=True)
    return replace(run, cpu_seconds=sum(seconds), peak_memory_bytes=max(peaks))
