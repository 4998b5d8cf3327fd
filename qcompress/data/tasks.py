"""A live model is measured by its task: a metric with its interval, and what every sample gave it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeAlias, assert_never

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qcompress.data.batches import Batch, Batches, run_model
from qcompress.data.measurement import Measurement, Values, mean_interval, wilson
from qcompress.data.user_code import find_callable
from qcompress.errors import DataError
from qcompress.types.ranks import ALONE, World
from qcompress.types.settings import (
    CausalLm,
    Classification,
    FactoryTask,
    Reconstruction,
    SequenceClassification,
    Task,
    Translation,
)

TOP = 5
"""The classes that `top5` looks at."""

Run: TypeAlias = Callable[[Iterator[Batch]], Iterator[tuple[Tensor, Batch]]]
"""Batches -> what a network makes of each, with it."""

Score: TypeAlias = Callable[[Tensor, Batch], dict[str, tuple[Tensor, Tensor]]]
"""(output, batch) -> metric -> (what each sample gives, how much it counts), both [samples]."""


def measure(
    task: Task,
    module: nn.Module,
    batches: Batches,
    device: torch.device,
    advance: Callable[[int], None] = lambda _: None,
    *,
    root: Path = Path(),
    allow_code: bool = False,
    run: Run | None = None,
    world: World = ALONE,
) -> list[Measurement]:
    """Every metric of the task, the headline first.

    advance  called with the samples that are done
    run      gives what the module makes of batches, in their order; where absent the module runs on one by one
    world    the ranks that divide the batches; each then knows what all have measured
    raises   DataError for labels that do not fit the outputs; ModelError for a model that does not run on the data
    """
    module.eval()
    if isinstance(task, Translation):
        from qcompress.data.translation import measure_translation

        return measure_translation(task, module, batches, device, advance, world)
    score = _scorer(task, root, allow_code)
    own: list[dict[str, list[list[float]]]] = []
    done = 0
    here = (batch.to(device) for batch in batches.of_rank(world))
    with torch.inference_mode():
        for output, batch in ((run_model(module, one), one) for one in here) if run is None else run(here):
            world.check()
            own.append({metric: [one.tolist() for one in both] for metric, both in score(output, batch).items()})
            done += batch.size * world.size
            advance(min(done, batches.samples))
    rows = world.tell_in_turn(own)
    found = []
    for metric in rows[0]:
        values, weights = (np.concatenate([np.array(row[metric][part], np.float64) for row in rows]) for part in (0, 1))
        found.append(_measurement(metric, values, weights, task))
    return found


def _scorer(task: Task, root: Path, allow_code: bool) -> Score:
    match task:
        case Classification():
            # The headline comes first.
            order = ("top1", "top5") if task.metric == "top1" else ("top5", "top1")
            return lambda output, batch: _hits(output, batch, order)
        case SequenceClassification():
            return lambda output, batch: {"accuracy": _hits(output, batch, ("top1",))["top1"]}
        case CausalLm():
            return lambda output, batch: {"perplexity": _token_losses(output, batch)}
        case Reconstruction():
            return lambda output, batch: {"psnr": _relative_errors(output, batch, task.peak)}
        case FactoryTask():
            function = find_callable(task.factory, root, allow_code, "task.factory", DataError)
            make = function(**task.args) if task.args else function
            return lambda output, batch: {task.metric: _own(make(output, batch), batch)}
        case Translation():
            raise AssertionError("translation is measured on its own")
        case _:
            assert_never(task)


def _hits(output: Tensor, batch: Batch, metrics: tuple[str, ...]) -> dict[str, tuple[Tensor, Tensor]]:
    labels = _labels(batch)
    if output.ndim != 2 or labels.ndim != 1 or len(output) != len(labels):
        what = f"the model gives {list(output.shape)} for labels of {list(labels.shape)}"
        raise DataError("task", what, "give one label a sample, and a model that gives [samples, classes]")
    classes = output.shape[1]
    outside = (labels < 0) | (labels >= classes)
    if bool(outside.any()):
        what = f"label {int(labels[outside][0])} is outside the model's {classes} classes"
        raise DataError("data.eval", what, "check the labels, and the model's number of classes")
    found = {}
    for place, metric in enumerate(metrics):
        if metric == "top5" and place and classes <= TOP:
            # Of so few classes the label is always among the five.
            continue
        top = 1 if metric == "top1" else min(TOP, classes)
        hit = (output.topk(top, 1).indices == labels.unsqueeze(1)).any(1)
        found[metric] = (hit, torch.ones_like(hit))
    return found


def _token_losses(output: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """The summed loss of each row's tokens but the first, and their number."""
    tokens = batch.args[0] if batch.args else batch.kwargs["input_ids"]
    mask = batch.kwargs.get("attention_mask")
    if output.ndim != 3 or output.shape[:2] != tokens.shape:
        what = f"the model gives {list(output.shape)} for tokens of {list(tokens.shape)}"
        raise DataError("task", what, "causal-lm needs a model that gives [samples, length, vocabulary]")
    if int(tokens.max()) >= output.shape[2] or int(tokens.min()) < 0:
        raise DataError("data.eval", f"holds tokens outside the vocabulary of {output.shape[2]}", "check the tokenizer")
    places = torch.arange(1, tokens.shape[1], device=tokens.device)
    counted = torch.ones_like(tokens[:, 1:], dtype=torch.bool) if mask is None else mask[:, 1:].bool()
    if batch.lengths is not None:
        counted = counted & (places < batch.lengths.unsqueeze(1))
    losses = F.cross_entropy(output[:, :-1].transpose(1, 2).float(), tokens[:, 1:], reduction="none")
    return (losses * counted).sum(1), counted.sum(1)


def _relative_errors(output: Tensor, batch: Batch, peak: float) -> tuple[Tensor, Tensor]:
    labels = _labels(batch)
    if labels.shape != output.shape:
        what = f"the model gives {list(output.shape)} for targets of {list(labels.shape)}"
        raise DataError("task", what, "reconstruction needs labels of the output's shape")
    errors = (output.float() - labels.float()).square().flatten(1).mean(1) / peak**2
    return errors, torch.ones_like(errors)


def _own(values: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    values = torch.as_tensor(values).detach()
    if values.shape != (batch.size,):
        what = f"the task's factory gives {list(values.shape)} for {batch.size} samples"
        raise DataError("task.factory", what, "give one value a sample")
    return values.double(), torch.ones_like(values, dtype=torch.float64)


def _labels(batch: Batch) -> Tensor:
    if batch.labels is None:
        raise DataError("data.eval", "has no labels", "name the array of labels, or give a metadata.csv")
    return batch.labels


def _measurement(metric: str, values: Values, weights: Values, task: Task) -> Measurement:
    samples = len(values)
    if metric in ("top1", "top5", "accuracy"):
        low, high = wilson(float(values.sum()), samples)
        return Measurement(metric, float(values.mean()), samples, low, high, True, values, weights)
    low, high = mean_interval(values, weights)
    mean = float(values.sum() / weights.sum())
    higher = task.higher if isinstance(task, FactoryTask) else metric == "psnr"
    found = Measurement(metric, mean, samples, low, high, higher, values, weights)
    if found.scale == "mean":
        return found
    ends = sorted(_scaled(found.scale, end) for end in (low, high))
    return Measurement(metric, _scaled(found.scale, mean), samples, ends[0], ends[1], higher, values, weights)


def _scaled(scale: str, mean: float) -> float:
    if scale == "exp":
        return math.exp(min(mean, 700.0))
    if scale == "decibel":
        return -10 * math.log10(mean) if mean > 0 else math.inf
    return mean


def paired_drop(before: Measurement, after: Measurement) -> tuple[float, float, float]:
    """How much worse `after` is on the same samples, and the 95 % interval of that; positive is worse.

    The samples' differences are taken for independent; through exp and decibels the interval goes by their slope.
    """
    sign = 1.0 if before.higher else -1.0
    drop = sign * (before.value - after.value)
    if before.scale == "mean":
        low, high = mean_interval(before.per_sample - after.per_sample, before.weights)
        ends = sorted((sign * low, sign * high))
        return drop, ends[0], ends[1]
    slopes = [_slope(one) for one in (before, after)]
    change = slopes[0] * _centred(before) - slopes[1] * _centred(after)
    low, high = mean_interval(change, before.weights)
    half = (high - low) / 2
    return drop, drop - half, drop + half


def _centred(one: Measurement) -> Values:
    centred: Values = one.per_sample - one.weights * (one.per_sample.sum() / one.weights.sum())
    return centred


def _slope(one: Measurement) -> float:
    """How the metric changes with the mean of its samples."""
    if one.scale == "exp":
        return one.value
    mean = float(one.per_sample.sum() / one.weights.sum())
    return -10 / (math.log(10) * mean) if mean > 0 else 0.0
