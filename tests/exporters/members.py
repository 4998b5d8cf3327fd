"""What the contract over exporters cannot know of each: how another tool reads its files, and what they hold."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from artifact.examples import make_artifact, rule
from safetensors.torch import load_file
from torch import Tensor

from exporters import gguf_reader
from exporters.networks import HEADS, KV_HEADS, compress_llama, q4
from qcompress.artifact.entry import FORMS, GRIDS
from qcompress.checkpoint.checkpoint import read_checkpoint


@dataclass(frozen=True)
class Member:
    """What the contract cannot know of an exporter.

    read     the tensors of an exported file or folder as the consumer decodes them, by the checkpoint's names
    holds    the grid forms that its files hold exactly
    make     an artifact that it holds, in a folder
    cases    others that it holds
    writes   a folder, a file, or whichever of them the artifact is
    refuses  a part of the reason why it refuses an artifact whatever its forms; empty where it does not
    signs    whether a zero keeps its sign
    """

    read: Callable[[Path], Mapping[str, Tensor]]
    holds: frozenset[str]
    make: Callable[[Path], Path] = make_artifact
    cases: Mapping[str, Callable[[Path], Path]] = field(default_factory=dict)
    writes: Literal["same", "folder", "file"] = "same"
    refuses: Callable[[Path], str] = lambda path: ""
    signs: bool = True

    def writes_folder(self, path: Path) -> bool:
        return path.is_dir() if self.writes == "same" else self.writes == "folder"


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Every tensor by the safetensors library; a tied name that is not stored is in config.json or in the metadata."""
    found: dict[str, Tensor] = {}
    for file in sorted(path.glob("*.safetensors")) if path.is_dir() else [path]:
        found |= load_file(file)
    return found | {name: found[twin] for name, twin in read_checkpoint(path).tied.items()}


def load_folder(path: Path) -> dict[str, Tensor]:
    """Every tensor of a folder's files."""
    return {name: value for file in sorted(path.glob("*.safetensors")) for name, value in load_file(file).items()}


def take_bits(words: Tensor, bits: int, count: int) -> Tensor:
    """The first numbers of `bits` bits, least significant first, in each row of 32-bit words: int64 [rows, count]."""
    found = torch.zeros(len(words), count, dtype=torch.int64)
    for place in range(count):
        for bit in range(bits):
            at = place * bits + bit
            found[:, place] |= (words[:, at // 32].long() >> at % 32 & 1) << bit
    return found


def read_compressed_tensors(path: Path) -> dict[str, Tensor]:
    """Every weight, one code at a time, by what config.json says of its module."""
    config = json.loads((path / "config.json").read_text())
    stored = load_folder(path)
    found = {name: value for name, value in stored.items() if ".weight_" not in name}
    for module in (name.removesuffix(".weight_packed") for name in stored if name.endswith(".weight_packed")):
        groups = config["quantization_config"]["config_groups"].values()
        mine = [
            group["weights"]
            for group in groups
            if any(re.match(one[3:], module) if one.startswith("re:") else one == module for one in group["targets"])
        ]
        assert len(mine) == 1
        bits, half = mine[0]["num_bits"], 2 ** (mine[0]["num_bits"] - 1)
        rows, columns = stored[f"{module}.weight_shape"].tolist()
        scale = stored[f"{module}.weight_scale"]
        codes = take_bits(stored[f"{module}.weight_packed"], bits, columns) - half
        times = mine[0]["group_size"] or columns
        if not mine[0]["symmetric"]:
            points = take_bits(stored[f"{module}.weight_zero_point"].T, bits, rows).T - half
            codes = codes - points.repeat_interleave(times, 1)
        found[f"{module}.weight"] = (codes.float() * scale.float().repeat_interleave(times, 1)).to(dtype_of(path))
    return found


def read_mlx(path: Path) -> dict[str, Tensor]:
    """Every weight, one code at a time, by what config.json says of its module."""
    config = json.loads((path / "config.json").read_text())
    stored = load_folder(path)
    found = {name: value for name, value in stored.items() if not name.endswith((".scales", ".biases"))}
    for module in (name.removesuffix(".scales") for name in stored if name.endswith(".scales")):
        section = config["quantization"]
        own = section.get(module, section)
        scale, bias = stored[f"{module}.scales"], stored[f"{module}.biases"]
        codes = take_bits(stored[f"{module}.weight"], own["bits"], scale.shape[1] * own["group_size"])
        scale, bias = (one.float().repeat_interleave(own["group_size"], 1) for one in (scale, bias))
        found[f"{module}.weight"] = (codes.float() * scale + bias).to(dtype_of(path))
    return found


def read_gguf(path: Path) -> dict[str, Tensor]:
    """Every tensor of the file of a Llama by its name in the checkpoint, halves of heads put back, in float32."""
    found = {}
    for name, value in gguf_reader.read(path)[1].items():
        found[LLAMA_NAMES[name] if name in LLAMA_NAMES else f"model.layers.{name.split('.')[1]}.{layer_name(name)}"] = (
            pairs_to_halves(value, HEADS if "attn_q" in name else KV_HEADS) if re.search("attn_[qk]", name) else value
        )
    return found


LLAMA_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
IN_LAYER = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def layer_name(name: str) -> str:
    _, _, module, leaf = name.split(".")
    return f"{IN_LAYER[module]}.{leaf}"


def pairs_to_halves(value: Tensor, heads: int) -> Tensor:
    """Rows 0, 2, 4, ... of each head before its rows 1, 3, 5, ..."""
    by_head = value.reshape(heads, -1, *value.shape[1:])
    return torch.cat([by_head[:, 0::2], by_head[:, 1::2]], dim=1).reshape(value.shape)


def dtype_of(path: Path) -> torch.dtype:
    """That of the network's weights, as its config.json names it."""
    dtype: torch.dtype = getattr(torch, json.loads((path / "config.json").read_text()).get("dtype", "float32"))
    return dtype


def no_network(path: Path) -> str:
    """Why a folder exporter refuses an artifact whatever its forms."""
    return "" if (path / "config.json").is_file() else "config.json"


MIXED = q4("*.mlp.*_proj.weight", 3, granularity="channel", group_size=None)

MEMBERS = {
    "safetensors": Member(read_safetensors, frozenset({*GRIDS, *FORMS} - {"affine"})),
    "compressed-tensors": Member(
        read_compressed_tensors,
        frozenset({"full", "narrow", "zero-point"}),
        compress_llama,
        {
            "plain": compress_llama,
            "bfloat16": partial(compress_llama, dtype=torch.bfloat16),
            "three grids, tied": lambda at: compress_llama(at, MIXED, q4(), q4("*embed*", 8), tie_word_embeddings=True),
            "zero points, head": lambda at: compress_llama(at, q4(symmetric=False), q4("lm_head.weight", 5)),
            "entropy coded": partial(compress_llama, choice="ans"),
        },
        "folder",
        no_network,
    ),
    "gguf": Member(
        read_gguf,
        frozenset({"full", "narrow", "zero-point", "offset", "mid-rise", "table"}),
        compress_llama,
        {
            "plain": compress_llama,
            "entropy coded": partial(compress_llama, choice="ans"),
            "five bits, eight, and a scale a row": lambda at: compress_llama(
                at, MIXED, q4("*.q_proj.weight", 5), q4("*.k_proj.weight", 8), q4(), q4("*embed*", 8)
            ),
            "zero points of 3, 4 and 6 bits": lambda at: compress_llama(
                at,
                q4("*.q_proj.weight", 3, symmetric=False),
                q4("*.mlp.*", 6, symmetric=False),
                q4(symmetric=False, group_size=64),
            ),
            "offsets of 4 and 5 bits": lambda at: compress_llama(
                at,
                rule("*.mlp.*_proj.weight", "mse", bits=5, symmetric=False, granularity="group", group_size=32),
                rule("*_proj.weight", "mse", bits=4, symmetric=False, granularity="group", group_size=32),
            ),
            "middles": lambda at: compress_llama(at, rule("*_proj.weight", "mse", bits=2, symmetric=True)),
        },
        "file",
        lambda path: no_network(path) or ("model_type" if path.name == "folder" else ""),
    ),
    "mlx": Member(
        read_mlx,
        frozenset({"full", "narrow", "zero-point", "offset", "mid-rise"}),
        compress_llama,
        {
            "plain": compress_llama,
            "bfloat16": partial(compress_llama, dtype=torch.bfloat16),
            "three grids, tied": lambda at: compress_llama(at, MIXED, q4(), q4("*embed*", 8), tie_word_embeddings=True),
            "offsets, 7 bits": lambda at: compress_llama(
                at,
                rule("*.mlp.*", "mse", bits=7, granularity="group", group_size=64, symmetric=False),
                q4(symmetric=False),
            ),
            "middles": lambda at: compress_llama(at, rule("*_proj.weight", "mse", bits=2, symmetric=True)),
        },
        "folder",
        lambda path: no_network(path) or ("groups of 4" if path.name == "folder" else ""),
        signs=False,
    ),
}
