"""Data-free quantization: what a network's own batch norms allow to be done for its weights.

Nagel et al. 2019, arXiv 1906.04721: batch norms folded, neighbouring layers equalized, high biases absorbed, weights
rounded to nearest, biases corrected. `preset: paper` follows AIMET, which the compared figures come from: equalization
in one pass, ReLU6 taken for ReLU, absorption whatever the padding. Ours equalizes until nothing moves, and absorbs only
what comes out the same at the borders of padded inputs.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from qcompress.coding.affine import TORCH_DTYPES, exponent_for
from qcompress.coding.rows import blocks_from_rows, grid_shape, rows_from_weight
from qcompress.errors import DataError
from qcompress.model.activations import attach_caps
from qcompress.model.chains import Link, cap_module, equalization_links, join_links
from qcompress.model.fold import FoldedLayer, fold_layer, is_free, kernels, read_layer, why_not_folded
from qcompress.model.graph import batch_norm_of, input_layers
from qcompress.model.layers import TRANSPOSED
from qcompress.model.live import LiveModel, find_tensor, layer_name, put_tensors
from qcompress.model.moments import input_moments
from qcompress.model.sweep import layer_inputs, run_stage
from qcompress.registry import DfqConfig
from qcompress.solvers.equalize import (
    ABSORBED_DEVIATIONS,
    DEAD,
    Chain,
    Peaks,
    absorbable,
    constant_response,
    equalize,
)
from qcompress.solvers.grids import affine_from_grid
from qcompress.solvers.hessian import choose_grid
from qcompress.solvers.ranges_tf import tf_enhanced_grid
from qcompress.types import Affine, Decision, Encoded, Fitted, Kept

SWEEPS = 40


@dataclass
class _Network:
    """What becomes of the layers, by name, on the way.

    configs  of the layers that are free to be changed, see model.fold
    caps     module name -> the largest value of each channel, float64
    """

    live: LiveModel
    decisions: dict[str, Decision] = field(default_factory=dict)
    layers: dict[str, FoldedLayer] = field(default_factory=dict)
    caps: dict[str, Tensor] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def config(self, layer: str) -> DfqConfig:
        config: DfqConfig = self.decisions[layer].config
        return config

    def tensors(self, layers: Iterable[str]) -> dict[str, Tensor]:
        """The tensors of the named layers and their batch norms that are not as they were."""
        found: dict[str, Tensor] = {}
        for name in layers:
            found |= self.layers[name].tensors(TORCH_DTYPES[self.decisions[name].tensor.dtype])
        before = self.live.module
        return {name: value for name, value in found.items() if not torch.equal(value, find_tensor(before, name))}

    def note(self, what: str, names: Sequence[str]) -> None:
        """Note what was left out, with the first few of the names."""
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            self.notes.append(f"{what}: {', '.join(names[:3])}{more}")


@torch.no_grad()
def fit(live: LiveModel, decisions: Sequence[Decision]) -> Fitted:
    """Codes of the decided weights, with the batch norms, biases and caps that they need.

    `references` are the folded and equalized weights. Under them the network computes what it did, but for what
    absorption and `relu6: relax` change. Tensors of layers that the decisions do not name stay as they are.

    raises  ModelError where the network cannot be traced; DataError where empirical correction has no calibration data
    """
    _refuse_no_data(live, decisions)
    network = _read_network(live, decisions)
    links = _usable_links(network)
    _equalize(network, [link for link in links if network.config(link.first).equalize])
    _absorb(network, [link for link in links if network.config(link.first).absorb])
    reference = copy.deepcopy(live.module)
    prepared = network.tensors(network.layers)
    put_tensors(reference, prepared)
    put_tensors(live.quantized, prepared)
    for module in (reference, live.quantized):
        attach_caps(module, network.caps)
    encoded: dict[str, Encoded] = {
        d.tensor.name: _encode(live, find_tensor(reference, d.tensor.name), d) for d in decisions
    }
    live.put(encoded)
    _correct_biases(network, reference)
    adjusted = network.tensors(network.layers)
    references = {name: value for name, value in adjusted.items() if name in encoded}
    encoded |= {name: Kept(value) for name, value in adjusted.items() if name not in encoded}
    caps = {name: cap.float() for name, cap in network.caps.items()}
    return Fitted(encoded, references=references, caps=caps, notes=tuple(network.notes))


def _refuse_no_data(live: LiveModel, decisions: Sequence[Decision]) -> None:
    if not live.calibration and any(d.config.bias_correction == "empirical" for d in decisions):
        what = "bias_correction: empirical has no calibration data"
        raise DataError("dfq", what, "add `data: {calibration: ...}`, or use bias_correction: analytic")


def _read_network(live: LiveModel, decisions: Sequence[Decision]) -> _Network:
    """The layers that can be changed as a whole, their batch norms folded where they can be."""
    network = _Network(live)
    strangers, unfolded = [], []
    for decision in decisions:
        name = layer_name(decision.tensor.name)
        if decision.tensor.name != f"{name}.weight" or not is_free(live, name):
            strangers.append(decision.tensor.name)
            continue
        network.decisions[name] = decision
        norm = batch_norm_of(live, name)
        reason = None if norm is None else why_not_folded(live, name, norm)
        if norm is not None and reason is None and decision.config.fold:
            network.layers[name] = fold_layer(live, name, norm)
        else:
            network.layers[name] = read_layer(live, name)
        if reason is not None:
            unfolded.append(name)
    network.note("rounded and no more, no layer of its own that is called once", strangers)
    network.note("batch norm without weight and bias not folded", unfolded)
    return network


def _usable_links(network: _Network) -> list[Link]:
    """The links between layers that may both be changed; all others are noted."""
    live, layers = network.live, network.layers
    usable: list[Link] = []
    foreign, rigid, capped = [], [], []
    for link in equalization_links(live, live.layers):
        shown = f"{link.first} -> {link.second}"
        if link.first not in layers or link.second not in layers:
            foreign.append(shown)
        elif batch_norm_of(live, link.first) is not None and layers[link.first].norm is None:
            rigid.append(shown)
        elif link.cap is not None and network.config(link.first).relu6 == "skip":
            capped.append(shown)
        else:
            usable.append(link)
    network.note("not equalized, one of the two is not dfq's", foreign)
    network.note("not equalized, the batch norm between is not folded", rigid)
    network.note("not equalized, ReLU6 between (relu6: caps or relax would)", capped)
    return usable


def _equalize(network: _Network, links: list[Link]) -> None:
    """Scale what layers hand on so that the channels of all have equal ranges."""
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


def _limit(layer: FoldedLayer, cap: float | None) -> Tensor:
    """How much larger each channel of a layer's outputs may get: float64 [channels].

    Below a cap that stays where it is, none; but a channel that is constant may grow up to the cap, or else up to what
    the layer's other channels reach.
    """
    groups, height, _, _ = layer.kernels.shape
    limit = torch.full((groups * height,), math.inf if cap is None else 1.0, dtype=torch.float64)
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
        if first.statistics is None:
            continue
        exact = not link.padded or network.config(link.first).preset == "paper"
        if not exact or not second.can_move or isinstance(second.module, TRANSPOSED):
            skipped.append(f"{link.first} -> {link.second}")
            continue
        home = cap_module(network.live, link)
        cap = network.caps.get(home)
        amount = absorbable(first.statistics.after, first.statistics.deviation, link.rectified, cap)
        response = constant_response(second.kernels, amount.repeat_interleave(link.repeats))
        layers[link.first], layers[link.second] = first.lowered(amount), second.moved(response)
        if cap is not None:
            network.caps[home] = cap - amount
    network.note("high biases not absorbed, zeros join in on the way or there is no bias to take them", skipped)


def _encode(live: LiveModel, weight: Tensor, decision: Decision) -> Affine:
    """The weight, in its own shape, in the nearest codes of the configured range."""
    config: DfqConfig = decision.config
    assert config.granularity is not None and config.range is not None
    rows = rows_from_weight(weight, decision.axis).flatten(1).contiguous()
    exponent = exponent_for(float(rows.abs().max()))
    if config.range == "tf-enhanced":
        blocks = blocks_from_rows(rows, config.granularity, config.group_size)
        grid = tf_enhanced_grid(blocks, config.bits, bool(config.symmetric), exponent)
    else:
        grid = choose_grid(rows, config, config.range, exponent, None, live.generator(decision.tensor.name))
    shape = grid_shape(tuple(rows.shape), config.granularity, config.group_size)
    found = affine_from_grid(rows, grid, config.bits, exponent, shape)
    return replace(found, shape=decision.tensor.shape, axis=decision.axis, dtype=decision.tensor.dtype)


def _correct_biases(network: _Network, reference: nn.Module) -> None:
    """Take the mean error of each layer's outputs from its bias, in the network and in `live.quantized`."""
    default = "empirical" if network.live.calibration else "analytic"
    ways = {name: network.config(name).bias_correction or default for name in network.layers}
    homeless = [name for name, way in ways.items() if way != "none" and not network.layers[name].can_move]
    network.note("bias not corrected, there is none", homeless)
    for way, correct in (("analytic", _correct_by_statistics), ("empirical", _correct_by_data)):
        names = [name for name in ways if ways[name] == way and name not in homeless]
        if names:
            correct(network, reference, names)


def _move(network: _Network, name: str, error: Tensor) -> None:
    """Take a layer's mean error, float64 [channels], from its bias."""
    network.layers[name] = network.layers[name].moved(-error)
    tensors = network.tensors([name])
    tensors.pop(f"{name}.weight", None)
    put_tensors(network.live.quantized, tensors)


def _correct_by_statistics(network: _Network, reference: nn.Module, names: Sequence[str]) -> None:
    """The error of the weight times the mean input that the batch norms before it tell of (section 4.2.1).

    The network's own input counts as zero on average, so that the layers that see it stay as they are.
    """
    live = network.live
    models = input_moments(live, reference, network.caps)
    unknown = []
    for name in names:
        model = models.get(name)
        if model is None or not model.mean_known:
            unknown.append(name)
            continue
        module: Any = reference.get_submodule(name)
        error = find_tensor(live.quantized, f"{name}.weight") - module.weight
        # A transposed convolution meets each place of its output with one of so many of its taps.
        share = math.prod(module.stride) if isinstance(module, TRANSPOSED) else 1
        _move(network, name, constant_response(kernels(module, error), model.moments[0]) / share)
    own = input_layers(live)
    network.note("bias not corrected, no statistics of what it sees", [name for name in unknown if name not in own])


def _correct_by_data(network: _Network, reference: nn.Module, names: Sequence[str]) -> None:
    """The mean over the calibration data of what the quantized network gives more, layer after layer.

    Every layer sees what the layers before it give with their biases corrected. One pass through both networks, where
    AIMET's code runs the network once more for every layer.
    """
    live = network.live
    clean = [live.stages[0].begin(batch) for batch in live.calibration]
    noisy = list(clean)
    for stage in live.stages:
        for name in (name for name in stage.layers if name in names):
            means = [
                _output_mean(module.get_submodule(name), layer_inputs(stage, module, states, [name])[name])
                for module, states in ((reference, clean), (live.quantized, noisy))
            ]
            _move(network, name, means[1] - means[0])
        clean, noisy = run_stage(stage, reference, clean), run_stage(stage, live.quantized, noisy)


def _output_mean(module: nn.Module, inputs: Sequence[Tensor]) -> Tensor:
    """The mean output for these inputs, over samples and places: float64 [channels]."""
    axis = -1 if isinstance(module, nn.Linear) else 1
    sums, count = torch.zeros((), dtype=torch.float64), 0
    for x in inputs:
        rows = module(x).movedim(axis, -1).flatten(0, -2)
        sums, count = sums + rows.sum(0, dtype=torch.float64), count + len(rows)
    return sums / count
