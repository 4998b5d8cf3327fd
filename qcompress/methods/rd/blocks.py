"""A network that goes block by block is seen twice: every block is measured, then every block is coded.

What was measured of a block, and some rows of each of its weights, are all that is kept of it. From these rows one
factor on the steps of all blocks is found, anew before each block from what the ones before it took in fact, so that
all together take the rate that was asked for. A layer counts by the relative error of its block's output: what the
network makes of it would need all the blocks behind.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from qcompress.coding.unbounded.lengths import coded_bits, foretold_bits
from qcompress.methods.rd.coder import Coded, code_layers, make_prices
from qcompress.methods.rd.layers import Layer, make_grids, make_layer, rounded, scaled
from qcompress.methods.rd.responses import Response, measure_responses
from qcompress.methods.rd.session import LOG_SCALES
from qcompress.model.live import LiveModel
from qcompress.registry import RdConfig
from qcompress.solvers.unbounded import bisect_rate
from qcompress.types.encoded import Fitted, Unbounded
from qcompress.types.plan import Decision
from qcompress.types.run import FitContext

NOTE = "rd weighed each layer by the relative error of its block's output, since the network goes block by block"
SAMPLED_WEIGHTS = 1 << 16
"""Of each weight, in whole rows, that tell what all of its rows will take."""
CELLS = 4
"""How often a weight's bits are told within a factor of e on its step; they are interpolated between."""
ATTEMPTS = 3
"""How often a block is coded at most."""
NEAR, NEAREST = 0.02, 0.002
"""The share by which the bits of a block, and of the last one, may differ from what was foretold."""
BITS = ".bits"
"""What stands behind a weight's name in the key of the bits that it took and of those that were foretold for it."""


def measure_block(live: LiveModel, decisions: Sequence[Decision[RdConfig]]) -> Fitted:
    """What is to be known of the weights of one block when others are coded."""
    named = {decision.tensor.name: decision for decision in decisions}
    config = decisions[0].config
    slopes = _kind(config) == "measured"
    responses = measure_responses(live, named, damping=config.damping, slopes=slopes)
    measured: dict[str, Tensor] = {}
    for name, response in responses.items():
        layer = make_layer(live, named[name], response)
        measured |= {f"{name}.{key}": value for key, value in _told(layer).items()}
    return Fitted({}, measured=measured)


def code_block(live: LiveModel, decisions: Sequence[Decision[RdConfig]], context: FitContext) -> Fitted:
    """The codes of one block's weights, of which the bits that are left for all that is not coded yet has its share."""
    assert context.rate is not None and context.measured is not None
    config, kept = decisions[0].config, context.kept.get("rd")
    if not isinstance(kept, _Survey) or kept.rate != context.rate:
        kept = context.kept["rd"] = _Survey(context.measured, _kind(config), context.rate)
    survey = kept
    own = {one.tensor.name: make_layer(live, one, survey.layers[one.tensor.name].response) for one in decisions}
    layers = {name: own[name] for name in survey.layers if name in own}
    live.unreached |= {name for name, layer in layers.items() if layer.is_lookup and not layer.response.reached}
    done = _coded_names(context.measured)
    later = [name for name in survey.layers if name not in own and name not in done]
    spent = sum(float(context.measured[f"{name}{BITS}"][0]) for name in done)
    room, ratio = context.rate * survey.weights - spent, _last_ratio(context.measured, done)
    for attempt in range(ATTEMPTS):
        if attempt:
            _start_again(live)
        scale = survey.scale([*layers, *later], room / ratio)
        coded = _code(live, layers, survey.grids, scale, config)
        taken = {name: coded_bits([one]) for name, one in coded.unbounded.items()}
        foretold = {name: survey.bits([name], math.log(scale)) for name in layers}
        told = sum(taken.values()) / max(sum(foretold.values()), 1.0)
        if abs(math.log(max(told, 1e-6) / ratio)) <= (NEAR if later else NEAREST):
            break
        ratio = told
    bits = {f"{name}{BITS}": torch.tensor([taken[name], foretold[name]], dtype=torch.float64) for name in layers}
    return replace(coded.fitted(), measured=bits, notes=(NOTE,))


def _kind(config: RdConfig) -> str:
    return config.allocation or ("relative" if config.effort == "fast" else "measured")


def _code(
    live: LiveModel, layers: Mapping[str, Layer], grids: Mapping[str, Unbounded], scale: float, config: RdConfig
) -> Coded:
    own = {
        name: replace(grids[name], shape=layer.shape, axis=layer.axis, dtype=layer.dtype)
        for name, layer in layers.items()
    }
    like = {name: rounded(own[name], scale, layer) for name, layer in layers.items()} if config.lam else {}
    final = {name: scaled(own[name], scale, layer) for name, layer in layers.items()}
    return code_layers(live, layers, final, make_prices(like, config), config)


def _start_again(live: LiveModel) -> None:
    """The quantized network's weights are read anew when they are needed."""
    assert live.offloaded is not None
    live.offloaded[1].release()


def _coded_names(measured: Collection[str]) -> list[str]:
    """The weights that are coded already, in the order of blocks."""
    return [key.removesuffix(BITS) for key in measured if key.endswith(BITS)]


def _last_ratio(measured: Mapping[str, Tensor], done: Sequence[str]) -> float:
    """What the codes of the last weights took beside what was foretold; 1 where none are coded."""
    if not done:
        return 1.0
    last = torch.stack([measured[f"{name}{BITS}"] for name in done[-RATIO_OF:]]).sum(0)
    return float(last[0] / last[1])


RATIO_OF = 7
"""Weights whose codes tell how the next ones do: about those of a block."""


def _told(layer: Layer) -> dict[str, Tensor]:
    """A layer as tensors, with some of its rows; see `_layer_of`."""
    places = _sampled_rows(*layer.size)
    response = layer.response
    numbers = [
        *layer.size,
        layer.taps,
        layer.deviation,
        layer.largest,
        response.slope,
        response.normed_slope,
        response.reached,
        layer.is_lookup,
        layer.config.columns is not False,
        layer.config.trellis,
    ]
    return {
        "rows": layer.rows[places],
        "energies": response.energies,
        "power": response.power,
        "gains": response.gains,
        "numbers": torch.tensor([float(one) for one in numbers], dtype=torch.float64),
    }


def _sampled_rows(rows: int, columns: int) -> Tensor:
    count = min(rows, max(2, SAMPLED_WEIGHTS // max(1, columns)))
    return (torch.arange(count) * rows) // count


def _layer_of(told: Mapping[str, Tensor]) -> Layer:
    """The layer that `_told` has told of, in the order of channels and taps."""
    rows, columns, taps, deviation, largest, slope, normed, reached, is_lookup, varies, trellis = told[
        "numbers"
    ].tolist()
    size = (int(rows), int(columns))
    return Layer(
        shape=(size[0], size[1] // int(taps), int(taps)),
        axis=(0,),
        dtype="F32",
        config=RdConfig(effort="high" if trellis else "normal", columns=None if varies else False),
        size=size,
        rows=told["rows"],
        deviation=deviation,
        largest=largest,
        response=Response(told["energies"], told["power"], told["gains"], slope, normed, reached=bool(reached)),
        is_lookup=bool(is_lookup),
    )


class _Survey:
    """What all blocks were measured to be, and what their weights take on the steps of one rate."""

    def __init__(self, measured: Mapping[str, Tensor], kind: str, rate: float) -> None:
        self.rate = rate
        names = [key.removesuffix(".numbers") for key in measured if key.endswith(".numbers")]
        parts = ("rows", "energies", "power", "gains", "numbers")
        self.layers = {name: _layer_of({part: measured[f"{name}.{part}"] for part in parts}) for name in names}
        self.grids = make_grids(self.layers, kind, rate)
        self.weights = sum(layer.weights for layer in self.layers.values())
        self._cell = cache(self._bits_at)

    def bits(self, names: Sequence[str], log: float) -> float:
        """About the bits that weights take when they are rounded on steps times e**log."""
        low = math.floor(log * CELLS)
        share = log * CELLS - low
        return sum((1 - share) * self._cell(name, low) + share * self._cell(name, low + 1) for name in names)

    def scale(self, names: Sequence[str], bits: float) -> float:
        """The factor on all steps under which weights take so many bits."""
        return math.exp(bisect_rate(lambda log: self.bits(names, log), bits, *LOG_SCALES))

    def _bits_at(self, name: str, cell: int) -> float:
        layer = self.layers[name]
        return foretold_bits(rounded(self.sampled(name), math.exp(cell / CELLS), layer), layer.size[0])

    def sampled(self, name: str) -> Unbounded:
        """The grid of the rows that are known."""
        grid, size = self.grids[name], self.layers[name].size
        shape = (len(self.layers[name].rows), *grid.shape[1:])
        rows = None if grid.rows is None else grid.rows[_sampled_rows(*size)]
        return replace(grid, shape=shape, rows=rows)
