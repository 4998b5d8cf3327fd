"""One flipped bit that changes what weights are is seen by every reader, not by `verify` alone.

Three bits: of an exponent, which halves a tensor; of a kept bias, whose first number vanishes; of the exponent of the
last layer, which costs accuracy. Each as it may happen to a file, and with all that covers the whole file made right
again, so that only the checksum of the tensor is left to tell.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from artifact.examples import Header, rewrite
from conftest import Run, files_under

from qcompress.checkpoint.checkpoint import write_checkpoint
from qcompress.compress.load import load_into, load_state_dict
from qcompress.demo import DigitsNet
from qcompress.errors import ArtifactError
from qcompress.report.document_json import report_path

RECIPE = """version: 1
model: {factory: "qcompress.demo:DigitsNet"}
data: {eval: {npz: x.npz}}
task: {classification: {}}
rules: [{match: "*.weight", rtn: {bits: 8}}]
"""
FLIPS = {"exponent": "conv2.weight", "kept": "bn1.bias", "eval": "linear.weight"}
"""Flip -> the tensor whose values it changes."""


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a network, its artifact, and images that carry the labels that the artifact gives them."""
    from qcompress.cli.app import run as run_command

    folder = tmp_path_factory.mktemp("flipped")
    torch.manual_seed(0)
    module = DigitsNet().eval()
    with torch.no_grad():
        for norm in (module.bn1, module.bn2, module.bn3):
            norm.bias.normal_()
        # A number above two loses the highest bit of its exponent.
        module.bn1.bias[0] = 3.15
    write_checkpoint(module.state_dict(), folder / "m.safetensors")
    (folder / "r.yaml").write_text(RECIPE)
    words = ["--bits", "8", "--method", "rtn", "--coding", "packed", "-q", "-o", str(folder / "a.safetensors")]
    assert run_command(["quantize", str(folder / "m.safetensors"), *words]) == 0
    report_path(folder / "a.safetensors").unlink()
    images = 20 * torch.randn(64, 1, 8, 8)
    load_into(module, folder / "a.safetensors")
    with torch.no_grad():
        labels = module(images).argmax(1)
    assert len(labels.unique()) > 1
    np.savez(folder / "x.npz", x=images.numpy(), y=labels.numpy())
    return folder


def flip(path: Path, name: str, *, resealed: bool) -> None:
    """Change one bit of an artifact; `resealed` makes the checksums of manifest, header and data right again."""

    def change(header: Header, manifest: Header, data: bytearray) -> None:
        if name == "kept":
            start = header["bn1.bias"]["data_offsets"][0]
            # The highest bit of the exponent of a float32.
            data[start + 3] ^= 0x40
        else:
            manifest["numbers"]["exponent"][FLIPS[name]] ^= 1 if name == "exponent" else 16

    rewrite(path, lambda *_: None)
    whole = bytearray(path.read_bytes())
    rewrite(path, change)
    if not resealed:
        changed = path.read_bytes()
        place = next(at for at, (one, other) in enumerate(zip(whole, changed, strict=True)) if one != other)
        assert (whole[place] ^ changed[place]).bit_count() == 1
        whole[place] = changed[place]
        path.write_bytes(whole)


def values_of(path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """What an artifact decodes to where checksums of tensors are not looked at."""
    with monkeypatch.context() as patch:
        patch.setattr("qcompress.artifact.stored_tensor.StoredTensor.check_seal", lambda _: None)
        patch.setattr("qcompress.artifact.artifact_file.ArtifactFile.check_kept", lambda *_: None)
        return load_state_dict(path)


@pytest.fixture
def broken(request: pytest.FixtureRequest, sound: Path, tmp_path: Path) -> tuple[Path, str, bool]:
    """A copy of the artifact with one bit flipped, the tensor that it changes, and whether only that can tell."""
    name, resealed = request.param
    path = tmp_path / "a.safetensors"
    path.write_bytes((sound / "a.safetensors").read_bytes())
    flip(path, name, resealed=resealed)
    return path, FLIPS[name], resealed or name == "kept"


EVERY = pytest.mark.parametrize(
    "broken",
    [(name, resealed) for name in FLIPS for resealed in (False, True)],
    indirect=True,
    ids=[f"{name}-{kind}" for name in FLIPS for kind in ("flipped", "resealed")],
)
COMMANDS: dict[str, Callable[[Path, Path], list[Any]]] = {
    "verify": lambda path, _: ["verify", path],
    "report": lambda path, _: ["report", path],
    "report --baseline": lambda path, sound: ["report", path, "--baseline", sound / "m.safetensors"],
    "export": lambda path, _: ["export", path, "--to", "safetensors"],
    "eval": lambda path, sound: ["eval", path, "-r", sound / "r.yaml"],
}


@EVERY
@pytest.mark.parametrize("command", COMMANDS)
def test_commands_refuse_it(command: str, broken: tuple[Path, str, bool], sound: Path, run: Run) -> None:
    path, tensor, told = broken
    before = files_under(path.parent)
    ran = run(*COMMANDS[command](path, sound))
    assert ran.code == 3 and ran.out == ""
    assert files_under(path.parent) == before
    assert len(ran.error_lines) == 1
    assert f"{path}: " in ran.err
    assert f"tensor {tensor!r}: its checksum does not hold" in ran.err if told else "damaged" in ran.err


@EVERY
def test_loading_refuses_it(broken: tuple[Path, str, bool]) -> None:
    path, tensor, told = broken
    module = DigitsNet()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    for read in (load_state_dict, lambda one: load_into(module, one)):
        with pytest.raises(ArtifactError) as caught:
            read(path)
        assert str(path) in str(caught.value)
        assert f"tensor {tensor!r}: its checksum does not hold" in str(caught.value) or not told
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_sound_ones_are_read_and_the_flips_would_matter(
    sound: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for words in COMMANDS.values():
        assert run(*words(sound / "a.safetensors", sound)).code == 0
    assert "top1 1 " in run("eval", sound / "a.safetensors", "-r", sound / "r.yaml").out
    before = load_state_dict(sound / "a.safetensors")
    for name, tensor in FLIPS.items():
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes((sound / "a.safetensors").read_bytes())
        flip(path, name, resealed=True)
        after = values_of(path, monkeypatch)
        assert [one for one in before if not torch.equal(before[one], after[one])] == [tensor]
        match name:
            case "exponent":
                ratio = after[tensor].norm() / before[tensor].norm()
                assert float(ratio) in (0.5, 2.0)
            case "kept":
                assert float(before[tensor][0]) > 3 > 1e-30 > float(after[tensor][0]) > 0
            case _:
                module = DigitsNet().eval()
                module.load_state_dict(after)
                images = np.load(sound / "x.npz")
                with torch.no_grad():
                    right = module(torch.from_numpy(images["x"])).argmax(1) == torch.from_numpy(images["y"])
                assert right.float().mean() < 0.9
