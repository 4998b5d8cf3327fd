"""transformers loads compressed folders, and holds their codes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
import torch
from artifact.examples import recipe, rtn, rule, run
from conftest import package_or_skip
from model.architectures import ARCHITECTURES, make_architecture

from qcompress.artifact.reader import read_artifact
from qcompress.compress.export import export
from qcompress.runtime.load_packed import held_bytes
from qcompress.runtime.packed_modules import Int4Weight
from qcompress.types.plan import Recipe

TOKENS = torch.tensor([[1, 5, 9, 2, 7], [3, 3, 8, 0, 4]])
FORMS: dict[str, Recipe] = {
    "symmetric": recipe(rule("*", "rtn", bits=4, symmetric=True, granularity="group", group_size=16)),
    "zero points": recipe(rule("*", "rtn", bits=3)),
    "offsets": recipe(rule("*", "mse", bits=2)),
    "ragged groups": recipe(rule("*", "hqq", bits=5, granularity="group", group_size=20)),
    "one grid": recipe(rule("*", "rtn", bits=8, granularity="tensor")),
    "codebooks": recipe(rule("*", "kmeans", bits=3)),
    "vectors": recipe(rule("*", "kmeans", bits=4, dim=2)),
    "steps": recipe(rule("*", "rd", step=0.25)),
}


@pytest.fixture
def plugin() -> Iterator[Any]:
    """The plug-in, which is taken out again: other tests have transformers as it is without."""
    auto = package_or_skip("transformers.quantizers.auto")
    from qcompress.runtime import plugin

    auto.AUTO_QUANTIZATION_CONFIG_MAPPING["qcompress"] = plugin.QcompressConfig
    auto.AUTO_QUANTIZER_MAPPING["qcompress"] = plugin.QcompressQuantizer
    yield plugin
    del auto.AUTO_QUANTIZATION_CONFIG_MAPPING["qcompress"], auto.AUTO_QUANTIZER_MAPPING["qcompress"]


def compressed(name: str, asked: Recipe, folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """A network whose folder is compressed to `folder / "a"`, as transformers loads its dense export."""
    module = make_architecture(name).to(dtype)
    module.save_pretrained(folder / "m")
    run(folder / "m", folder / "a", asked)
    export(read_artifact(folder / "a"), folder / "dense", force=False)
    return type(module).from_pretrained(folder / "dense", dtype=dtype)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_reads_the_weights_of_the_dense_export(name: str, plugin: Any, tmp_path: Path) -> None:
    dense = compressed(name, rtn(4), tmp_path)
    packed, info = type(dense).from_pretrained(tmp_path / "a", dtype=torch.float32, output_loading_info=True)
    for key, value in dense.state_dict().items():
        assert torch.equal(attrgetter(key)(packed), value), key
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert held_bytes(packed) < held_bytes(dense)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("form", FORMS)
def test_logits_are_those_of_the_dense_export(form: str, dtype: torch.dtype, plugin: Any, tmp_path: Path) -> None:
    import transformers

    dense = compressed("llama-tied", FORMS[form], tmp_path, dtype)
    packed = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype=dtype)
    with torch.no_grad():
        assert torch.equal(packed(TOKENS).logits, dense(TOKENS).logits)
    assert packed.lm_head.weight_packed is packed.model.embed_tokens.weight_packed
    assert {value.dtype for value in packed.parameters()} == {dtype}


def test_kept_weights_that_are_coded_are_decoded(plugin: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """All of them, and some beside compressed ones; what is saved is the artifact again."""
    for place, rules in enumerate(([rule("*")], [rule("*mlp*", "rtn", bits=4), rule("*")])):
        folder = tmp_path / str(place)
        folder.mkdir()
        asked = replace(recipe(*rules), keep_coding="auto")
        dense = compressed("llama-tied", asked, folder, torch.bfloat16)
        assert any(file.manifest.coded for file in read_artifact(folder / "a").files)
        packed, info = type(dense).from_pretrained(folder / "a", dtype=torch.bfloat16, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"] and not caplog.records
        for key, value in dense.state_dict().items():
            assert torch.equal(attrgetter(key)(packed), value), key
        assert packed.lm_head.weight is packed.model.embed_tokens.weight
        packed.save_pretrained(folder / "again")
        assert read_artifact(folder / "again").sha256 == read_artifact(folder / "a").sha256


def test_it_generates_what_the_dense_export_does(plugin: Any, tmp_path: Path) -> None:
    dense = compressed("qwen3", rtn(4), tmp_path)
    packed = type(dense).from_pretrained(tmp_path / "a", dtype=torch.float32)
    asked = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(TOKENS), "pad_token_id": 0}
    assert torch.equal(packed.generate(TOKENS, **asked), dense.generate(TOKENS, **asked))


def test_the_kernel_is_asked_for_by_the_config(plugin: Any, tmp_path: Path) -> None:
    import transformers

    asked = recipe(rule("*", "rtn", bits=4, symmetric=True, granularity="group", group_size=32))
    dense = compressed("llama", asked, tmp_path, torch.bfloat16)
    config = transformers.AutoConfig.from_pretrained(tmp_path / "a")
    config.quantization_config["kernel"] = "auto"
    packed = type(dense).from_pretrained(tmp_path / "a", dtype=torch.bfloat16, config=config)
    assert isinstance(packed.model.layers[0].self_attn.q_proj.weight_packed, Int4Weight)
    with torch.no_grad():
        right, found = dense(TOKENS).logits.float(), packed(TOKENS).logits.float()
    assert 0 < (found - right).norm() / right.norm() < 0.02
    config.quantization_config["kernel"] = "fast"
    with pytest.raises(ValueError, match="kernel is decode or auto, not 'fast'"):
        type(dense).from_pretrained(tmp_path / "a", config=config)


def test_what_is_saved_is_the_artifact_again(plugin: Any, tmp_path: Path) -> None:
    dense = compressed("llama-tied", rtn(4), tmp_path)
    packed = type(dense).from_pretrained(tmp_path / "a", dtype=torch.float32)
    packed.save_pretrained(tmp_path / "again")
    for path in (tmp_path / "a").glob("*.safetensors"):
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert config["quantization_config"] == {"quant_method": "qcompress", "weights": "model.qcompress.safetensors"}
    assert "transformers_weights" not in config
    again = type(dense).from_pretrained(tmp_path / "again", dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(again(TOKENS).logits, dense(TOKENS).logits)
        packed.model.norm.weight += 1
    with pytest.raises(ValueError, match=r"model.norm.weight has changed since it was loaded"):
        packed.save_pretrained(tmp_path / "changed")


def test_several_files_are_found_by_their_index(plugin: Any, tmp_path: Path) -> None:
    module = make_architecture("llama")
    module.save_pretrained(tmp_path / "m", max_shard_size="20KB")
    run(tmp_path / "m", tmp_path / "a", rtn(4))
    assert len([*(tmp_path / "a").glob("*.safetensors")]) > 1
    export(read_artifact(tmp_path / "a"), tmp_path / "dense", force=False)
    with torch.no_grad():
        logits = [
            type(module).from_pretrained(tmp_path / name, dtype=torch.float32)(TOKENS).logits for name in ("a", "dense")
        ]
    assert torch.equal(*logits)


def test_a_tensor_that_the_artifact_lacks_is_told(plugin: Any, tmp_path: Path) -> None:
    module = make_architecture("llama")
    module.save_pretrained(tmp_path / "m")
    run(tmp_path / "m", tmp_path / "a", rtn(4))
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    (tmp_path / "a" / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    _, info = type(module).from_pretrained(tmp_path / "a", dtype=torch.float32, output_loading_info=True)
    assert all(".layers.2." in name for name in info["missing_keys"]) and info["missing_keys"]
