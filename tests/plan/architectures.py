"""Pins the role of every tensor of many architectures: python tests/plan/architectures.py [NAME...]

Without names it builds each network anew, on torch's meta device and with few layers, and writes architectures.txt
beside this file, whose roles a person then reads. Of tensors whose names differ by numbers alone the first is kept. A
network is named `PACKAGE NAME`, with ` in memory` after it where its saved names differ from its own.

A block of the file is the network's name, what its config.json says that roles depend on, and a line for each role:
`role: name shape; name shape dtype @axis; ...`. Networks whose packages are not installed here are written by hand in
by_hand.txt, in the same form.
"""

from __future__ import annotations

import json
import os
import re
import sys
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from qcompress.plan.axes import find_axes
from qcompress.plan.network import EXPERT_COUNTS, Network, plain_name
from qcompress.plan.roles import VOCABULARY, find_roles
from qcompress.types.plan import ROLE_NAMES, Role, TensorInfo

HERE = Path(__file__).parent
BUILT, BY_HAND = HERE / "architectures.txt", HERE / "by_hand.txt"

TRANSFORMERS = """
gpt2 gptj gpt_neo gpt_neox gpt_bigcode gpt_oss bloom opt falcon codegen mpt ctrl llama llama4_text mixtral phi3 phimoe
qwen2_moe qwen3 qwen3_moe qwen3_next gemma2 gemma3_text cohere olmoe stablelm granitemoe granitemoehybrid jetmoe
deepseek_v3 glm4_moe ernie4_5_moe jamba nemotron_h mamba mamba2 falcon_h1 rwkv recurrent_gemma xlstm lfm2 kimi_linear
minimax longcat_flash bert albert distilbert deberta-v2 mpnet mobilebert funnel convbert canine modernbert xlnet xlm
layoutlm t5 bart switch_transformers pegasus_x nllb-moe whisper wav2vec2 wavlm encodec vits speecht5
audio-spectrogram-transformer fastspeech2_conformer vit deit beit swin swinv2 convnextv2 dinov2 mobilevit levit
segformer mask2former detr rt_detr dpt sam hiera clip blip-2 llava qwen2_vl qwen3_vl_moe idefics3 perceiver
grounding-dino patchtst decision_transformer
"""
TORCHVISION = """
resnet18 densenet121 mobilenet_v2 efficientnet_b0 shufflenet_v2_x1_0 squeezenet1_1 vgg11_bn convnext_tiny vit_b_16
swin_v2_t maxvit_t mvit_v1_b fasterrcnn_resnet50_fpn retinanet_resnet50_fpn ssdlite320_mobilenet_v3_large
fcos_resnet50_fpn deeplabv3_resnet50 raft_small
"""
TIMM = """
vit_tiny_patch16_224 beit_base_patch16_224 resmlp_12_224 mixer_s32_224 levit_128s pvt_v2_b0 coatnet_0_rw_224
halonet26t xcit_nano_12_p16_224 cait_xxs24_224 crossvit_tiny_240 nfnet_f0 eca_nfnet_l0 sequencer2d_s visformer_tiny
mambaout_femto vit_small_patch14_reg4_dinov2 samvit_base_patch16 fastvit_t8 efficientformer_l1
"""

TASKS = (
    *("CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "MASKED_LM", "SPEECH_SEQ_2_SEQ", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM"),
    *("CTC", "IMAGE_CLASSIFICATION", "OBJECT_DETECTION", "ZERO_SHOT_OBJECT_DETECTION", "UNIVERSAL_SEGMENTATION"),
    *("SEMANTIC_SEGMENTATION", "DEPTH_ESTIMATION", "AUDIO_CLASSIFICATION", "MASK_GENERATION", "PRETRAINING"),
)
"""The head that a network gets: the first of these that transformers has for it."""

DTYPES = {"float32": "F32", "float64": "F64", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "bool": "BOOL"}
LAYERS = re.compile(r"(num|n)_\w*layers?|n_layer|(en|de)coder_layers|num_\w+_blocks|num_hidden_groups|depth")
TOLD = re.compile(rf"model_type|tie_word_embeddings|hidden_size|d_model|n_embd|{'|'.join(EXPERT_COUNTS)}")


@dataclass(frozen=True)
class Tensor:
    """A tensor of an architecture, and its pinned role and channel axes."""

    info: TensorInfo
    role: Role
    axis: tuple[int, ...] = (0,)


@dataclass(frozen=True)
class Architecture:
    name: str
    config: Mapping[str, Any]
    tensors: tuple[Tensor, ...]

    @property
    def infos(self) -> list[TensorInfo]:
        return [one.info for one in self.tensors]


def decide(infos: list[TensorInfo], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """What qcompress says of the tensors of a checkpoint."""
    network = Network(infos, config)
    roles = find_roles(network)
    axes = {name: axis.axes for name, axis in find_axes(network, roles).items()}
    return {info.name: Tensor(info, roles[info.name], axes.get(info.name, (0,))) for info in infos}


def read_pins(path: Path) -> list[Architecture]:
    """The architectures of a file."""
    found = []
    for block in path.read_text(encoding="utf-8").split("\n\n"):
        name, config, *lines = block.strip().split("\n")
        tensors = [
            _read_tensor(entry, role)
            for role, _, entries in (line.partition(": ") for line in lines)
            for entry in entries.split("; ")
        ]
        found.append(Architecture(name.removeprefix("# "), json.loads(config), tuple(tensors)))
    return found


def _read_tensor(entry: str, role: Any) -> Tensor:
    name, shape, *rest = entry.split(" ")
    assert role in ROLE_NAMES, role
    dtype = next((word for word in rest if word[0] != "@"), "F32")
    axis = next((tuple(map(int, word[1:].split(","))) for word in rest if word[0] == "@"), (0,))
    sizes = () if shape == "scalar" else tuple(map(int, shape.split("x")))
    return Tensor(TensorInfo(name, sizes, dtype), role, axis)


def written(architecture: Architecture) -> str:
    """The block of an architecture."""
    lines = [f"# {architecture.name}", json.dumps(architecture.config)]
    for role in ROLE_NAMES:
        entries = [_entry(one) for one in architecture.tensors if one.role == role]
        lines += [f"{role}: {'; '.join(entries)}"] * bool(entries)
    return "\n".join(lines)


def _entry(one: Tensor) -> str:
    shape = "x".join(map(str, one.info.shape)) or "scalar"
    axis = f" @{','.join(map(str, one.axis))}" * (one.axis != (0,))
    return f"{one.info.name} {shape}" + f" {one.info.dtype}" * (one.info.dtype != "F32") + axis


def fold(name: str) -> str:
    return re.sub(r"(?<![A-Za-z])\d+(?=\.|$)", "N", name)


def firsts(tensors: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """Of tensors with names that differ by numbers alone, with one role and axis, the first.

    Vectors of norms are left out, and biases stay with their weights.
    """
    found: dict[tuple[str, Role, tuple[int, ...]], str] = {}
    for name, one in tensors.items():
        if len(one.info.shape) > 1 or one.role not in ("norm", "bias"):
            found.setdefault((fold(name), one.role, one.axis), name)
    modules = {plain_name(name).rpartition(".")[0] for name in found.values()}
    first = set(found.values())
    biases = {name for name in tensors if name.endswith("bias") and plain_name(name).rpartition(".")[0] in modules}
    return tuple(one for name, one in tensors.items() if name in first | biases)


@cache
def package(name: str) -> Any:
    from qcompress.data.user_code import import_package

    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    return import_package(name)


def built(names: list[str] | None = None) -> Iterator[tuple[str, Mapping[str, Any], list[TensorInfo]]]:
    """Name, config and tensors of every architecture, or of those named."""
    import torch

    makers = {
        **{f"transformers {name}": (transformers_network, name) for name in TRANSFORMERS.split()},
        **{f"torchvision {name}": (torchvision_network, name) for name in TORCHVISION.split()},
        **{f"timm {name}": (timm_network, name) for name in TIMM.split()},
    }
    for title, (make, name) in makers.items():
        if names and not {title, name} & set(names):
            continue
        with warnings.catch_warnings(), torch.device("meta"):
            warnings.simplefilter("ignore")
            module, config = make(name)
        own = module.state_dict()
        saved = own
        if make is transformers_network:
            saved = _saved(module, own)
            if {fold(one) for one in own} - {fold(one) for one in saved} - set(_tied(module)):
                yield f"{title} in memory", config, _infos(own)
        yield title, config, _infos(saved)


def _infos(state: Mapping[str, Any]) -> list[TensorInfo]:
    return [TensorInfo(name, tuple(one.shape), DTYPES[str(one.dtype)[6:]]) for name, one in state.items()]


def _tied(module: Any) -> Mapping[str, str]:
    return getattr(module, "all_tied_weights_keys", None) or {}


def _saved(module: Any, own: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors as `save_pretrained` names and shapes them, in the network's own order."""
    from transformers.core_model_loading import revert_weight_conversion

    tied = _tied(module)
    found = revert_weight_conversion(module, {name: one for name, one in own.items() if name not in tied})
    order = {name: place for place, name in enumerate(own)}
    return dict(sorted(found.items(), key=lambda item: order.get(item[0], len(order))))


def transformers_network(name: str) -> tuple[Any, Mapping[str, Any]]:
    transformers = package("transformers")
    from transformers.models.auto import modeling_auto

    config = transformers.CONFIG_MAPPING[name]()
    _shorten(config)
    mappings = [getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES") for task in TASKS]
    kind = next(one[name] for one in (*mappings, modeling_auto.MODEL_MAPPING_NAMES) if name in one)
    module = getattr(transformers, kind if isinstance(kind, str) else kind[0])(config)
    return module, _told(json.loads(config.to_json_string()))


def _shorten(config: Any) -> None:
    """Few layers and experts, in the configs within a config too."""
    for key, value in list(vars(config).items()):
        if type(value).__name__.endswith("Config"):
            _shorten(value)
        elif key == "layer_types":
            setattr(config, key, [*dict.fromkeys(value), *value][:2])
        elif key == "first_k_dense_replace":
            setattr(config, key, 1)
        elif key == "depths":
            setattr(config, key, type(value)(min(2, one) for one in value))
        elif isinstance(value, int) and not isinstance(value, bool):
            most = 2 if LAYERS.fullmatch(key) else 8 if key in EXPERT_COUNTS else value
            setattr(config, key, min(value, most))


def _told(config: Mapping[str, Any]) -> dict[str, Any]:
    """What roles depend on."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            inner = _told(value)
            found |= {key: inner} if inner else {}
        elif value is not None and (TOLD.fullmatch(key) or VOCABULARY.fullmatch(key)):
            found[key] = value
    return found


def torchvision_network(name: str) -> tuple[Any, Mapping[str, Any]]:
    models = package("torchvision").models
    # Only networks with a backbone have weights for it.
    backbone = {"weights_backbone": None} if "resnet50" in name or "ssdlite" in name else {}
    return models.get_model(name, weights=None, **backbone), {}


def timm_network(name: str) -> tuple[Any, Mapping[str, Any]]:
    return package("timm").create_model(name, pretrained=False), {}


def main(names: list[str]) -> None:
    made = {}
    for name, config, infos in built(names):
        tensors = firsts(decide(infos, config))
        made[name] = Architecture(name, config, tensors)
        sys.stdout.write(f"{name}: {len(tensors)} of {len(infos)}\n")
        alone = decide([one.info for one in tensors], config)
        for one in tensors:
            if alone[one.info.name] != one:
                sys.stdout.write(f"  {one.info.name}: {one.role} {one.axis}, here {alone[one.info.name]}\n")
    if names:
        made = {one.name: one for one in read_pins(BUILT)} | made
    BUILT.write_text("\n\n".join(map(written, made.values())) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
