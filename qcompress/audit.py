"""What the weights of a live model are like, and what naive quantization and k-means of them give."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from qcompress.coding.affine import decode
from qcompress.coding.rows import rows_from_weight
from qcompress.encoded import Affine
from qcompress.methods import kmeans, rtn
from qcompress.model.build import channel_axes
from qcompress.model.live import put_tensors
from qcompress.model.tasks import Measurement
from qcompress.registry import KmeansConfig, RtnConfig
from qcompress.report.figures import LayerMeter
from qcompress.report.training import WeightFigures
from qcompress.solvers.codebooks import BookEvidence
from qcompress.solvers.hessian import grid_exponent

Measure = Callable[[nn.Module], Sequence[Measurement]]


TrialKind: TypeAlias = Literal["naive", "k-means"]


@dataclass(frozen=True)
class Trials:
    """The widths at which all weights are tried: naive quantization a channel, k-means a tensor."""

    naive: Sequence[int] = ()
    kmeans: Sequence[int] = ()

    def __iter__(self) -> Iterator[tuple[TrialKind, int]]:
        yield from (("naive", bits) for bits in self.naive)
        yield from (("k-means", bits) for bits in self.kmeans)


@dataclass(frozen=True)
class Audit:
    """Figures of every weight, and of all of them in each trial.

    weights  weight name -> its figures
    metrics  trial -> the task's headline; empty where nothing is measured
    sqnr_db  trial -> over all weights together; None where it is exact
    """

    weights: Mapping[str, WeightFigures]
    metrics: Mapping[tuple[TrialKind, int], float]
    sqnr_db: Mapping[tuple[TrialKind, int], float | None]


def audit(module: nn.Module, names: Sequence[str], trials: Trials, measure: Measure | None = None) -> Audit:
    """The audit of some weights of a module, which stays as it is.

    names    parameters of two dimensions or more
    measure  the task's metrics of a module, the headline first
    """
    state = {name: value.detach().cpu().float() for name, value in module.state_dict().items() if name in set(names)}
    axes = channel_axes(module)
    figures: dict[str, WeightFigures] = {}
    ratios: dict[str, dict[str, float | None]] = {name: {} for name in state}
    metrics: dict[tuple[TrialKind, int], float] = {}
    totals: dict[tuple[TrialKind, int], float | None] = {}
    energy = sum(float(value.double().square().sum()) for value in state.values())
    for trial in trials:
        kind, bits = trial
        rounded = {
            name: _naive(value, axes[name].axes if name in axes else (0,), bits)
            if kind == "naive"
            else _clustered(value, bits)
            for name, value in state.items()
        }
        errors = {name: float((rounded[name] - value).double().square().sum()) for name, value in state.items()}
        for name, value in state.items():
            if kind == "naive":
                ratios[name][str(bits)] = _decibels(float(value.double().square().sum()), errors[name])
        totals[trial] = _decibels(energy, sum(errors.values()))
        if measure is not None:
            quantized = copy.deepcopy(module)
            put_tensors(quantized, rounded)
            metrics[trial] = measure(quantized)[0].value
    for name, value in state.items():
        figures[name] = _figures(value, ratios[name])
    return Audit(figures, metrics, totals)


def _naive(weight: Tensor, axis: tuple[int, ...], bits: int) -> Tensor:
    """The weight rounded to nearest on the min-max grid of each channel."""
    rows = rows_from_weight(weight, axis)
    encoded = rtn.encode(rows, RtnConfig(bits=bits), grid_exponent(rows.flatten(1)))
    return decode(_placed(encoded, tuple(weight.shape), axis))


def _clustered(weight: Tensor, bits: int) -> Tensor:
    """The weight in the codebook of least squared error, one for all of it, as it would be stored."""
    rows = weight.reshape(len(weight), -1)
    evidence = BookEvidence(torch.Generator().manual_seed(0))
    encoded = kmeans.encode(rows, KmeansConfig(bits=bits), grid_exponent(rows), evidence)
    return decode(encoded).reshape(weight.shape)


def _placed(encoded: Affine, shape: tuple[int, ...], axis: tuple[int, ...]) -> Affine:
    from dataclasses import replace

    return replace(encoded, shape=shape, axis=axis)


def _figures(weight: Tensor, ratios: Mapping[str, float | None]) -> WeightFigures:
    flat = weight.reshape(1, -1)
    meter = LayerMeter(weight.numel())
    meter.add(flat, flat, None)
    found = meter.result()
    deviation = float(weight.double().std(correction=0))
    low, high = (float(end) for end in torch.aminmax(weight))
    return WeightFigures(
        range=high - low,
        range_over_std=(high - low) / deviation if deviation > 0 else None,
        outlier_share=found.outlier_share or 0.0,
        kurtosis=found.kurtosis,
        sqnr_db=ratios,
    )


def _decibels(energy: float, error: float) -> float | None:
    return 10 * math.log10(energy / error) if error > 0 and energy > 0 else None
