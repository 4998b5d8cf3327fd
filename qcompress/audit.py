"""What the weights of a live model are like, and what naive quantization of them gives."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qcompress.coding.affine import decode
from qcompress.coding.rows import rows_from_weight
from qcompress.methods import rtn
from qcompress.model.build import channel_axes
from qcompress.model.live import put_tensors
from qcompress.model.tasks import Measurement
from qcompress.registry import RtnConfig
from qcompress.report.figures import LayerMeter
from qcompress.report.training import WeightFigures
from qcompress.solvers.hessian import grid_exponent
from qcompress.types import Affine

Measure = Callable[[nn.Module], Sequence[Measurement]]


@dataclass(frozen=True)
class Audit:
    """Figures of every weight, and of all of them after naive quantization.

    weights  weight name -> its figures
    metrics  bits -> the task's headline after naive quantization; empty where nothing is measured
    sqnr_db  bits -> over all weights together; None where it is exact
    """

    weights: Mapping[str, WeightFigures]
    metrics: Mapping[int, float]
    sqnr_db: Mapping[int, float | None]


def audit(module: nn.Module, names: Sequence[str], widths: Sequence[int], measure: Measure | None = None) -> Audit:
    """The audit of some weights of a module, which stays as it is.

    names    parameters of two dimensions or more
    measure  the task's metrics of a module, the headline first
    """
    state = {name: value.detach().cpu().float() for name, value in module.state_dict().items() if name in set(names)}
    axes = channel_axes(module)
    figures: dict[str, WeightFigures] = {}
    ratios: dict[str, dict[str, float | None]] = {name: {} for name in state}
    metrics: dict[int, float] = {}
    totals: dict[int, float | None] = {}
    energy = sum(float(value.double().square().sum()) for value in state.values())
    for bits in widths:
        rounded = {
            name: _naive(value, axes[name].axes if name in axes else (0,), bits) for name, value in state.items()
        }
        errors = {name: float((rounded[name] - value).double().square().sum()) for name, value in state.items()}
        for name, value in state.items():
            ratios[name][str(bits)] = _decibels(float(value.double().square().sum()), errors[name])
        totals[bits] = _decibels(energy, sum(errors.values()))
        if measure is not None:
            quantized = copy.deepcopy(module)
            put_tensors(quantized, rounded)
            metrics[bits] = measure(quantized)[0].value
    for name, value in state.items():
        figures[name] = _figures(value, ratios[name])
    return Audit(figures, metrics, totals)


def _naive(weight: Tensor, axis: tuple[int, ...], bits: int) -> Tensor:
    """The weight rounded to nearest on the min-max grid of each channel."""
    rows = rows_from_weight(weight, axis)
    encoded = rtn.encode(rows, RtnConfig(bits=bits), grid_exponent(rows.flatten(1)))
    return decode(_placed(encoded, tuple(weight.shape), axis))


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
