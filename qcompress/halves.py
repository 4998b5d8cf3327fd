"""Which kept tensors can be stored in half precision, from their values."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from qcompress.checkpoint import Checkpoint, tensor_view
from qcompress.encoded import Fitted, Kept
from qcompress.plan import STORED_AS_F16
from qcompress.types import Plan

HALF_ERROR = 2.0**-9
"""The most that a tensor may change, relative to its size, to be stored as float16 on request."""


def halve_what_bears_it(checkpoint: Checkpoint, plan: Plan, fitted: Fitted) -> Plan:
    """The plan with every kept tensor in its own dtype that float16 cannot hold: too large, or too small altogether."""
    decisions = []
    for decision in plan.decisions:
        if decision.stored is not None:
            tensor = decision.tensor
            adjusted = fitted.encoded.get(tensor.name)
            value = adjusted.value if isinstance(adjusted, Kept) else None
            if value is None:
                value = tensor_view(checkpoint.shard_of(tensor.name), tensor)
            if not _bears_half(value):
                reason = f"{decision.reason.removesuffix(STORED_AS_F16)}; float16 cannot hold its values"
                decision = replace(decision, stored=None, reason=reason)
        decisions.append(decision)
    return replace(plan, decisions=tuple(decisions))


def _bears_half(value: Tensor) -> bool:
    """Whether float16 holds every number, and all together to 2**-9 of their size."""
    exact = value.detach().double()
    error = exact.half().double() - exact
    return bool(error.isfinite().all()) and float(error.norm()) <= HALF_ERROR * float(exact.norm())
