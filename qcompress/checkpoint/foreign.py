"""Checkpoints that another tool has quantized are known by their config.json and by the names of their tensors.

Compressing them would round a second time, and quantize the first tool's scales: they are refused, with the way out.
Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qcompress.checkpoint.safetensors_file import Container
from qcompress.errors import CheckpointError
from qcompress.types.plan import WEIGHT_DTYPES, TensorInfo

MADE_FROM = "compress the checkpoint that it was made from"
DENSE = "or write it dense first, with transformers: {} and save_pretrained"
DEQUANTIZE = f"{MADE_FROM}, {DENSE.format('from_pretrained, model.dequantize()')}"
READ_HERE = frozenset({"fp8", "mxfp4", "qcompress"})
"""The `quant_method`s that config.json may name: what is read as dense weights, and what says itself what it is."""


@dataclass(frozen=True)
class Foreign:
    """A tool's format.

    leaves  what names end in, all of which stand behind one stem: the weight's name or its module's
    dtypes  of the first of them; empty: any
    """

    name: str
    leaves: tuple[str, ...]
    hint: str
    dtypes: frozenset[str] = frozenset()


FP8 = frozenset({"F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "I8", "F4", "U8"})
COMPRESSED = f"{MADE_FROM}, {DENSE.format('from_pretrained with CompressedTensorsConfig(dequantize=True)')}"

FORMATS = (
    Foreign("compressed-tensors", (".weight_packed", ".weight_scale"), COMPRESSED),
    Foreign("compressed-tensors or ModelOpt", (".weight", ".weight_scale"), COMPRESSED, FP8),
    Foreign("GPTQ", (".qweight", ".scales", ".g_idx"), MADE_FROM, frozenset({"I32"})),
    Foreign("AWQ", (".qweight", ".scales"), MADE_FROM, frozenset({"I32"})),
    Foreign("bitsandbytes", (".weight", ".weight.absmax"), DEQUANTIZE, frozenset({"U8"})),
    Foreign("bitsandbytes", (".weight", ".SCB"), DEQUANTIZE, frozenset({"I8"})),
    Foreign("MLX", (".weight", ".scales"), MADE_FROM, frozenset({"U32"})),
    Foreign("HQQ", (".W_q", ".meta"), DEQUANTIZE),
    Foreign("HQQ", (".W_q", ".scale"), DEQUANTIZE),
    Foreign("quanto", (".weight._data", ".weight._scale"), DEQUANTIZE),
    Foreign("MXFP4 in OpenAI's layout", (".blocks", ".scales"), "name the folder that config.json lies in", FP8),
)
"""The first whose leaves are there names the format."""

NAMES = {
    "compressed-tensors": ("compressed-tensors", COMPRESSED),
    "gptq": ("GPTQ", MADE_FROM),
    "awq": ("AWQ", MADE_FROM),
    "bitsandbytes": ("bitsandbytes", DEQUANTIZE),
}
"""`quant_method` of config.json -> the tool and the way out; others go by what config.json says."""


def refuse_foreign(path: Path, shards: Sequence[Container], config: Mapping[str, object]) -> None:
    """Raise CheckpointError where the weights are another tool's codes, whose scales would be taken for weights."""
    infos = {info.name: info for shard in shards for info in shard.tensors}
    found = next((one for one in FORMATS if _has(infos, one)), None)
    own = config.get("quantization_config")
    method = own.get("quant_method") if isinstance(own, dict) else None
    named = method if isinstance(method, str) and method not in READ_HERE else None
    if found is None and (named is None or not any(map(_is_codes, infos.values()))):
        return
    known = (found.name, found.hint) if found is not None else (str(named), DEQUANTIZE)
    name, hint = NAMES.get(named or "", (named or known[0], known[1]))
    raise CheckpointError(str(path), f"is quantized already, by {name}", hint)


def _has(infos: Mapping[str, TensorInfo], one: Foreign) -> bool:
    first, *others = one.leaves
    stems = (name.removesuffix(first) for name in infos if name.endswith(first))
    return any(
        (not one.dtypes or infos[stem + first].dtype in one.dtypes) and all(stem + leaf in infos for leaf in others)
        for stem in stems
    )


def _is_codes(info: TensorInfo) -> bool:
    return len(info.shape) > 1 and info.dtype not in WEIGHT_DTYPES
