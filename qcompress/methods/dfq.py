"""DFQ, data-free quantization, prepares weights by what a network's own batch norms allow, and rounds them.

Nagel et al. 2019, arXiv 1906.04721: batch norms folded, neighbouring layers equalized, high biases absorbed, weights
rounded to nearest, biases corrected. `preset: paper` follows AIMET, which the compared figures come from: equalization
in one pass, ReLU6 taken for ReLU, absorption whatever the padding. Ours equalizes until nothing moves, folds only what
equalization needs, since what stays in a batch norm needs no grid, and absorbs only what padded inputs leave exact.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from qcompress.calibration.activations import attach_caps
from qcompress.calibration.corrections import correct_by_data, mean_errors
from qcompress.coding.grids import TORCH_DTYPES
from qcompress.coding.rows import rows_from_weight
from qcompress.errors import DataError
from qcompress.model.chains import Link, cap_module, equalization_links, join_links
from qcompress.model.fold import NormedLayer, fold_layer, is_free, read_layer, why_not_folded
from qcompress.model.graph import batch_norm_of, input_layers
from qcompress.model.layers import TRANSPOSED
from qcompress.model.live import LiveModel, find_tensor, layer_name, put_tensors
from qcompress.registry import DfqConfig
from qcompress.solvers.equalize import ABSORBED_DEVIATIONS, DEAD, Chain, Peaks, absorbable, equalize
from qcompress.solvers.grids import affine_from_grid
from qcompress.solvers.hessian import choose_grid, grid_exponent
from qcompress.types.encoded import Affine, Encoded, Fitted, Kept, for_tensor
from qcompress.types.plan import Decision
from qcompress.types.run import FitContext

SWEEPS = 40


@dataclass
class _Network:
    """What becomes of the layers, by name, on the way.

    configs  of the layers that are free to be changed, see model.fold
    caps     module name -> the largest value of each channel, float64
    """

    live: LiveModel
    decisions: dict[str, Decision[DfqConfig]] = field(default_factory=dict)
    layers: dict[str, NormedLayer] = field(default_factory=dict)
    caps: dict[str, Tensor] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def config(self, layer: str) -> DfqConfig:
        return self.decisions[layer].config

    def tensors(self, layer: str) -> dict[str, Tensor]:
        """The tensors of a layer and its batch norm."""
        return self.layers[layer].tensors(TORCH_DTYPES[self.decisions[layer].tensor.dtype])

    def fold(self, layer: str) -> bool:
        """Fold a layer's batch norm, unless that is done, and say whether what comes out of it can now be scaled."""
        own = self.layers[layer]
        if own.norm is None or own.folded:
            return True
        if self.config(layer).fold is False or why_not_folded(self.live, layer, own.norm) is not None:
            return False
        self.layers[layer] = fold_layer(self.live, layer, own.norm)
        return True

    def changed_tensors(self) -> dict[str, Tensor]:
        """The tensors of all layers that are not as they were."""
        found = {name: value for layer in self.layers for name, value in self.tensors(layer).items()}
        before = self.live.module
        return {name: value for name, value in found.items() if not torch.equal(value, find_tensor(before, name))}

    def note(self, what: str, names: Sequence[str]) -> None:
        """Note what was left out, with the first few of the names."""
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            self.notes.append(f"{what}: {', '.join(names[:3])}{more}")


@torch.no_grad()
def fit(live: LiveModel, decisions: Sequence[Decision[DfqConfig]], context: FitContext) -> Fitted:
    """Codes of the decided weights, with the batch norms, biases and caps that they need.

    `references` are the folded and equalized weights. Under them the network computes what it did, but for what
    absorption and `relu6: relax` change. Tensors of layers that the decisions do not name stay as they are.

    raises  ModelError where the network cannot be traced; DataError where empirical correction has no calibration data
    """
    _refuse_no_data(live, decisions)
    network = _read_network(live, decisions)
    links = _usable_links(network)
    _equalize(network, links)
    _absorb(network, links)
    reference = copy.deepcopy(live.module)
    prepared = network.changed_tensors()
    for module in (reference, live.quantized):
        put_tensors(module, prepared)
        attach_caps(module, network.caps)
    encoded: dict[str, Encoded] = {}
    for decision in decisions:
        name = decision.tensor.name
        encoded[name] = _encode(live, find_tensor(reference, name), decision)
    live.put(encoded)
    _correct_biases(network, reference)
    changed = network.changed_tensors()
    references = {name: changed.pop(name) for name in encoded if name in changed}
    encoded |= {name: Kept(value) for name, value in changed.items()}
    caps = {name: cap.float() for name, cap in network.caps.items()}
    return Fitted(encoded, references=references, caps=caps, notes=tuple(network.notes))


def _refuse_no_data(live: LiveModel, decisions: Sequence[Decision[DfqConfig]]) -> None:
    if not live.calibration and any(d.config.bias_correction == "empirical" for d in decisions):
        what = "bias_correction: empirical has no calibration data"
        raise DataError("dfq", what, "add `data: {calibration: ...}`, or use bias_correction: analytic")


def _read_network(live: LiveModel, decisions: Sequence[Decision[DfqConfig]]) -> _Network:
    """The layers that can be changed as a whole; where `fold` is on, with their batch norms folded."""
    network = _Network(live)
    strangers, unfolded = [], []
    for decision in decisions:
        name = layer_name(decision.tensor.name)
        if decision.tensor.name != f"{name}.weight" or not is_free(live, name):
            strangers.append(decision.tensor.name)
            continue
        network.decisions[name] = decision
        network.layers[name] = read_layer(live, name, batch_norm_of(live, name))
        if decision.config.fold and not network.fold(name):
            unfolded.append(name)
    network.note("rounded and no more, not the weight of a plain layer that is called once", strangers)
    network.note("batch norm not folded, it has no weight and bias", unfolded)
    return network


def _usable_links(network: _Network) -> list[Link]:
    """The links between layers that may both be changed; all others are noted."""
    usable: list[Link] = []
    foreign, capped = [], []
    for link in equalization_links(network.live, network.live.layers):
        shown = f"{link.first} -> {link.second}"
        if link.first not in network.layers or link.second not in network.layers:
            foreign.append(shown)
        elif link.cap is not None and network.config(link.first).relu6 == "skip":
            capped.append(shown)
        else:
            usable.append(link)
    network.note("left alone, one of the two has another method", foreign)
    network.note("left alone, ReLU6 between", capped)
    return usable


def _equalize(network: _Network, links: Sequence[Link]) -> None:
    """Scale what layers hand on so that the channels of all have equal ranges."""
    wanted = [link for link in links if network.config(link.first).equalize and network.config(link.second).equalize]
    links = [link for link in wanted if network.fold(link.first)]
    network.note(
        "not equalized, the batch norm between is not folded", [link.first for link in wanted if link not in links]
    )
    rows = join_links(network.live, links)
    if not rows:
        return
    names = list(dict.fromkeys(name for link in links for name in (link.first, link.second)))
    peaks = [Peaks(network.layers[name].kernels.abs().amax(3)) for name in names]
    chains = [_chain(network, row, names) for row in rows]
    sweeps = 1 if network.config(links[0].first).preset == "paper" else SWEEPS
    scales = equalize(chains, peaks, sweeps)
    layers = network.layers
    for link, scale in zip((link for row in rows for link in row), (s for row in scales for s in row), strict=True):
        layers[link.first] = layers[link.first].scaled_outputs(scale)
        layers[link.second] = layers[link.second].scaled_inputs(1 / scale.repeat_interleave(link.repeats))
        if link.cap is not None and network.config(link.first).relu6 == "caps":
            network.caps[cap_module(network.live, link)] = link.cap * scale
    largest = max(float(scale.max()) for row in scales for scale in row)
    least = min(float(scale.min()) for row in scales for scale in row)
    network.notes.append(f"equalized over {len(links)} links: channels times {least:.3g} to {largest:.3g}")


def _chain(network: _Network, row: Sequence[Link], names: Sequence[str]) -> Chain:
    members = (row[0].first, *(link.second for link in row))
    limits = tuple(_limit(network.layers[link.first], link.cap) for link in row)
    return Chain(tuple(names.index(name) for name in members), limits, row[-1].repeats)


def _limit(layer: NormedLayer, cap: float | None) -> Tensor:
    """How much larger each channel of a layer's outputs may get: float64 [channels].

    Below a cap that stays where it is, none; but a channel that is constant may grow up to the cap, or else up to what
    the layer's other channels reach.
    """
    groups, height, _, _ = layer.kernels.shape
    limit = layer.weight.new_full((groups * height,), math.inf if cap is None else 1.0, dtype=torch.float64)
    if layer.statistics is None:
        return limit
    after, deviation = layer.statistics.after, layer.statistics.deviation
    top = float((after + ABSORBED_DEVIATIONS * deviation).max()) if cap is None else cap
    constant = deviation <= DEAD * deviation.max()
    room = torch.where(after > 0, max(top, 0.0) / after.clamp_min(1e-30), math.inf)
    return torch.where(constant, room, limit)


def _absorb(network: _Network, links: Sequence[Link]) -> None:
    """Take what almost every output exceeds from a layer, and give it to the next layer's bias."""
    layers, skipped = network.layers, []
    for link in links:
        first, second = layers[link.first], layers[link.second]
        asked = network.config(link.first).absorb and network.config(link.second).absorb
        if not asked or first.statistics is None or first.norm is None or not first.norm.affine:
            continue
        exact = not link.padded or network.config(link.first).preset == "paper"
        if not exact or not second.can_move or isinstance(second.module, TRANSPOSED):
            skipped.append(f"{link.first} -> {link.second}")
            continue
        home = cap_module(network.live, link)
        cap = network.caps.get(home)
        if cap is None and link.cap is not None and network.config(link.first).relu6 == "caps":
            cap = torch.full_like(first.statistics.after, link.cap)
        amount = absorbable(first.statistics.after, first.statistics.deviation, link.rectified, cap)
        response = second.response(amount.repeat_interleave(link.repeats))
        layers[link.first], layers[link.second] = first.lowered(amount), second.moved(response)
        if cap is not None:
            network.caps[home] = cap - amount
    network.note("high biases not absorbed, zeros join in on the way or there is no bias to take them", skipped)


def _encode(live: LiveModel, weight: Tensor, decision: Decision[DfqConfig]) -> Affine:
    """The weight, in its own shape, in the nearest codes of the configured range."""
    config = decision.config
    assert config.range is not None
    rows = rows_from_weight(weight, decision.axis).flatten(1).contiguous()
    exponent = grid_exponent(rows, config)
    grid = choose_grid(rows, config, config.range, exponent, None, live.generator(decision.tensor.name))
    return for_tensor(affine_from_grid(rows, grid, config, exponent), decision)


def _correct_biases(network: _Network, reference: nn.Module) -> None:
    """Take the mean error of each layer's outputs from its bias, in the network and in `live.quantized`.

    The network's own input counts as zero on average for `analytic`, so that layers that see it stay as they are.
    """
    live = network.live
    default = "empirical" if live.calibration else "analytic"
    ways = {name: network.config(name).bias_correction or default for name in network.layers}
    homeless = [name for name, way in ways.items() if way != "none" and not network.layers[name].can_move]
    network.note("bias not corrected, there is none", homeless)
    by_way = {way: [n for n in ways if ways[n] == way and n not in homeless] for way in ("analytic", "empirical")}

    def correct(name: str, error: Tensor) -> None:
        network.layers[name] = network.layers[name].moved(-error)
        tensors = network.tensors(name)
        del tensors[f"{name}.weight"]
        put_tensors(live.quantized, tensors)

    errors = mean_errors(live, reference, [network.layers[name] for name in by_way["analytic"]], network.caps)
    for name, error in errors.items():
        correct(name, error)
    unknown = [name for name in by_way["analytic"] if name not in {*errors, *input_layers(live)}]
    network.note("bias not corrected, no statistics of what it sees", unknown)
    if by_way["empirical"]:
        correct_by_data(live, reference, by_way["empirical"], correct)
