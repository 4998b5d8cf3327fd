"""Steps without data: rounding has the entropy of the budget, no tensor drowns, and norms take scales out again."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from artifact.examples import gaussian, plan_for, save
from conftest import Run
from torch import Tensor

from qcompress.budget import steps
from qcompress.budget.scales import step_factors
from qcompress.budget.steps import RoundedWeights, Rounding, rounded
from qcompress.checkpoint.checkpoint import read_checkpoint
from qcompress.compress.compress import compress_within
from qcompress.compress.load import load_state_dict
from qcompress.recipe import parse_recipe
from qcompress.registry import RdConfig
from qcompress.report.document import Report
from qcompress.types.plan import Plan
from qcompress.types.run import Options


def entropy(codes: Tensor) -> float:
    """Bits a code, from frequencies."""
    shares = torch.unique(codes, return_counts=True)[1].double() / codes.numel()
    return -float((shares * shares.log2()).sum())


def planned(source: Path, bpw: float) -> tuple[Any, Plan]:
    checkpoint = read_checkpoint(source)
    return checkpoint, plan_for(checkpoint, parse_recipe(f"version: 1\nbudget: {{bpw: {bpw}}}\n", "r.yaml"))


def compressed(tensors: dict[str, Tensor], folder: Path, bpw: float) -> Report:
    checkpoint, plan = planned(save(folder / "m.safetensors", tensors), bpw)
    return compress_within(checkpoint, plan, Options(folder / "o.safetensors", force=True), None, lambda _: None)


@pytest.mark.parametrize("bpw", [0.5, 1.0, 2.0, 4.0, 8.0])
def test_steps_are_first_chosen_where_rounding_has_the_entropy_of_the_budget(tmp_path: Path, bpw: float) -> None:
    """By samples of some of these tensors; of eight bits they tell no more than that half a step takes a bit."""
    made = {
        "conv.weight": gaussian(24, 16, 3, 3, seed=1) * 0.1,
        "matrix.weight": gaussian(64, 96, seed=2),
        "small.weight": gaussian(10, 24, seed=3) * 3,
    }
    checkpoint, plan = planned(save(tmp_path / "m.safetensors", made), bpw)
    weights = [value.double() for value in made.values()]
    decided = RoundedWeights.of(checkpoint, plan).plan_for(plan, bpw).decisions
    chosen = [decision.config.step for decision in decided if isinstance(decision.config, RdConfig)]
    spent = sum(
        entropy((weight / (step * weight.square().mean().sqrt().sqrt())).round()) * weight.numel()
        for weight, step in zip(weights, chosen, strict=True)
    )
    assert spent / sum(weight.numel() for weight in weights) == pytest.approx(bpw, rel=0.08)


def test_rounding_a_stack_is_rounding_each_sample() -> None:
    samples = torch.cat((gaussian(3, 500, seed=1), torch.zeros(1, 500), torch.arange(500.0).expand(1, 500)))
    for step in (0.3, 1.0, 2000.0):
        for sample, one in zip(samples.double(), rounded(samples.sort(1).values, step), strict=True):
            codes = (sample / step).round()
            error, energy = float((codes * step - sample).square().sum()), float(sample.square().sum())
            assert one.bits == pytest.approx(entropy(codes), abs=1e-12)
            assert one.sqnr == (pytest.approx(10 * math.log10(energy / error)) if error else math.inf)
    assert rounded(torch.zeros(2, 0), 1.0) == [Rounding(1.0, 0.0, math.inf)] * 2


def test_what_is_held_to_choose_steps_does_not_grow_with_the_number_of_tensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Less is sampled of each of many tensors, and their steps are about the same."""
    monkeypatch.setattr(steps, "HELD_WEIGHTS", 1 << 14)
    made = {f"{place}.weight": gaussian(48, 100, seed=place) * (1 + place % 3) for place in range(60)}
    checkpoint, plan = planned(save(tmp_path / "m.safetensors", made), 3.0)
    few = RoundedWeights.of(checkpoint, plan)
    assert sum(stack.numel() for _, stack in few.stacks) <= 1 << 14
    monkeypatch.undo()
    all_held = RoundedWeights.of(checkpoint, plan)
    assert sum(stack.numel() for _, stack in all_held.stacks) > 1 << 15, "of few tensors as much as ever"
    for bits in (2.5, 5.0):
        assert abs(math.log2(few.step(bits) / all_held.step(bits))) < 0.15, "of a bit"


@pytest.mark.parametrize("scale", [1e-2, 1e-4, 1e-12])
def test_no_tensor_drowns_because_its_scale_is_small(tmp_path: Path, scale: float) -> None:
    """None lies more than 12 dB under the median, and the others pay for it: the budget holds."""
    tensors = {f"{name}.weight": gaussian(48, 128, seed=seed) * 0.05 for seed, name in enumerate("abc")}
    tensors["b.weight"] *= scale
    report = compressed(tensors, tmp_path, 4.0)
    decibels = [layer.sqnr_db or 0.0 for layer in report.layers]
    assert min(decibels) >= statistics.median(decibels) - 12
    parts = report.size.parts
    assert 0.97 <= 8 * (parts.codes + parts.side_information) / (4.0 * 3 * 48 * 128) <= 1
    assert not report.warnings


def test_a_tensor_that_errors_drown_is_said(tmp_path: Path) -> None:
    """At a fifth of a bit a weight hardly anything is left of any tensor."""
    report = compressed({"a.weight": gaussian(48, 128, seed=0)}, tmp_path, 0.2)
    assert any("errors drown a.weight" in line for line in report.warnings)


def conv_net(scales: dict[int, float], *, seed: int = 0) -> dict[str, Tensor]:
    """Six convolutions of one shape with batch norms behind them, some scaled: the same function; and a classifier."""
    tensors: dict[str, Tensor] = {"fc.weight": gaussian(10, 16, seed=99) * 0.2}
    for place in range(6):
        scale, name = scales.get(place, 1.0), f"layers.{place}"
        weight = gaussian(16, 16, 3, 3, seed=seed + place) * 0.08 * (1 + 0.05 * place)
        variance = weight.square().sum((1, 2, 3)) * 0.4
        tensors |= {
            f"{name}.conv1.weight": weight * scale,
            f"{name}.bn1.weight": torch.ones(16),
            f"{name}.bn1.bias": torch.zeros(16),
            f"{name}.bn1.running_mean": torch.zeros(16),
            f"{name}.bn1.running_var": variance * scale**2,
        }
    return tensors


def errors(tensors: dict[str, Tensor], folder: Path, bpw: float) -> dict[str, float]:
    """The squared error of each convolution over its energy."""
    compressed(tensors, folder, bpw)
    found = load_state_dict(folder / "o.safetensors")
    names = [name for name in tensors if "conv" in name]
    return {n: float((found[n] - tensors[n]).square().sum() / tensors[n].square().sum()) for n in names}


def test_a_scale_that_a_batch_norm_takes_out_again_costs_nothing(tmp_path: Path) -> None:
    """Scaled weights get the errors that they have in the network as it was, and the others keep theirs."""
    plain = errors(conv_net({}), tmp_path, 2.0)
    for scales in ({1: 0.05, 4: 0.05}, {0: 20.0, 3: 20.0}, {2: 1e-4}):
        twin = errors(conv_net(scales), tmp_path, 2.0)
        assert max(abs(math.log(twin[name] / plain[name])) for name in plain) < 0.35


def test_scales_as_training_leaves_them_are_left_alone(tmp_path: Path) -> None:
    for scales in ({}, {1: 1.7, 3: 0.6}):
        source = save(tmp_path / "m.safetensors", conv_net(scales))
        assert step_factors(*planned(source, 2.0)) == {}


def test_a_norm_whose_variance_does_not_fit_stands_elsewhere(tmp_path: Path) -> None:
    """Where the norm of that name stands before the convolution, its variance knows nothing of the weight's scale."""
    tensors = conv_net({})
    tensors["layers.2.conv1.weight"] = tensors["layers.2.conv1.weight"] * 0.05
    source = save(tmp_path / "m.safetensors", tensors)
    assert step_factors(*planned(source, 2.0)) == {}
    live = {f"layers.{place}.conv1.weight": f"layers.{place}.bn1.running_var" for place in range(6)}
    assert set(step_factors(*planned(source, 2.0), live)) == {"layers.2.conv1.weight"}


def language_model(scales: dict[int, float], *, offset: bool = False) -> dict[str, Tensor]:
    """Layers whose projections read what a norm gives; where a gain is scaled, they are by its inverse."""
    tensors: dict[str, Tensor] = {}
    for place in range(4):
        scale, name = scales.get(place, 1.0), f"model.layers.{place}"
        gain = (gaussian(32, seed=place) * 0.1 + (0 if offset else 1)) * scale
        tensors[f"{name}.input_layernorm.weight"] = gain
        for seed, part in enumerate(("q_proj", "k_proj", "v_proj")):
            weight = gaussian(32, 32, seed=10 * place + seed) * 0.1
            tensors[f"{name}.self_attn.{part}.weight"] = weight / scale
    return tensors


def test_a_gain_before_a_weight_takes_its_scale_out_again(tmp_path: Path) -> None:
    """A step is in the unit of the weight times its inputs' gain: scaled by 16 both, it is finer by sixteen."""
    source = save(tmp_path / "m.safetensors", language_model({2: 16.0}))
    found = step_factors(*planned(source, 3.0))
    assert set(found) == {f"model.layers.2.self_attn.{part}.weight" for part in ("q_proj", "k_proj", "v_proj")}
    # The step is in units of the deviation's root, which is finer by four already.
    assert all(factor == pytest.approx(0.25, rel=0.05) for factor in found.values())
    source = save(tmp_path / "m.safetensors", language_model({2: 16.0}, offset=True))
    assert step_factors(*planned(source, 3.0)) == {}


def few_values(kind: str) -> tuple[Tensor, float]:
    """A weight on few values, and the entropy of what its codes must tell."""
    generator = torch.Generator().manual_seed(0)
    if kind == "ternary":
        weight = torch.randint(-1, 2, (64, 256), generator=generator) * 0.03
    elif kind == "four bits":
        weight = torch.randint(-8, 8, (64, 256), generator=generator) * 0.01
    elif kind == "a row":
        codes = torch.randint(0, 4, (64, 1024), generator=generator).float()
        weight = codes * torch.rand(64, 1, generator=generator) - torch.rand(64, 1, generator=generator)
        return weight, 2.0
    else:
        weight = gaussian(64, 256, seed=0)
        weight = torch.where(weight.abs() > 1.5, (weight * 4).round() / 4, torch.zeros(()))
    return weight, entropy(weight)


@pytest.mark.parametrize("kind", ["ternary", "four bits", "a row", "pruned and shared"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_on_few_values_are_stored_as_they_are(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    """A budget a little above their entropy is met without any error, and beside others they take no more."""
    weight, bits = few_values(kind)
    if kind == "a row" and dtype == torch.bfloat16:
        # Rounding to bfloat16 keeps each row's values few.
        weight = weight.bfloat16().float()
    other = gaussian(64, 256, seed=5) * 0.05
    report = compressed({"w.weight": weight.to(dtype)}, tmp_path, bits + 0.25)
    assert torch.equal(load_state_dict(tmp_path / "o.safetensors")["w.weight"], weight.to(dtype))
    taken = 8 * (report.size.parts.codes + report.size.parts.side_information) / weight.numel()
    assert taken <= bits + 0.25
    report = compressed({"w.weight": weight.to(dtype), "x.weight": other}, tmp_path, 4.5)
    assert torch.equal(load_state_dict(tmp_path / "o.safetensors")["w.weight"], weight.to(dtype))


def test_the_least_budget_that_is_named_for_few_values_can_be_had(run: Run, tmp_path: Path) -> None:
    weight, _ = few_values("ternary")
    source = save(tmp_path / "m.safetensors", {"w.weight": weight})
    ran = run("quantize", source, "--bpw", 1.5, "-q")
    assert ran.code == 3
    least = ran.error_lines[0].partition("ask for at least ")[2].partition(",")[0]
    assert run("quantize", source, "--bpw", least, "-o", tmp_path / "o.safetensors", "-q").code == 0
    assert torch.equal(load_state_dict(tmp_path / "o.safetensors")["w.weight"], weight)


@pytest.mark.parametrize("value", [0.0, 1.0, 1e-6, -0.1])
def test_a_constant_is_kept_whatever_the_budget(tmp_path: Path, value: float) -> None:
    tensors = {"conv.weight": gaussian(16, 16, 3, 3, seed=0), "gain.weight": torch.full((16, 8), value)}
    report = compressed(tensors, tmp_path, 2.0)
    assert torch.equal(load_state_dict(tmp_path / "o.safetensors")["gain.weight"], tensors["gain.weight"])
    forms = {layer.name: layer.form for layer in report.layers}
    assert forms == {"conv.weight": "unbounded", "gain.weight": "constant"}


def test_sixteen_bits_are_not_filled_with_more_than_they_have(run: Run, tmp_path: Path) -> None:
    """Far above the entropy of bfloat16 weights a budget gives them as they are, in fewer bytes."""
    weight = (gaussian(64, 256, seed=0) * 0.05).bfloat16()
    source = save(tmp_path / "m.safetensors", {"w.weight": weight})
    output = tmp_path / "o.safetensors"
    assert run("quantize", source, "--bpw", 15, "-o", output, "-q").code == 0
    assert torch.equal(load_state_dict(output)["w.weight"], weight)
    assert json.loads(output.with_suffix(".report.json").read_text())["size"]["bits_per_weight"] < 15
