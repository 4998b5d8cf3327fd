"""Modules whose parameters are held as codes."""

from __future__ import annotations

import copy

import pytest
import torch
from artifact.examples import gaussian
from torch import Tensor, nn

from qcompress.coding.grids import decode
from qcompress.runtime.packed_modules import int4_weight, put_packed, takes_packed
from qcompress.runtime.packed_weight import pack_weight
from qcompress.types.encoded import Affine


def affine(shape: tuple[int, ...], bits: int = 4, groups: int = 1, offset: bool = False) -> Affine:
    rows = torch.Size(shape)[0]
    columns = torch.Size(shape).numel() // rows
    generator = torch.Generator().manual_seed(rows)
    codes = torch.randint(0, 2**bits, (rows, columns), generator=generator, dtype=torch.uint8)
    scale = (torch.rand(rows, groups, generator=generator) + 0.1).half()
    size = None if groups == 1 else columns // groups
    if offset:
        return Affine(codes, bits, scale, -4, shape, offset=-scale * 7, group_size=size)
    return Affine(codes, bits, scale, -4, shape, convention="full", group_size=size)


class Doubled(nn.Embedding):
    """A class with a forward of its own, as Gemma's embedding."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


MODULES = {
    "linear": (lambda: nn.Linear(8, 6), gaussian(3, 8)),
    "convolution 1": (lambda: nn.Conv1d(4, 6, 3, groups=2), gaussian(2, 4, 9)),
    "convolution 2": (lambda: nn.Conv2d(4, 6, 3, padding=1), gaussian(2, 4, 5, 5)),
    "convolution 3": (lambda: nn.Conv3d(2, 4, 2), gaussian(1, 2, 3, 3, 3)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2), gaussian(2, 4, 5, 5)),
    "embedding": (lambda: nn.Embedding(10, 6, padding_idx=1), torch.tensor([[1, 9], [0, 3]])),
    "embedding with a forward": (lambda: Doubled(10, 6), torch.tensor([[1, 9], [0, 3]])),
    "embedding with a norm": (lambda: nn.Embedding(10, 6, max_norm=0.1), torch.tensor([[1, 9], [0, 3]])),
    "bag": (lambda: nn.EmbeddingBag(10, 6), torch.tensor([[1, 9], [0, 3]])),
}


@pytest.mark.parametrize("kind", MODULES)
def test_a_packed_module_computes_what_the_dense_one_does(kind: str) -> None:
    make, input = MODULES[kind]
    module = make().eval()
    encoded = affine(tuple(module.weight.shape))
    dense = copy.deepcopy(module)
    dense.weight.data.copy_(decode(encoded))
    assert takes_packed(module, "weight")
    put_packed(module, "weight", pack_weight(encoded))
    with torch.no_grad():
        assert torch.equal(module(input), dense(input))
    assert isinstance(module, type(dense))
    assert not dict(module.named_parameters()).keys() & {"weight"}


def test_an_embedding_decodes_no_rows_but_those_it_looks_up(monkeypatch: pytest.MonkeyPatch) -> None:
    module = nn.Embedding(10, 6)
    weight = pack_weight(affine((10, 6)))
    put_packed(module, "weight", weight)
    monkeypatch.setattr(weight, "decode", None)
    assert torch.equal(module(torch.tensor([4, 4])), decode(affine((10, 6)))[[4, 4]])


def test_attention_computes_from_codes_too() -> None:
    module = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    dense = copy.deepcopy(module)
    for owner, other, name in (
        (module, dense, "in_proj_weight"),
        (module.out_proj, dense.out_proj, "weight"),
    ):
        encoded = affine(tuple(getattr(owner, name).shape))
        getattr(other, name).data.copy_(decode(encoded))
        put_packed(owner, name, pack_weight(encoded))
    x = gaussian(2, 5, 8)
    with torch.no_grad():
        assert torch.equal(module(x, x, x)[0], dense(x, x, x)[0])
    with torch.no_grad():
        assert torch.equal(module(x, x, x, need_weights=False)[0], dense(x, x, x, need_weights=False)[0])


def test_two_parameters_of_one_module_are_both_packed() -> None:
    module = nn.Linear(8, 6)
    weight, bias = affine((6, 8)), affine((6, 1))
    put_packed(module, "weight", pack_weight(weight))
    put_packed(module, "bias", pack_weight(Affine(bias.codes.T, 4, bias.scale[:1], -4, (6,), convention="full")))
    assert torch.equal(module.weight, decode(weight)) and module.bias.shape == (6,)
    assert module(gaussian(2, 8)).shape == (2, 6) and not list(module.parameters())


def test_recurrent_layers_cannot_be_packed() -> None:
    assert not takes_packed(nn.LSTM(3, 4), "weight_ih_l0")
    assert not takes_packed(nn.BatchNorm1d(3), "running_mean")


def test_a_packed_module_is_copied_and_moved_between_dtypes() -> None:
    module = nn.Linear(8, 6)
    put_packed(module, "weight", pack_weight(affine((6, 8))))
    other = copy.deepcopy(module).to(torch.bfloat16).to(torch.float32)
    assert torch.equal(other.weight, decode(affine((6, 8))))


def linear(rows: int, columns: int, dtype: torch.dtype = torch.bfloat16) -> nn.Linear:
    return nn.Linear(columns, rows, bias=True).to(dtype)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("offset", [False, True])
def test_the_kernel_computes_within_bfloat16(groups: int, offset: bool) -> None:
    module, encoded = linear(32, 128), affine((32, 128), groups=groups, offset=offset)
    weight = int4_weight(module, "weight", encoded, torch.bfloat16)
    assert weight is not None
    right = decode(encoded)
    assert ((weight.decode() - right).norm() / right.norm()) < 2**-8
    put_packed(module, "weight", weight.to(torch.bfloat16))
    x = gaussian(3, 2, 128).bfloat16()
    exact = x.float() @ right.T + module.bias.float()
    assert ((module(x).float() - exact).norm() / exact.norm()) < 2**-7
    assert (module.float()(x.float()) - exact).norm() / exact.norm() < 2**-7


@pytest.mark.parametrize(
    ("module", "encoded"),
    [
        (linear(32, 128, torch.float32), affine((32, 128))),
        (linear(24, 128), affine((24, 128))),
        (linear(32, 48), affine((32, 48))),
        (linear(32, 128), affine((32, 128), bits=3)),
        (nn.Embedding(32, 128).bfloat16(), affine((32, 128))),
    ],
    ids=["float32", "rows", "columns", "bits", "embedding"],
)
def test_the_kernel_is_left_out_where_it_does_not_fit(module: nn.Linear, encoded: Affine) -> None:
    assert int4_weight(module, "weight", encoded, module.weight.dtype) is None


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["linear", "convolution 2", "embedding", "embedding with a forward"])
def test_a_packed_module_compiles_to_one_graph(kind: str) -> None:
    make, input = MODULES[kind]
    module = make().eval()
    put_packed(module, "weight", pack_weight(affine(tuple(module.weight.shape))))
    torch._dynamo.reset()
    with torch.no_grad():
        assert torch.allclose(torch.compile(module, fullgraph=True)(input), module(input), atol=1e-5)
