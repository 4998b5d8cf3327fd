"""How large a weight would be were it as large as its kind: what a norm beside it makes of its scale is nothing.

Steps follow the square root of a weight's deviation, which is right for weights as training leaves them. Where a norm
stands behind a weight or before it, the weight may have any scale at all and the network be the same: one that is far
from what weights of its size have is taken for one of them, scaled.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping

from torch import Tensor

from qcompress.checkpoint.checkpoint import Checkpoint, tensor_view
from qcompress.plan.allocate import has_steps
from qcompress.plan.siblings import batch_norms_behind, norms_before
from qcompress.solvers.unbounded import root_mean_square
from qcompress.types.plan import Decision, Plan

STRANGE = math.log(2.25)
"""Logarithm of the factor beyond which a scale is not what training left: the deviations of networks lie nearer."""
SIZE_POWER = 0.4
"""Deviations fall with this power of a weight's size, about: measured on residual and depthwise networks."""
SURE = math.log(8)
"""Logarithm of the factor up to which a batch norm's variance may differ from what its weight's scale makes likely."""
FEWEST = 3
"""Weights that can tell what is usual among them."""
POSITIVE = 0.99
"""The share of gains above zero at least: others may be offsets from one."""


def step_factors(checkpoint: Checkpoint, plan: Plan, behind: Mapping[str, str] | None = None) -> dict[str, float]:
    """Tensor -> what its step is to be multiplied by, of those whose scale is strange and a norm makes it nothing.

    behind  weight -> the running variance of the batch norm behind it, as a live model has it; None: as names tell
    """
    tensors = {info.name: info for info in checkpoint.tensors}
    decisions = {d.tensor.name: d for d in plan.decisions if has_steps(d)}
    found = {}

    def read(name: str) -> Tensor:
        return tensor_view(checkpoint.shard_of(name), tensors[name])

    before = {name: gain for name, gain in norms_before(tensors).items() if name in decisions}
    for name, gain in _gains_before(before, read).items():
        if abs(gain) > STRANGE:
            found[name] = math.exp(-gain / 2)
    named = batch_norms_behind(tensors) if behind is None else behind
    sizes = _sizes({name: norm for name, norm in named.items() if name in decisions}, read, sure=behind is None)
    for name, size in sizes.items():
        own = decisions[name]
        usual = _usual(own, sizes, decisions)
        if usual is not None and abs(size - usual) > STRANGE:
            found[name] = math.exp((size - usual) / 2)
    return found


def _gains_before(before: Mapping[str, str], read: Callable[[str], Tensor]) -> dict[str, float]:
    """Weight -> the logarithm of its norm's gain over the median of all norms'."""
    logs = {}
    for gain in set(before.values()):
        values = read(gain)
        size = root_mean_square(values)
        if 0 < size < math.inf and float((values > 0).double().mean()) >= POSITIVE:
            logs[gain] = math.log(size)
    if len(logs) < FEWEST:
        return {}
    middle = statistics.median(logs.values())
    return {name: logs[gain] - middle for name, gain in before.items() if gain in logs}


def _sizes(behind: Mapping[str, str], read: Callable[[str], Tensor], *, sure: bool) -> dict[str, float]:
    """Weight -> the logarithm of its deviation, less what its number of values makes of it.

    sure  leave out weights whose scale and norm do not fit: the norm stands elsewhere, whatever its name
    """
    sizes, spreads = {}, {}
    for name, norm in behind.items():
        weight = read(name)
        deviation, spread = root_mean_square(weight), root_mean_square(read(norm)) ** 0.5
        if not (0 < deviation < math.inf and 0 < spread < math.inf):
            continue
        sizes[name] = math.log(deviation) + SIZE_POWER * math.log(weight.numel())
        spreads[name] = math.log(spread / deviation) - math.log(weight.numel() / len(weight)) / 2
    if not sure or not spreads:
        return sizes
    middle = statistics.median(spreads.values())
    return {name: size for name, size in sizes.items() if abs(spreads[name] - middle) <= SURE}


def _usual(own: Decision, sizes: Mapping[str, float], decisions: Mapping[str, Decision]) -> float | None:
    """The size of weights like one: of its shape, else of its kind, else of all; None of too few."""
    shape = own.tensor.shape
    kind = [name for name in sizes if _is_depthwise(decisions[name]) == _is_depthwise(own)]
    alike = [name for name in kind if decisions[name].tensor.shape == shape]
    kind = kind if len(kind) >= FEWEST else list(sizes)
    alike = alike if len(alike) >= FEWEST else kind
    if len(alike) < FEWEST:
        return None
    middle = statistics.median(sizes[name] for name in kind)
    near = [sizes[name] for name in alike if abs(sizes[name] - middle) <= STRANGE]
    return statistics.median(near if len(near) > 1 else [sizes[name] for name in alike])


def _is_depthwise(decision: Decision) -> bool:
    return len(decision.tensor.shape) > 2 and decision.tensor.shape[1] == 1
