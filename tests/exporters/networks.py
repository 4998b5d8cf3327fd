"""Small Hugging Face folders, made without transformers, and artifacts of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from artifact.examples import gaussian, recipe, rule, run, save
from conftest import package_or_skip
from torch import Tensor

from qcompress.types.plan import Rule

HIDDEN, VOCABULARY, HEADS, KV_HEADS, LAYERS = 64, 96, 4, 2, 2

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def llama_tensors(config: Mapping[str, Any], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Random weights of a Llama, or of what has its names."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    width = config.get("head_dim", hidden // config["num_attention_heads"])
    keys = width * config["num_key_value_heads"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        shapes |= {
            f"{at}self_attn.q_proj.weight": (width * config["num_attention_heads"], hidden),
            f"{at}self_attn.k_proj.weight": (keys, hidden),
            f"{at}self_attn.v_proj.weight": (keys, hidden),
            f"{at}self_attn.o_proj.weight": (hidden, width * config["num_attention_heads"]),
            f"{at}mlp.gate_proj.weight": (inner, hidden),
            f"{at}mlp.up_proj.weight": (inner, hidden),
            f"{at}mlp.down_proj.weight": (hidden, inner),
            f"{at}input_layernorm.weight": (hidden,),
            f"{at}post_attention_layernorm.weight": (hidden,),
        }
    shapes["model.norm.weight"] = (hidden,)
    if not config.get("tie_word_embeddings"):
        shapes["lm_head.weight"] = shapes["model.embed_tokens.weight"]
    return {name: gaussian(*shape, seed=seed).mul_(0.1).to(dtype) for seed, (name, shape) in enumerate(shapes.items())}


_GEMMA = {"head_dim": 256}
NETWORKS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", {}),
    "mistral": ("MistralForCausalLM", "MistralConfig", {"sliding_window": None}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {"num_attention_heads": 2, "head_dim": 128}),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", _GEMMA),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", _GEMMA),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", _GEMMA),
    "phi": ("PhiForCausalLM", "PhiConfig", {"num_key_value_heads": HEADS, "partial_rotary_factor": 0.5}),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", {"pad_token_id": 0}),
    # transformers takes it to have 1024 places, whatever the file says.
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", {"num_key_value_heads": HEADS, "max_position_embeddings": 1024}),
}
"""Name -> what transformers calls the network and its config, and what differs from LLAMA's sizes."""


def make_network(name: str) -> Any:
    """A small network of transformers by chance; the test is skipped where that is not installed."""
    library = package_or_skip("transformers")
    kind, config, changes = NETWORKS[name]
    sizes = {key: value for key, value in LLAMA.items() if isinstance(value, int)}
    torch.manual_seed(0)
    network = getattr(library, kind)(getattr(library, config)(**{**sizes, **changes})).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(0, 0.05)
    return network


def write_tokenizer(folder: Path) -> None:
    """A tokenizer.json of byte pairs of which none are merged, with the tokens that llama.cpp seeks in a Phi 3."""
    tokens = ["<unk>", "<s>", "</s>", "<|endoftext|>", *(chr(0x100 + number) for number in range(VOCABULARY - 4))]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    model = {"type": "BPE", "vocab": vocabulary, "merges": []}
    (folder / "tokenizer.json").write_text(json.dumps({"model": model, "added_tokens": []}))


def save_network(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Path:
    folder.mkdir()
    save(folder / "model.safetensors", tensors, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def compress_llama(
    folder: Path, *rules: Rule, dtype: torch.dtype = torch.float32, choice: str = "packed", **changes: Any
) -> Path:
    """An artifact of a small Llama in a folder: `artifact`, of the checkpoint `network` beside it.

    rules    what becomes of its tensors; without any, matrices in 4 bits and groups of 32, symmetric
    changes  of config.json
    """
    config = {**LLAMA, **changes, "dtype": str(dtype).removeprefix("torch.")}
    source = save_network(folder / "network", config, llama_tensors(config, dtype))
    run(source, folder / "artifact", recipe(*(rules or (q4(),))), choice)
    return folder / "artifact"


def q4(match: str = "model.layers.*_proj.weight", bits: int = 4, **options: Any) -> Rule:
    """A rule of a symmetric grid in groups of 32."""
    grouped = {"symmetric": True, "granularity": "group", "group_size": 32}
    return rule(match, "rtn", bits=bits, **{**grouped, **options})
