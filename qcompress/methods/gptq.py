"""GPTQ rounds column by column, and lets the columns still to come make up for each error.

Frantar et al. 2022, arXiv 2210.17323. `preset: paper` follows the official code but for dead columns (see
solvers.feedback). Ours aims at the full-precision outputs (Li et al. 2025, arXiv 2504.02692, in closed form: the least
squares target is rounded), on a grid chosen under the Hessian, and ends in coordinate descent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from qcompress.coding.grids import exponent_for
from qcompress.coding.message import share_codes
from qcompress.coding.rows import rows_from_weight, weight_from_rows
from qcompress.model.live import LiveModel
from qcompress.model.sweep import LayerStep, sweep
from qcompress.registry import GptqConfig
from qcompress.solvers.feedback import descend, make_feedback, nearest_codes
from qcompress.solvers.hessian import (
    cholesky,
    choose_grid,
    encoded_rows,
    grid_exponent,
    least_squares_target,
    row_levels,
)
from qcompress.types.encoded import Affine, Encoded, Fitted, for_tensor
from qcompress.types.plan import Decision
from qcompress.types.run import EncodeContext, FitContext, Gram

HOLD = 0.01
"""How firmly the least squares target is held at the weights, as a share of the Hessian's mean diagonal."""
DESCENT_DAMPING = 1e-4


def fit(live: LiveModel, decisions: Sequence[Decision[GptqConfig]], context: FitContext) -> Fitted:
    """Codes layer by layer, each from the inputs that the layers before it now give. Weights alone change.

    The references are the weights of least squares, where these are what the codes round.
    """
    encoded: dict[str, Encoded] = {}
    references: dict[str, Tensor] = {}
    for sequential in (True, False):
        wanted = {d.tensor.name: d for d in decisions if d.config.sequential is sequential}
        paired = any(d.config.asymmetric for d in wanted.values())
        group: list[tuple[LayerStep, Gram]] = []
        for step in sweep(live, wanted, sequential=sequential, paired=paired) if wanted else ():
            group.append((step, step.gram()))
            # Ranks divide layers that see the same inputs; one process has no use for waiting.
            if step.following and live.world.size > 1:
                continue
            found, targets = _solved(live, wanted, group)
            encoded |= found
            references |= targets
            live.put(found)
            group.clear()
    return Fitted(encoded, references=references)


def _solved(
    live: LiveModel, decisions: Mapping[str, Decision[GptqConfig]], group: Sequence[tuple[LayerStep, Gram]]
) -> tuple[dict[str, Encoded], dict[str, Tensor]]:
    """The codes of layers of which none sees what becomes of another, and their references; each found by one rank."""
    encoded: dict[str, Encoded] = {}
    references: dict[str, Tensor] = {}
    for place in live.world.share([decisions[step.tensor].tensor.numel for step, _ in group]):
        step, gram = group[place]
        decision = decisions[step.tensor]
        weight = live.weight(decision.tensor.name)
        rows = rows_from_weight(weight, decision.axis)
        own = EncodeContext(exponent_for(float(rows.abs().max())), step.generator, gram)
        name, target = decision.tensor.name, _target(rows, decision.config, own)
        encoded[name] = for_tensor(_rounded(rows, target, decision.config, own), decision)
        if target is not None:
            references[name] = weight_from_rows(target.cpu(), decision.tensor.shape, decision.axis)
    return share_codes(encoded, references, live.world)


def encode(weight: Tensor, config: GptqConfig, context: EncodeContext) -> Affine:
    """The codes of one weight, float32 [rows, ...], from the second moments of its layer's inputs."""
    return _rounded(weight, _target(weight, config, context), config, context)


def _target(weight: Tensor, config: GptqConfig, context: EncodeContext) -> Tensor | None:
    """What is rounded in place of a weight, float32 [rows, columns], so that its outputs are the full-precision ones.

    None where it is the weight itself.
    """
    gram = context.gram
    assert gram is not None
    if not config.asymmetric or gram.cross is None:
        return None
    return least_squares_target(weight.flatten(1), gram.hessian, gram.cross, HOLD)


def _rounded(weight: Tensor, target: Tensor | None, config: GptqConfig, context: EncodeContext) -> Affine:
    """The codes of one weight, float32 [rows, ...], or of its target, on the weight's grid."""
    gram = context.gram
    assert gram is not None
    rows, hessian = weight.flatten(1).contiguous(), gram.hessian
    exponent = grid_exponent(rows, config)
    target = rows if target is None else target
    grid = choose_grid(rows, config, config.range or "minmax", exponent, hessian, context.generator)
    scale, low = row_levels(grid, config, exponent, rows)
    damping, act_order = config.damping, bool(config.act_order)
    feedback = gram.once(
        f"feedback {damping} {act_order}",
        lambda: make_feedback(hessian, damping, rows.dtype, act_order=act_order),
    )
    codes = nearest_codes(feedback, target, scale, low, config.bits)
    if config.descent:
        raised = gram.once("raised", lambda: cholesky(hessian, DESCENT_DAMPING)[1])
        codes = descend(
            codes, target, scale, low, raised, lowest=0.0, highest=2.0**config.bits - 1, sweeps=config.descent
        )
    return replace(encoded_rows(codes, grid, config, exponent), shape=tuple(weight.shape))
