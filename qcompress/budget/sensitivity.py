"""The cost of each bit width of each layer is measured on a live model, in which only this layer is quantized.

The cost is the divergence of the output from that of the network as it was; `report --sensitivity` adds the task's
metrics. `weight_costs` measures costs from weights alone.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qcompress.artifact.layout import make_slots
from qcompress.budget.weight_costs import round_weight, stand_in, weight_costs
from qcompress.checkpoint.checkpoint import Checkpoint
from qcompress.coding.grids import decode, exponent_for
from qcompress.coding.rows import rows_from_weight
from qcompress.data.batches import Batch, Batches, run_model
from qcompress.data.measurement import Measurement
from qcompress.data.sources import open_batches
from qcompress.data.tasks import measure
from qcompress.encode.encode_weight import ContextSources, encode_rows
from qcompress.errors import InputError, RecipeError, Subject, raise_all
from qcompress.model.live import LiveModel, find_tensor
from qcompress.plan.allocate import Costs
from qcompress.plan.plan import refuse
from qcompress.plan.sensitivity import (
    DivergenceData,
    DivergenceKind,
    LayerCosts,
    Sensitivity,
    WidthCost,
    checkpoint_sha256,
    grid_words,
)
from qcompress.recipe import recipe_json
from qcompress.registry import METHODS
from qcompress.report.figures import add_up_ranks, run_figures
from qcompress.types.encoded import for_tensor
from qcompress.types.plan import Decision, Plan, Widths
from qcompress.types.run import ModelRun, Options, Say, start_clock
from qcompress.types.settings import CausalLm, Classification, SequenceClassification, Translation

PREDICTIONS = (Classification, SequenceClassification, CausalLm, Translation)
"""The tasks for which a network's outputs are logits."""

REFERENCE_BYTES = 1 << 29
"""Most bytes that the outputs of the network as it was may take."""

BROKEN = 1e30
"""The divergence of a network whose outputs are not finite."""
ALL_WIDTHS = range(1, 9)
SAMPLES = 256
"""Samples that divergences and metrics are measured on where nothing is said."""

MEASURED_WIDTH = 4
"""The widest that is run to allocate: beyond it the divergence falls like the relative error."""


@dataclass(frozen=True)
class Probe:
    """The data that a network's outputs are compared on, and the outputs of the network as it was.

    data       the part of the recipe's data that the batches are from
    reference  of each batch the output, float32, or where predictions are compared their log-probabilities
    """

    kind: DivergenceKind
    data: DivergenceData
    batches: Sequence[Batch]
    reference: Sequence[Tensor]

    @property
    def samples(self) -> int:
        return sum(batch.size for batch in self.batches)

    def divergence(self, module: nn.Module) -> float:
        """Between the module's outputs and the reference, at least 0."""
        total = weight = 0.0
        with torch.inference_mode():
            for batch, reference in zip(self.batches, self.reference, strict=True):
                output = run_model(module, batch)
                if self.kind == "relative-error":
                    total += float((output.float() - reference).double().square().sum())
                    weight += float(reference.double().square().sum())
                    continue
                each = F.kl_div(output.float().log_softmax(-1), reference, reduction="none", log_target=True).sum(-1)
                counted = counted_places(batch, each)
                total += float((each.double() * counted).sum())
                weight += float(counted.sum())
        found = total / weight if weight else 0.0
        # Rounding may leave a little less than nothing.
        return max(found, 0.0) if math.isfinite(found) else BROKEN


def counted_places(batch: Batch, each: Tensor) -> Tensor:
    """1 where a prediction counts, 0 behind a text's end; shaped like `each`, [samples] or [samples, length, ...]."""
    counted = torch.ones_like(each, dtype=torch.float64)
    if each.ndim != 2:
        return counted
    mask = batch.kwargs.get("attention_mask")
    if mask is not None and mask.shape == each.shape:
        counted = counted * mask
    if batch.lengths is not None:
        counted = counted * (torch.arange(each.shape[1], device=each.device) < batch.lengths.unsqueeze(1))
    return counted


def make_probe(live: LiveModel, model_run: ModelRun, samples: int) -> Probe:
    """The first samples of the calibration data, or without any of the eval data, through the network as it was.

    raises  RecipeError where the recipe has neither
    """
    data = model_run.recipe.data
    part: DivergenceData
    source: Sequence[Batch] | Batches
    if live.calibration:
        part, source = "calibration", live.calibration
    elif data is not None and data.eval is not None:
        part, source = "eval", open_batches(model_run, "eval")
    else:
        what = "has no data that the network's outputs could be compared on"
        raise RecipeError(model_run.recipe.source, what, "add `data.calibration`")
    kind: DivergenceKind = "kl" if isinstance(model_run.recipe.task, PREDICTIONS) else "relative-error"
    batches: list[Batch] = []
    reference: list[Tensor] = []
    left, room = samples, REFERENCE_BYTES
    with torch.inference_mode():
        for batch in source:
            if left <= 0 or room <= 0:
                break
            batch = batch.first(left).to(live.device)
            output = run_model(live.module, batch).float()
            batches.append(batch)
            reference.append(output.log_softmax(-1) if kind == "kl" else output)
            left, room = left - batch.size, room - 4 * output.numel()
    return Probe(kind, part, batches, reference)


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
            if method.rates or (method.family == "cluster" and not quick):
                what = f"{decision.method} cannot be tried at other widths"
                errors.append(RecipeError(decision.tensor.name, what, "give it a rule with squant"))
                continue
            known = decision.widths if decision.is_open else _at_all_widths(decision)
            chosen = {bits: config for bits, config in known.configs.items() if bits in widths}
            if not chosen:
                what = f"{decision.method} has none of the widths {', '.join(map(str, widths))}"
                errors.append(RecipeError(decision.tensor.name, what, "name others with --widths"))
                continue
            decision = replace(decision, config=Widths(chosen))
        decisions.append(decision)
    raise_all(errors)
    return replace(plan, decisions=tuple(decisions))


def _at_all_widths(decision: Decision) -> Widths:
    """The config of a decision at every width that it can have."""
    found = {}
    for bits in ALL_WIDTHS:
        try:
            config = decision.config.changed(bits=bits)
        except ValueError:
            continue
        if refuse(decision.tensor, config, decision.axis) is None:
            found[bits] = config
    return Widths(found)


def live_costs(
    live: LiveModel,
    checkpoint: Checkpoint,
    plan: Plan,
    model_run: ModelRun,
    options: Options,
    say: Say = lambda _: None,
) -> Costs:
    """The divergence of every open tensor at each of its widths, measured on a few samples; ranks divide the tensors.

    Widths above MEASURED_WIDTH are not run: their divergence is that of the widest that was, times the ratio of the
    relative errors. What the network holds as a part of another tensor is taken to cost, for its relative error, what
    the median of the others does.
    """
    by_weights = weight_costs(checkpoint, plan, options)
    errors = by_weights.of
    probe = make_probe(live, model_run, SAMPLES)
    opened = [decision for decision in plan.decisions if decision.is_open]
    decisions = [decision for decision in opened if decision.tensor.name not in live.names.merged]
    say(f"sensitivity of {len(decisions)} tensors on {probe.samples} samples")
    lines: list[tuple[str, list[tuple[int, float]], float]] = []
    for decision, tried in _tried(live, _own(live, decisions)):
        live.world.check()
        name, widths = decision.tensor.name, list(decision.widths.configs)
        run = [bits for bits in widths if bits <= MEASURED_WIDTH] or widths[:1]
        found = {bits: probe.divergence(tried(bits)) for bits in run}
        last = run[-1]
        scale = found[last] / errors[name][last] if errors[name][last] else 0.0
        lines.append((name, [(bits, found.get(bits, scale * errors[name][bits])) for bits in widths], scale))
    told = [line for part in live.world.tell(lines) for line in part]
    costs = {name: dict(found) for name, found, _ in told}
    scales = [scale for _, _, scale in told]
    typical = median(scales) if scales else 1.0
    for decision in opened:
        name = decision.tensor.name
        if name not in costs:
            costs[name] = {bits: typical * errors[name][bits] for bits in decision.widths.configs}
    why = f"measured on {probe.samples} samples of data.{probe.data}"
    return Costs(costs, why, measured=True, coded=by_weights.coded)


def measure_sensitivity(
    live: LiveModel,
    checkpoint: Checkpoint,
    plan: Plan,
    model_run: ModelRun,
    samples: int = SAMPLES,
    say: Say = lambda _: None,
) -> Sensitivity:
    """The divergence and the task's metrics that each open tensor of the plan alone costs at each of its widths.

    Divergences are measured on the first `samples` samples of the calibration data (without any, of the eval data),
    metrics on those of the eval data. Activation quantizers are not in place. Ranks divide the tensors.
    """
    clock = start_clock()
    probe = make_probe(live, model_run, samples)
    batches = _eval_batches(model_run, samples)
    before = _measured(live.module, batches, model_run)
    decisions = [decision for decision in plan.decisions if decision.is_open]
    _refuse_merged(live, decisions)
    measured: dict[str, list[dict[str, object]]] = {}
    own = _own(live, decisions)
    for index, (decision, tried) in enumerate(_tried(live, own)):
        live.world.check()
        name = decision.tensor.name
        say(f"{name}: {index + 1} of {len(own)}")
        place = live.names.place(name)
        rounded = round_weight(find_tensor(live.module, place), decision, decision.widths.configs, plan.recipe.seed)
        measured[name] = []
        for bits, config in decision.widths.configs.items():
            module = tried(bits)
            cost = WidthCost(
                bits=bits,
                bytes=sum(slot.n_bytes for slot in make_slots(replace(decision, config=config), "packed")),
                relative_error=rounded[bits].error,
                divergence=probe.divergence(module),
                metrics={one.metric: one.value for one in _measured(module, batches, model_run)},
            )
            measured[name].append(asdict(cost))
    told = {name: costs for part in live.world.tell(measured) for name, costs in part.items()}
    layers = [
        LayerCosts(
            name=d.tensor.name,
            shape=d.tensor.shape,
            method=d.method or "",
            grid=grid_words(d),
            widths=tuple(WidthCost(**cost) for cost in told[d.tensor.name]),
        )
        for d in decisions
    ]
    return Sensitivity(
        checkpoint=checkpoint.path.name,
        input_sha256=checkpoint_sha256(checkpoint),
        measured_sha256=measured_sha256(plan, samples),
        divergence_kind=probe.kind,
        divergence_data=probe.data,
        divergence_samples=probe.samples,
        metric_samples=0 if batches is None else batches.samples,
        higher={one.metric: one.higher for one in before},
        baseline={one.metric: one.value for one in before},
        layers=tuple(layers),
        run=add_up_ranks(run_figures(clock, str(model_run.device)), live.world),
    )


def _own(live: LiveModel, decisions: Sequence[Decision]) -> list[Decision]:
    """The decisions that this rank looks at: each takes as long as the network does, whatever the weight."""
    return [decisions[place] for place in live.world.share([1] * len(decisions))]


def _refuse_merged(live: LiveModel, decisions: Sequence[Decision]) -> None:
    """Raise RecipeError (Refusals where several) for what the network holds as a part of another tensor only."""
    what = "is a part of another tensor in the network, whose cost cannot be measured alone"
    raise_all(
        [
            RecipeError(live.place, what, "keep it by a rule of its own", Subject(decision.tensor.name))
            for decision in decisions
            if decision.tensor.name in live.names.merged
        ]
    )


def measured_sha256(plan: Plan, samples: int) -> str:
    """The hash of all that figures depend on but the weights: model, data, task, grids, widths, samples."""
    recipe = recipe_json(plan.recipe)
    parts = {name: recipe[name] for name in ("model", "data", "task", "seed") if name in recipe}
    grids = [
        [d.tensor.name, d.method, grid_words(d), [repr(config) for config in d.widths.configs.values()]]
        for d in plan.decisions
        if d.is_open
    ]
    text = json.dumps([parts, grids, samples], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _eval_batches(model_run: ModelRun, samples: int) -> Batches | None:
    """The first samples of the eval data; None where there is nothing to measure."""
    recipe = model_run.recipe
    if recipe.task is None or recipe.data is None or recipe.data.eval is None:
        return None
    batches = open_batches(model_run, "eval")
    return replace(batches, samples=min(samples, batches.samples))


def _measured(module: nn.Module, batches: Batches | None, model_run: ModelRun) -> list[Measurement]:
    """The task's metrics; none where there is nothing to measure."""
    task = model_run.recipe.task
    if batches is None or task is None:
        return []
    return measure(task, module, batches, model_run.device, root=model_run.root, allow_code=model_run.allow_code)


def _tried(live: LiveModel, decisions: Sequence[Decision]) -> Iterator[tuple[Decision, Callable[[int], nn.Module]]]:
    """Each decision with a function: bits -> the network in which this weight alone is quantized, until the next call.

    The quantized copy is what it was once the iterator moves on or is closed.
    """
    for decision in decisions:
        weight = find_tensor(live.quantized, live.names.place(decision.tensor.name))
        original = weight.detach().clone()
        try:
            yield decision, _rounding(live, decision, weight, original)
        finally:
            with torch.no_grad():
                weight.copy_(original)


def _rounding(live: LiveModel, decision: Decision, weight: Tensor, original: Tensor) -> Callable[[int], nn.Module]:
    """A function that puts the original, rounded to so many bits, in a weight's place and gives the network."""
    rows = rows_from_weight(original, decision.axis).cpu().float().contiguous()
    exponent = exponent_for(float(original.abs().max()) if original.numel() else 0.0)

    def tried(bits: int) -> nn.Module:
        closed = stand_in(decision, bits)
        found = encode_rows(rows, closed, ContextSources(live.seed).context_of(closed, exponent))
        value = decode(for_tensor(found, decision))
        with torch.no_grad():
            weight.copy_(value)
        return live.quantized

    return tried
