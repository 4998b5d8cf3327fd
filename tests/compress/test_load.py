"""An artifact back in the original architecture."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from artifact.examples import dense, entry, gaussian, make_artifact, plan_for, recipe, rtn, rule, run, save, write_raw
from torch import nn

import qcompress
from qcompress.checkpoint.checkpoint import read_checkpoint
from qcompress.compress.compress import compress
from qcompress.compress.load import checkpoint_state
from qcompress.errors import ArtifactError
from qcompress.types.encoded import ActivationGrid, Fitted
from qcompress.types.plan import DTYPE_BITS
from qcompress.types.run import Options


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.linear = nn.Linear(8, 5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.linear(self.norm(self.conv(images)).mean((2, 3)))


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def test_a_module_computes_what_its_weights_decode_to(net: Net, tmp_path: Path) -> None:
    run(save(tmp_path / "m.safetensors", net.state_dict()), tmp_path / "a.safetensors", rtn(8))
    other = Net().eval()
    qcompress.load_into(other, tmp_path / "a.safetensors")
    state = qcompress.load_state_dict(str(tmp_path / "a.safetensors"))
    assert set(state) == set(net.state_dict())
    for name, tensor in other.state_dict().items():
        assert dense(tensor) == dense(state[name])
    images = gaussian(2, 3, 8, 8)
    with torch.no_grad():
        assert torch.allclose(other(images), net(images), atol=0.02)
        assert not torch.equal(other(images), net(images))


def test_what_was_kept_is_the_same_to_the_bit(net: Net, tmp_path: Path) -> None:
    run(save(tmp_path / "m.safetensors", net.state_dict()), tmp_path / "a.safetensors", rtn(2))
    state = qcompress.load_state_dict(tmp_path / "a.safetensors")
    for name, tensor in net.state_dict().items():
        if tensor.ndim < 2:
            assert dense(state[name]) == dense(tensor)


def test_names_that_one_side_lacks_are_refused_unless_asked(net: Net, tmp_path: Path) -> None:
    state = net.state_dict()
    del state["linear.bias"]
    run(save(tmp_path / "m.safetensors", state), tmp_path / "a.safetensors", rtn(4))
    with pytest.raises(ArtifactError, match=r"does not fit Net: .*linear.bias"):
        qcompress.load_into(net, tmp_path / "a.safetensors")
    qcompress.load_into(net, tmp_path / "a.safetensors", strict=False)


def test_loaded_tensors_can_be_trained_and_leave_the_file_alone(tmp_path: Path) -> None:
    path = make_artifact(tmp_path)
    before = path.read_bytes()
    state = qcompress.load_state_dict(path)
    for tensor in state.values():
        tensor.add_(1)
    assert path.read_bytes() == before
    assert torch.equal(state["b"], gaussian(3, seed=2) + 1)


def test_tensors_come_on_the_device_that_is_asked_for(tmp_path: Path) -> None:
    state = qcompress.load_state_dict(make_artifact(tmp_path), device="meta")
    assert {tensor.device.type for tensor in state.values()} == {"meta"}


@pytest.mark.parametrize("name", ["missing.safetensors", "m.safetensors"])
def test_what_is_no_artifact_is_refused(name: str, tmp_path: Path) -> None:
    save(tmp_path / "m.safetensors", {"w": gaussian(2, 2)})
    with pytest.raises(ArtifactError) as caught:
        qcompress.load_state_dict(tmp_path / name)
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("dtype", sorted(set(DTYPE_BITS) - {"F4", "F6_E2M3", "F6_E3M2"}))
def test_a_kept_tensor_of_any_dtype_is_loaded_byte_for_byte(dtype: str, tmp_path: Path) -> None:
    content = bytes(index % 2 for index in range(6 * DTYPE_BITS[dtype] // 8))
    source = write_raw(tmp_path / "m.safetensors", {"t": entry(dtype, [2, 3], 0, len(content))}, content)
    run(source, tmp_path / "a.safetensors", recipe(rule("*")))
    found = qcompress.load_state_dict(tmp_path / "a.safetensors")["t"]
    assert found.shape == (2, 3)
    assert found.reshape(-1).view(torch.uint8).numpy().tobytes() == content


@pytest.mark.parametrize("dtype", ["F4", "F6_E2M3"])
def test_a_dtype_that_torch_lacks_is_refused_with_a_way_out(dtype: str, tmp_path: Path) -> None:
    content = bytes(4 * DTYPE_BITS[dtype] // 8)
    source = write_raw(tmp_path / "m.safetensors", {"t": entry(dtype, [4], 0, len(content))}, content)
    run(source, tmp_path / "a.safetensors", recipe(rule("*")))
    with pytest.raises(ArtifactError, match=f"'t': dtype {dtype} has no counterpart in torch; .*--to safetensors"):
        qcompress.load_state_dict(tmp_path / "a.safetensors")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_decoded_weights_have_the_shape_and_dtype_that_they_had(dtype: torch.dtype, tmp_path: Path) -> None:
    source = save(tmp_path / "m.safetensors", {"w": gaussian(6, 10, dtype=dtype), "c": gaussian(4, 3, 2, dtype=dtype)})
    run(source, tmp_path / "a.safetensors", rtn(4))
    state = qcompress.load_state_dict(tmp_path / "a.safetensors")
    assert {name: (value.dtype, tuple(value.shape)) for name, value in state.items()} == {
        "w": (dtype, (6, 10)),
        "c": (dtype, (4, 3, 2)),
    }


def test_tied_names_share_one_tensor(tmp_path: Path) -> None:
    weight = gaussian(8, 4)
    source = save(tmp_path / "m.safetensors", {"embed.weight": weight, "head.weight": weight.clone()})
    checkpoint = replace(read_checkpoint(source), tied={"head.weight": "embed.weight"})
    compress(checkpoint, plan_for(checkpoint, rtn(4)), Options(tmp_path / "a.safetensors"))
    state = qcompress.load_state_dict(tmp_path / "a.safetensors")
    assert state["head.weight"] is state["embed.weight"]


def test_a_checkpoints_tensors_are_copied_and_names_without_data_share_one(tmp_path: Path) -> None:
    made = {"embed.weight": gaussian(8, 4), "half": gaussian(5, dtype=torch.float16), "none": torch.empty(0, 3)}
    path = save(tmp_path / "m.safetensors", made)
    before = path.read_bytes()
    checkpoint = replace(read_checkpoint(path), tied={"head.weight": "embed.weight"})
    state = checkpoint_state(checkpoint)
    assert state["head.weight"] is state["embed.weight"]
    for name, value in made.items():
        assert state[name].dtype == value.dtype and torch.equal(state[name], value)
        state[name].add_(1)
    assert path.read_bytes() == before


def test_a_module_of_other_shapes_is_refused(net: Net, tmp_path: Path) -> None:
    run(save(tmp_path / "m.safetensors", net.state_dict()), tmp_path / "a.safetensors", rtn(4))
    wider = Net()
    wider.linear = nn.Linear(9, 5)
    for strict in (True, False):
        with pytest.raises(ArtifactError, match=r"'linear.weight': is \[5, 8\] in the checkpoint and \[5, 9\] in Net"):
            qcompress.load_into(wider, tmp_path / "a.safetensors", strict=strict)


def test_caps_and_on_request_quantizers_come_with_the_weights(net: Net, tmp_path: Path) -> None:
    checkpoint = read_checkpoint(save(tmp_path / "m.safetensors", net.state_dict()))
    fitted = Fitted({}, activations={"linear": ActivationGrid(1, 0.5, 0)}, caps={"conv": torch.zeros(8)})
    compress(checkpoint, plan_for(checkpoint, rtn(8)), Options(tmp_path / "a.safetensors"), fitted)
    images = gaussian(2, 3, 8, 8)
    seen: dict[str, torch.Tensor] = {}
    for name, activations in (("plain", False), ("quantized", True)):
        other = Net().eval()
        qcompress.load_into(other, tmp_path / "a.safetensors", activations=activations)
        other.norm.register_forward_hook(lambda _, args, __: seen.update(conv=args[0]))
        other.linear.register_forward_hook(lambda _, args, __, name=name: seen.update({name: args[0]}))
        with torch.no_grad():
            other(images)
        assert float(seen["conv"].max()) <= 0
    assert set(seen["quantized"].unique().tolist()) <= {0.0, 0.5}
    assert len(seen["plain"].unique()) > 2
    with pytest.raises(ArtifactError, match="does not fit"):
        qcompress.load_into(nn.Sequential(nn.Conv2d(3, 8, 3)), tmp_path / "a.safetensors", strict=False)
