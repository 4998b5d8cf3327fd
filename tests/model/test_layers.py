"""A layer seen as a matrix product gives what the layer gives, and its Gram is the sum that it stands for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from qcompress.coding.rows import rows_from_weight, weight_from_rows
from qcompress.model.build import channel_axes
from qcompress.model.layers import MatrixLayer, matrix_layer, measure_gram
from qcompress.solvers.hessian import least_squares_target, linear_term, output_error

LAYERS = {
    "linear": (nn.Linear(6, 4), (5, 6)),
    "tokens": (nn.Linear(6, 4), (3, 7, 6)),
    "1d": (nn.Conv1d(4, 6, 3, padding=1), (2, 4, 9)),
    "2d": (nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False), (3, 4, 9, 7)),
    "3d": (nn.Conv3d(2, 4, (1, 2, 3), padding=(0, 1, 1)), (2, 2, 4, 5, 6)),
    "1x1": (nn.Conv2d(4, 6, 1), (3, 4, 5, 5)),
    "dilated": (nn.Conv2d(4, 6, 3, dilation=2), (2, 4, 9, 9)),
    "same": (nn.Conv2d(4, 6, (2, 4), padding="same"), (2, 4, 6, 6)),
    "reflect": (nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (2, 4, 6, 6)),
    "grouped": (nn.Conv2d(6, 4, 3, groups=2, padding=1), (2, 6, 5, 5)),
    "depthwise": (nn.Conv2d(4, 4, 3, groups=4, padding=1), (2, 4, 6, 6)),
    "multiplied": (nn.Conv2d(3, 6, 3, groups=3), (2, 3, 5, 5)),
    "transposed": (nn.ConvTranspose2d(4, 3, 3, stride=2, padding=1, output_padding=1), (2, 4, 5, 4)),
    "transposed 1d": (nn.ConvTranspose1d(4, 3, 4, stride=3, dilation=2), (2, 4, 5)),
    "transposed grouped": (nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, groups=2), (2, 4, 4, 5)),
    "transposed depthwise": (nn.ConvTranspose2d(4, 4, 3, stride=2, groups=4), (2, 4, 4, 5)),
    "transposed multiplied": (nn.ConvTranspose3d(3, 6, 2, groups=3), (2, 3, 3, 4, 2)),
    "rectangular": (nn.Conv2d(2, 3, (3, 1), stride=(1, 2), padding=(2, 0)), (2, 2, 5, 6)),
}


def viewed(name: str) -> tuple[MatrixLayer, nn.Module, Tensor]:
    module, shape = LAYERS[name]
    layer = matrix_layer(module)
    assert layer is not None
    torch.manual_seed(1)
    return layer, module, torch.randn(shape)


def rows_of(module: nn.Module) -> Tensor:
    """Of each group in turn the rows that its outputs are made by."""
    if "Transpose" not in type(module).__name__:
        return module.weight.detach().flatten(1)
    return torch.cat([rows_from_weight(part, (1,)).flatten(1) for part in module.weight.detach().chunk(module.groups)])


@pytest.mark.parametrize("name", LAYERS)
def test_columns_times_rows_are_the_output(name: str) -> None:
    layer, module, x = viewed(name)
    columns = layer.columns(x)
    rows = rows_of(module).reshape(layer.groups, -1, columns.shape[2])
    product = (columns @ rows.transpose(1, 2)).transpose(0, 1).flatten(1)
    if module.bias is not None:
        product = product + module.bias
    torch.testing.assert_close(product, layer.outputs(module(x)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", LAYERS)
def test_drawn_places_are_places_of_every_sample(name: str) -> None:
    layer, _, x = viewed(name)
    everything = layer.columns(x)
    per_sample = everything.shape[1] // len(x)
    for wanted in (1, per_sample, per_sample + 5):
        drawn = layer.columns(x, wanted, torch.Generator().manual_seed(0))
        count = min(wanted, per_sample)
        assert drawn.shape == (everything.shape[0], len(x) * count, everything.shape[2])
        for sample in range(len(x)):
            whole = everything[0, sample * per_sample : (sample + 1) * per_sample]
            some = drawn[0, sample * count : (sample + 1) * count]
            found = [(whole == one).all(1).nonzero() for one in some]
            assert all(len(places) for places in found)
            if "transposed" not in name:  # which has many places that see nothing but zeros
                assert [int(places[0]) for places in found] == sorted({int(places[0]) for places in found})


@pytest.mark.parametrize("name", ["linear", "2d", "depthwise", "transposed"])
def test_the_gram_is_the_mean_of_outer_products(name: str) -> None:
    layer, module, x = viewed(name)
    noise = 0.1 * torch.randn_like(x)
    gram = measure_gram(layer, [x[:1] + noise[:1], x[1:] + noise[1:]], [x[:1], x[1:]], torch.Generator())
    noisy, clean = layer.columns(x + noise).double(), layer.columns(x).double()
    count = noisy.shape[1]
    torch.testing.assert_close(gram.hessian, noisy.transpose(1, 2) @ noisy / count, rtol=1e-4, atol=1e-6)
    assert gram.cross is not None
    torch.testing.assert_close(gram.cross, clean.transpose(1, 2) @ noisy / count, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(gram.mean, noisy.mean(1), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(gram.clean_mean, clean.mean(1), rtol=1e-4, atol=1e-6)
    assert gram.count == count
    rows = rows_of(module).reshape(layer.groups, -1, noisy.shape[2]).double()
    changed = rows + 0.3 * torch.randn_like(rows)
    measured = (changed @ noisy.transpose(1, 2) - rows @ clean.transpose(1, 2)).square().mean(2).flatten()
    at_rest = (rows @ noisy.transpose(1, 2) - rows @ clean.transpose(1, 2)).square().mean(2).flatten()
    linear = linear_term(rows.flatten(0, 1), gram.hessian, gram.cross)
    found = output_error((changed - rows).flatten(0, 1), gram.hessian, linear)
    torch.testing.assert_close(found, measured - at_rest, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["transposed grouped", "transposed multiplied", "transposed depthwise"])
def test_the_gram_of_a_grouped_transposed_convolution_tells_its_output_error(name: str) -> None:
    """Rows are those of the axes that the plan gives: several groups may have their part in one row."""
    layer, module, x = viewed(name)
    gram = measure_gram(layer, [x], None, torch.Generator())
    found = channel_axes(nn.Sequential(module)).get("0.weight")
    axis = (0,) if found is None else found.axes
    rows = rows_from_weight(module.weight.detach(), axis).flatten(1)
    change = 0.3 * torch.randn_like(rows)
    total = float(output_error(change, gram.hessian).sum())
    with torch.no_grad():
        before = module(x)
        module.weight += weight_from_rows(change, tuple(module.weight.shape), axis)
        after = module(x)
    positions = before.numel() / before.shape[1]
    assert total == pytest.approx(float((after - before).square().sum()) / positions, rel=1e-4)


def test_the_target_is_where_the_error_is_least() -> None:
    torch.manual_seed(2)
    clean = torch.randn(1, 500, 6, dtype=torch.float64)
    noisy = clean @ torch.randn(6, 6, dtype=torch.float64) * 0.5 + 0.2 * torch.randn(1, 500, 6, dtype=torch.float64)
    hessian, cross = noisy.transpose(1, 2) @ noisy / 500, clean.transpose(1, 2) @ noisy / 500
    weight = torch.randn(4, 6, dtype=torch.float64)
    target = least_squares_target(weight, hessian, cross, 0.0)
    expected = torch.linalg.lstsq(noisy[0], clean[0] @ weight.T).solution.T
    torch.testing.assert_close(target, expected)
    torch.testing.assert_close(least_squares_target(weight, hessian, hessian, 0.01), weight)


def test_what_computes_more_than_its_class_is_no_matrix_product() -> None:
    class Scaled(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    assert matrix_layer(Scaled(3, 3, 1)) is None
    assert matrix_layer(nn.Embedding(4, 3)) is None


@pytest.mark.parametrize("columns", [1, 7, 500])
def test_sums_over_batches_are_those_of_float64(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever part of them is added at a time."""
    monkeypatch.setattr("qcompress.model.layers.CACHED_VALUES", 40)
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(2, 3, columns, generator=generator) for _ in range(4)]
    layer = MatrixLayer(nn.Linear(columns, 2), 1)
    found = measure_gram(layer, inputs, None, generator)
    products = [x.reshape(1, -1, columns).transpose(1, 2) @ x.reshape(1, -1, columns) for x in inputs]
    wanted = torch.stack([one.double() for one in products]).sum(0) / 24
    torch.testing.assert_close(found.hessian, wanted, rtol=1e-14, atol=1e-14)
