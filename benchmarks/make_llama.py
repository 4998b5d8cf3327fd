"""Write a Llama as a Hugging Face folder: config.json, model.safetensors, and a tokenizer where there is one.

    python benchmarks/make_llama.py stories FOLDER stories260K.safetensors [--hidden 192]
    python benchmarks/make_llama.py recipe FOLDER CHECKPOINT RECIPE tokenizer.json
    python benchmarks/make_llama.py random FOLDER [--dtype F32|BF16]

`stories` gives Meta's names and order of rows those of transformers (and room to groups
that do not divide 172), `recipe` takes the config from a recipe whose
network is transformers' own, and `random` makes 98 M weights of no meaning, for measures of time and memory.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

COMMON: dict[str, Any] = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu"}
COMMON |= {"rms_norm_eps": 1e-5, "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2}
STORIES = COMMON | {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 172,
    "num_hidden_layers": 5,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "dtype": "float32",
}
RANDOM = COMMON | {
    "vocab_size": 16384,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "max_position_embeddings": 512,
}
PARTS = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
"""Meta's name of a module of a layer -> transformers'."""


def halves(weight: Tensor, heads: int) -> Tensor:
    """Rows that Meta turns in neighbouring pairs, in the order in which transformers turns them: half by half."""
    rows, columns = weight.shape
    return weight.view(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def stories(checkpoint: Path) -> dict[str, Tensor]:
    """The tensors of stories260K under transformers' names."""
    meta = load_file(checkpoint)
    found = {"model.embed_tokens.weight": meta["tok_embeddings.weight"], "model.norm.weight": meta["norm.weight"]}
    for layer in range(STORIES["num_hidden_layers"]):
        for theirs, ours in PARTS.items():
            weight = meta[f"layers.{layer}.{theirs}.weight"]
            if ours.endswith(("q_proj", "k_proj")):
                part = "attention" if "q_proj" in ours else "key_value"
                weight = halves(weight, STORIES[f"num_{part}_heads"])
            found[f"model.layers.{layer}.{ours}.weight"] = weight.contiguous()
    return found


def padded(tensors: Mapping[str, Tensor], hidden: int) -> dict[str, Tensor]:
    """Feed-forward layers filled up with zeros to a hidden size, which changes nothing that is computed."""
    found = dict(tensors)
    for name, weight in tensors.items():
        rows, columns = weight.shape if weight.ndim == 2 else (0, 0)
        if name.endswith(("gate_proj.weight", "up_proj.weight")):
            found[name] = torch.cat([weight, weight.new_zeros(hidden - rows, columns)])
        elif name.endswith("down_proj.weight"):
            found[name] = torch.cat([weight, weight.new_zeros(rows, hidden - columns)], dim=1)
    return found


def random(dtype: torch.dtype, config: Mapping[str, Any] = RANDOM) -> dict[str, Tensor]:
    """Weights by chance, norms of one; as many keys and values as heads."""
    width, inner = config["hidden_size"], config["intermediate_size"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], width)}
    for layer in range(config["num_hidden_layers"]):
        for part in PARTS.values():
            shape = {"mlp.down_proj": (width, inner), "mlp.gate_proj": (inner, width), "mlp.up_proj": (inner, width)}
            norm = part.endswith("layernorm")
            shapes[f"model.layers.{layer}.{part}.weight"] = (width,) if norm else shape.get(part, (width, width))
    shapes["model.norm.weight"] = (width,)
    torch.manual_seed(0)
    return {
        name: (torch.ones(shape) if len(shape) == 1 else torch.randn(shape) * shape[1] ** -0.5).to(dtype)
        for name, shape in shapes.items()
    }


def write(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    folder.mkdir(exist_ok=True, parents=True)
    save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    print(f"{folder}: {sum(tensor.numel() for tensor in tensors.values()):,} weights")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    for verb, names in {
        "stories": ("folder", "checkpoint"),
        "recipe": ("folder", "checkpoint", "recipe", "tokenizer"),
        "random": ("folder",),
    }.items():
        of_verb = verbs.add_parser(verb)
        for name in names:
            of_verb.add_argument(name, type=Path)
    verbs.choices["stories"].add_argument("--hidden", type=int, default=172, help="filled up to that with zeros")
    verbs.choices["random"].add_argument("--dtype", choices=("F32", "BF16"), default="F32")
    options = parser.parse_args()
    match options.verb:
        case "stories":
            tensors = padded(stories(options.checkpoint), options.hidden)
            write(options.folder, STORIES | {"intermediate_size": options.hidden}, tensors)
        case "recipe":
            args = yaml.safe_load(options.recipe.read_text(encoding="utf-8"))["model"]["args"]
            write(options.folder, COMMON | {"dtype": "float32"} | args, load_file(options.checkpoint))
            shutil.copy(options.tokenizer, options.folder / "tokenizer.json")
        case _:
            dtype = {"F32": torch.float32, "BF16": torch.bfloat16}[options.dtype]
            write(options.folder, RANDOM | {"dtype": str(dtype).removeprefix("torch.")}, random(dtype))


if __name__ == "__main__":
    main()
