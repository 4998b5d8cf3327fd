"""Networks of transformers as llama.cpp has them: names of tensors, metadata, and what is turned or permuted.

Names and keys are those of llama.cpp's `gguf-py` (constants.py, tensor_mapping.py) and of its conversion script.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from qcompress.exporters.gguf_file import Value

_LLAMA = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_NORMED = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
_GEMMA2 = {
    **_LLAMA,
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_PHI3 = {
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_PHI = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.dense": "attn_output",
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
    "input_layernorm": "attn_norm",
}
_GPT2 = {
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
    "ln_1": "attn_norm",
    "ln_2": "ffn_norm",
}
_OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_BUFFERS = re.compile(r"(^|\.)(rotary_emb\.inv_freq|attn\.(masked_)?bias)$")


@dataclass(frozen=True)
class Network:
    """A kind of network.

    architecture  llama.cpp's name of it
    layers, outer names of modules in a layer, and outside -> llama.cpp's
    layer         what stands before the number of a layer
    permuted      whether rows of q and k go in pairs, as llama.cpp rotates them, in place of halves
    turned        modules whose weights are stored [in, out]
    plus_one      whether norms are stored less one
    gelu          whether its activation is a GELU, in place of SiLU
    layers_27b    of its largest network, whose attention llama.cpp scales by the width of a head as if there were no
                  `head_dim`; 0 where config.json has no scale
    hidden        modules whose rows, and modules whose columns, are the hidden values of a feed-forward layer
    pre           the pre-tokenizer of its byte-level tokenizers, and a part of its pattern
    """

    architecture: str
    layers: Mapping[str, str]
    outer: Mapping[str, str] = field(default_factory=lambda: _OUTER)
    layer: str = "model.layers."
    permuted: bool = False
    turned: bool = False
    plus_one: bool = False
    gelu: bool = False
    layers_27b: int = 0
    hidden: tuple[tuple[str, ...], tuple[str, ...]] = (("ffn_gate", "ffn_up"), ("ffn_down",))
    pre: tuple[str, str] = ("", "")


_ACTIVATIONS = {False: ("silu", "swish"), True: ("gelu_pytorch_tanh", "gelu_new", "gelu_fast", "gelu")}
"""What llama.cpp computes as SiLU, and as GELU."""
_DIGITS = ("llama-bpe", r"\p{N}{1,3}")
NETWORKS: Mapping[str, Network] = {
    "llama": Network("llama", _LLAMA, permuted=True, pre=_DIGITS),
    "mistral": Network("llama", _LLAMA, permuted=True, pre=("tekken", r"\p{Lu}")),
    "qwen2": Network("qwen2", _LLAMA, pre=("qwen2", r"|\p{N}|")),
    "qwen3": Network("qwen3", {**_LLAMA, **_NORMED}, pre=("qwen2", r"|\p{N}|")),
    "gemma": Network("gemma", _LLAMA, plus_one=True, gelu=True),
    "gemma2": Network("gemma2", _GEMMA2, plus_one=True, gelu=True, layers_27b=46),
    "gemma3_text": Network("gemma3", {**_GEMMA2, **_NORMED}, plus_one=True, gelu=True, layers_27b=62),
    "phi": Network("phi2", _PHI, {**_OUTER, "model.final_layernorm": "output_norm"}, gelu=True, pre=("phi-2", "")),
    "phi3": Network("phi3", _PHI3, hidden=((), ())),
    "gpt2": Network(
        "gpt2",
        _GPT2,
        {"wte": "token_embd", "wpe": "position_embd", "ln_f": "output_norm", "lm_head": "output"},
        "h.",
        turned=True,
        gelu=True,
        pre=("gpt-2", ""),
    ),
}
"""model_type of config.json -> how llama.cpp has such networks."""


def place(network: Network, name: str) -> str | None:
    """llama.cpp's name of a tensor; empty of a buffer that it does not have, None where it knows none such."""
    if _BUFFERS.search(name):
        return ""
    bare = name.removeprefix("transformer.")
    module, _, leaf = bare.rpartition(".")
    if leaf not in ("weight", "bias"):
        return None
    if module in network.outer:
        return f"{network.outer[module]}.{leaf}"
    found = re.fullmatch(re.escape(network.layer) + r"(\d+)\.(.+)", module)
    if found is None or found[2] not in network.layers:
        return None
    return f"blk.{found[1]}.{network.layers[found[2]]}.{leaf}"


def describe(network: Network, config: Mapping[str, Any], hidden: int) -> dict[str, Value]:
    """The metadata of a network from its config.json; `hidden` is the hidden size of its feed-forward layers.

    raises  KeyError for what config.json lacks, ValueError for what llama.cpp does not compute
    """
    _refuse(network, config)
    one = _Config(config)
    heads, width = one.integer("num_attention_heads", "n_head"), one.integer("hidden_size", "n_embd")
    found: dict[str, Value] = {
        "vocab_size": one.integer("vocab_size"),
        "context_length": one.integer("max_position_embeddings", "n_positions", "n_ctx"),
        "embedding_length": width,
        "block_count": one.integer("num_hidden_layers", "n_layer"),
        "feed_forward_length": hidden,
        "attention.head_count": heads,
        "attention.head_count_kv": int(config.get("num_key_value_heads") or heads),
    }
    if network.architecture in ("gpt2", "phi2"):
        key = "layer_norm_epsilon" if network.architecture == "gpt2" else "layer_norm_eps"
        found["attention.layer_norm_epsilon"] = float(config.get(key, 1e-5))
    else:
        found["attention.layer_norm_rms_epsilon"] = float(config.get("rms_norm_eps", 1e-6))
    if network.architecture == "gpt2":
        return _with_prefix(network, found)
    head = int(config.get("head_dim") or width // heads)
    rotated = int(head * float(one.rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))))
    found |= {"rope.dimension_count": rotated, "rope.freq_base": float(one.rope_theta)}
    if config.get("head_dim") or network.plus_one:
        found |= {"attention.key_length": head, "attention.value_length": head}
    for key, name in (
        ("sliding_window", "attention.sliding_window"),
        ("attn_logit_softcapping", "attn_logit_softcapping"),
        ("final_logit_softcapping", "final_logit_softcapping"),
    ):
        if config.get(key) and network.architecture in ("gemma2", "gemma3", "phi3"):
            found[name] = int(config[key]) if key == "sliding_window" else float(config[key])
    return _with_prefix(network, found | one.rope_scaling())


def _refuse(network: Network, config: Mapping[str, Any]) -> None:
    """Raise ValueError for what llama.cpp computes otherwise, and no file can tell it."""
    given = [config[key] for key in ("hidden_activation", "hidden_act", "activation_function") if config.get(key)]
    if given and given[0] not in _ACTIVATIONS[network.gelu]:
        own = _ACTIVATIONS[network.gelu][0]
        raise ValueError(f"its activation is {given[0]!r}, and llama.cpp computes {own} in a {network.architecture}")
    scale = config.get("query_pre_attn_scalar")
    if network.layers_27b and scale is not None:
        heads = config["hidden_size"] // config["num_attention_heads"]
        head = heads if config["num_hidden_layers"] == network.layers_27b else config.get("head_dim") or heads
        if scale != head:
            what = f"its query_pre_attn_scalar is {scale}, and llama.cpp takes {head}, the width of a head"
            raise ValueError(what)


def _with_prefix(network: Network, found: Mapping[str, Value]) -> dict[str, Value]:
    general: dict[str, Value] = {
        "general.architecture": network.architecture,
        # transformers takes no file whose name is "mistral".
        "general.name": network.architecture,
        "general.quantization_version": 2,
    }
    return general | {f"{network.architecture}.{key}": value for key, value in found.items()}


@dataclass(frozen=True)
class _Config:
    values: Mapping[str, Any]

    def integer(self, *keys: str) -> int:
        """The first of some keys that config.json has. Raises KeyError, naming the first."""
        return next((int(self.values[key]) for key in keys if self.values.get(key)), 0) or int(self.values[keys[0]])

    @property
    def rope(self) -> Mapping[str, Any]:
        """How positions are rotated; of several kinds of layers, in those that see everything."""
        rope = self.values.get("rope_parameters") or self.values.get("rope_scaling") or {}
        whole = rope.get("full_attention", rope)
        return whole if isinstance(whole, dict) else {}

    @property
    def rope_theta(self) -> float:
        return float(self.rope.get("rope_theta") or self.values.get("rope_theta") or 10000.0)

    def rope_scaling(self) -> dict[str, Value]:
        kind = str(self.rope.get("rope_type") or self.rope.get("type") or "default")
        if kind in ("default", "llama3"):
            return {}
        if kind not in ("linear", "yarn"):
            raise ValueError(f"its positions are rotated as {kind!r}, which is not written yet")
        found: dict[str, Value] = {"rope.scaling.type": kind, "rope.scaling.factor": float(self.rope["factor"])}
        if kind == "yarn":
            original = self.rope.get("original_max_position_embeddings") or self.values["max_position_embeddings"]
            found["rope.scaling.original_context_length"] = int(original)
        return found


def rope_factors(config: Mapping[str, Any]) -> list[float]:
    """What Llama 3 divides its frequencies by, one for each pair of a head; none where it does not."""
    one = _Config(config)
    if one.rope.get("rope_type", one.rope.get("type")) != "llama3":
        return []
    head = int(config.get("head_dim") or one.integer("hidden_size") // one.integer("num_attention_heads"))
    factor, low, high = (float(one.rope[key]) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    old = float(one.rope["original_max_position_embeddings"])
    found = []
    for pair in range(0, head, 2):
        length = 2 * math.pi * one.rope_theta ** (pair / head)
        if length < old / high:
            found.append(1.0)
        elif length > old / low:
            found.append(factor)
        else:
            smooth = (old / length - low) / (high - low)
            found.append(1 / ((1 - smooth) / factor + smooth))
    return found
