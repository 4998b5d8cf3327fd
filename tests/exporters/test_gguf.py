"""The file for llama.cpp: what gguf's own reader and transformers make of it, and what it cannot hold."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from artifact.examples import gaussian, recipe, rule, run
from conftest import package_or_skip
from torch import Tensor

from exporters import gguf_reader
from exporters.members import read_gguf
from exporters.networks import (
    LLAMA,
    NETWORKS,
    compress_llama,
    llama_tensors,
    make_network,
    q4,
    save_network,
    write_tokenizer,
)
from qcompress.artifact.reader import read_artifact
from qcompress.compress.export import export, plan_export
from qcompress.compress.load import load_state_dict
from qcompress.errors import InputError
from qcompress.exporters.gguf_networks import rope_factors
from qcompress.types.export import ExportOptions
from qcompress.types.plan import Rule

GROUPED = {"granularity": "group", "group_size": 32}


def test_ggufs_own_reader_gives_what_the_artifact_decodes_to(tmp_path: Path) -> None:
    gguf = package_or_skip("gguf")
    artifact = compress_llama(
        tmp_path,
        q4("*.q_proj.weight", 5),
        q4("*.k_proj.weight", 8),
        rule("*.v_proj.weight", "mse", bits=4, symmetric=False, **GROUPED),
        rule("*.o_proj.weight", "mse", bits=5, symmetric=False, **GROUPED),
        q4(),
    )
    export(read_artifact(artifact), tmp_path / "m.gguf", "gguf")
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    metadata, ours = gguf_reader.read(tmp_path / "m.gguf")
    assert {one.tensor_type.name for one in reader.tensors} == {"Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "F32"}
    assert {one.name for one in reader.tensors} == set(ours)
    for one in reader.tensors:
        values = gguf.quants.dequantize(one.data, one.tensor_type).reshape(ours[one.name].shape)
        assert np.array_equal(values, ours[one.name].numpy()), one.name
    assert reader.fields["llama.attention.head_count_kv"].contents() == metadata["llama.attention.head_count_kv"] == 2
    state, found = load_state_dict(artifact), read_gguf(tmp_path / "m.gguf")
    assert state.keys() == found.keys()
    assert all(torch.equal(state[name], value) for name, value in found.items())


RULES = {
    "llama": (q4("*_proj.weight"), q4("*embed_tokens*", 8)),
    "gemma2": (q4("*_proj.weight"), q4("*embed*", 8)),
    "gpt2": (rule("*.h.*.c_*.weight", "rtn", bits=4, symmetric=True, axis=1, **GROUPED),),
}
"""What becomes of a network's weights where not its matrices alone have 4 bits."""


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NETWORKS if name not in ("gemma", "phi")])
def test_transformers_computes_what_the_dense_export_computes(name: str, tmp_path: Path) -> None:
    for needed in ("gguf", "accelerate"):
        package_or_skip(needed)
    transformers: Any = package_or_skip("transformers")
    make_network(name).save_pretrained(tmp_path / "network")
    write_tokenizer(tmp_path / "network")
    rules = RULES.get(name, (q4("*_proj.weight"),))
    run(tmp_path / "network", tmp_path / "artifact", recipe(*rules))
    artifact = read_artifact(tmp_path / "artifact")
    export(artifact, tmp_path / "dense")
    export(artifact, tmp_path / "m.gguf", "gguf")
    auto = transformers.AutoModelForCausalLM
    dense = auto.from_pretrained(tmp_path / "dense", dtype=torch.float32).eval()
    found = auto.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32).eval()
    state = found.state_dict()
    for key, value in dense.state_dict().items():
        if "gemma" in name and "norm" in key:
            # One is added and taken away again.
            torch.testing.assert_close(state[key], value, rtol=0, atol=2**-24)
        else:
            assert torch.equal(state[key], value), key
    ids = torch.arange(40)[None] * 7 % 96
    with torch.no_grad():
        expected, logits = dense(ids).logits, found(ids).logits
    assert (logits - expected).norm() <= (1e-5 if "gemma" in name else 0) * expected.norm()


def gpt2(folder: Path, bits: int = 4) -> tuple[Path, dict[str, Tensor]]:
    """An artifact of a small GPT-2 and its tensors; its matrices are [in, out]."""
    shapes = {"wte.weight": (96, 64), "wpe.weight": (32, 64), "ln_f.weight": (64,), "ln_f.bias": (64,)}
    for part, shape in {
        "attn.c_attn": (64, 192),
        "attn.c_proj": (64, 64),
        "mlp.c_fc": (64, 256),
        "mlp.c_proj": (256, 64),
    }.items():
        shapes |= {f"h.0.{part}.weight": shape, f"h.0.{part}.bias": shape[1:]}
    for part in ("ln_1", "ln_2"):
        shapes |= {f"h.0.{part}.weight": (64,), f"h.0.{part}.bias": (64,)}
    tensors = {name: gaussian(*shape, seed=seed) for seed, (name, shape) in enumerate(shapes.items())}
    config = {"model_type": "gpt2", "n_embd": 64, "n_head": 4, "n_layer": 1, "n_positions": 32, "vocab_size": 96}
    save_network(folder / "network", config, tensors)
    rules = recipe(rule("h.*.c_*.weight", "rtn", bits=bits, symmetric=True, axis=1, **GROUPED))
    run(folder / "network", folder / "artifact", rules)
    return folder / "artifact", load_state_dict(folder / "artifact")


def test_matrices_of_gpt2_are_turned(tmp_path: Path) -> None:
    artifact, state = gpt2(tmp_path)
    plan = export(read_artifact(artifact), tmp_path / "m.gguf", "gguf")
    assert {held.name: held.tensors for held in plan.held} == {"Q4_0": 4, "F32": 12}
    metadata, found = gguf_reader.read(tmp_path / "m.gguf")
    assert metadata["gpt2.feed_forward_length"] == 256
    for theirs, ours in {
        "blk.0.attn_qkv.weight": "h.0.attn.c_attn.weight",
        "blk.0.attn_output.weight": "h.0.attn.c_proj.weight",
        "blk.0.ffn_up.weight": "h.0.mlp.c_fc.weight",
        "blk.0.ffn_down.weight": "h.0.mlp.c_proj.weight",
    }.items():
        assert torch.equal(found[theirs], state[ours].T)
    for theirs, ours in {"token_embd.weight": "wte.weight", "position_embd.weight": "wpe.weight"}.items():
        assert torch.equal(found[theirs], state[ours])
    assert torch.equal(found["blk.0.attn_qkv.bias"], state["h.0.attn.c_attn.bias"])


def test_hidden_sizes_are_filled_up_with_zeros(tmp_path: Path) -> None:
    artifact = compress_llama(tmp_path, intermediate_size=44)
    with pytest.raises(InputError) as caught:
        plan_export(read_artifact(artifact), "gguf")
    assert "has rows of 44, no multiple of 32; fill it up with --pad-hidden, or write it dense" in str(caught.value)
    options = ExportOptions(pad_hidden=True)
    plan = export(read_artifact(artifact), tmp_path / "m.gguf", "gguf", options)
    assert "hidden sizes of feed-forward layers have 20 zeros more" in plan.notes
    metadata, found = gguf_reader.read(tmp_path / "m.gguf")
    state = load_state_dict(artifact)
    assert metadata["llama.feed_forward_length"] == 64
    for part, name in (("ffn_up", "mlp.up_proj"), ("ffn_gate", "mlp.gate_proj"), ("ffn_down", "mlp.down_proj")):
        ours, theirs = state[f"model.layers.1.{name}.weight"], found[f"blk.1.{part}.weight"]
        rows, columns = ours.shape
        assert tuple(theirs.shape) == (64, 64)
        assert torch.equal(theirs[:rows, :columns], ours)
        assert not theirs[rows:].any()
        assert not theirs[:, columns:].any()


def test_scales_that_are_no_float16_numbers_are_refused_or_rounded(tmp_path: Path) -> None:
    config = {**LLAMA, "dtype": "float32"}
    tensors = llama_tensors(config)
    name = "model.layers.0.mlp.up_proj.weight"
    # A scale of some 2**-18, whose float16 has 7 bits; and a block of zeros, whose scale is no matter.
    tensors[name][0] = tensors[name][0] * 2.0**-12
    tensors[name][1] = 0
    save_network(tmp_path / "network", config, tensors)
    rules = recipe(rule("*_proj.weight", "mse", bits=4, symmetric=True, **GROUPED))
    run(tmp_path / "network", tmp_path / "artifact", rules)
    artifact = read_artifact(tmp_path / "artifact")
    with pytest.raises(InputError, match="float16 numbers; round them with --round-scales") as caught:
        plan_export(artifact, "gguf")
    assert name in str(caught.value)
    plan = export(artifact, tmp_path / "m.gguf", "gguf", ExportOptions(round_scales=True))
    told = next(note for note in plan.notes if "rounded" in note)
    change = float(told.split("at most ")[1].split()[0])
    assert 0 < change < 2**-6
    state, found = load_state_dict(tmp_path / "artifact"), read_gguf(tmp_path / "m.gguf")
    for key, value in state.items():
        if key != name:
            assert torch.equal(found[key], value), key
    assert ((found[name] - state[name]).abs() <= state[name].abs() * change * 1.01).all()
    assert torch.equal(found[name][1:], state[name][1:])


@pytest.mark.parametrize(
    ("rules", "line"),
    [
        ((rule("*_proj.weight", "kmeans", bits=4),), "the form codebook at 4 bits, which no type of blocks holds"),
        ((rule("*_proj.weight", "mse", bits=6, symmetric=False, **GROUPED),), "a grid with offset at 6 bits"),
        ((q4(group_size=16),), "has groups of 16, no multiple of 32"),
    ],
)
def test_what_it_cannot_hold_is_refused_or_dense(rules: tuple[Rule, ...], line: str, tmp_path: Path) -> None:
    artifact = read_artifact(compress_llama(tmp_path, *rules))
    with pytest.raises(InputError) as caught:
        plan_export(artifact, "gguf")
    assert len(caught.value.lines()) == 1
    assert line in caught.value.lines()[0]
    plan = export(artifact, tmp_path / "m.gguf", "gguf", ExportOptions(keep_unfit=True))
    assert [held.name for held in plan.held] == ["F32"]
    state, found = load_state_dict(tmp_path / "artifact"), read_gguf(tmp_path / "m.gguf")
    assert all(torch.equal(found[key], value) for key, value in state.items())


def test_unknown_networks_and_tensors_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    with pytest.raises(InputError, match="model_type 'mamba', which is not written as GGUF yet; these are: llama"):
        plan_export(read_artifact(compress_llama(tmp_path / "one", model_type="mamba")), "gguf")
    config = {**LLAMA, "dtype": "float32"}
    save_network(tmp_path / "network", config, {**llama_tensors(config), "model.adapter.weight": gaussian(4, 4)})
    run(tmp_path / "network", tmp_path / "artifact", recipe(q4()))
    with pytest.raises(InputError, match=r"model\.adapter\.weight \[4, 4\]: has no place"):
        plan_export(read_artifact(tmp_path / "artifact"), "gguf")


def metadata_of(folder: Path, files: dict[str, Any], **changes: Any) -> tuple[dict[str, Any], list[str]]:
    """What the file of a small Llama says, with more files in its folder, and the notes."""
    artifact = compress_llama(folder, **changes)
    for name, content in files.items():
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        (artifact / name).write_bytes(data)
    plan = export(read_artifact(artifact), folder / "m.gguf", "gguf")
    return gguf_reader.read(folder / "m.gguf")[0], list(plan.notes)


def piece(text: str, score: float, kind: int | None = None) -> bytes:
    """A piece of a sentencepiece model, as protocol buffers have it."""
    body = bytes([10, len(text.encode())]) + text.encode() + b"\x15" + struct.pack("<f", score)
    body += b"" if kind is None else bytes([24, kind])
    return bytes([10, len(body)]) + body


def test_a_sentencepiece_model_gives_tokens_scores_and_kinds(tmp_path: Path) -> None:
    model = piece("<unk>", 0, 2) + piece("<s>", 0, 3) + piece("</s>", 0, 3) + piece("<0x0A>", 0, 6) + piece("▁a", -1.5)
    own = {"add_bos_token": True, "chat_template": "{{ messages }}"}
    metadata, notes = metadata_of(tmp_path, {"tokenizer.model": model, "tokenizer_config.json": own})
    assert notes == []
    assert metadata["tokenizer.ggml.model"] == "llama"
    assert metadata["tokenizer.ggml.tokens"][:6] == ["<unk>", "<s>", "</s>", "<0x0A>", "▁a", "[PAD5]"]
    assert len(metadata["tokenizer.ggml.tokens"]) == len(metadata["tokenizer.ggml.scores"]) == 96
    assert metadata["tokenizer.ggml.token_type"][:6] == [2, 3, 3, 6, 1, 5]
    assert metadata["tokenizer.ggml.scores"][4] == -1.5
    assert (metadata["tokenizer.ggml.bos_token_id"], metadata["tokenizer.ggml.eos_token_id"]) == (1, 2)
    assert metadata["tokenizer.ggml.add_bos_token"] is True
    assert metadata["tokenizer.chat_template"] == "{{ messages }}"


@pytest.mark.parametrize(("pattern", "pre"), [(r"(?i:'s|'t)|\p{N}{1,3}| ?\s+", "llama-bpe"), (r"\S+", "default")])
def test_byte_pairs_give_merges_and_the_pre_tokenizer_that_the_network_has(
    pattern: str, pre: str, tmp_path: Path
) -> None:
    tokenizer = {
        "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]},
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": pattern}},
        "added_tokens": [
            {"id": 3, "content": "<|end|>", "special": True},
            {"id": 4, "content": "<u>", "special": False},
        ],
    }
    metadata, notes = metadata_of(tmp_path, {"tokenizer.json": tokenizer})
    assert metadata["tokenizer.ggml.model"] == "gpt2"
    assert metadata["tokenizer.ggml.pre"] == pre
    assert metadata["tokenizer.ggml.merges"] == ["a b"]
    assert metadata["tokenizer.ggml.tokens"][:5] == ["a", "b", "ab", "<|end|>", "<u>"]
    assert metadata["tokenizer.ggml.token_type"][:6] == [1, 1, 1, 3, 4, 5]
    assert len(notes) == (pre == "default")


@pytest.mark.parametrize(
    ("config", "line"),
    [
        ({"hidden_act": "gelu"}, "its activation is 'gelu', and llama.cpp computes silu in a llama"),
        ({"model_type": "gemma"}, "its activation is 'silu', and llama.cpp computes gelu_pytorch_tanh in a gemma"),
        (
            {"model_type": "gemma3_text", "hidden_act": "gelu_pytorch_tanh", "query_pre_attn_scalar": 256},
            "its query_pre_attn_scalar is 256, and llama.cpp takes 16, the width of a head",
        ),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_refused(config: dict[str, Any], line: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=re.escape(line)):
        plan_export(read_artifact(compress_llama(tmp_path, **config)), "gguf")


def test_without_a_tokenizer_the_file_says_so(tmp_path: Path) -> None:
    metadata, notes = metadata_of(tmp_path, {})
    assert metadata["tokenizer.ggml.model"] == "none"
    assert "has no tokenizer" in notes[0]


def test_frequencies_of_llama_3_are_divided_as_transformers_does(tmp_path: Path) -> None:
    rope = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    config = {**LLAMA, "rope_parameters": {**rope, "rope_theta": 500.0}}
    factors = torch.tensor(rope_factors(config), dtype=torch.float64)
    assert len(factors) == 8
    transformers: Any = package_or_skip("transformers")
    utils = package_or_skip("transformers.modeling_rope_utils")
    parameters = {key: value for key, value in config.items() if key not in ("architectures", "model_type")}
    scaled, _ = utils.ROPE_INIT_FUNCTIONS["llama3"](transformers.LlamaConfig(**parameters), "cpu")
    plain = 500.0 ** -(torch.arange(0, 16, 2, dtype=torch.float64) / 16)
    torch.testing.assert_close(plain / factors, scaled.double(), rtol=1e-5, atol=0)
