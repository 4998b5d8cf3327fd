"""Files that belong to folders, or lie within other files: indices, configurations, tokenizers, arrays of an npz."""

from __future__ import annotations

import io
import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from safetensors.torch import save_file

from fuzz.campaign import Target
from fuzz.mutations import mutate_bytes, mutate_json
from fuzz.sound import digest, gaussian, samples
from qcompress.artifact.reader import read_artifact
from qcompress.checkpoint.checkpoint import INDEX_SUFFIX, read_checkpoint, tensor_view
from qcompress.compress.load import load_state_dict
from qcompress.compress.plan_checkpoint import plan_checkpoint
from qcompress.recipe import parse_recipe
from qcompress.types.data_settings import NpzData, TextData

GOLDEN = Path(__file__).parent.parent / "golden" / "folder"
CONFIG = {
    "architectures": ["GPT2LMHeadModel"],
    "model_type": "gpt2",
    "tie_word_embeddings": True,
    "num_local_experts": 4,
    "text_config": {"num_experts": 4, "model_type": "llama4_text"},
}
RECIPE = parse_recipe('version: 1\nrules: [{match: "*", mse: {bits: 4}}]\n', "r.yaml")


def folder_targets(scratch: Path) -> list[Target]:
    """Targets whose files are read with others beside them."""
    network = _network(scratch / "network")
    index = network / f"model{INDEX_SUFFIX}"
    words = scratch / "words"
    words.mkdir(exist_ok=True)
    (words / "text.txt").write_text("a b c a c b a\n" * 40)
    return [
        _within("index of a checkpoint", network, index.name, mutate_json, _planned),
        _within("configuration of a checkpoint", network, "config.json", mutate_json, _planned),
        _within(
            "index of an artifact",
            GOLDEN,
            "model.qcompress.safetensors.index.json",
            mutate_json,
            _verified,
            lambda one, other: bool(one == other),
        ),
        Target(
            "tokenizer",
            {"a": _tokenizer()},
            mutate_json,
            lambda path: samples(words, TextData(text="text.txt", tokenizer=str(path), length=8)),
            ".json",
        ),
        Target(
            "array of an npz",
            {"a": _npz()},
            _mutate_arrays,
            lambda path: samples(path.parent, NpzData(npz=path.name)),
            ".npz",
        ),
    ]


def _within(
    name: str,
    folder: Path,
    file: str,
    mutate: Callable[[bytes, Random], bytes],
    read: Callable[[Path], Any],
    accepts: Callable[[Any, Any], bool] | None = None,
) -> Target:
    """A file of a folder, which is read as a whole."""

    def read_folder(path: Path) -> Any:
        copy = path.with_name(f"{path.name}.folder")
        if not copy.exists():
            shutil.copytree(folder, copy)
        (copy / file).write_bytes(path.read_bytes())
        return read(copy)

    return Target(name, {"a": (folder / file).read_bytes()}, mutate, read_folder, accepts=accepts)


def _network(folder: Path) -> Path:
    """A checkpoint of two files whose configuration tells of ties, axes and experts."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    files = {
        "model-00001-of-00002.safetensors": {
            "transformer.wte.weight": gaussian(16, 8),
            "transformer.h.0.attn.c_attn.weight": gaussian(8, 24),
        },
        "model-00002-of-00002.safetensors": {
            "model.layers.0.mlp.experts.gate_up_proj": gaussian(4, 8, 16),
            "lm_head.weight": gaussian(16, 8),
        },
    }
    weight_map = {}
    for file, tensors in files.items():
        save_file(tensors, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    index = {"metadata": {"total_size": 4000}, "weight_map": weight_map}
    (folder / f"model{INDEX_SUFFIX}").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def _planned(folder: Path) -> list[str]:
    """What is decided of every tensor, and its values."""
    found = read_checkpoint(folder)
    values = {info.name: digest(tensor_view(found.shard_of(info.name), info)) for info in found.tensors}
    return [f"{one} {values[one.tensor.name]}" for one in plan_checkpoint(found, RECIPE).decisions]


def _verified(folder: Path) -> list[str]:
    """The tensors of an artifact all of whose bytes are as they were, and their values."""
    checked = [name for name, _ in read_artifact(folder).verify()]
    return [*checked, *(f"{name} {digest(value)}" for name, value in load_state_dict(folder).items())]


def _tokenizer() -> bytes:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing

    made = Tokenizer(WordLevel({"[UNK]": 0, "[BOS]": 1, "[EOS]": 2, "a": 3, "b": 4, "c": 5}, unk_token="[UNK]"))
    made.pre_tokenizer = Whitespace()
    made.post_processor = TemplateProcessing(single="[BOS] $A [EOS]", special_tokens=[("[BOS]", 1), ("[EOS]", 2)])
    return str(made.to_str()).encode()


def _npz() -> bytes:
    stream = io.BytesIO()
    np.savez(stream, x=np.arange(96, dtype=np.uint8).reshape(6, 4, 4, 1), y=np.arange(6))
    return stream.getvalue()


def _mutate_arrays(data: bytes, chance: Random) -> bytes:
    """One array changed, and the checksums of the file made right again."""
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as sound, zipfile.ZipFile(stream, "w") as changed:
        names = sound.namelist()
        which = chance.choice(names)
        for name in names:
            raw = sound.read(name)
            changed.writestr(zipfile.ZipInfo(name), mutate_bytes(raw, chance) if name == which else raw)
    return stream.getvalue()
