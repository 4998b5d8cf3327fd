"""Rate-distortion: unbounded codes on grids whose steps are chosen for all tensors together, entropy coded.

Error feedback under each layer's Hessian (GPTQ, arXiv 2210.17323) on a lattice without ends (WaterSIC, arXiv
2603.04956), inputs from the network as it is already coded, steps of equal slope with measured sensitivities, tables by
scale classes (coding.classes). `fit` works on a live model with calibration data, `encode` from a weight alone.
"""

from __future__ import annotations

from collections.abc import Sequence

from qcompress.encoded import Fitted
from qcompress.methods.rd.free import encode, free_step
from qcompress.methods.rd.session import Session
from qcompress.model.live import LiveModel
from qcompress.types import Decision

__all__ = ["encode", "fit", "free_step"]


def fit(live: LiveModel, decisions: Sequence[Decision], bits: float) -> Fitted:
    """Codes that take at most `bits` with all their side information, batch norms and biases matched to them."""
    return Session(live, decisions).solve(bits)
