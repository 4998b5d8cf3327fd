"""AdaRound learns for every weight whether to round up or down, layer by layer, against the layer's output.

Nagel et al. 2020, arXiv 2004.10568. `preset: paper` follows AIMET, which the compared figures come from: batch norms
folded, a symmetric grid a tensor, random batches through the layer and the activation after it. Ours minimises the same
error in closed form over all positions (solvers.rounding), on a grid that is chosen under the Hessian.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from qcompress.coding.grids import exponent_for
from qcompress.coding.rows import rows_from_weight, weight_from_rows
from qcompress.model.fold import fold_batch_norms
from qcompress.model.graph import activation_after, batch_norm_of
from qcompress.model.layers import MatrixLayer
from qcompress.model.live import LiveModel, find_tensor
from qcompress.model.operations import BatchNorm
from qcompress.model.sweep import LayerStep, sweep
from qcompress.registry import AdaroundConfig
from qcompress.solvers.hessian import choose_grid, encoded_rows, grid_exponent, row_levels
from qcompress.solvers.rounding import SoftRounding, make_neighbours, round_by_gram, round_by_samples
from qcompress.types.encoded import Affine, Encoded, Fitted, for_tensor
from qcompress.types.plan import Decision
from qcompress.types.run import EncodeContext, FitContext

Activation = Callable[[Tensor], Tensor]
USUAL: dict[str, Any] = {"iterations": 500, "learning_rate": 3e-2, "strength": 0.1, "warm_up": 0.2}
"""The schedule on a Gram of a weight that no batches can be passed through: of a product inside a module."""


def fit(live: LiveModel, decisions: Sequence[Decision[AdaroundConfig]], context: FitContext) -> Fitted:
    """Codes layer by layer, each from the inputs that the layers before it now give.

    Where `fold` is on, batch norms become identities first; those and biases are then adjusted too.
    """
    encoded: dict[str, Encoded] = {}
    folding = [decision for decision in decisions if decision.config.fold]
    folded = fold_batch_norms(live, folding) if folding else Fitted({})
    for asymmetric in (True, False):
        wanted = {d.tensor.name: d for d in decisions if d.config.asymmetric is asymmetric}
        for step in sweep(live, wanted, sequential=asymmetric) if wanted else ():
            decision = wanted[step.tensor]
            name = decision.tensor.name
            weight = folded.references.get(name, live.weight(name))
            rows = rows_from_weight(weight, decision.axis)
            sampled = decision.config.objective == "sampled" and step.is_reached
            if not sampled or not isinstance(step.layer, MatrixLayer) or step.layer.joined:
                own = EncodeContext(exponent_for(float(rows.abs().max())), step.generator, step.gram())
                found = encode(rows, decision.config, own)
            else:
                found = _encode_by_samples(live, step, weight, decision)
            found = encoded[name] = for_tensor(found, decision)
            live.put({name: found})
    return Fitted({**folded.encoded, **encoded}, references=folded.references, notes=folded.notes)


def encode(weight: Tensor, config: AdaroundConfig, context: EncodeContext) -> Affine:
    """The codes of one weight, float32 [rows, ...], from the second moments of its layer's inputs."""
    gram = context.gram
    assert gram is not None
    rows = weight.flatten(1).contiguous()
    exponent = grid_exponent(rows, config)
    grid = choose_grid(rows, config, config.range or "minmax", exponent, gram.hessian, context.generator)
    scale, low = row_levels(grid, config, exponent, rows)
    codes = round_by_gram(
        rows,
        make_neighbours(rows, scale, low, config.bits),
        gram.hessian,
        gram.cross if config.asymmetric else None,
        **(_schedule(config) if config.objective == "gram" else USUAL),
    )
    return replace(encoded_rows(codes, grid, config, exponent), shape=tuple(weight.shape))


def _schedule(config: AdaroundConfig) -> dict[str, Any]:
    names = ("iterations", "learning_rate", "strength", "warm_up")
    return {name: getattr(config, name) for name in names}


def _encode_by_samples(live: LiveModel, step: LayerStep, weight: Tensor, decision: Decision[AdaroundConfig]) -> Affine:
    """As published: Adam on random batches of stored inputs; nearest rounding where that leaves a smaller error."""
    config = decision.config
    rows = rows_from_weight(weight, decision.axis).flatten(1).contiguous()
    exponent = grid_exponent(rows, config)
    hessian = step.gram().hessian if config.range == "hessian" else None
    grid = choose_grid(rows, config, config.range or "minmax", exponent, hessian, step.generator)
    scale, low = row_levels(grid, config, exponent, rows)
    neighbours = make_neighbours(rows, scale, low, config.bits)
    rounding = SoftRounding(neighbours, tuple(weight.shape), decision.axis)
    error = _Reconstruction(live, step, weight, config.batch_size)
    codes = round_by_samples(
        rounding,
        error,
        error.samples,
        batch_size=config.batch_size,
        **_schedule(config),
        schedule="cosine",
        generator=step.generator,
    )
    nearest = torch.where(neighbours.rest > 0.5, neighbours.ceiling, neighbours.floor)
    with torch.no_grad():
        errors = [
            error.over_all(weight_from_rows(neighbours.values(one), tuple(weight.shape), decision.axis))
            for one in (codes, nearest)
        ]
    best = codes if errors[0] < errors[1] else nearest
    return encoded_rows(best, grid, config, exponent)


class _Reconstruction:
    """The squared error of a layer's output after its batch norm and activation: the sum over channels, averaged over
    the rest."""

    def __init__(self, live: LiveModel, step: LayerStep, weight: Tensor, batch_size: int) -> None:
        self._noisy, self._clean = torch.cat([*step.noisy]), torch.cat([*step.clean])
        self._module = live.quantized.get_submodule(step.name)
        self._weight = weight
        self._after = _what_follows(live, step.name)
        assert isinstance(step.layer, MatrixLayer)
        self._layer = step.layer
        self._batch = batch_size
        self.samples = len(self._noisy)

    def __call__(self, weight: Tensor, samples: Tensor) -> Tensor:
        found = self._output(weight, self._noisy[samples])
        with torch.no_grad():
            wanted = self._output(self._weight, self._clean[samples])
        return (found - wanted).square().sum(1).mean()

    def _output(self, weight: Tensor, x: Tensor) -> Tensor:
        """[positions, channels]."""
        return self._after(self._layer.outputs(functional_call(self._module, {"weight": weight}, (x,))))

    def over_all(self, weight: Tensor) -> float:
        """The error over all samples."""
        total = 0.0
        for start in range(0, self.samples, self._batch):
            part = torch.arange(start, min(start + self._batch, self.samples), device=weight.device)
            total += float(self(weight, part)) * len(part)
        return total / self.samples


def _what_follows(live: LiveModel, name: str) -> Activation:
    """The layer's batch norm and the ReLU or capped one after it, as far as there are any, on [positions, channels]."""
    if not live.traced:
        return lambda y: y
    norm, activation = batch_norm_of(live, name), activation_after(live, name)
    scale, shift = (torch.ones(()), torch.zeros(())) if norm is None else _affine(live, norm)
    if activation is None or activation.kind not in ("relu", "capped"):
        return lambda y: y * scale + shift
    return lambda y: (y * scale + shift).clamp(0, activation.cap)


def _affine(live: LiveModel, norm: BatchNorm) -> tuple[Tensor, Tensor]:
    """What a batch norm with stored statistics multiplies and adds, each [channels]."""
    mean, variance = (find_tensor(live.quantized, tensor) for tensor in (norm.running_mean, norm.running_var))
    scale = (variance + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * find_tensor(live.quantized, norm.weight)
    shift = -mean * scale
    return scale, shift if norm.bias is None else shift + find_tensor(live.quantized, norm.bias)
