"""RD chooses unbounded codes on grids whose steps are chosen for all tensors together, to be entropy coded.

Error feedback under each layer's Hessian (GPTQ, arXiv 2210.17323) on unbounded codes (WaterSIC, arXiv
2603.04956), inputs from the network as it is already coded, steps of equal slope with measured sensitivities, tables by
scale classes (coding.unbounded.tokens). `fit` works on a live model with calibration data, `encode` from
a weight alone.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from qcompress.methods.rd.blocks import code_block, measure_block
from qcompress.methods.rd.exact import encode_exact
from qcompress.methods.rd.free import encode_free
from qcompress.methods.rd.session import Session
from qcompress.model.live import LiveModel
from qcompress.registry import ExactConfig, RdConfig
from qcompress.types.encoded import Codebook, Constant, Fitted, Unbounded
from qcompress.types.plan import Decision
from qcompress.types.run import EncodeContext, FitContext

__all__ = ["encode", "fit"]


def encode(weight: Tensor, config: RdConfig | ExactConfig, context: EncodeContext) -> Unbounded | Codebook | Constant:
    """The codes of one weight, float32 [rows, ...], on the grid that its step says, or as it is."""
    if isinstance(config, ExactConfig):
        return encode_exact(weight, config)
    return encode_free(weight, config, context.whole, context.moments)


def fit(live: LiveModel, decisions: Sequence[Decision[RdConfig]], context: FitContext) -> Fitted:
    """Codes on steps under which rounding would take the context's rate, norms and biases matched to them.

    What was measured of the network serves all attempts at a budget, and each takes its prices from the one before.
    Where the network goes block by block a first visit measures each block, and a second one codes it.
    """
    if live.at is not None:
        return measure_block(live, decisions) if context.measured is None else code_block(live, decisions, context)
    assert context.rate is not None
    session = context.kept.get("rd")
    if not isinstance(session, Session):
        session = context.kept["rd"] = Session(live, decisions)
    return session.fit(live, context.rate)
