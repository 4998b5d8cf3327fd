"""PD-Quant learns rounding and activation steps block by block, against the network's prediction.

Liu et al. 2023, arXiv 2212.07048. `preset: paper` follows the official code, with first and last layer at the width
that is asked for. Ours starts from the roundings of least output error of each layer (solvers.rounding) around the
weights that make up for the drift of their inputs, takes the prediction difference in its quadratic form, and keeps of
the learned, the starting and the nearest roundings those with which the block's own loss is least.
"""

from __future__ import annotations

from collections.abc import Sequence

from qcompress.calibration.activations import attach_activations
from qcompress.errors import ModelError
from qcompress.methods.pdquant.block import Block, round_unreached
from qcompress.model.graph import make_blocks
from qcompress.model.live import LiveModel, layer_name
from qcompress.model.runs import run_stage
from qcompress.model.stages import Stage
from qcompress.registry import PdquantConfig
from qcompress.types.encoded import ActivationGrid, Encoded, Fitted
from qcompress.types.plan import Decision
from qcompress.types.run import FitContext

__all__ = ["fit"]


def fit(live: LiveModel, decisions: Sequence[Decision[PdquantConfig]], context: FitContext) -> Fitted:
    """Codes block by block, each from inputs that the quantized blocks before it give, with activation quantizers.

    raises  ModelError for a network that is neither traced nor cut by named blocks, and for layers that are no matrix
            products
    """
    wanted = {layer_name(decision.tensor.name): decision for decision in decisions}
    stages = _blocks(live)
    encoded: dict[str, Encoded] = {}
    activations: dict[str, ActivationGrid] = {}
    clean = [stages[0].begin(batch) for batch in live.calibration]
    noisy = list(clean)
    for place, stage in enumerate(stages):
        names = [name for name in stage.layers if name in wanted]
        if names:
            found = Block(live, stages[place:], {name: wanted[name] for name in names}, clean, noisy).fit()
            encoded |= found.encoded
            activations |= found.activations
            live.put(found.encoded)
            attach_activations(live.quantized, found.activations)
        clean = run_stage(stage, live.module, clean)
        noisy = run_stage(stage, live.quantized, noisy)
    alone = {name: round_unreached(live, decision) for name, decision in wanted.items() if name not in live.layers}
    encoded |= {wanted[name].tensor.name: one for name, one in alone.items()}
    return Fitted(encoded, activations=activations)


def _blocks(live: LiveModel) -> tuple[Stage, ...]:
    if live.blocks:
        return live.stages
    if live.traced:
        return make_blocks(live)
    reason = "pdquant needs the network in blocks, and it cannot be traced"
    raise ModelError(live.place, reason, "name its units under `model.blocks`")
