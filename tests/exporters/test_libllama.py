"""llama.cpp computes from exported files what their weights say, and better than from files of its own quantizer."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import libllama
import make_llama
import numpy as np
import pytest
import torch
from artifact.examples import recipe, rule, run

from exporters.networks import NETWORKS, make_network, q4, save_network, write_tokenizer
from qcompress.artifact.reader import read_artifact
from qcompress.compress.export import export
from qcompress.types.export import ExportOptions
from qcompress.types.plan import Rule

pytestmark = pytest.mark.slow
ROWS = 60
PADDED = ExportOptions(pad_hidden=True, round_scales=True)


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    found = libllama.load()
    if found is None:
        pytest.skip("QCOMPRESS_LIBLLAMA names no libllama: benchmarks/libllama.py says how to build it")
    return found


@pytest.fixture(scope="module")
def texts() -> list[list[int]]:
    with np.load(data() / "stories.npz") as stories:
        return [ids[:length].tolist() for ids, length in zip(stories["eval_ids"], stories["eval_len"], strict=True)][
            :ROWS
        ]


def data() -> Path:
    named = os.environ.get("QCOMPRESS_DATA")
    if not named:
        pytest.skip("QCOMPRESS_DATA is not set: the network is not here")
    return Path(named).resolve() / "stories"


@pytest.mark.parametrize("name", NETWORKS)
def test_llama_cpp_computes_what_transformers_does(name: str, library: ctypes.CDLL, tmp_path: Path) -> None:
    network = make_network(name)
    network.save_pretrained(tmp_path / "network")
    write_tokenizer(tmp_path / "network")
    ids = [number * 7 % 96 for number in range(40)]
    found = libllama.logits_of(library, to_gguf(tmp_path / "network", tmp_path / "m.gguf"), [ids])[0]
    with torch.no_grad():
        expected = network(torch.tensor([ids])).logits[0].numpy()
    # Keys and values are kept in float16.
    assert np.linalg.norm(found - expected) < 2e-3 * np.linalg.norm(expected)


def to_gguf(network: Path, target: Path, *rules: Rule) -> Path:
    """The GGUF file of a folder that is compressed by these rules; dense without any."""
    run(network, target.with_suffix(".artifact"), recipe(*(rules or (rule("*"),))))
    export(read_artifact(target.with_suffix(".artifact")), target, "gguf", PADDED)
    return target


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """stories260K as a Hugging Face folder."""
    tensors = make_llama.stories(data() / "stories260K.safetensors")
    return save_network(tmp_path_factory.mktemp("stories") / "network", make_llama.STORIES, tensors)


GROUPED = {"granularity": "group", "group_size": 32}
KINDS = {
    "Q4_0": (rule("*norm.weight"), rule("*", "mse", bits=4, symmetric=True, **GROUPED)),
    "Q4_1": (rule("*norm.weight"), rule("*", "mse", bits=4, symmetric=False, **GROUPED)),
    "Q8_0": (rule("*norm.weight"), q4("*", 8)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_perplexity_is_that_of_the_weights_and_no_worse_than_by_llama_cpps_quantizer(
    kind: str, library: ctypes.CDLL, network: Path, texts: list[list[int]], tmp_path: Path
) -> None:
    ours = to_gguf(network, tmp_path / "ours.gguf", *KINDS[kind])
    export(read_artifact(tmp_path / "ours.artifact"), tmp_path / "decoded")
    same = to_gguf(tmp_path / "decoded", tmp_path / "same.gguf")
    found = libllama.perplexity(library, ours, texts)
    assert found == pytest.approx(libllama.perplexity(library, same, texts), rel=0.002)
    own = tmp_path / "own.gguf"
    libllama.quantize(library, to_gguf(network, tmp_path / "dense.gguf"), own, kind, kind)
    assert ours.stat().st_size == own.stat().st_size
    # At 8 bits both are within what rounding activations to 8 bits does.
    assert found < libllama.perplexity(library, own, texts) * (1.0005 if kind == "Q8_0" else 1)
