"""The prediction difference and its quadratic form; inputs moved towards what batch norms have seen."""

from __future__ import annotations

import pytest
import torch
from model.networks import Residual, live
from torch import Tensor, nn

from qcompress.methods.pdquant.inputs import correct_inputs, seen_statistics
from qcompress.methods.pdquant.prediction import half_fisher, prediction_difference, probe, quadratic_difference
from qcompress.model.graph import batch_norm_of


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_difference_is_nothing_for_equal_answers_and_never_negative() -> None:
    clean, found = torch.randn(2, 50, 7, generator=seeded(), dtype=torch.float64)
    assert float(prediction_difference(clean, clean, 4.0)) == pytest.approx(0, abs=1e-12)
    assert float(prediction_difference(clean, found, 4.0)) > 0
    assert float(prediction_difference(clean, found, 1e4)) < 1e-7
    p, q = (logits.div(2).softmax(1) for logits in (clean, found))
    expected = (p * (p / q).log()).sum(1).mean()
    torch.testing.assert_close(prediction_difference(clean, found, 2.0), expected)


def test_the_factor_is_a_root_of_the_softmax_covariance() -> None:
    logits = torch.randn(6, generator=seeded(), dtype=torch.float64)
    columns = torch.stack([half_fisher(logits, sign, 3.0) for sign in torch.eye(6, dtype=torch.float64)], 1)
    p = (logits / 3.0).softmax(0)
    torch.testing.assert_close(columns @ columns.T, torch.diag(p) - torch.outer(p, p))


def test_many_probes_give_the_divergence_of_a_small_change() -> None:
    torch.manual_seed(0)
    rest = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 5)).double()
    outputs = torch.randn(40, 8, dtype=torch.float64)
    change = 0.02 * torch.randn(40, 8, dtype=torch.float64)
    probes = probe(outputs, rest, 2.0, 300, seeded())
    exact = prediction_difference(rest(outputs), rest(outputs + change), 2.0)
    torch.testing.assert_close(quadratic_difference(probes, change), exact, rtol=0.08, atol=0)
    assert float(quadratic_difference(probes, torch.zeros_like(change))) == 0


def moments_distance(x: Tensor, module: nn.Module) -> float:
    norm = module.stem_bn
    y = module.stem(x).flatten(2)
    deviation = (norm.running_var + 1e-6).sqrt()
    return float((y.mean(2) - norm.running_mean).square().mean() + (y.std(2) - deviation).square().mean())


def test_corrected_inputs_come_nearer_to_the_statistics_and_stay_near() -> None:
    found = live(Residual)
    norm = batch_norm_of(found, "stem")
    assert norm is not None
    seen = seen_statistics(found.module, [norm])
    x = found.calibration[0].args[0] * 3 + 1

    def run(value: Tensor) -> None:
        found.module.stem_bn(found.module.stem(value))

    moved = correct_inputs(x, run, found.module, seen, steps=200, closeness=1e-3)
    assert moments_distance(moved, found.module) < 0.9 * moments_distance(x, found.module)
    held = correct_inputs(x, run, found.module, seen, steps=200, closeness=1e3)
    assert float((held - x).abs().max()) < 0.05 < float((moved - x).abs().max())
    assert torch.equal(correct_inputs(x, run, found.module, [], steps=5, closeness=1.0), x)
    # The mean of a batch does not depend on the order of its samples, so each sample moves the same.
    order = torch.randperm(len(x), generator=seeded())
    other = correct_inputs(x[order], run, found.module, seen, steps=20, closeness=1.0)
    torch.testing.assert_close(
        other, correct_inputs(x, run, found.module, seen, steps=20, closeness=1.0)[order], rtol=1e-3, atol=1e-3
    )
