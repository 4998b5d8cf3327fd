"""What `save_pretrained` wrote, compressed, back in the network of transformers that it came from."""

from __future__ import annotations

from collections.abc import Mapping
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
import torch
from artifact.examples import dense, rtn, run, save
from model.architectures import ARCHITECTURES, make_architecture
from torch import Tensor, nn

import qcompress
from qcompress.artifact.reader import read_artifact
from qcompress.compress.export import export
from qcompress.errors import ArtifactError, InputError


def state_of(module: nn.Module) -> dict[str, Tensor]:
    return module.state_dict()


def assert_equal(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    different = [name for name in wanted if dense(found[name]) != dense(wanted[name])]
    assert not different


def saved(module: Any, folder: Path) -> Path:
    """The folder that `save_pretrained` writes."""
    module.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_takes_what_its_artifact_decodes_to(name: str, tmp_path: Path) -> None:
    """The oracle is the library: `from_pretrained` of the dense export; the artifact's folder it does not load."""
    module = make_architecture(name)
    run(saved(module, tmp_path / "m"), tmp_path / "a", rtn(8))
    export(read_artifact(tmp_path / "a"), tmp_path / "dense", force=False)
    network: Any = type(module)
    wanted = state_of(network.from_pretrained(tmp_path / "dense", dtype=torch.float32))
    other = make_architecture(name, seed=1)
    qcompress.load_into(other, tmp_path / "a")
    assert_equal(state_of(other), wanted)
    assert any(not torch.equal(wanted[key], value) for key, value in state_of(module).items())
    for key, value in state_of(module).items():
        torch.testing.assert_close(wanted[key].float(), value.float(), rtol=0, atol=0.01)
    with pytest.raises(OSError, match=r"no file named|does not appear to have"):
        network.from_pretrained(tmp_path / "a")


def test_a_state_dict_of_the_networks_own_names_is_taken_too(tmp_path: Path) -> None:
    module = make_architecture("mixtral")
    run(save(tmp_path / "m.safetensors", state_of(module)), tmp_path / "a.safetensors", rtn(8))
    other = make_architecture("mixtral", seed=1)
    qcompress.load_into(other, tmp_path / "a.safetensors")
    assert_equal(state_of(other), qcompress.load_state_dict(tmp_path / "a.safetensors"))


def test_a_network_of_half_precision_keeps_its_dtype(tmp_path: Path) -> None:
    module = make_architecture("qwen2").to(torch.bfloat16)
    run(saved(module, tmp_path / "m"), tmp_path / "a", rtn(8))
    for dtype in (torch.bfloat16, torch.float32):
        other = make_architecture("qwen2", seed=1).to(dtype)
        qcompress.load_into(other, tmp_path / "a")
        decoded = qcompress.load_state_dict(tmp_path / "a")
        assert {value.dtype for value in state_of(other).values()} == {dtype}
        assert torch.equal(other.lm_head.weight.float(), decoded["model.embed_tokens.weight"].float())
        assert other.lm_head.weight is other.model.embed_tokens.weight


def test_a_network_is_not_touched_by_what_does_not_fit_it(tmp_path: Path) -> None:
    """Another depth: its names are missing; another width: the stack of experts has another shape."""
    run(saved(make_architecture("mixtral"), tmp_path / "m"), tmp_path / "a", rtn(8))
    for change, error in (
        ({"num_hidden_layers": 3}, r"does not fit MixtralForCausalLM: it lacks 'model\.layers\.2"),
        ({"num_hidden_layers": 1}, r"it has 'model\.layers\.1.* too many"),
        ({"num_local_experts": 3}, r"6 tensors, first 'model\.layers\.0\..* have other shapes in the checkpoint"),
    ):
        other = make_architecture("mixtral", **change)
        before = {name: value.clone() for name, value in state_of(other).items()}
        with pytest.raises(InputError, match=error):
            qcompress.load_into(other, tmp_path / "a")
        assert_equal(state_of(other), before)


def test_an_embedding_and_a_head_that_differ_are_not_tied(tmp_path: Path) -> None:
    run(saved(make_architecture("llama"), tmp_path / "m"), tmp_path / "a", rtn(8))
    with pytest.raises(ArtifactError, match=r"'lm_head\.weight'.*differs from 'model\.embed_tokens"):
        qcompress.load_into(make_architecture("llama-tied"), tmp_path / "a")


@pytest.mark.parametrize("name", ["vit", "mixtral", "qwen2", "gpt-neox"])
def test_codes_are_held_under_the_names_of_the_network(name: str, tmp_path: Path) -> None:
    run(saved(make_architecture(name), tmp_path / "m"), tmp_path / "a", rtn(8))
    dense_one, packed = make_architecture(name, seed=1), make_architecture(name, seed=2)
    qcompress.load_into(dense_one, tmp_path / "a")
    qcompress.load_into(packed, tmp_path / "a", packed=True)
    wanted = dict(dense_one.named_parameters())
    held = [key for key in wanted if key not in dict(packed.named_parameters())]
    assert len(held) > 4
    for key, value in wanted.items():
        assert torch.equal(attrgetter(key)(packed), value)
