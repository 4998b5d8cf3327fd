"""What each layer alone costs at each width: from its weights, or from the output of a live model.

From weights alone the cost is the squared error that the grid leaves, over the tensor's norm. On a live model it is the
divergence between the outputs of the network as it was and of the network in which only this layer is quantized.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from qcompress.allocate import Costs
from qcompress.artifact.layout import make_slots
from qcompress.books import Evidence
from qcompress.checkpoint import Checkpoint, tensor_view
from qcompress.coding.affine import decode, decode_rows
from qcompress.coding.half import exponent_for
from qcompress.coding.rows import rows_from_weight
from qcompress.container import Container
from qcompress.errors import InputError, RecipeError, raise_all
from qcompress.evaluate import Setting
from qcompress.model.batches import Batches
from qcompress.model.live import LiveModel, find_tensor
from qcompress.model.tasks import measure
from qcompress.plan import refuse
from qcompress.probe import make_probe
from qcompress.recipe import recipe_json
from qcompress.registry import METHODS, MseConfig, RtnConfig
from qcompress.report.assemble import run_figures
from qcompress.report.sensitivity import (
    LayerCosts,
    Sensitivity,
    WidthCost,
    checkpoint_sha256,
    grid_words,
)
from qcompress.types import Decision, Plan, Recipe, Widths
from qcompress.worker import BLOCK_WEIGHTS, encode_rows

ALL_WIDTHS = range(1, 9)
SAMPLES = 256
"""Samples that divergences and metrics are measured on where nothing is said."""

SAMPLED_WEIGHTS = 1 << 16
"""Of larger tensors the errors are those of evenly spread rows of about so many weights."""

MEASURED_WIDTH = 4
"""The widest that is run to allocate: beyond it the divergence falls like the relative error."""

ROUNDED_WIDTH = 5
"""The widest that weights are rounded to, to allocate: beyond it their error falls to a quarter with each bit."""

Say = Callable[[str], None]


def weight_costs(checkpoint: Checkpoint, plan: Plan, threads: int = 1) -> Costs:
    """The squared error of every open tensor at each of its widths over its norm, from its weights alone.

    Half way between the relative and the absolute error, where measured divergences lie (docs/methods.md). Of tensors
    past SAMPLED_WEIGHTS, unless one grid spans them, the error is that of evenly spread rows. Widths above
    ROUNDED_WIDTH are not tried. A weight that is not finite costs nothing: whoever encodes it refuses it.
    """
    decisions = [decision for decision in plan.decisions if decision.is_open]

    def measured(decision: Decision) -> dict[int, float]:
        source, widths = checkpoint.shard_of(decision.tensor.name), list(decision.config.configs)
        tried = [bits for bits in widths if bits <= ROUNDED_WIDTH] or widths[:1]
        errors = relative_errors(tensor_view(source, decision.tensor), decision, tried, plan.recipe.seed)
        last, norm = tried[-1], _norm(source, decision)
        return {bits: norm * errors.get(bits, errors[last] / 4 ** (bits - last)) for bits in widths}

    with ThreadPoolExecutor(threads) as pool:
        found = list(pool.map(measured, decisions))
    of = {decision.tensor.name: costs for decision, costs in zip(decisions, found, strict=True)}
    return Costs(of, "error that its grid leaves")


def _norm(source: Container, decision: Decision) -> float:
    """The root of a weight's energy; 0 where that is not finite."""
    weight = tensor_view(source, decision.tensor).reshape(-1)
    parts = (weight[start : start + BLOCK_WEIGHTS] for start in range(0, weight.numel(), BLOCK_WEIGHTS))
    energy = sum(float(part.double().square().sum()) for part in parts)
    return math.sqrt(energy) if math.isfinite(energy) else 0.0


def relative_errors(weight: Tensor, decision: Decision, widths: Iterable[int], seed: int) -> dict[int, float]:
    """Width -> squared error over energy of one weight, in its stand-in's grids; 0 of a weight without energy."""
    rows = rows_from_weight(weight, decision.axis)
    if decision.config.widest.granularity != "tensor":
        rows = rows[:: max(1, rows.numel() // SAMPLED_WEIGHTS)]
    rows = rows.to("cpu", torch.float32).contiguous()
    energy = float(rows.double().square().sum())
    if not 0 < energy < math.inf:
        return dict.fromkeys(widths, 0.0)
    flat, exponent = rows.reshape(len(rows), -1), exponent_for(float(rows.abs().max()))
    errors = {}
    for bits in widths:
        decoded = decode_rows(encode_rows(rows, stand_in(decision, bits), exponent, Evidence(seed)))
        errors[bits] = float((decoded - flat).double().square().sum()) / energy
    return errors


def stand_in(decision: Decision, bits: int) -> Decision:
    """The decision at a width; of a method that needs a live model, the same grid chosen from weights alone."""
    config = decision.config.at(bits)
    if METHODS[decision.method or ""].needs == "weights":
        return replace(decision, config=config)
    shared = {name: getattr(config, name) for name in ("bits", "granularity", "group_size", "symmetric", "axis")}
    if getattr(config, "range", None) == "minmax":
        return replace(decision, method="rtn", config=RtnConfig(**shared))
    return replace(decision, method="mse", config=MseConfig(**shared, effort="normal"))


def open_widths(plan: Plan, widths: Sequence[int] = ALL_WIDTHS) -> Plan:
    """The plan with every compressed tensor open at those of `widths` that its method and shape allow.

    raises  RecipeError (Refusals where several) for methods without widths, and where none of them is allowed
    """
    errors: list[InputError] = []
    decisions = []
    for decision in plan.decisions:
        if decision.compresses:
            method = METHODS[decision.method or ""]
            quick = method.needs == "weights" and not method.representatives
            if not method.has_widths or (method.family == "cluster" and not quick):
                what = f"{decision.method} cannot be tried at other widths"
                errors.append(RecipeError(decision.tensor.name, what, "give it a rule with squant"))
                continue
            configs = decision.config.configs if decision.is_open else _at_widths(decision)
            chosen = {bits: config for bits, config in configs.items() if bits in widths}
            if not chosen:
                what = f"{decision.method} has none of the widths {', '.join(map(str, widths))}"
                errors.append(RecipeError(decision.tensor.name, what, "name others with --widths"))
                continue
            decision = replace(decision, config=Widths(chosen))
        decisions.append(decision)
    raise_all(errors)
    return replace(plan, decisions=tuple(decisions))


def _at_widths(decision: Decision) -> dict[int, Any]:
    """The config of a decision at every width that it can have."""
    found = {}
    for bits in ALL_WIDTHS:
        try:
            config = replace(decision.config, bits=bits)
        except ValueError:
            continue
        if refuse(decision.tensor, decision.method or "", config, decision.axis) is None:
            found[bits] = config
    return found


def live_costs(
    live: LiveModel, checkpoint: Checkpoint, plan: Plan, setting: Setting, say: Say = lambda _: None
) -> Costs:
    """The divergence of every open tensor at each of its widths, measured on a few samples.

    Widths above MEASURED_WIDTH are not run: their divergence is that of the widest that was, times the ratio of the
    relative errors.
    """
    errors = weight_costs(checkpoint, plan).of
    probe = make_probe(live, setting, SAMPLES)
    decisions = [decision for decision in plan.decisions if decision.is_open]
    say(f"sensitivity of {len(decisions)} tensors on {probe.samples} samples")
    costs: dict[str, dict[int, float]] = {}
    for decision, tried in _tried(live, decisions):
        name, widths = decision.tensor.name, list(decision.config.configs)
        run = [bits for bits in widths if bits <= MEASURED_WIDTH] or widths[:1]
        found = {bits: probe.divergence(tried(bits)) for bits in run}
        last = run[-1]
        scale = found[last] / errors[name][last] if errors[name][last] else 0.0
        costs[name] = {bits: found.get(bits, scale * errors[name][bits]) for bits in widths}
    return Costs(costs, f"measured on {probe.samples} samples of data.{probe.data}", measured=True)


def measure_sensitivity(
    live: LiveModel,
    checkpoint: Checkpoint,
    plan: Plan,
    setting: Setting,
    samples: int = SAMPLES,
    say: Say = lambda _: None,
) -> Sensitivity:
    """What each open tensor of the plan alone costs at each of its widths: divergence, and the task's metrics.

    Divergences are measured on the first `samples` samples of the calibration data (without any, of the eval data),
    metrics on those of the eval data. Activation quantizers are not in place.
    """
    started, cpu_started = time.monotonic(), time.process_time()
    probe = make_probe(live, setting, samples)
    batches = _eval_batches(setting, samples)
    before = _metrics(live.module, batches, setting)
    decisions = [decision for decision in plan.decisions if decision.is_open]
    layers = []
    for index, (decision, tried) in enumerate(_tried(live, decisions)):
        name = decision.tensor.name
        say(f"{name}: {index + 1} of {len(decisions)}")
        errors = relative_errors(find_tensor(live.module, name), decision, decision.config.configs, plan.recipe.seed)
        widths = []
        for bits in decision.config.configs:
            module = tried(bits)
            closed = replace(decision, config=decision.config.at(bits))
            widths.append(
                WidthCost(
                    bits=bits,
                    bytes=sum(slot.n_bytes for slot in make_slots(closed, "packed")),
                    relative_error=errors[bits],
                    divergence=probe.divergence(module),
                    metrics={metric: value for metric, (value, _) in _metrics(module, batches, setting).items()},
                )
            )
        layers.append(
            LayerCosts(
                name=name,
                shape=decision.tensor.shape,
                method=decision.method or "",
                grid=grid_words(decision),
                widths=tuple(widths),
            )
        )
    return Sensitivity(
        checkpoint=checkpoint.path.name,
        input_sha256=checkpoint_sha256(checkpoint),
        measured_sha256=measured_sha256(plan, samples),
        divergence_kind=probe.kind,
        divergence_data="calibration" if probe.data == "calibration" else "eval",
        divergence_samples=probe.samples,
        metric_samples=0 if batches is None else batches.samples,
        higher={metric: higher for metric, (_, higher) in before.items()},
        baseline={metric: value for metric, (value, _) in before.items()},
        layers=tuple(layers),
        run=run_figures(time.monotonic() - started, time.process_time() - cpu_started, str(setting.device)),
    )


def measured_sha256(plan: Plan, samples: int) -> str:
    """What ties figures to all that they depend on but the weights: model, data, task, grids, widths, samples."""
    recipe: dict[str, Any] = recipe_json(plan.recipe)
    parts = {name: recipe[name] for name in ("model", "data", "task", "seed") if name in recipe}
    grids = [
        [d.tensor.name, d.method, grid_words(d), [repr(config) for config in d.config.configs.values()]]
        for d in plan.decisions
        if d.is_open
    ]
    text = json.dumps([parts, grids, samples], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _eval_batches(setting: Setting, samples: int) -> Batches | None:
    recipe: Recipe = setting.recipe
    if recipe.task is None or recipe.data is None or recipe.data.eval is None:
        return None
    batches = setting.batches("eval")
    return replace(batches, samples=min(samples, batches.samples))


def _metrics(module: nn.Module, batches: Batches | None, setting: Setting) -> dict[str, tuple[float, bool]]:
    """Metric -> (value, whether more is better); nothing where there is nothing to measure."""
    task = setting.recipe.task
    if batches is None or task is None:
        return {}
    found = measure(task, module, batches, setting.device, root=setting.root, allow_code=setting.allow_code)
    return {one.metric: (one.value, one.higher) for one in found}


def _tried(live: LiveModel, decisions: Sequence[Decision]) -> Iterator[tuple[Decision, Callable[[int], nn.Module]]]:
    """Each decision with a function: bits -> the network in which this weight alone is quantized, until the next call.

    The quantized copy is what it was once the iterator moves on or is closed.
    """
    module = live.quantized
    for decision in decisions:
        weight = find_tensor(module, decision.tensor.name)
        original = weight.detach().clone()
        rows = rows_from_weight(original, decision.axis).cpu().float().contiguous()
        exponent = exponent_for(float(original.abs().max()) if original.numel() else 0.0)

        def tried(
            bits: int, decision: Decision = decision, weight: Tensor = weight, rows: Tensor = rows, e: int = exponent
        ) -> nn.Module:
            found = encode_rows(rows, stand_in(decision, bits), e, Evidence(live.seed))
            info = decision.tensor
            value = decode(replace(found, shape=info.shape, axis=decision.axis, dtype=info.dtype))
            with torch.no_grad():
                weight.copy_(value)
            return module

        try:
            yield decision, tried
        finally:
            with torch.no_grad():
                weight.copy_(original)
