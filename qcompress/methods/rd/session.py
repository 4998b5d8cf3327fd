"""A session measures a live model's responses once, and codes its weights at as many rates as a budget tries."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qcompress.coding.unbounded.lengths import coded_bits
from qcompress.methods.rd.coder import Coded, code_layers, make_prices
from qcompress.methods.rd.layers import make_grids, make_layer, rounded, scaled
from qcompress.methods.rd.responses import measure_responses
from qcompress.model.live import LiveModel, put_tensors
from qcompress.model.runs import run_stage
from qcompress.model.stages import last_output
from qcompress.registry import RdConfig
from qcompress.solvers.unbounded import bisect_rate
from qcompress.types.encoded import Fitted, Unbounded
from qcompress.types.plan import Decision

DIVERGENCE_SAMPLES = 512
LOG_SCALES = (-14.0, 6.0)
"""Logarithms of factors on all steps between which one is searched for a rate."""
ALIKE = 2.0
"""By how much rates differ at most for one pass to take its prices from the codes of another."""


@dataclass(frozen=True)
class _Pass:
    """What one sweep made of a rate.

    rate        bits a weight that it was asked for
    bits        of all codes with their side information
    divergence  the mean Kullback-Leibler divergence of the network's outputs, in nats
    """

    rate: float
    coded: Coded
    bits: float
    divergence: float


class Session:
    """A live model whose weights can be coded at any rate, each time in a copy of it that is as it was.

    Steps come from an allocation: of equal slope with measured sensitivities, or of an error relative to each layer's
    normed output that grows with its inputs. The better one is told by what it makes of the calibration data at the
    first rate, and stays.
    """

    def __init__(self, live: LiveModel, decisions: Sequence[Decision[RdConfig]]) -> None:
        self.live = live
        named = {decision.tensor.name: decision for decision in decisions}
        self.config = decisions[0].config
        responses = measure_responses(live, named, damping=self.config.damping)
        self.layers = {name: make_layer(live, named[name], response) for name, response in responses.items()}
        self._start = {name: value.detach().clone() for name, value in live.quantized.state_dict().items()}
        self._samples = live.calibration[: max(1, DIVERGENCE_SAMPLES // live.calibration[0].size)]
        self._wanted = _log_probabilities(live, live.module, self._samples)
        self.kind: str | None = self.config.allocation or ("relative" if self.config.effort == "fast" else None)
        self._last: _Pass | None = None

    def fit(self, live: LiveModel, rate: float) -> Fitted:
        """Codes on the steps under which rounding takes `rate` bits a weight, side information included.

        live  a copy of the session's model with nothing encoded yet; its `quantized` ends as what is returned
        """
        self.live = live
        if self._last is None or self.kind is None:
            done = self._first(rate)
        else:
            done = self._pass(self.kind, rate, self._last)
        self._last = done
        self._restore()
        put_tensors(self.live.quantized, done.coded.adjusted)
        self.live.put(done.coded.unbounded)
        return done.coded.fitted()

    def _first(self, rate: float) -> _Pass:
        """The pass of the better allocation; with high effort another one, at the prices of its codes."""
        kinds = [self.kind] if self.kind else ["measured", "relative"]
        tried = {kind: self._pass(kind, rate, None) for kind in kinds}
        # Divergence falls about fourfold with each bit a weight.
        self.kind = min(tried, key=lambda kind: tried[kind].divergence * 4.0 ** (tried[kind].bits / self.weights))
        done = tried[self.kind]
        return self._pass(self.kind, rate, done) if self.config.effort == "high" else done

    @property
    def weights(self) -> int:
        """Weights that are coded."""
        return sum(layer.weights for layer in self.layers.values())

    def _restore(self) -> None:
        self.live.quantized.load_state_dict(self._start)

    def _rounded(self, grids: Mapping[str, Unbounded], scale: float) -> dict[str, Unbounded]:
        return {name: rounded(grids[name], scale, layer) for name, layer in self.layers.items()}

    def _scale(self, grids: Mapping[str, Unbounded], rate: float) -> float:
        """The factor on all steps under which rounding takes so many bits a weight."""

        def rate_at(log: float) -> float:
            return coded_bits([*self._rounded(grids, math.exp(log)).values()]) / self.weights

        return math.exp(bisect_rate(rate_at, rate, *LOG_SCALES))

    def _pass(self, kind: str, rate: float, before: _Pass | None) -> _Pass:
        """One sweep in which every layer is coded for the inputs that the layers before it now give.

        before  whose codes tell prices, where it was of a like rate; else rounded ones do
        """
        grids = make_grids(self.layers, kind, rate)
        scale = self._scale(grids, rate)
        alike = before is not None and max(before.rate, rate) <= ALIKE * min(before.rate, rate)
        priced = before.coded.unbounded if before is not None and alike else self._rounded(grids, scale)
        self._restore()
        prices = make_prices({name: priced[name] for name in self.layers}, self.config)
        final = {name: scaled(grids[name], scale, layer) for name, layer in self.layers.items()}
        coded = code_layers(self.live, self.layers, final, prices, self.config)
        return _Pass(rate, coded, coded_bits([*coded.unbounded.values()]), self._divergence())

    def _divergence(self) -> float:
        found = _log_probabilities(self.live, self.live.quantized, self._samples)
        return float((self._wanted.exp() * (self._wanted - found)).sum(-1).mean())


@torch.no_grad()
def _log_probabilities(live: LiveModel, module: nn.Module, batches: Sequence[object]) -> Tensor:
    """The logarithms of the network's output probabilities, [positions, classes]."""
    states = [live.stages[0].begin(batch) for batch in batches]  # type: ignore[arg-type]
    for stage in live.stages:
        states = run_stage(stage, module, states)
    return torch.cat([last_output(state).flatten(0, -2).float() for state in states]).log_softmax(-1)
