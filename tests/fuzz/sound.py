"""Sound files of this tool to start from: made by real runs on small networks, the same every time."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import io
import json
import pkgutil
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

import qcompress
from qcompress.cli.app import run
from qcompress.data.batches import Source
from qcompress.data.sources import read_data
from qcompress.model.factories import without_network
from qcompress.plan.sensitivity import SENSITIVITY, LayerCosts, Sensitivity, WidthCost
from qcompress.training.state import save_state
from qcompress.types.data_settings import Data
from qcompress.types.settings import Sgd


def import_all() -> None:
    """Import every module of the package, and what they import for a network: no child of this process has to then."""
    for module in pkgutil.walk_packages(qcompress.__path__, "qcompress."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    with without_network():
        pass


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def digest(value: Tensor) -> str:
    raw = value.contiguous().view(-1).view(torch.uint8).numpy()
    return f"{value.dtype} {list(value.shape)} {hashlib.sha256(raw).hexdigest()}"


def samples(folder: Path, settings: Data) -> list[str]:
    batches = read_data(settings, Source(folder, "data.eval"), 0)
    return [digest(x) for batch in batches for x in (*batch.args, batch.labels) if x is not None]


def small_weights() -> dict[str, Tensor]:
    return {
        "conv.weight": gaussian(6, 3, 3, 3, seed=1),
        "conv.bias": gaussian(6, seed=2),
        "fc.weight": gaussian(5, 12, seed=3).half(),
        "steps": torch.arange(4),
    }


def compressed(scratch: Path, *words: object, command: str = "quantize") -> tuple[bytes, bytes]:
    """What a command makes of the small weights: the artifact's bytes and the report's."""
    from qcompress.checkpoint.checkpoint import write_checkpoint

    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        source, output = Path(folder) / "m.safetensors", Path(folder) / "a.safetensors"
        write_checkpoint(small_weights(), source)
        with contextlib.redirect_stdout(io.StringIO()):
            code = run([command, str(source), *map(str, words), "-o", str(output), "-q", "--threads", "1"])
        assert code == 0, words
        return output.read_bytes(), output.with_name("a.report.json").read_bytes()


def sensitivity_file() -> bytes:
    widths = tuple(
        WidthCost(bits=bits, bytes=20 * bits, relative_error=4.0**-bits, divergence=3.0**-bits, metrics={"top1": 0.9})
        for bits in (2, 3, 4)
    )
    layers = tuple(
        LayerCosts(name=name, shape=shape, method="mse", grid="channel", widths=widths)
        for name, shape in (("conv.weight", (6, 3, 3, 3)), ("fc.weight", (5, 12)))
    )
    found = Sensitivity(
        checkpoint="m.safetensors",
        input_sha256="0" * 64,
        measured_sha256="1" * 64,
        divergence_kind="kl",
        divergence_data="calibration",
        divergence_samples=8,
        metric_samples=8,
        higher={"top1": True},
        baseline={"top1": 0.95},
        layers=layers,
    )
    return SENSITIVITY.text(found).encode()


class _Killed(BaseException):
    pass


def journal_of_a_killed_run(scratch: Path) -> tuple[bytes, str]:
    """The journal of a run that ended after two tensors, and the key of that run."""
    from artifact.examples import plan_for

    from qcompress.checkpoint.checkpoint import read_checkpoint, write_checkpoint
    from qcompress.compress.compress import compress
    from qcompress.recipe import parse_recipe
    from qcompress.types.run import Options

    done = 0

    def advance(name: str, n_bytes: int) -> None:
        nonlocal done
        done += name.endswith("weight")
        if done == 3:
            raise _Killed

    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        source = Path(folder) / "m.safetensors"
        write_checkpoint({f"{index}.weight": gaussian(4, 9, seed=index) for index in range(4)}, source)
        recipe = parse_recipe('version: 1\nrules: [{match: "*", mse: {bits: 3}}]\n', "r.yaml")
        checkpoint = read_checkpoint(source)
        options = replace(Options(Path(folder) / "a.safetensors", choice="packed", resume=True), progress=advance)
        with contextlib.suppress(_Killed):
            compress(checkpoint, plan_for(checkpoint, recipe), options)
        journal = (Path(folder) / ".a.safetensors.partial" / "m.safetensors.journal").read_bytes()
    return journal, json.loads(journal.partition(b"\n")[0])["key"]


def training_state(scratch: Path) -> bytes:
    from training.test_state import IDENTITY, trainee

    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        save_state(Path(folder) / "s", trainee(Sgd(lr=0.05)), IDENTITY)
        return (Path(folder) / "s").read_bytes()
