"""What rescaled weights cost rd without data, where a norm takes the scale out again: each network and its twins.

    QCOMPRESS_DATA=data python benchmarks/rescaled.py [--networks resnet20,stories] [--rates 1.5,2.0] [--test]

A twin is the same function: some weights are multiplied, and the batch norms behind them, or the gains of the norms
before them, make up for it. Each is coded with the rule that finds strange scales (qcompress/budget/scales.py) and
without it. On training images 10,000 to 11,999, which no calibration, choice or test sees, the texts that stories260K
is not evaluated on, and photos like MobileNet's; DS-CNN has no data but those of its test. --test takes the test data
of all, and adds the score there: not for choices. Prints JSON: network -> rate -> twin, with or without the rule ->
divergence from the network as it was in nats, share of largest outputs that are its own, bits a weight.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from networks import CASES, IMAGE_MEAN, IMAGE_STD, Batches, image_batches, measure_networks
from safetensors.torch import save_file
from torch import Tensor, nn

from qcompress.checkpoint.checkpoint import read_checkpoint
from qcompress.compress.compress import compress_within
from qcompress.compress.load import load_state_dict
from qcompress.plan.plan import make_plan
from qcompress.plan.siblings import batch_norms_behind, norms_before
from qcompress.recipe import BudgetFlag, recipe_from_flags
from qcompress.types.plan import TensorInfo
from qcompress.types.run import Options

EPSILON = {"resnet20": 1e-5, "resnet32": 1e-5, "mobilenet": 1e-3, "dscnn": 1e-3}
SEED = 20


def untouched(name: str, folder: Path) -> Batches:
    """The data that a network is measured on here."""
    if name in ("resnet20", "resnet32"):
        with np.load(folder / "cifar10/train20k.npz") as data:
            pixels, labels = data["x"][10000:12000], data["y"][10000:12000]
        return image_batches(pixels, labels, 255 * torch.tensor(IMAGE_MEAN), 255 * torch.tensor(IMAGE_STD), 250)
    case = CASES[name]
    return case.held_out(folder) if case.held_out is not None else case.batches(folder, case.samples)


def scaled(state: Mapping[str, Tensor], name: str, scales: Mapping[str, float]) -> dict[str, Tensor]:
    """The same function with these weights multiplied; those behind one norm are multiplied alike."""
    found = {key: value.clone() for key, value in state.items()}
    infos = {key: TensorInfo(key, tuple(value.shape), "F32") for key, value in state.items()}
    behind, before = batch_norms_behind(infos), norms_before(infos)
    for weight, scale in scales.items():
        if weight in behind:
            variance = behind[weight]
            norm = variance.removesuffix("running_var")
            epsilon = EPSILON[name]
            found[weight] *= scale
            found[f"{norm}running_mean"] *= scale
            found[variance] = (state[variance] + epsilon) * scale**2 - epsilon
            bias = f"{weight.removesuffix('.weight')}.bias"
            if bias in found:
                found[bias] *= scale
        else:
            gain = before[weight]
            for reader in (one for one, other in before.items() if other == gain):
                found[reader] = state[reader] * scale
            found[gain] = state[gain] / scale
    return found


def twins(state: Mapping[str, Tensor], name: str) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """The network, and what is the same function as it."""
    infos = {key: TensorInfo(key, tuple(value.shape), "F32") for key, value in state.items()}
    behind, before = batch_norms_behind(infos), norms_before(infos)
    yield "plain", dict(state)
    generator = np.random.default_rng(SEED)
    # One weight of all that read a gain: the others go with it.
    chosen = sorted(behind) or sorted({gain: weight for weight, gain in before.items()}.values())

    def bears(weight: str, scale: float) -> bool:
        """Whether a running variance stays above zero."""
        epsilon = EPSILON.get(name, 0.0)
        return weight not in behind or float(((state[behind[weight]] + epsilon) * scale**2 - epsilon).min()) > 0

    for title, count, low, high in (
        ("three times .05", 3, 0.05, 0.05),
        ("four times 20", 4, 20.0, 20.0),
        ("all by up to 30", len(chosen), 1 / 30, 30.0),
    ):
        drawn = {weight: float(np.exp(generator.uniform(np.log(low), np.log(high)))) for weight in chosen}
        able = [weight for weight in chosen if bears(weight, drawn[weight])]
        picked = [str(weight) for weight in generator.permutation(able)[:count]]
        if len(picked) >= min(count, 3):
            yield title, scaled(state, name, {weight: drawn[weight] for weight in picked})


def log_probabilities(network: nn.Module, batches: Batches) -> Tensor:
    with torch.inference_mode():
        return torch.cat([network(x).float().log_softmax(-1).flatten(0, -2) for x, _ in batches])


def coded(state: Mapping[str, Tensor], folder: Path, rate: float) -> tuple[dict[str, Tensor], float]:
    """What a budget of so many bits a weight leaves of the tensors, and the bits that it took."""
    source = folder / "m.safetensors"
    save_file({key: value.contiguous() for key, value in state.items()}, source)
    checkpoint = read_checkpoint(source)
    recipe = recipe_from_flags("rd", {}, "quantize", BudgetFlag(f"--bpw {rate}", "bpw", rate))
    plan = make_plan(recipe, checkpoint.tensors, checkpoint.tied, checkpoint.config)
    options = Options(folder / "o.safetensors", force=True)
    report = compress_within(checkpoint, replace(plan), options, None, lambda _: None)
    return load_state_dict(options.output), report.size.bits_per_weight


def measure(name: str, rates: list[float], test: bool, folder: Path) -> dict[str, Any]:
    case = CASES[name]
    network, state = case.network(folder)
    batches = case.batches(folder, case.samples) if test else untouched(name, folder)
    expected = log_probabilities(network, batches)

    def figures(values: Mapping[str, Tensor], bits: float) -> dict[str, float]:
        network.load_state_dict(values, strict=False)
        found = log_probabilities(network, batches)
        divergence = float((expected.exp() * (expected - found)).sum(-1).mean())
        agreement = float((found.argmax(-1) == expected.argmax(-1)).double().mean())
        score = {case.score: case.measure(network, batches)} if test else {}
        return {"divergence": divergence, "agreement": agreement, "bits": bits, **score}

    rows: dict[str, Any] = {f"{rate}": {} for rate in rates}
    for title, twin in twins(state, name):
        same = figures(twin, 32.0)["divergence"]
        assert same < 1e-3, f"{name}, {title}: no twin, {same}"
        for rate in rates:
            for rule in ("with", "without"):
                with tempfile.TemporaryDirectory() as work:
                    if rule == "with":
                        found = coded(twin, Path(work), rate)
                    else:
                        with patch("qcompress.budget.steps.step_factors", lambda *_: {}):
                            found = coded(twin, Path(work), rate)
                row = rows[f"{rate}"][f"{title}, {rule}"] = figures(*found)
                print(name, rate, title, rule, row, file=sys.stderr, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", type=lambda text: [float(rate) for rate in text.split(",")], default=[1.5, 2.0])
    parser.add_argument("--test", action="store_true")
    measure_networks(parser, [*CASES], lambda name, given, folder: measure(name, given.rates, given.test, folder))


if __name__ == "__main__":
    main()
