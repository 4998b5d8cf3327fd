"""Weights that are held as codes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from artifact.golden_cases import GOLDEN
from hypothesis import given
from hypothesis import strategies as st

from qcompress.artifact.reader import read_artifact
from qcompress.coding.grids import decode
from qcompress.coding.packing import pack
from qcompress.coding.packing import unpack as unpack_numpy
from qcompress.runtime.packed_weight import PackedWeight, pack_weight, unpack
from qcompress.types.encoded import Affine, Blocked, Codebook, Compressed, Constant, Table, Unbounded

FILES = sorted(GOLDEN.glob("*.safetensors"))
FORMS = (Affine, Table, Blocked, Codebook, Unbounded, Constant)


def weights_of(path: Path) -> Iterator[Compressed]:
    for file in read_artifact(path).files:
        for name in file.manifest.tensors:
            yield file.tensor(name).read()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_form_decodes_to_what_the_artifact_decodes_to(path: Path) -> None:
    for encoded in weights_of(path):
        right = decode(encoded)
        found = pack_weight(encoded).decode()
        assert (found.dtype, found.shape) == (right.dtype, right.shape)
        assert torch.equal(found, right)


def test_the_files_have_every_form() -> None:
    assert {type(encoded) for path in FILES for encoded in weights_of(path)} == set(FORMS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_rows_are_those_of_the_whole(path: Path) -> None:
    for encoded in weights_of(path):
        whole = decode(encoded)
        if not whole.ndim:
            continue
        rows = torch.tensor([[len(whole) - 1, 0], [0, 0]])
        assert torch.equal(pack_weight(encoded).decode_rows(rows), whole[rows])


@given(st.integers(1, 12), st.integers(1, 40), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_codes_are_unpacked_as_files_have_them(bits: int, columns: int, rows: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 2**bits, (rows, columns)).astype("u1" if bits <= 8 else "u2")
    packed = pack(codes, bits)
    padded = np.pad(packed, ((0, 0), (0, -packed.shape[1] % bits)))
    assert np.array_equal(unpack(torch.from_numpy(padded), bits, columns).numpy(), unpack_numpy(packed, bits, columns))


def affine(bits: int = 3, rows: int = 6, columns: int = 40) -> Affine:
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (rows, columns), generator=generator, dtype=torch.uint8)
    scale = torch.rand(rows, 2, generator=generator).half()
    return Affine(codes, bits, scale, -3, (rows, columns), convention="full", group_size=20)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_network_in_another_dtype_gets_the_decoded_weight_in_it(dtype: torch.dtype) -> None:
    weight = pack_weight(affine())
    changed = weight.to(torch.bfloat16).to(dtype)
    assert changed.dtype == dtype
    assert torch.equal(changed.decode(), decode(affine()).to(dtype))


@pytest.mark.parametrize("bits", range(1, 9))
def test_codes_take_their_bits_and_no_more(bits: int) -> None:
    encoded = affine(bits, columns=400)
    held = sum(value.nbytes for value in pack_weight(encoded).buffers())
    assert held <= 6 * (400 * bits // 8 + bits) + encoded.scale.nbytes


def test_unbounded_codes_take_the_fewest_bytes_that_hold_them() -> None:
    codes = torch.tensor([[0, 127], [-128, 3]], dtype=torch.int32)
    encoded = Unbounded(codes, torch.tensor(0.5).half(), 0, (2, 2))
    for factor, dtype in ((1, torch.int8), (3, torch.int16), (1 << 20, torch.int32)):
        weight = pack_weight(replace(encoded, codes=codes * factor))
        assert next(value for name, value in weight.named_buffers() if name == "codes").dtype == dtype
        assert torch.equal(weight.decode(), codes * factor * 0.5)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_decoding_compiles_to_one_graph(form: type) -> None:
    encoded = next(one for path in FILES for one in weights_of(path) if isinstance(one, form))
    weight: PackedWeight = pack_weight(encoded)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(weight.decode, fullgraph=True)(), decode(encoded))
