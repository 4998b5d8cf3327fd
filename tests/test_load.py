"""An artifact back in the original architecture."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from artifact.examples import dense, entry, gaussian, make_artifact, recipe, rtn, rule, run, save, write_raw
from torch import nn

import qcompress
from qcompress.errors import ArtifactError
from qcompress.types import DTYPE_BITS


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
