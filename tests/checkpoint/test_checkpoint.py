"""Checkpoints as people have them: one file, shards, Hugging Face folders, every dtype, and folders that are wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from artifact.educational_decoder import Dense, expand
from artifact.examples import dense, denses, entry, gaussian, plan_for, rtn, run, save, save_folder, verify, write_raw
from safetensors.torch import load_file, save_model
from torch import nn

from qcompress.checkpoint.checkpoint import read_checkpoint, strided_values, tensor_view
from qcompress.compress.load import load_state_dict
from qcompress.errors import CheckpointError

A = "model-00001-of-00002.safetensors"
B = "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(path)
    assert caught.value.exit_code == 3
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write_index(folder: Path, weight_map: Any) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_a_weight_is_seen_as_the_library_loads_it(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {"w": gaussian(3, 5, dtype=dtype), "s": gaussian(dtype=dtype), "v": gaussian(4, dtype=dtype)}
    checkpoint = read_checkpoint(save(tmp_path / "m.safetensors", tensors | {"e": torch.empty(0, 3, dtype=dtype)}))
    (shard,) = checkpoint.shards
    for info in checkpoint.tensors:
        view = tensor_view(shard, info)
        assert dense(view) == dense(load_file(tmp_path / "m.safetensors")[info.name])


@pytest.mark.parametrize("padding", range(1, 8))
@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16"])
def test_a_header_of_odd_length_leaves_values_as_they_are(dtype: str, padding: int, tmp_path: Path) -> None:
    size = {"F64": 8, "F32": 4}.get(dtype, 2)
    data = bytes(range(6 * size))
    header = json.dumps({"w": entry(dtype, [2, 3], 0, 6 * size)}).encode()
    path = write_raw(tmp_path / "m.safetensors", header + b" " * (-len(header) % 8 + padding), data)
    checkpoint = read_checkpoint(path)
    assert dense(tensor_view(checkpoint.shards[0], checkpoint.tensors[0])) == Dense(dtype, (2, 3), data)


@pytest.mark.parametrize("padding", [0, 3])
def test_an_unaligned_checkpoint_is_compressed_like_an_aligned_one(padding: int, tmp_path: Path) -> None:
    data = gaussian(8, 16).numpy().tobytes()
    header = json.dumps({"w": entry("F32", [8, 16], 0, len(data))}).encode()
    path = write_raw(tmp_path / "m.safetensors", header + b" " * (-len(header) % 8 + padding), data)
    save(tmp_path / "n.safetensors", {"w": gaussian(8, 16)})
    run(path, tmp_path / "a.safetensors", rtn(3))
    run(tmp_path / "n.safetensors", tmp_path / "b.safetensors", rtn(3))
    assert expand(tmp_path / "a.safetensors") == expand(tmp_path / "b.safetensors")


KEPT = {
    "f8a": gaussian(4, 4).to(torch.float8_e4m3fn),
    "f8b": gaussian(4, 4).to(torch.float8_e5m2),
    "i64": torch.arange(-8, 8).reshape(4, 4),
    "i32": torch.arange(6, dtype=torch.int32).reshape(2, 3),
    "i8": torch.arange(-3, 3, dtype=torch.int8),
    "u8": torch.arange(6, dtype=torch.uint8).reshape(3, 2),
    "u64": torch.tensor([[2**63 - 1, 1]]).to(torch.uint64),
    "bool": torch.tensor([[True, False], [False, True]]),
    "none": torch.empty(0, 5),
    "none too": torch.empty(5, 0, dtype=torch.float16),
    "scalar": torch.tensor(1.5),
    "vector": gaussian(7),
}


@pytest.mark.parametrize("choice", ["packed", "zstd", "ans", "auto"])
def test_what_is_not_a_weight_stays_byte_for_byte(choice: str, tmp_path: Path) -> None:
    source = save(tmp_path / "m.safetensors", KEPT | {"w": gaussian(4, 8)})
    run(source, tmp_path / "a.safetensors", rtn(3), choice)
    wanted = denses(KEPT)
    found = load_state_dict(tmp_path / "a.safetensors")
    assert {name: dense(found[name]) for name in KEPT} == wanted
    expanded = expand(tmp_path / "a.safetensors")
    assert {name: expanded[name] for name in KEPT} == wanted
    library = load_file(tmp_path / "a.safetensors")
    assert {name: dense(library[name]) for name in KEPT} == wanted


@pytest.mark.parametrize("choice", ["packed", "zstd"])
def test_dtypes_that_torch_has_no_name_for_stay_byte_for_byte(choice: str, tmp_path: Path) -> None:
    """Half bytes and three quarters: F4 and F6 lie behind all that is wider and before codes of unknown length."""
    weight = gaussian(4, 8).numpy().tobytes()
    header = {
        "f4": entry("F4", [4], 0, 2),
        "f6": entry("F6_E2M3", [4], 2, 5),
        "e8": entry("F8_E8M0", [3], 5, 8),
        "w": entry("F32", [4, 8], 8, 136),
    }
    source = write_raw(tmp_path / "m.safetensors", header, bytes(range(8)) + weight)
    run(source, tmp_path / "a.safetensors", rtn(3), choice)
    verify(tmp_path / "a.safetensors")
    expanded = expand(tmp_path / "a.safetensors")
    assert expanded["f4"] == Dense("F4", (4,), bytes([0, 1]))
    assert expanded["f6"] == Dense("F6_E2M3", (4,), bytes([2, 3, 4]))
    assert expanded["e8"] == Dense("F8_E8M0", (3,), bytes([5, 6, 7]))


NAMES = [
    "ünïcode.重み",
    'quote"d',
    "new\nline",
    "tab\t",
    "back\\slash",
    "\x7f\x00",
    "",
    " ",
    "{}",
    "🧠",
    "a" * 300,
    "[0].w",
]


def test_any_name_survives(tmp_path: Path) -> None:
    tensors = {name: gaussian(4, 8, seed=index) for index, name in enumerate(NAMES)}
    source = save(tmp_path / "m.safetensors", tensors)
    assert {info.name for info in read_checkpoint(source).tensors} == set(NAMES)
    run(source, tmp_path / "a.safetensors", rtn(8))
    verify(tmp_path / "a.safetensors")
    found = load_state_dict(tmp_path / "a.safetensors")
    assert denses(found) == expand(tmp_path / "a.safetensors")
    for name, tensor in tensors.items():
        assert (found[name] - tensor).abs().max() < 0.02


def test_names_of_parts_are_reserved(tmp_path: Path) -> None:
    text = refusal(save(tmp_path / "m.safetensors", {"w.qc.codes": gaussian(4, 8)}))
    assert "'w.qc.codes'" in text
    assert "reserved" in text


def test_an_artifact_is_no_checkpoint(tmp_path: Path) -> None:
    run(save(tmp_path / "m.safetensors", {"w": gaussian(4, 8)}), tmp_path / "a.safetensors", rtn(3))
    assert "is compressed already; expand it first: qcompress export" in refusal(tmp_path / "a.safetensors")


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(16, 8)
        self.head = nn.Linear(8, 16, bias=False)
        self.head.weight = self.embedding.weight


def test_what_the_library_ties_by_metadata_is_tied_again(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Tied()
    save_model(model, str(tmp_path / "m.safetensors"))
    checkpoint = read_checkpoint(tmp_path / "m.safetensors")
    (kept,) = (info.name for info in checkpoint.tensors)
    (alias,) = {"embedding.weight", "head.weight"} - {kept}
    assert checkpoint.tied == {alias: kept}
    run(tmp_path / "m.safetensors", tmp_path / "a.safetensors", rtn(4))
    state = load_state_dict(tmp_path / "a.safetensors")
    assert set(state) == {"embedding.weight", "head.weight"}
    assert state["head.weight"] is state["embedding.weight"]
    assert denses(state) == expand(tmp_path / "a.safetensors")


def test_metadata_that_names_a_tensor_by_chance_ties_nothing(tmp_path: Path) -> None:
    source = save(tmp_path / "m.safetensors", {"pt": gaussian(2, 2)}, {"format": "pt", "author": "nobody"})
    assert read_checkpoint(source).tied == {}


def llm(tied: bool = True) -> dict[str, torch.Tensor]:
    embedding = gaussian(32, 8)
    head = embedding.clone() if tied else gaussian(32, 8, seed=3)
    return {"model.embed_tokens.weight": embedding, "lm_head.weight": head, "model.mlp.weight": gaussian(8, 8, seed=1)}


@pytest.mark.parametrize("split", [False, True])
def test_what_config_json_ties_is_stored_once(split: bool, tmp_path: Path) -> None:
    tensors = llm()
    head = {"lm_head.weight": tensors.pop("lm_head.weight")}
    shards = {A: tensors, B: head} if split else {"model.safetensors": tensors | head}
    source = save_folder(tmp_path / "model", shards, {"tie_word_embeddings": True})
    run(source, tmp_path / "out", rtn(8))
    artifact = verify(tmp_path / "out")
    assert artifact.tied == {"lm_head.weight": "model.embed_tokens.weight"}
    assert not any("lm_head" in info.name for file in artifact.files for info in file.container.tensors)
    state = load_state_dict(tmp_path / "out")
    assert set(state) == set(llm())
    assert state["lm_head.weight"] is state["model.embed_tokens.weight"]
    assert denses(state) == expand(tmp_path / "out")


def test_a_folder_finds_its_file(tmp_path: Path) -> None:
    for name in ("model.safetensors", "only.safetensors"):
        folder = tmp_path / name.split(".")[0]
        folder.mkdir()
        save(folder / name, {"w": gaussian(4, 8)})
        assert [info.name for info in read_checkpoint(folder).tensors] == ["w"]


def sharded(folder: Path) -> Path:
    return save_folder(folder, {A: {"w": gaussian(4, 8)}, B: {"v": gaussian(2, 8)}})


def test_shards_make_one_checkpoint(tmp_path: Path) -> None:
    checkpoint = read_checkpoint(sharded(tmp_path / "m"))
    assert [info.name for info in checkpoint.tensors] == ["w", "v"]
    assert checkpoint.file_bytes == sum((tmp_path / "m" / file).stat().st_size for file in (A, B))
    assert checkpoint.shard_of("v").path.name == B


FOLDERS = {
    "shard missing": (
        lambda f: (f / B).unlink(),
        f"promises {B} of 2 files, which are not there",
    ),
    "shard truncated": (lambda f: (f / B).write_bytes((f / B).read_bytes()[:-1]), f"{B}: is truncated"),
    "shard empty": (lambda f: (f / B).write_bytes(b""), f"{B}: is empty"),
    "index not JSON": (lambda f: (f / INDEX).write_text("{"), "is not JSON"),
    "index not UTF-8": (lambda f: (f / INDEX).write_bytes(b'{"\xff": 1}'), "is not JSON"),
    "index nested": (lambda f: (f / INDEX).write_text("[" * 100_000), "is not JSON"),
    "index a list": (lambda f: (f / INDEX).write_text("[]"), "is not a JSON object"),
    "no weight_map": (lambda f: (f / INDEX).write_text("{}"), "has no weight_map"),
    "weight_map a list": (lambda f: write_index(f, ["w"]), "has no weight_map"),
    "weight_map of numbers": (lambda f: write_index(f, {"w": 1}), "has no weight_map"),
    "weight_map empty": (lambda f: write_index(f, {}), "lists no tensors"),
    "tensor missing": (
        lambda f: write_index(f, {"w": A, "v": B, "u": B}),
        "that model-00002-of-00002.safetensors does not hold, such as 'u'",
    ),
    "tensor in the other shard": (lambda f: write_index(f, {"w": B, "v": A}), "does not hold, such as 'v'"),
    "tensor not listed": (
        lambda f: write_index(f, {"w": A}) or save(f / A, {"w": gaussian(1), "x": gaussian(1)}),
        "does not list 1 tensors of model-00001-of-00002.safetensors, such as 'x'",
    ),
    "tensor in two shards": (
        lambda f: save(f / B, {"w": gaussian(4, 8), "v": gaussian(2, 8)}),
        "does not list 1 tensors",
    ),
    "file above": (
        lambda f: write_index(f, {"w": "../m.safetensors"}),
        "names the file '../m.safetensors' outside its folder",
    ),
    "file elsewhere": (
        lambda f: write_index(f, {"w": "/etc/passwd"}),
        "names the file '/etc/passwd' outside its folder",
    ),
    "the folder above": (lambda f: write_index(f, {"w": ".."}), "is a folder, not a file"),
    "the folder itself": (lambda f: write_index(f, {"w": ""}), "is a folder, not a file"),
    "no file name": (lambda f: write_index(f, {"w": "a\0b"}), "no name that a file can have"),
    "no encodable name": (lambda f: write_index(f, {"w": "a\ud800b"}), "no name that a file can have"),
    "two indices": (lambda f: (f / "other.safetensors.index.json").write_text("{}"), "has several indices"),
    "no index": (lambda f: (f / INDEX).unlink(), "has 2 .safetensors files and no"),
    "config not JSON": (lambda f: (f / "config.json").write_text("{"), "config.json: is not JSON"),
    "config a list": (lambda f: (f / "config.json").write_text("[1]"), "config.json: is not a JSON object"),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_that_is_wrong_is_refused(name: str, tmp_path: Path) -> None:
    change, what = FOLDERS[name]
    folder = sharded(tmp_path / "m")
    change(folder)
    assert what in refusal(folder)


def test_a_folder_of_pickles_says_so(tmp_path: Path) -> None:
    assert "holds no .safetensors file; check the path" in refusal(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK\x03\x04")
    assert "only pickles; convert it to safetensors first" in refusal(tmp_path)


@pytest.mark.slow
def test_ten_thousand_tensors(tmp_path: Path) -> None:
    """Every pass over a checkpoint is linear in its tensors; a quadratic one would make this take minutes."""
    count, data = 10_000, gaussian(4, 4).numpy().tobytes()
    header = {f"layer.{index}.weight": entry("F32", [4, 4], 64 * index, 64 * index + 64) for index in range(count)}
    source = write_raw(tmp_path / "m.safetensors", header, data * count)
    checkpoint = read_checkpoint(source)
    plan = plan_for(checkpoint, rtn(4, match="layer.1*"))
    assert sum(decision.compresses for decision in plan.decisions) == 1111
    run(source, tmp_path / "a.safetensors", rtn(4, match="layer.1*"))
    artifact = verify(tmp_path / "a.safetensors")
    assert len(artifact.files[0].kept) == count - 1111
    assert len(load_state_dict(tmp_path / "a.safetensors")) == count


@pytest.mark.parametrize("stride", [1, 3, 7, 100, 5000])
def test_strided_values_are_those_of_the_whole_tensor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stride: int
) -> None:
    """Also where a stride is longer than what is read at a time."""
    weight = torch.arange(1230).reshape(41, 30).bfloat16()
    checkpoint = read_checkpoint(save(tmp_path / "m.safetensors", {"w": weight}))
    monkeypatch.setattr("qcompress.checkpoint.safetensors_file.PIECE_BYTES", 64)
    (info,) = checkpoint.tensors
    found = strided_values(checkpoint.shard_of("w"), info, stride)
    assert torch.equal(found, weight.reshape(-1)[::stride])
