"""Networks that hold an artifact's weights as codes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from artifact.examples import gaussian, recipe, rule, run, save
from torch import Tensor, nn

import qcompress
from qcompress.artifact.reader import read_artifact
from qcompress.compress.load import hold_packed
from qcompress.errors import ArtifactError, ResourceError
from qcompress.runtime.load_packed import held_bytes
from qcompress.types.plan import Recipe


class Net(nn.Module):
    """A tied embedding, a convolution, a recurrent layer and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(30, 16)
        self.conv = nn.Conv1d(16, 16, 3, padding=1)
        self.norm = nn.BatchNorm1d(16)
        self.gru = nn.GRU(16, 16, batch_first=True)
        self.head = nn.Linear(16, 30, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x: Tensor = self.norm(self.conv(self.embed(tokens).transpose(1, 2))).transpose(1, 2)
        return self.head(self.gru(x)[0])


TOKENS = torch.tensor([[1, 2, 3, 4, 5], [29, 0, 7, 7, 2]])
METHODS: dict[str, Recipe] = {
    "rtn": recipe(rule("*", "rtn", bits=4)),
    "mse in groups": recipe(rule("*", "mse", bits=3, granularity="group", group_size=5)),
    "k-means": recipe(rule("*", "kmeans", bits=3)),
}


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def artifact(net: Net, folder: Path, asked: Recipe, choice: str = "packed") -> Path:
    state = net.state_dict()
    del state["head.weight"]
    source = save(folder / "m.safetensors", state, {"head.weight": "embed.weight"})
    run(source, folder / "a.safetensors", asked, choice)
    return folder / "a.safetensors"


@pytest.mark.parametrize("choice", ["packed", "ans"])
@pytest.mark.parametrize("method", METHODS)
def test_a_packed_network_computes_what_the_dense_one_does(net: Net, method: str, choice: str, tmp_path: Path) -> None:
    path = artifact(net, tmp_path, METHODS[method], choice)
    dense, packed = Net().eval(), Net().eval()
    qcompress.load_into(dense, path)
    held = hold_packed(packed, read_artifact(path))
    with torch.no_grad():
        assert torch.equal(packed(TOKENS), dense(TOKENS))
    assert set(held.packed) == {"embed.weight", "conv.weight"}
    assert set(held.dense) == {"gru.weight_ih_l0", "gru.weight_hh_l0"}
    assert held.n_bytes == held_bytes(packed) < held.dense_bytes == held_bytes(dense)
    assert packed.head.weight_packed is packed.embed.weight_packed


def test_it_is_as_small_as_the_packed_artifact(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 64))
    run(save(tmp_path / "m.safetensors", net.state_dict()), tmp_path / "a.safetensors", METHODS["rtn"])
    qcompress.load_into(net, tmp_path / "a.safetensors", packed=True)
    assert held_bytes(net) <= (tmp_path / "a.safetensors").stat().st_size


def test_a_network_without_data_never_holds_its_weights_dense(net: Net, tmp_path: Path) -> None:
    path = artifact(net, tmp_path, METHODS["rtn"])
    with torch.device("meta"):
        empty = Net().eval()
    dense = Net().eval()
    qcompress.load_into(dense, path)
    qcompress.load_into(empty, path, packed=True)
    empty.gru.flatten_parameters()
    with torch.no_grad():
        assert torch.equal(empty(TOKENS), dense(TOKENS))


def test_what_no_artifact_holds_cannot_lie_on_the_meta_device(net: Net, tmp_path: Path) -> None:
    path = artifact(net, tmp_path, METHODS["rtn"])
    with torch.device("meta"):
        empty = Net()
        empty.register_buffer("table", torch.zeros(3), persistent=False)
    with pytest.raises(ArtifactError, match="table lies on the meta device"):
        qcompress.load_into(empty, path, packed=True)


def test_a_network_of_other_names_or_shapes_is_refused_and_left_alone(net: Net, tmp_path: Path) -> None:
    path = artifact(net, tmp_path, METHODS["rtn"])
    for wrong, words in ((nn.Linear(3, 3), "lacks .*'conv.weight'"), (Net(), r"'conv.weight': is \[16, 16, 3\]")):
        if isinstance(wrong, Net):
            wrong.conv = nn.Conv1d(16, 16, 5)
        before = {name: value.clone() for name, value in wrong.state_dict().items()}
        with pytest.raises(ArtifactError, match=words):
            qcompress.load_into(wrong, path, packed=True)
        after = wrong.state_dict()
        assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


def test_codes_that_do_not_fit_the_memory_are_refused(tmp_path: Path) -> None:
    run(save(tmp_path / "m.safetensors", {"weight": gaussian(500, 500)}), tmp_path / "a.safetensors", METHODS["rtn"])
    module = nn.Linear(500, 500, bias=False)
    qcompress.load_into(module, tmp_path / "a.safetensors", packed=True, max_memory=16_600_000)
    with pytest.raises(ResourceError, match="holding it packed"):
        qcompress.load_into(
            nn.Linear(500, 500, bias=False), tmp_path / "a.safetensors", packed=True, max_memory=16_400_000
        )


def test_the_kernel_computes_linear_layers_of_bfloat16(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 16)).bfloat16()
    source = save(tmp_path / "m.safetensors", net.state_dict())
    run(source, tmp_path / "a.safetensors", recipe(rule("*", "rtn", bits=4, granularity="group", group_size=32)))
    exact, fast = (nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 16)).bfloat16() for _ in range(2))
    qcompress.load_into(exact, tmp_path / "a.safetensors", packed=True)
    held = hold_packed(fast, read_artifact(tmp_path / "a.safetensors"), kernel="auto")
    assert set(held.kernel) == {"0.weight", "2.weight"}
    x = gaussian(5, 64).bfloat16()
    with torch.no_grad():
        right, found = exact(x).float(), fast(x).float()
    assert 0 < (found - right).norm() / right.norm() < 2**-6
