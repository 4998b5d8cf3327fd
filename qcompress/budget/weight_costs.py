"""The cost of each bit width is measured from weights alone: the squared error that the grid leaves, over the norm.

No live model and no data are loaded for it. `sensitivity` measures costs on a live model.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from qcompress.checkpoint.checkpoint import Checkpoint, tensor_view
from qcompress.checkpoint.safetensors_file import Container
from qcompress.coding.grids import decode_rows, exponent_for
from qcompress.coding.rows import rows_from_weight
from qcompress.encode.encode_tensor import BLOCK_WEIGHTS
from qcompress.encode.encode_weight import ContextSources, encode_codes
from qcompress.plan.allocate import Costs
from qcompress.registry import METHODS, GridConfig, MseConfig, RtnConfig
from qcompress.registry.calibrated import LiveConfig
from qcompress.types.plan import Decision, Plan

SAMPLED_WEIGHTS = 1 << 16
"""Of larger tensors evenly spread rows or weights of about so many are looked at."""

ROUNDED_WIDTH = 5
"""The widest that weights are rounded to, to allocate: beyond it their error falls to a quarter with each bit."""


def weight_costs(checkpoint: Checkpoint, plan: Plan, threads: int = 1) -> Costs:
    """The squared error of every open tensor at each of its widths over its norm, from its weights alone.

    Half way between the relative and the absolute error, where measured divergences lie (docs/methods.md). Of tensors
    past SAMPLED_WEIGHTS, unless one grid spans them, the error is that of evenly spread rows. Widths above
    ROUNDED_WIDTH are not tried. A weight that is not finite costs nothing: whoever encodes it refuses it.
    """
    decisions = [decision for decision in plan.decisions if decision.is_open]

    def measured(decision: Decision) -> dict[int, float]:
        source, widths = checkpoint.shard_of(decision.tensor.name), list(decision.widths.configs)
        tried = [bits for bits in widths if bits <= ROUNDED_WIDTH] or widths[:1]
        errors = relative_errors(tensor_view(source, decision.tensor), decision, tried, plan.recipe.seed)
        last, norm = tried[-1], _norm(source, decision)
        return {bits: norm * errors.get(bits, errors[last] / 4 ** (bits - last)) for bits in widths}

    with ThreadPoolExecutor(threads) as pool:
        found = list(pool.map(measured, decisions))
    of = {decision.tensor.name: costs for decision, costs in zip(decisions, found, strict=True)}
    return Costs(of, "error that its grid leaves")


def _norm(source: Container, decision: Decision) -> float:
    """The root of a weight's energy; 0 where that is not finite."""
    weight = tensor_view(source, decision.tensor).reshape(-1)
    parts = (weight[start : start + BLOCK_WEIGHTS] for start in range(0, weight.numel(), BLOCK_WEIGHTS))
    energy = sum(float(part.double().square().sum()) for part in parts)
    return math.sqrt(energy) if math.isfinite(energy) else 0.0


def relative_errors(weight: Tensor, decision: Decision, widths: Iterable[int], seed: int) -> dict[int, float]:
    """Width -> squared error over energy of one weight, in its stand-in's grids; 0 of a weight without energy."""
    rows = rows_from_weight(weight, decision.axis)
    if decision.config.unit != "tensor":
        rows = rows[:: max(1, rows.numel() // SAMPLED_WEIGHTS)]
    rows = rows.to("cpu", torch.float32).contiguous()
    energy = float(rows.double().square().sum())
    if not 0 < energy < math.inf:
        return dict.fromkeys(widths, 0.0)
    flat, exponent = rows.reshape(len(rows), -1), exponent_for(float(rows.abs().max()))
    errors = {}
    for bits in widths:
        closed = stand_in(decision, bits)
        context = ContextSources(seed).context_of(closed, exponent)
        decoded = decode_rows(encode_codes(rows, closed, context))
        errors[bits] = float((decoded - flat).double().square().sum()) / energy
    return errors


def stand_in(decision: Decision, bits: int) -> Decision:
    """The decision at a width; of a method that needs a live model, the same grid chosen from weights alone."""
    config = decision.widths.at(bits)
    if METHODS[decision.method or ""].needs == "weights":
        return replace(decision, config=config)
    assert isinstance(config, GridConfig)
    same: dict[str, Any] = {
        "bits": config.bits,
        "granularity": config.granularity,
        "group_size": config.group_size,
        "symmetric": config.symmetric,
        "axis": config.axis,
    }
    if isinstance(config, LiveConfig) and config.range == "minmax":
        return replace(decision, method="rtn", config=RtnConfig(**same))
    return replace(decision, method="mse", config=MseConfig(**same, effort="normal"))
