"""Checkpoints in 8-bit floats and MXFP4, read as dense weights."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Run, refused
from model.architectures import make_architecture
from safetensors.torch import load_file, save_file
from torch import Tensor

import qcompress
from qcompress.checkpoint.checkpoint import Checkpoint, StackedRows, StoredRows, read_checkpoint, tensor_view
from qcompress.checkpoint.safetensors_file import Container
from qcompress.data.user_code import import_package

E4M3 = torch.float8_e4m3fn


def folder_of(tensors: Mapping[str, Tensor], folder: Path, **config: object) -> Path:
    folder.mkdir()
    save_file(dict(tensors), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def dense_of(checkpoint: Checkpoint, name: str) -> Tensor:
    shard = checkpoint.shard_of(name)
    return tensor_view(shard, shard.by_name[name])


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def blocks_of(weight: Tensor, scale: Tensor, block: tuple[int, int]) -> Tensor:
    """Value by value, as the format says it."""
    found = torch.zeros(weight.shape)
    for row in range(weight.shape[0]):
        for column in range(weight.shape[1]):
            found[row, column] = weight[row, column].float() * scale[row // block[0], column // block[1]].float()
    return found


def to_fp8(weight: Tensor, block: int = 128) -> tuple[Tensor, Tensor]:
    """Codes and scales a block, as a quantizer makes them."""
    tall, wide = (-(-size // block) for size in weight.shape)
    scale = torch.zeros(tall, wide)
    codes = torch.zeros(weight.shape, dtype=E4M3)
    for row in range(tall):
        for column in range(wide):
            part = (slice(row * block, (row + 1) * block), slice(column * block, (column + 1) * block))
            scale[row, column] = weight[part].float().abs().max().clamp_min(1e-12) / 448
            codes[part] = (weight[part].float() / scale[row, column]).to(E4M3)
    return codes, scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e8m0fnu])
def test_eight_bit_floats_times_the_scale_of_their_block(dtype: torch.dtype, tmp_path: Path) -> None:
    weight, scale = random(200, 150).to(E4M3), random(2, 2, seed=1).abs().add(0.1).to(dtype)
    path = folder_of({"a.weight": weight, "a.weight_scale_inv": scale, "b": random(4)}, tmp_path / "m", dtype="float32")
    checkpoint = read_checkpoint(path)
    assert {one.name: (one.shape, one.dtype) for one in checkpoint.tensors} == {
        "a.weight": ((200, 150), "F32"),
        "b": ((4,), "F32"),
    }
    assert torch.equal(dense_of(checkpoint, "a.weight"), blocks_of(weight, scale, (128, 128)))
    assert checkpoint.file_bytes == (path / "model.safetensors").stat().st_size


def test_the_library_dequantizes_to_the_same(tmp_path: Path) -> None:
    fp8: Any = import_package("transformers.integrations.finegrained_fp8")
    mxfp4: Any = import_package("transformers.integrations.mxfp4")
    weight, scale = random(256, 384).to(E4M3), random(2, 3, seed=1).abs()
    blocks = torch.randint(0, 256, (3, 6, 2, 16), dtype=torch.uint8)
    scales = torch.randint(110, 140, (3, 6, 2), dtype=torch.uint8)
    tensors = {"a.weight": weight, "a.weight_scale_inv": scale, "e.up_proj_blocks": blocks, "e.up_proj_scales": scales}
    checkpoint = read_checkpoint(folder_of(tensors, tmp_path / "m", torch_dtype="bfloat16"))
    wanted = fp8.Fp8Dequantize(None)._dequantize_one(weight, scale, torch.bfloat16)
    assert torch.equal(dense_of(checkpoint, "a.weight"), wanted)
    found, wanted = dense_of(checkpoint, "e.up_proj"), mxfp4.convert_moe_packed_tensors(blocks, scales)
    assert found.dtype == wanted.dtype == torch.bfloat16 and found.shape == wanted.shape == (3, 64, 6)
    assert torch.equal(found, wanted)


@pytest.mark.parametrize(
    ("shape", "scales", "config", "block"),
    [
        ((8, 6), (2, 2), {"quantization_config": {"weight_block_size": [4, 3]}}, (4, 3)),
        ((8, 6), (8, 1), {}, (1, 6)),
        ((8, 6), (1, 1), {}, (128, 128)),
        ((130, 257), (2, 3), {}, (128, 128)),
    ],
)
def test_the_size_of_a_block(
    shape: tuple[int, int], scales: tuple[int, int], config: dict[str, object], block: tuple[int, int], tmp_path: Path
) -> None:
    weight, scale = random(*shape).to(E4M3), random(*scales, seed=1)
    tensors = {"w": weight, "w_scale_inv": scale}
    checkpoint = read_checkpoint(folder_of(tensors, tmp_path / "m", dtype="float32", **config))
    assert torch.equal(dense_of(checkpoint, "w"), blocks_of(weight, scale, block))


def test_stacks_of_experts_have_blocks_of_their_own(tmp_path: Path) -> None:
    weight, scale = random(3, 130, 20).to(E4M3), random(3, 2, 1, seed=1)
    path = folder_of({"w": weight, "w_scale_inv": scale}, tmp_path / "m", dtype="float32")
    wanted = torch.stack([blocks_of(one, its, (128, 128)) for one, its in zip(weight, scale, strict=True)])
    assert torch.equal(dense_of(read_checkpoint(path), "w"), wanted)


def test_any_bytes_of_it_are_those_of_the_whole(tmp_path: Path) -> None:
    blocks, scales = torch.randint(0, 256, (4, 6, 1, 16), dtype=torch.uint8), torch.full((4, 6, 1), 127).byte()
    tensors = {"w": random(150, 7).to(E4M3), "w_scale_inv": random(2, 1), "x_blocks": blocks, "x_scales": scales}
    checkpoint = read_checkpoint(folder_of(tensors, tmp_path / "m"))
    for name in ("w", "x"):
        shard, whole = checkpoint.shard_of(name), dense_of(checkpoint, name)
        raw = whole.reshape(-1).view(torch.uint8).numpy().tobytes()
        assert b"".join(shard.pieces_of(name)) == raw == bytes(shard.stored(name).read(0, len(raw)))
        assert shard.crc32_of(name) == zlib.crc32(raw)
        for start, stop in ((0, 1), (13, 29), (len(raw) - 3, len(raw)), (5, 5), (100, 701)):
            assert bytes(shard.bytes_of(name, start, stop)) == raw[start:stop]
    info = checkpoint.shard_of("w").by_name["w"]
    assert torch.equal(StoredRows(checkpoint.shard_of("w"), info, (150, 7))[40:131], dense_of(checkpoint, "w")[40:131])
    info = checkpoint.shard_of("x").by_name["x"]
    rows = dense_of(checkpoint, "x").movedim(2, 1).reshape(24, 32)
    stacked = StackedRows(checkpoint.shard_of("x"), info)
    for start, stop in ((0, 24), (3, 4), (5, 13), (23, 24)):
        assert torch.equal(stacked[start:stop], rows[start:stop])


def test_no_more_than_some_rows_are_read_at_a_time(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    codes, scale = to_fp8(random(4096, 512) / 30)
    path = folder_of({"w": codes, "w_scale_inv": scale}, tmp_path / "m")
    reads: list[int] = []
    read = Container.read

    def watched(self: Container, begin: int, end: int) -> memoryview:
        reads.append(end - begin)
        return read(self, begin, end)

    monkeypatch.setattr(Container, "read", watched)
    done = run("quantize", path, "--bits", 4, "--coding", "packed", "-q")
    assert done.code == 0, done.err
    assert max(reads) <= codes.numel() // 2


def test_a_weight_and_its_scales_may_lie_in_different_files(run: Run, tmp_path: Path) -> None:
    codes, scale = to_fp8(random(160, 40) / 30)
    folder = tmp_path / "m"
    folder.mkdir()
    files = {"model-00001-of-00002.safetensors": {"a.weight": codes, "n": torch.ones(3)}}
    files["model-00002-of-00002.safetensors"] = {"a.weight_scale_inv": scale, "b.weight": random(20, 30)}
    for file, tensors in files.items():
        save_file(tensors, folder / file)
    index = {name: file for file, tensors in files.items() for name in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (folder / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "fp8"}, "a": 1}))
    done = run("quantize", folder, "--bits", 8, "--json", "-", "-o", tmp_path / "a")
    assert done.code == 0, done.err
    report = json.loads(done.out)
    assert report["size"]["baseline_bytes"] == sum((folder / file).stat().st_size for file in files)
    assert {layer["name"] for layer in report["layers"]} == {"a.weight", "b.weight", "n"}
    state = qcompress.load_state_dict(tmp_path / "a")
    torch.testing.assert_close(state["a.weight"].float(), blocks_of(codes, scale, (128, 128)), rtol=0, atol=0.002)
    marked = json.loads((tmp_path / "a" / "config.json").read_text())
    index = "model.qcompress.safetensors.index.json"
    assert marked["quantization_config"] == {"quant_method": "qcompress", "weights": index}
    assert run("verify", tmp_path / "a").code == 0
    compared = run("report", tmp_path / "a", "--baseline", folder, "--format", "json")
    assert compared.code == 0, compared.err
    assert run("export", tmp_path / "a", "--to", "safetensors", "-o", tmp_path / "d").code == 0
    assert json.loads((tmp_path / "d" / "config.json").read_text()) == {"a": 1}
    exported = {
        name: value for file in (tmp_path / "d").glob("*.safetensors") for name, value in load_file(file).items()
    }
    assert exported.keys() == state.keys() and all(torch.equal(exported[name], state[name]) for name in state)


def pack_mxfp4(values: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks and scales of [experts, columns, rows]: the nearest values, under the power of two that holds them."""
    table = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    groups = values.movedim(1, 2).unflatten(2, (-1, 32))
    exponent = (groups.abs().amax(-1).clamp_min(2.0**-100) / 6).log2().ceil()
    scaled = groups / exponent.exp2().unsqueeze(-1)
    codes = (scaled.abs().unsqueeze(-1) - table).abs().argmin(-1) + 8 * (scaled < 0)
    return (codes[..., 0::2] + 16 * codes[..., 1::2]).byte(), (exponent + 127).byte()


def test_gpt_oss_goes_through_and_loads_as_what_it_decodes_to(run: Run, tmp_path: Path) -> None:
    module = make_architecture("gpt-oss").to(torch.bfloat16)
    module.save_pretrained(tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    tensors = load_file(file)
    wanted = dict(tensors)
    for name in [name for name in tensors if name.endswith("gate_up_proj")]:
        blocks, scales = pack_mxfp4(tensors.pop(name).float())
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        mxfp4: Any = import_package("transformers.integrations.mxfp4")
        wanted[name] = mxfp4.convert_moe_packed_tensors(blocks, scales)
    save_file(tensors, file, {"format": "pt"})
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4"}
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    done = run("quantize", tmp_path / "m", "--bits", 8, "--json", "-", "-o", tmp_path / "a")
    assert done.code == 0, done.err
    layers = {layer["name"]: layer for layer in json.loads(done.out)["layers"]}
    assert layers.keys() == wanted.keys()
    stacked = [layer for name, layer in layers.items() if name.endswith("gate_up_proj")]
    assert stacked and all(layer["figures"]["sqnr_db"] > 40 for layer in stacked)
    other = make_architecture("gpt-oss", seed=1)
    qcompress.load_into(other, tmp_path / "a")
    assert run("export", tmp_path / "a", "--to", "safetensors", "-o", tmp_path / "d").code == 0
    again = type(module).from_pretrained(tmp_path / "d", dtype=torch.float32).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in other.state_dict().items())
    assert all(torch.allclose(again[name], value.float(), atol=0.01) for name, value in wanted.items())


@pytest.mark.parametrize(
    ("tensors", "error"),
    [
        ({"w_scale_inv": random(1, 1)}, "'w_scale_inv': holds the scales of 'w', which no file holds"),
        ({"w": random(4, 4), "w_scale_inv": random(1, 1)}, "is F32, for a weight F32: only F8_E4M3"),
        ({"w": random(4, 4).to(E4M3), "w_scale_inv": random(3, 1)}, r"is \[3, 1\], which is no grid of blocks"),
        ({"w": random(4, 4).to(E4M3), "w_scale_inv": random(2)}, r"is \[2\], and its weight \[4, 4\]"),
        ({"x_blocks": random(2, 2), "x_scales": random(2)}, r"is F32 \[2, 2\], not U8"),
        (
            {"x_blocks": torch.zeros(2, 3, 1, 16).byte(), "x_scales": torch.zeros(2, 3, 2).byte()},
            r"'x_scales': is \[2, 3, 2\], and its blocks are \[2, 3, 1, 16\]",
        ),
        (
            {"x": random(2), "x_blocks": torch.zeros(2, 3, 1, 16).byte(), "x_scales": torch.zeros(2, 3, 1).byte()},
            "holds the blocks of 'x', which is there too",
        ),
    ],
)
def test_scales_that_fit_no_weight_are_refused(
    tensors: dict[str, Tensor], error: str, run: Run, tmp_path: Path
) -> None:
    path = folder_of(tensors, tmp_path / "m")
    assert re.search(error, refused(run, tmp_path, "quantize", path, "--bits", 4))
