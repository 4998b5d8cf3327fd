"""Methods that work from a layer's inputs do so where the product is inside a module, and where values route tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qcompress.compress.apply_plan import fit
from qcompress.data.batches import Batch
from qcompress.encode.encode_weight import ContextSources
from qcompress.model.build import facts_of
from qcompress.model.live import LiveModel, make_live_model
from qcompress.plan.plan import make_plan
from qcompress.registry import METHODS
from qcompress.types.data_settings import DataSettings, NpzData
from qcompress.types.encoded import Fitted
from qcompress.types.plan import Plan, Recipe, Rule, TensorInfo
from qcompress.types.run import FitContext
from qcompress.types.settings import ActivationSettings

METHOD_OPTIONS: dict[str, dict[str, Any]] = {
    "rtn": {"bits": 3},
    "gptq": {"bits": 3},
    "adaround": {"bits": 3, "iterations": 50},
    "rd": {},
    "pdquant": {"bits": 3, "iterations": 3, "correction_steps": 1},
}
CPU = torch.device("cpu")


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase] = nn.LSTM, **options: Any) -> None:
        super().__init__()
        self.rnn = kind(6, 12, num_layers=2, bidirectional=True, **options)
        self.fc = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.rnn(x)[0])


class Gated(Recurrent):
    def __init__(self) -> None:
        super().__init__(nn.GRU, batch_first=True)


class Attentive(nn.Module):
    """Torch's own encoder layer, which a fused operation may stand for, and attention to something else."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.cross = nn.MultiheadAttention(8, 2, batch_first=True)
        self.start, self.fc = nn.Linear(6, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.start(x)
        return self.fc(self.cross(self.encoder(x), x[:, :3], x[:, :3], need_weights=False)[0])


class Rising(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose1d(6, 48, 5, stride=2, groups=2)
        self.more, self.fc = nn.ConvTranspose1d(48, 48, 5, groups=48), nn.Linear(48, 40)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.more(self.up(x.transpose(1, 2)).relu()).transpose(1, 2))


class Routed(nn.Module):
    """Of six experts the tokens of the first batch reach two, those of all batches four, and none the last two."""

    def __init__(self, skips: bool = True) -> None:
        super().__init__()
        self.skips, self.inp, self.gate = skips, nn.Linear(6, 12), nn.Linear(12, 6, bias=False)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(12, 16), nn.SiLU(), nn.Linear(16, 12)) for _ in range(6))
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.inp(x.flatten(0, 1)).relu()
        group = 2 * (x[0, 0, 0] > 50).long()
        scores = self.gate(h)
        weight, chosen = scores.softmax(-1)[:, group : group + 2].topk(1, -1)
        out = torch.zeros_like(h)
        for place, expert in enumerate(self.experts):
            rows = (chosen[:, 0] + group == place).nonzero()[:, 0]
            if rows.numel() or not self.skips:
                out.index_add_(0, rows, expert(h[rows]) * weight[rows])
        return self.fc((out + h).view(*x.shape[:2], -1))


def batches(count: int = 4) -> list[Batch]:
    torch.manual_seed(7)
    found = [torch.randn(6, 9, 6) for _ in range(count)]
    found[-1][0, 0, 0] = 100.0
    return [Batch((x,)) for x in found]


def planned(module: nn.Module, method: str, *, activations: bool = False, match: str = "*weight*") -> Plan:
    config = METHODS[method].config(**METHOD_OPTIONS[method])
    infos = [TensorInfo(name, tuple(value.shape), "F32") for name, value in module.state_dict().items()]
    data = DataSettings(calibration=NpzData(npz="x.npz"))
    keep = (Rule("gate.weight", None, None, "keep"),) if any(info.name == "gate.weight" for info in infos) else ()
    rules = (*keep, Rule(match, method, config, "rule"))
    rates = METHODS[method].rates
    recipe = Recipe("quantize", rules, data=data, activations=ActivationSettings() if activations else None)
    if rates:
        from qcompress.types.plan import Budget

        recipe = Recipe("quantize", rules, data=data, budget=Budget(bpw=3.5))
    return make_plan(recipe, infos, {}, {}, model=facts_of(module))


def run(
    kind: Callable[[], nn.Module], method: str, blocks: tuple[str, ...] = (), **options: Any
) -> tuple[LiveModel, Fitted]:
    torch.manual_seed(0)
    module = kind().eval()
    for name, value in module.named_parameters():
        if "bias" in name or "norm" in name:
            value.data += 0.1 * torch.randn_like(value)
    plan = planned(module, method, **options)
    data = batches()
    found = make_live_model(
        module, plan.decisions, data, data[0].first(2), device=CPU, activations=plan.recipe.activations, blocks=blocks
    )
    rate = 3.5 if METHODS[method].rates else None
    return found, fit(found, plan, ContextSources(0), FitContext(rate))


@torch.no_grad()
def output_error(found: LiveModel) -> float:
    total = energy = 0.0
    for batch in found.calibration:
        before, after = found.module(*batch.args), found.quantized(*batch.args)
        total += float((after - before).square().sum())
        energy += float(before.square().sum())
    return total / energy


@pytest.mark.parametrize("method", ["gptq", "adaround", "rd"])
@pytest.mark.parametrize("kind", [Recurrent, Gated, Attentive, Rising, Routed], ids=lambda kind: kind.__name__)
def test_every_product_is_fitted_to_what_flows_into_it(kind: Callable[[], nn.Module], method: str) -> None:
    found, result = run(kind, method)
    expected = {name for name, value in found.module.state_dict().items() if value.ndim > 1} - {"gate.weight"}
    expected = {name for name in expected if "norm" not in name}
    assert set(found.weights) == expected
    assert expected <= set(result.encoded)
    plain, _ = run(kind, "rtn")
    assert output_error(found) < output_error(plain)


@pytest.mark.parametrize("method", ["gptq", "adaround", "rd"])
@pytest.mark.parametrize("skips", [True, False])
def test_experts_that_no_token_reaches_are_rounded_and_named(method: str, skips: bool) -> None:
    found, result = run(lambda: Routed(skips), method)
    assert found.routes
    (note,) = [note for note in result.notes if "no calibration sample" in note]
    assert note == ("rounded to nearest, no calibration sample reaches it: experts.4.0.weight and 3 more")
    for name in ("experts.2.0.weight", "experts.5.2.weight"):
        before, after = found.module.get_parameter(name), found.quantized.get_parameter(name)
        share = float((after - before).square().sum() / before.square().sum())
        assert 0 < share < 0.3


def test_pdquant_works_block_by_block_where_tokens_are_routed() -> None:
    class Blocks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.start, self.blocks, self.idle = nn.Linear(6, 6), nn.ModuleList([Routed(), Routed()]), nn.Linear(6, 6)
            for block in self.blocks:
                block.fc = nn.Linear(12, 6)

        def forward(self, x: Tensor) -> Tensor:
            x = self.start(x)
            for block in self.blocks:
                x = block(x)
            return x

    found, result = run(Blocks, "pdquant", blocks=("blocks.*",))
    matrices = {name for name, value in found.module.state_dict().items() if value.ndim > 1 and "gate" not in name}
    assert matrices == {*result.encoded}
    assert {"idle.weight", "blocks.0.experts.5.0.weight"} <= found.unreached


def test_inputs_of_inner_products_are_quantized_where_their_module_is_called() -> None:
    _, result = run(Attentive, "gptq", activations=True)
    assert {*result.activations} == {
        *("start", "encoder.self_attn", "encoder.linear1", "encoder.linear2", "cross", "fc")
    }
    _, result = run(Recurrent, "gptq", activations=True)
    assert {*result.activations} == {"rnn", "fc"}


def test_a_tensor_of_a_module_that_holds_others_has_no_quantizer_at_its_input() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.fc = nn.Parameter(torch.randn(9, 6)), nn.Linear(6, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x + self.table)

    _, result = run(Positions, "rtn", activations=True, match="*")
    assert {*result.activations} == {"fc"} and {"table", "fc.weight"} <= {*result.encoded}
