"""The cost of each bit width is measured from weights alone: the squared error that the grid leaves, over the norm.

No live model and no data are loaded for it. `sensitivity` measures costs on a live model.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qcompress.artifact.entry import part_name
from qcompress.artifact.layout import make_slots
from qcompress.checkpoint.checkpoint import Checkpoint, tensor_view
from qcompress.checkpoint.safetensors_file import Container
from qcompress.coding.grids import decode_rows, exponent_for
from qcompress.coding.packing import pack
from qcompress.coding.payload import encode_payload
from qcompress.coding.rows import rows_from_weight
from qcompress.encode.encode_weight import ContextSources, encode_codes
from qcompress.encode.job import BLOCK_WEIGHTS
from qcompress.plan.allocate import Costs, read_costs
from qcompress.registry import METHODS, GridConfig, MseConfig, RtnConfig
from qcompress.registry.calibrated import LiveConfig
from qcompress.types.config import CodingChoice
from qcompress.types.plan import Decision, Plan
from qcompress.types.run import Options

SAMPLED_WEIGHTS = 1 << 16
"""Of larger tensors evenly spread rows or weights of about so many are looked at."""

ROUNDED_WIDTH = 5
"""The widest that weights are rounded to, to allocate: beyond it their error falls to a quarter with each bit."""


@dataclass(frozen=True)
class Rounded:
    """What one weight is at one width.

    error  squared, over the weight's energy
    bits   that coded codes take, a weight
    """

    error: float
    bits: float


def weight_costs(checkpoint: Checkpoint, plan: Plan, options: Options) -> Costs:
    """The squared error of every open tensor at each of its widths over its norm, from its weights alone.

    Ranks divide the tensors, and each then knows all costs.

    Half way between the relative and the absolute error, where measured divergences lie (docs/methods.md). Of tensors
    past SAMPLED_WEIGHTS, unless one grid spans them, the error is that of evenly spread rows. Widths above
    ROUNDED_WIDTH are not tried. A weight that is not finite costs nothing: whoever encodes it refuses it. The codes
    that were tried also tell what entropy coding leaves of them.
    """
    decisions = [decision for decision in plan.decisions if decision.is_open]
    choice, world = options.choice, options.world

    def measured(decision: Decision) -> tuple[dict[int, float], dict[int, int]]:
        source, widths = checkpoint.shard_of(decision.tensor.name), list(decision.widths.configs)
        tried = [bits for bits in widths if bits <= ROUNDED_WIDTH] or widths[:1]
        found = round_weight(tensor_view(source, decision.tensor), decision, tried, plan.recipe.seed, choice)
        last, norm = tried[-1], _norm(source, decision)
        for more in (bits - last for bits in widths if bits > last):
            found[last + more] = Rounded(found[last].error / 4**more, found[last].bits + more)
        errors = {bits: norm * found[bits].error for bits in widths}
        return errors, {bits: _coded_bytes(decision, bits, found[bits]) for bits in widths}

    own = [decisions[place] for place in world.share([decision.tensor.numel for decision in decisions])]
    with ThreadPoolExecutor(options.threads) as pool:
        both = list(pool.map(measured, own))
    told = world.tell(
        [[one.tensor.name, [*costs.items()], [*sizes.items()]] for one, (costs, sizes) in zip(own, both, strict=True)]
    )
    lines = {name: (dict(costs), dict(sizes)) for part in told for name, costs, sizes in part}
    names = [decision.tensor.name for decision in decisions]
    of, coded = ({name: lines[name][place] for name in names} for place in (0, 1))
    return Costs(of, "error that its grid leaves", coded=coded)


def file_costs(checkpoint: Checkpoint, plan: Plan, path: Path, options: Options) -> Costs:
    """The costs of a file of sensitivities, with what entropy coding leaves of the weights' codes.

    raises  what `read_costs` raises
    """
    costs = read_costs(checkpoint, plan, path)
    return replace(costs, coded=weight_costs(checkpoint, plan, options).coded)


def _coded_bytes(decision: Decision, bits: int, rounded: Rounded) -> int:
    """What codes and grids of an open decision take about at a width."""
    slots = make_slots(replace(decision, config=decision.widths.at(bits)), "packed")
    grids = sum(slot.n_bytes for slot in slots if slot.name != part_name(decision.tensor.name, "codes"))
    return grids + math.ceil(decision.tensor.numel * rounded.bits / 8)


def _norm(source: Container, decision: Decision) -> float:
    """The root of a weight's energy; 0 where that is not finite."""
    weight = tensor_view(source, decision.tensor).reshape(-1)
    parts = (weight[start : start + BLOCK_WEIGHTS] for start in range(0, weight.numel(), BLOCK_WEIGHTS))
    energy = sum(float(part.double().square().sum()) for part in parts)
    return math.sqrt(energy) if math.isfinite(energy) else 0.0


def round_weight(
    weight: Tensor, decision: Decision, widths: Iterable[int], seed: int, choice: CodingChoice = "packed"
) -> dict[int, Rounded]:
    """Width -> what one weight is in its stand-in's grids; nothing of a weight without energy."""
    rows = rows_from_weight(weight, decision.axis)
    if decision.config.unit != "tensor":
        rows = rows[:: max(1, rows.numel() // SAMPLED_WEIGHTS)]
    rows = rows.to("cpu", torch.float32).contiguous()
    energy = float(rows.double().square().sum())
    if not 0 < energy < math.inf:
        return dict.fromkeys(widths, Rounded(0.0, 0.0))
    flat, exponent = rows.reshape(len(rows), -1), exponent_for(float(rows.abs().max()))
    found = {}
    for bits in widths:
        closed = stand_in(decision, bits)
        context = ContextSources(seed).context_of(closed, exponent)
        encoded = encode_codes(rows, closed, context)
        error = float((decode_rows(encoded) - flat).double().square().sum()) / energy
        _, payload = encode_payload(pack(encoded.codes.numpy(), bits), bits, encoded.codes.shape[1], choice)
        found[bits] = Rounded(error, 8 * len(payload) / rows.numel())
    return found


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
