"""What flows into a weight, whatever module multiplies by it, is what an obvious way of computing it shows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence

from qcompress.model.layers import InnerProduct, measure_inner_gram
from qcompress.model.products import Call, product_of

CELLS: Mapping[type[nn.Module], type[nn.Module]] = {nn.LSTM: nn.LSTMCell, nn.GRU: nn.GRUCell, nn.RNN: nn.RNNCell}
SHAPES: list[dict[str, Any]] = [
    {},
    {"num_layers": 2, "bidirectional": True, "batch_first": True},
    {"num_layers": 3, "bias": False},
]


def seen(module: nn.Module, weight: str, *args: Any, **kwargs: Any) -> Any:
    product = product_of(nn.ModuleDict({"a": module}), f"a.{weight}")
    assert product is not None and product.caller == "a"
    return product.inputs(nn.ModuleDict({"a": module}), [Call(args, kwargs)])[0]


def unrolled(module: Any, sample: Tensor, start: Any) -> dict[str, list[Tensor]]:
    """One sample [steps, features] through cells, step by step: weight -> what it multiplies at each step.

    start  hidden state, of an LSTM cells too, each [layers * directions, features]
    """
    found: dict[str, list[Tensor]] = {}
    directions = 2 if module.bidirectional else 1
    for layer in range(module.num_layers):
        outputs = []
        for back in range(directions):
            suffix = f"_l{layer}{'_reverse' * back}"
            cell = CELLS[type(module)](sample.shape[1], module.hidden_size, bias=module.bias)
            values = dict(module.named_parameters())
            cell.load_state_dict({name: values[f"{name}{suffix}"] for name, _ in cell.named_parameters()})
            state = tuple(one[layer * directions + back : layer * directions + back + 1] for one in start)
            states: list[Tensor] = []
            for x in sample.flip(0) if back else sample:
                found.setdefault(f"weight_ih{suffix}", []).append(x)
                found.setdefault(f"weight_hh{suffix}", []).append(state[0][0])
                given = cell(x.unsqueeze(0), state if len(state) > 1 else state[0])
                state = given if isinstance(given, tuple) else (given,)
                states.append(state[0][0])
            outputs.append(torch.stack(states[::-1] if back else states))
        sample = torch.cat(outputs, 1)
    return found


def assert_same_rows(found: Tensor, expected: list[Tensor]) -> None:
    """Whatever their order: sums over positions do not have one."""
    rows = torch.stack(expected)
    assert found.shape == rows.shape
    keys = (
        [tuple(round(float(v), 4) for v in row) for row in found],
        [tuple(round(float(v), 4) for v in r) for r in rows],
    )
    torch.testing.assert_close(found[sorted_by(keys[0])], rows[sorted_by(keys[1])], rtol=1e-4, atol=1e-5)


def sorted_by(keys: list[tuple[float, ...]]) -> list[int]:
    return sorted(range(len(keys)), key=keys.__getitem__)


@torch.no_grad()
@pytest.mark.parametrize("options", SHAPES, ids=str)
@pytest.mark.parametrize("kind", CELLS, ids=lambda kind: kind.__name__)
def test_recurrent_weights_see_the_sequence_and_the_state_before_each_step(
    kind: type[nn.Module], options: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    module: Any = kind(3, 4, **options)
    count = module.num_layers * (2 if module.bidirectional else 1)
    samples = [torch.randn(length, 3) for length in (2, 5, 4)]
    start = [torch.randn(count, 3, 4) for _ in range(2 if kind is nn.LSTM else 1)]
    given = tuple(start) if kind is nn.LSTM else start[0]
    alike = torch.stack([one[:2] for one in samples], 0 if module.batch_first else 1)
    cases = [
        (pack_sequence(samples, enforce_sorted=False), samples),
        (alike, [one[:2] for one in samples]),
        (
            pack_padded_sequence(alike, torch.tensor([2, 2, 2]), batch_first=module.batch_first),
            [s[:2] for s in samples],
        ),
    ]
    for x, parts in cases:
        each = [unrolled(module, part, [one[:, i] for one in start]) for i, part in enumerate(parts)]
        for weight in each[0]:
            found = seen(module, weight, x, given)
            assert [*found] == [(0, getattr(module, weight).shape[0])]
            expected = [row for one in each for row in one[weight]]
            assert_same_rows(next(iter(found.values())), expected)
    zeros = unrolled(module, samples[1], [torch.zeros(count, 4)] * len(start))
    for weight, rows in zeros.items():
        found = seen(module, weight, input=samples[1])
        assert_same_rows(next(iter(found.values())), rows)


@torch.no_grad()
def test_a_projected_lstm_multiplies_what_its_cells_give() -> None:
    torch.manual_seed(1)
    module, x = nn.LSTM(3, 5, proj_size=2, bidirectional=True), torch.randn(4, 2, 3)
    outputs, _ = module(x)
    for back in range(2):
        suffix = "_l0" + "_reverse" * back
        before = seen(module, f"weight_hr{suffix}", x)[0, 2]
        expected = outputs.reshape(-1, 4)[:, 2 * back : 2 * back + 2]
        steps = before @ getattr(module, f"weight_hr{suffix}").T
        assert_same_rows(steps, [*expected])
        assert seen(module, f"weight_hh{suffix}", x)[0, 20].shape == (8, 2)


@torch.no_grad()
@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell])
def test_cells_are_called_step_by_step(kind: type[nn.Module]) -> None:
    module, x, hidden = kind(3, 4), torch.randn(2, 3), torch.randn(2, 4)
    state = (hidden, torch.randn(2, 4)) if kind is nn.LSTMCell else hidden
    rows = module.weight_ih.shape[0]
    assert torch.equal(seen(module, "weight_ih", x, state)[0, rows], x)
    assert torch.equal(seen(module, "weight_hh", x, state)[0, rows], hidden)
    assert torch.equal(seen(module, "weight_hh", x)[0, rows], torch.zeros(2, 4))


class Multiplied(nn.MultiheadAttention):
    """Attention by hand, in the words of its definition."""

    def by_hand(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """What the last product multiplies, and what comes out; batch first."""
        if self.in_proj_weight is None:
            weights = self.q_proj_weight, self.k_proj_weight, self.v_proj_weight
        else:
            weights = self.in_proj_weight.chunk(3)
        biases = self.in_proj_bias.chunk(3)
        split = [
            (x @ w.T + b).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
            for x, w, b in zip((query, key, value), weights, biases, strict=True)
        ]
        scores = split[0] @ split[1].transpose(2, 3) / self.head_dim**0.5
        if mask is not None:
            scores = scores.masked_fill(mask[:, None, None], float("-inf"))
        mixed = (scores.softmax(3) @ split[2]).transpose(1, 2).flatten(2)
        return mixed, mixed @ self.out_proj.weight.T + self.out_proj.bias


def attention(**options: Any) -> Multiplied:
    torch.manual_seed(3)
    module = Multiplied(8, 2, batch_first=True, **options).eval()
    nn.init.normal_(module.in_proj_bias)
    return module


@torch.no_grad()
@pytest.mark.parametrize("grad", [True, False])
def test_attention_shows_what_its_projections_multiply(grad: bool) -> None:
    """Also where a fused operation would stand for all of it."""
    module = attention().requires_grad_(grad)
    x, y, z = torch.randn(2, 3, 8), torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    mask = torch.zeros(2, 5, dtype=torch.bool)
    mask[1, 3:] = True
    flat = [one.reshape(-1, 8) for one in (x, y, z)]
    cases: list[tuple[Call, tuple[Tensor, Tensor, Tensor], Tensor | None, dict[Any, Tensor]]] = [
        (Call((x, x, x), {}), (x, x, x), None, {(0, 24): flat[0]}),
        (Call((x, y, y), {}), (x, y, y), None, {(0, 8): flat[0], (8, 24): flat[1]}),
        (
            Call((x,), {"key": y, "value": z, "key_padding_mask": mask, "need_weights": False}),
            (x, y, z),
            mask,
            {(0, 8): flat[0], (8, 16): flat[1], (16, 24): flat[2]},
        ),
    ]
    for call, given, hidden, expected in cases:
        found = seen(module, "in_proj_weight", *call.args, **call.kwargs)
        assert {**found}.keys() == expected.keys()
        for span, rows in expected.items():
            torch.testing.assert_close(found[span].sort(0).values, rows.sort(0).values)
        mixed, output = module.by_hand(*given, hidden)
        torch.testing.assert_close(module(*call.args, **call.kwargs)[0], output)
        out = seen(module, "out_proj.weight", *call.args, **call.kwargs)
        torch.testing.assert_close(out[0, 8].sort(0).values, mixed.reshape(-1, 8).sort(0).values)


@torch.no_grad()
def test_attention_with_sizes_of_its_own_has_three_weights() -> None:
    module = attention(kdim=6, vdim=5)
    x, y, z = torch.randn(2, 3, 8), torch.randn(2, 4, 6), torch.randn(2, 4, 5)
    for weight, given in (("q", x), ("k", y), ("v", z)):
        found = seen(module, f"{weight}_proj_weight", x, y, z)[0, 8]
        torch.testing.assert_close(found.sort(0).values, given.reshape(-1, given.shape[2]).sort(0).values)


class Experts(nn.Module):
    """Stacked experts like those of transformers."""

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.num_experts, self.is_transposed, self.config = 4, transposed, None
        self.up = nn.Parameter(torch.randn(4, 5, 6))
        self.down = nn.Parameter(torch.randn(4, 6, 5))

    def forward(self, x: Tensor, which: Tensor) -> Tensor:
        found = torch.zeros_like(x)
        for place in which.unique():
            rows = (which == place).nonzero()[:, 0]
            up, down = self.up[place], self.down[place]
            if self.is_transposed:
                found[rows] = (x[rows] @ up).relu() @ down
            else:
                found[rows] = nn.functional.linear(nn.functional.linear(x[rows], down.T.T).relu(), up)
        return found


@torch.no_grad()
@pytest.mark.parametrize("transposed", [False, True])
def test_stacked_experts_show_the_tokens_of_each(transposed: bool) -> None:
    torch.manual_seed(0)
    module, which = Experts(transposed), torch.tensor([0, 2, 2, 3, 0, 2])
    x = torch.randn(6, 5)
    first, rows = ("up", 6) if transposed else ("down", 6)
    found = seen(module, first, x, which)
    assert [*found] == [(0, rows), (2 * rows, 3 * rows), (3 * rows, 4 * rows)]
    for place in (0, 2, 3):
        assert torch.equal(found[place * rows, (place + 1) * rows], x[which == place])
    product = product_of(nn.ModuleDict({"a": module}), f"a.{first}")
    assert product is not None and product.axis == ((0, 2) if transposed else (0, 1))
    assert product.layer == InnerProduct(4 * rows)
    other = seen(module, "down" if transposed else "up", x, which)
    assert [len(part) for part in other.values()] == [2, 3, 1]


def test_a_gram_in_parts_is_that_of_each_and_plain_where_nothing_comes() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(7, 3), torch.randn(5, 3)
    parts = [{(0, 2): x[:4], (4, 8): y}, {(0, 2): x[4:]}]
    gram, unreached = measure_inner_gram(InnerProduct(8), 3, parts, None, torch.Generator())
    assert unreached == 2 and gram.hessian.shape == (4, 3, 3) and gram.cross is None
    expected = [(x.T @ x / 7).double(), None, (y.T @ y / 5).double(), (y.T @ y / 5).double()]
    for found, wanted in zip(gram.hessian, expected, strict=True):
        if wanted is None:
            assert torch.equal(found, float(found[0, 0]) * torch.eye(3, dtype=torch.float64)) and found[0, 0] > 0
        else:
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    nothing, unreached = measure_inner_gram(InnerProduct(8), 3, [], None, torch.Generator())
    assert unreached == 8 and nothing.count == 0
    assert torch.equal(nothing.hessian, torch.eye(3, dtype=torch.float64).expand_as(nothing.hessian))


def test_what_computes_more_than_its_class_is_not_looked_into() -> None:
    class Doubled(nn.LSTM):
        def forward(self, *args: Any) -> Any:
            return super().forward(2 * args[0])

    class Twice(nn.MultiheadAttention):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    assert product_of(nn.Sequential(Doubled(3, 4)), "0.weight_ih_l0") is None
    assert product_of(nn.Sequential(Twice(4, 2)), "0.in_proj_weight") is None
    assert product_of(nn.Sequential(nn.LSTM(3, 4)), "0.bias_ih_l0") is None
    assert product_of(nn.Sequential(nn.LayerNorm(4)), "0.weight") is None
    assert product_of(nn.Sequential(nn.Linear(4, 4)), "elsewhere.weight") is None
