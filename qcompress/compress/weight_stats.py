"""The weights of a live model are measured: their spread, and what naive quantization and k-means of them give."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from qcompress.coding.grids import decode, exponent_for
from qcompress.coding.rows import rows_from_weight
from qcompress.data.measurement import Measurement
from qcompress.methods import kmeans, rtn
from qcompress.model.build import channel_axes
from qcompress.model.live import put_tensors
from qcompress.registry import KmeansConfig, RtnConfig
from qcompress.report.document import sqnr_db
from qcompress.report.figures import LayerMeter
from qcompress.report.training_report import WeightFigures
from qcompress.types.run import EncodeContext

SUMMED_AT_ONCE = 1 << 20

Measure: TypeAlias = Callable[[nn.Module], Sequence[Measurement]]
"""Module -> the task's metrics, the headline first."""

TrialKind: TypeAlias = Literal["naive", "k-means"]
Trial: TypeAlias = tuple[TrialKind, int]
"""A kind and its bit width."""


@dataclass(frozen=True)
class Trials:
    """The bit widths at which all weights are tried: naive quantization a channel, k-means a tensor."""

    naive: Sequence[int] = ()
    kmeans: Sequence[int] = ()

    def __iter__(self) -> Iterator[Trial]:
        yield from (("naive", bits) for bits in self.naive)
        yield from (("k-means", bits) for bits in self.kmeans)


@dataclass(frozen=True)
class WeightStats:
    """Figures of every weight, and of all of them in each trial.

    weights  weight name -> its figures
    metrics  trial -> the task's headline; empty where nothing is measured
    sqnr_db  trial -> over all weights together; None where it is exact
    """

    weights: Mapping[str, WeightFigures]
    metrics: Mapping[Trial, float]
    sqnr_db: Mapping[Trial, float | None]


def measure_weights(
    module: nn.Module, names: Sequence[str], trials: Trials, measure: Measure | None = None
) -> WeightStats:
    """The figures of some weights of a module, which stays as it is.

    names  parameters of two dimensions or more
    """
    weights = {name: value.detach() for name, value in module.state_dict().items() if name in set(names)}
    energies = {name: _energy(value) for name, value in weights.items()}
    axes = channel_axes(module)
    ratios: dict[str, dict[str, float | None]] = {name: {} for name in weights}
    metrics: dict[Trial, float] = {}
    totals: dict[Trial, float | None] = {}
    tried = copy.deepcopy(module) if measure is not None and [*trials] else None
    for trial in trials:
        kind, bits = trial
        errors: dict[str, float] = {}
        # One weight at a time: what is tried takes the memory of one network more, whatever its size.
        for name, value in weights.items():
            weight = value.cpu().float()
            axis = axes[name].axes if name in axes else (0,)
            rounded = _naive(weight, axis, bits) if kind == "naive" else _clustered(weight, bits)
            errors[name] = _difference(rounded, weight)
            if tried is not None:
                put_tensors(tried, {name: rounded})
        if kind == "naive":
            for name in weights:
                ratios[name][str(bits)] = _decibels(energies[name], errors[name])
        totals[trial] = _decibels(sum(energies.values()), sum(errors.values()))
        if tried is not None and measure is not None:
            metrics[trial] = measure(tried)[0].value
    figures = {name: _figures(value.cpu().float(), ratios[name]) for name, value in weights.items()}
    return WeightStats(figures, metrics, totals)


def _naive(weight: Tensor, axis: tuple[int, ...], bits: int) -> Tensor:
    """The weight rounded to nearest on the min-max grid of each channel."""
    rows = rows_from_weight(weight, axis)
    encoded = rtn.encode(rows, RtnConfig(bits=bits), _context(rows))
    return decode(replace(encoded, shape=tuple(weight.shape), axis=axis))


def _clustered(weight: Tensor, bits: int) -> Tensor:
    """The weight in the codebook of least squared error, one for all of it, as it would be stored."""
    rows = weight.reshape(len(weight), -1)
    encoded = kmeans.encode(rows, KmeansConfig(bits=bits), _context(rows))
    return decode(encoded).reshape(weight.shape)


def _context(rows: Tensor) -> EncodeContext:
    return EncodeContext(exponent_for(float(rows.abs().max())), torch.Generator().manual_seed(0))


def _figures(weight: Tensor, ratios: Mapping[str, float | None]) -> WeightFigures:
    flat = weight.reshape(1, -1)
    meter = LayerMeter(weight.numel())
    meter.add(flat, flat, None)
    found = meter.result()
    deviation = _deviation(weight)
    low, high = (float(end) for end in torch.aminmax(weight))
    return WeightFigures(
        range=high - low,
        range_over_std=(high - low) / deviation if high > low else None,
        outlier_share=found.outlier_share or 0.0,
        kurtosis=found.kurtosis,
        sqnr_db=ratios,
    )


def _parts(values: Tensor) -> Sequence[Tensor]:
    """All values, some at a time, whose float64 forms take little memory."""
    return torch.split(values.reshape(-1), SUMMED_AT_ONCE)


def _energy(values: Tensor) -> float:
    return sum(float(part.double().square().sum()) for part in _parts(values))


def _difference(one: Tensor, other: Tensor) -> float:
    """The sum of the squares of what values differ by."""
    return sum(_energy(a - b) for a, b in zip(_parts(one), _parts(other), strict=True))


def _deviation(weight: Tensor) -> float:
    """The standard deviation of all weights from their mean."""
    mean = sum(float(part.double().sum()) for part in _parts(weight)) / weight.numel()
    variance = sum(float((part.double() - mean).square().sum()) for part in _parts(weight)) / weight.numel()
    return math.sqrt(variance)


def _decibels(energy: float, error: float) -> float | None:
    return sqnr_db(error / energy) if error > 0 and energy > 0 else None
