"""The steps that rate-distortion chooses for the layers of a network: no other share of their bits does less harm."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from model.networks import decisions
from torch import Tensor, nn

from qcompress.coding.unbounded.lengths import coded_bits
from qcompress.data.batches import Batch
from qcompress.methods.rd import fit
from qcompress.methods.rd.responses import Response, measure_responses
from qcompress.model.layers import matrix_layer, measure_gram
from qcompress.model.live import LiveModel, make_live_model
from qcompress.solvers.hessian import output_error
from qcompress.solvers.unbounded import feedback_unbounded, grid_steps, with_codes, with_step
from qcompress.types.encoded import Unbounded
from qcompress.types.run import FitContext

LAYERS = ("stem", "depthwise", "grouped", "conv", "fc")
HIGH_RATE = 6.0
SHIFT = 0.05
COMMON = [2.0 ** (n / 64) for n in range(-4, 5)]


class Uneven(nn.Module):
    """Layers of every kind, whose errors weigh very differently at the output."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 96, 3, padding=1)
        self.depthwise = nn.Conv2d(96, 96, 3, padding=1, groups=96)
        self.grouped = nn.Conv2d(96, 96, 3, padding=1, groups=4)
        self.conv = nn.Conv2d(96, 96, 3, padding=1)
        self.fc = nn.Linear(96, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.depthwise(F.relu(self.stem(x))))
        x = x + 4 * F.relu(self.grouped(x))
        return self.fc(F.relu(self.conv(x)).mean((2, 3)))


@dataclass(frozen=True)
class Layer:
    """One layer on the inputs of the full-precision network, and the grid that was chosen for it."""

    rows: Tensor
    hessian: Tensor
    response: Response
    grid: Unbounded

    def coded(self, factor: float) -> tuple[Unbounded, float]:
        """The codes by error feedback on so many times the step, and the harm that they do to the output."""
        grid = with_step(self.grid, float(self.grid.step) * 2.0**self.grid.exponent * factor)
        steps = grid_steps(grid, self.rows.device)
        codes = feedback_unbounded(self.rows, steps, self.hessian)
        harm = self.response.slope * float(output_error(codes * steps - self.rows, self.hessian).sum())
        return with_codes(grid, codes), harm


def hessian_of(live: LiveModel, name: str) -> Tensor:
    """The second moments of a layer's inputs on the calibration data."""
    seen: list[Tensor] = []
    handle = live.module.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        for batch in live.calibration:
            live.module(*batch.args)
    handle.remove()
    layer = matrix_layer(live.quantized.get_submodule(name))
    assert layer is not None
    return measure_gram(layer, seen, None, live.generator(name)).hessian


@pytest.fixture(scope="module")
def layers() -> dict[str, Layer]:
    torch.manual_seed(0)
    data = [Batch((torch.randn(16, 3, 8, 8),)) for _ in range(2)]
    module = Uneven().eval()
    options = {"effort": "fast", "allocation": "measured", "match": False}
    live = make_live_model(
        module, decisions(module, "rd", **options), data, data[0].first(2), device=torch.device("cpu")
    )
    wanted = decisions(live.module, "rd", **options)
    responses = measure_responses(live, {one.tensor.name: one for one in wanted}, damping=0.01)
    found = fit(live, wanted, FitContext(HIGH_RATE))
    grids = {name: found.encoded[f"{name}.weight"] for name in LAYERS}
    made = {}
    for name, grid in grids.items():
        assert isinstance(grid, Unbounded)
        rows = live.module.get_submodule(name).weight.detach().flatten(1)
        made[name] = Layer(rows, hessian_of(live, name), responses[f"{name}.weight"], grid)
    return made


def cost_of(layers: Mapping[str, Layer], factors: Mapping[str, float]) -> float:
    """The harm of all layers where some have other steps than were chosen, as if at one rate.

    At a high rate a bit a weight more for all is a quarter of the harm. Codes by feedback are chaotic in their steps,
    which makes a harm uncertain by about a hundredth: it is the mean over steps all a little larger or smaller.
    """
    weights = sum(layer.rows.numel() for layer in layers.values())
    costs = []
    for common in COMMON:
        done = [layer.coded(common * factors.get(name, 1.0)) for name, layer in layers.items()]
        rate = coded_bits([unbounded for unbounded, _ in done]) / weights
        costs.append(sum(harm for _, harm in done) * 4.0 ** (rate - HIGH_RATE))
    return sum(costs) / len(costs)


@pytest.mark.slow
def test_no_layer_would_better_have_another_step(layers: dict[str, Layer]) -> None:
    slopes = [layer.response.slope for layer in layers.values()]
    assert max(slopes) > 4 * min(slopes)
    cost = cost_of(layers, {})
    for name in LAYERS:
        for own in (1 - SHIFT, 1 + SHIFT):
            assert cost_of(layers, {name: own}) > 0.99 * cost, (name, own)


def test_a_layer_with_twice_its_step_does_more_harm_for_the_same_bits(layers: dict[str, Layer]) -> None:
    """So that the test before could fail: what it holds to 1 % is lost by a large share of bits."""
    cost = cost_of(layers, {})
    for own in (0.5, 2.0):
        assert cost_of(layers, {"conv": own}) > 1.1 * cost, own
