"""pdquant as itself: what a block's loss is, from where it is learned, and what is kept of that."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from model.networks import Mlp, Residual, Untraceable, decisions, live
from torch import Tensor, nn
from torch.nn.utils import parametrize

from qcompress.calibration.activations import attach_activations
from qcompress.data.batches import Batch
from qcompress.methods.pdquant.block import Block, Loss
from qcompress.methods.pdquant.inputs import Inputs, make_inputs
from qcompress.model.graph import make_blocks
from qcompress.model.live import LiveModel, layer_name, make_live_model
from qcompress.model.runs import run_stage
from qcompress.model.stages import Stage
from qcompress.registry import PdquantConfig
from qcompress.solvers.rounding import soft
from qcompress.types.settings import ActivationSettings


def blocks(found: LiveModel, **options: Any) -> Iterator[tuple[Block, Stage]]:
    """Every block in turn; those before it must be quantized when the next is asked for."""
    wanted = {layer_name(one.tensor.name): one for one in decisions(found.module, "pdquant", **options)}
    stages = found.stages if found.blocks else make_blocks(found)
    clean = [stages[0].begin(batch) for batch in found.calibration]
    noisy = list(clean)
    for place, stage in enumerate(stages):
        own = {name: wanted[name] for name in stage.layers}
        if own:
            yield Block(found, stages[place:], own, clean, noisy), stage
        clean, noisy = run_stage(stage, found.module, clean), run_stage(stage, found.quantized, noisy)


def learned(block: Block) -> Loss:
    """The block's loss, after it was learned, with the weights in their own places again."""
    with torch.no_grad():
        loss = block.prepare()
    for layer in block.layers.values():
        parametrize.register_parametrization(layer.module, "weight", layer.rounding, unsafe=True)
    block.trainer(loss)
    for layer in block.layers.values():
        parametrize.remove_parametrizations(layer.module, "weight", leave_parametrized=False)
    return loss


def samples(found: LiveModel) -> Tensor:
    return torch.cat([batch.args[0] for batch in found.calibration])


@torch.no_grad()
def test_the_loss_is_the_error_of_the_outputs_and_the_divergence_of_the_answers() -> None:
    """By whole networks in which the layers so far are quantized, block after block."""
    options: dict[str, Any] = {"bits": 2, "prediction_form": "exact", "prediction": 3.0, "temperature": 2.0}
    found = live(Mlp, "pdquant", **options)
    x, taken = samples(found), 0
    for block, stage in blocks(found, **options):
        loss = block.prepare()
        taken += len(stage.layers)
        partly = copy.deepcopy(found.module)
        for layer, other in [*zip(partly.layers[::2], found.quantized.layers[::2], strict=True)][:taken]:
            layer.weight.copy_(other.weight)
        upto = int(stage.layers[-1].split(".")[1]) + (2 if taken < 3 else 1)
        outputs, targets = partly.layers[:upto](x), found.module.layers[:upto](x)
        error = (outputs - targets).square().sum(1).mean()
        assert float(error) > 0
        answers = [(net(x) / 2).log_softmax(1) for net in (found.module, partly)]
        divergence = F.kl_div(answers[1], answers[0], reduction="batchmean", log_target=True)
        assert loss.whole() == pytest.approx(float(error + 3 * divergence), rel=1e-4)
        every = loss.of(torch.arange(len(x)), block.generator)
        assert float(every) == pytest.approx(loss.whole(), rel=1e-4)
    assert taken == 3


@torch.no_grad()
def test_channels_are_summed_and_places_averaged() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Conv2d(5, 2, 3)).eval()
    data = [Batch((torch.randn(16, 3, 6, 6),)) for _ in range(3)]
    options: dict[str, Any] = {"bits": 2, "prediction": 0.0}
    found = make_live_model(
        module, decisions(module, "pdquant", **options), data, data[0].first(2), device=torch.device("cpu")
    )
    block, _ = next(blocks(found, **options))
    loss = block.prepare()
    plain, quantized = (net[:2](samples(found)) for net in (found.module, found.quantized))
    assert loss.targets.shape == plain.shape == (48, 5, 4, 4)
    assert loss.whole() == pytest.approx(float((quantized - plain).square().sum(1).mean()), rel=1e-4)
    assert loss.energy() == pytest.approx(float(plain.square().sum(1).mean()), rel=1e-4)


@torch.no_grad()
def test_the_quadratic_form_is_near_the_divergence_where_little_changes() -> None:
    divergences = []
    for form in ("exact", "quadratic"):
        options: dict[str, Any] = {"bits": 4, "prediction_form": form, "temperature": 0.5}
        found = live(Mlp, "pdquant", **options)
        block, stage = next(blocks(found, **options))
        prediction = block.prepare().prediction
        assert prediction is not None and prediction.quadratic is (form == "quadratic")
        every = torch.arange(prediction.inputs.samples)
        state = stage.run(found.quantized, prediction.inputs.noisy)
        divergences.append(float(prediction.loss(every, state)))
        assert divergences[0] == pytest.approx(prediction.exact(every, state), rel=1e-4)
    assert divergences[1] == pytest.approx(divergences[0], rel=0.5)


def inputs_of(kind: type[nn.Module], **options: Any) -> Inputs:
    """What flows into the first block that others come before, all of them rounded to 2 bits."""
    found = live(kind, "pdquant", blocks=("blocks.*",) if kind is Untraceable else (), bits=2)
    found.put({})
    stages = found.stages if found.blocks else make_blocks(found)
    with torch.no_grad():
        for parameter in found.quantized.parameters():
            parameter.copy_((2 * parameter).round() / 2)
        clean = [stages[0].begin(batch) for batch in found.calibration]
        noisy = run_stage(stages[0], found.quantized, clean)
        clean = run_stage(stages[0], found.module, clean)
        return make_inputs(found, stages[1], PdquantConfig(bits=2, **options), clean, noisy)


def numbers(state: Any) -> Tensor:
    """The floats that flow, one after another."""
    values = state.values() if isinstance(state, dict) else state.args
    return torch.cat([one.reshape(-1) for one in values if isinstance(one, Tensor)])


@pytest.mark.parametrize("correction", [False, True])
@pytest.mark.parametrize("kind", [Residual, Untraceable])
def test_a_coin_decides_from_which_network_a_number_comes(kind: type[nn.Module], correction: bool) -> None:
    inputs = inputs_of(kind, distribution_correction=correction, correction_steps=3)
    every, generator = torch.arange(inputs.samples), torch.Generator().manual_seed(0)
    noisy, corrected = numbers(inputs.noisy), numbers(inputs.corrected)
    for share in (0.0, 0.3, 1.0):
        mixed = numbers(inputs.mixed(inputs.noisy, every, share, generator))
        differ = noisy != corrected
        assert torch.equal(mixed[~differ], noisy[~differ])
        from_other = mixed[differ] == corrected[differ]
        assert bool((from_other | (mixed[differ] == noisy[differ])).all())
        assert float(from_other.float().mean()) == pytest.approx(share, abs=0.1)


def test_correction_moves_what_flows_into_batch_norms_and_nothing_else() -> None:
    moved = inputs_of(Residual, distribution_correction=True, correction_steps=3)
    still = inputs_of(Residual, distribution_correction=False)
    assert torch.equal(numbers(moved.clean), numbers(still.clean))
    assert torch.equal(numbers(still.corrected), numbers(still.clean))
    assert not torch.equal(numbers(moved.corrected), numbers(moved.clean))
    without = inputs_of(Untraceable, distribution_correction=True, correction_steps=3)
    assert torch.equal(numbers(without.corrected), numbers(without.clean))


@torch.no_grad()
def test_learning_starts_from_roundings_that_err_less_than_the_nearest() -> None:
    found, losses = live(Residual, "pdquant", bits=2), []
    for block, _ in blocks(found, bits=2):
        loss = block.prepare()
        assert all(torch.equal(one.module.weight, one.weight(one.start)) for one in block.layers.values())
        losses.append([loss.whole()])
        for one in block.layers.values():
            one.module.weight.copy_(one.weight(one.nearest))
        losses[-1].append(loss.whole())
        for one in block.layers.values():
            one.module.weight.copy_(one.weight(one.start))
    # The network's own inputs are uncorrelated: there the nearest are best.
    assert len(losses) > 1 and all(started < nearest for started, nearest in losses[1:])
    found = live(Residual, "pdquant", bits=2, preset="paper")
    block, _ = next(blocks(found, bits=2, preset="paper"))
    block.prepare()
    assert all(torch.equal(one.start, one.nearest) for one in block.layers.values())


@pytest.mark.parametrize("best", ["learned", "start", "nearest"])
@torch.no_grad()
def test_of_three_roundings_the_one_of_least_loss_is_kept(best: str) -> None:
    found = live(Mlp, "pdquant", bits=3)
    block, _ = next(blocks(found, bits=3))
    loss = block.prepare()
    for layer in block.layers.values():
        good, bad = layer.start.clone(), torch.zeros_like(layer.start)
        layer.start, layer.nearest = (good if best == name else bad for name in ("start", "nearest"))
        up = (good > layer.rounding.neighbours.floor) if best == "learned" else torch.zeros_like(good, dtype=torch.bool)
        layer.rounding.v.copy_(torch.where(up, 5.0, -5.0).reshape(layer.rounding.v.shape))
        assert not torch.equal(good, bad)
        kept = block.best_codes(loss)
        assert torch.equal(next(iter(kept.values())), good)


def test_what_a_block_puts_into_the_network_comes_off() -> None:
    options: dict[str, Any] = {"bits": 2, "iterations": 3, "drop": 0.5}
    found = live(Residual, "pdquant", **options)
    found.activations = ActivationSettings(bits=3)
    for block, _ in blocks(found, **options):
        result = block.fit()
        assert set(block.steps) == set(result.activations) == set(block.layers)
        assert all(step.keep == 0 for step in block.steps.values())
        modules = [*found.quantized.modules()]
        attached = {name for name, one in found.quantized.named_modules() if one._forward_pre_hooks}
        assert not attached & set(block.layers)
        assert not any(parametrize.is_parametrized(one) for one in modules)
        found.put(result.encoded)
        attach_activations(found.quantized, result.activations)


def test_the_unit_of_the_outputs_changes_nothing() -> None:
    """The first block's weights times a power of two: the rounding that is learned is the same."""
    options: dict[str, Any] = {"bits": 2, "iterations": 30, "prediction": 0.0, "warm_up": 0.0}
    roundings = []
    for factor in (1.0, 2.0**-6):
        found = live(Mlp, "pdquant", **options)
        with torch.no_grad():
            for net in (found.module, found.quantized):
                net.layers[0].weight.mul_(factor)
                net.layers[0].bias.mul_(factor)
        block, _ = next(blocks(found, **options))
        learned(block)
        roundings.append(block.layers["layers.0"].rounding.v.detach())
    torch.testing.assert_close(roundings[0], roundings[1], rtol=1e-3, atol=1e-3)


def test_the_regularizer_leaves_nothing_between_two_codes() -> None:
    between = []
    for strength in (0.0, 10.0):
        options: dict[str, Any] = {"bits": 2, "iterations": 200, "strength": strength, "learning_rate": 0.1}
        block, _ = next(blocks(live(Mlp, "pdquant", **options), **options))
        learned(block)
        rounding = block.layers["layers.0"].rounding
        share = soft(rounding.v.detach())[rounding.neighbours.ceiling > rounding.neighbours.floor]
        between.append(float(torch.minimum(share, 1 - share).max()))
    assert between[1] < 0.02 and between[0] > 0.2
