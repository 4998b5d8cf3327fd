"""Every kind of file that a command reads: sound ones to start from, and how they are read."""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from artifact.examples import rewrite, seal
from safetensors.torch import load_file
from torch import Tensor

from fuzz.campaign import Disagree, Target
from fuzz.commands import command_targets
from fuzz.folders import folder_targets
from fuzz.mutations import mutate_bytes, mutate_json, mutate_text, mutate_value
from fuzz.sound import digest, samples
from qcompress.artifact.reader import read_artifact
from qcompress.checkpoint.checkpoint import read_checkpoint
from qcompress.checkpoint.side_files import HESSIAN, read_statistics, save_statistics
from qcompress.compress.export import export
from qcompress.compress.load import load_state_dict
from qcompress.data.foreign import first_line
from qcompress.encode.journal import Journal
from qcompress.errors import QcompressError, TrainingError
from qcompress.plan.sensitivity import read_sensitivity
from qcompress.recipe import read_recipe
from qcompress.report.document_json import read_report
from qcompress.report.gather import gather_report
from qcompress.report.html.render_html import render_html
from qcompress.report.render import Format, render
from qcompress.types.data_settings import ImagesData, NpzData


def make_targets(scratch: Path) -> dict[str, Target]:
    """All targets by name; sound files are made under `scratch`."""
    found = [
        *_of_artifacts(scratch),
        *_of_text(scratch),
        *_of_data(scratch),
        *_of_runs(scratch),
        *folder_targets(scratch),
        *command_targets(scratch),
    ]
    return {target.name: target for target in found}


def checkpoint_bytes(**tensors: Tensor) -> bytes:
    from safetensors.torch import save

    return bytes(save(tensors, {"format": "pt"}))


def gaussian(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))


# --- artifacts --------------------------------------------------------------------------------------------------------

GOLDEN = Path(__file__).parent.parent / "golden"
LARGEST_SEED = 2000
"""Bytes of the golden artifacts to start from: small ones, so that a mutation hits something that matters."""


def _of_artifacts(scratch: Path) -> list[Target]:
    """Golden artifacts of every form and coding: as they are damaged by chance, and by those who know the checksums."""
    seeds = {path.stem: path.read_bytes() for path in sorted(GOLDEN.glob("*.safetensors"))}
    seeds = {name: data for name, data in seeds.items() if len(data) < LARGEST_SEED}
    place = scratch / "sealed.safetensors"

    def sealed(data: bytes, chance: Random) -> bytes:
        place.write_bytes(data)
        try:
            rewrite(place, lambda header, manifest, raw: _change(header, manifest, raw, chance))
        except Exception:
            # The writer of the tests takes sound manifests only; what it cannot seal is read as far as it was written.
            return mutate_bytes(place.read_bytes(), chance)
        return place.read_bytes()

    return [
        Target("artifact", seeds, mutate_bytes, _weights, ".safetensors", lambda one, other: bool(one == other)),
        Target("sealed artifact", seeds, sealed, _agreed, ".safetensors"),
    ]


def _change(header: dict[str, Any], manifest: dict[str, Any], data: bytearray, chance: Random) -> None:
    """Change a field of an entry, a number, or bytes of one stored tensor, and make that tensor's checksum true."""
    stored = [name for name, entry in header.items() if name != "__metadata__" and entry["data_offsets"][1]]
    match chance.randrange(4):
        case 0 | 1:
            begin, end = header[chance.choice(stored)]["data_offsets"]
            changed = mutate_bytes(bytes(data[begin:end]), chance)[: end - begin]
            data[begin : begin + len(changed)] = changed
        case 2:
            key = chance.choice(sorted(manifest.keys() - {"numbers"}))
            manifest[key] = mutate_value(manifest[key], chance)
        case 3:
            kind = chance.choice(("coding", "exponent", "entries", "value"))
            for name in manifest["numbers"][kind]:
                manifest["numbers"][kind][name] = chance.choice((0, 1, 2, 3, -126, 111, 255, 2**16 - 1, 1e300))
    for name in manifest["numbers"]["crc32"]:
        seal(header, manifest, bytes(data), name)


def _weights(path: Path) -> dict[str, str]:
    return {name: digest(value) for name, value in load_state_dict(path).items()}


def _agreed(path: Path) -> dict[str, str]:
    """What all readers say; an error of ours where all refuse, and Disagree where some do."""
    readers: dict[str, Callable[[Path], Any]] = {
        "load": _weights,
        "verify": lambda at: [name for name, _ in read_artifact(at).verify()],
        "report": lambda at: render([gather_report(at)], "csv"),
        "export": lambda at: _exported(at, at.with_name("dense.safetensors")),
    }
    found: dict[str, Any] = {}
    for name, read in readers.items():
        try:
            found[name] = read(path)
        except QcompressError as error:
            found[name] = error
    refused = [name for name, value in found.items() if isinstance(value, QcompressError)]
    if len(refused) == len(found):
        raise found["load"]
    # A report tells of the file's sizes, which a damaged code does not change.
    if refused not in ([], ["load", "verify", "export"]):
        raise Disagree(f"refused by {refused}: {found[refused[0]]}")
    if refused:
        raise found["load"]
    if found["export"] != found["load"]:
        raise Disagree("export gives other weights than load_state_dict")
    weights: dict[str, str] = found["load"]
    return weights


def _exported(path: Path, output: Path) -> dict[str, str]:
    export(read_artifact(path), output, force=True)
    return {name: digest(value) for name, value in load_file(output).items()}


# --- text and JSON ----------------------------------------------------------------------------------------------------

RECIPE = b"""version: 1
seed: 7
model: {factory: "torchvision.models:resnet18", args: {num_classes: 10}}
data:
  calibration: {npz: calib.npz, samples: 64, batch_size: 16}
  eval: {npz: val.npz}
  train: {npz: train.npz, augment: [flip, crop4]}
  normalize: {mean: [0.5, 0.4, 0.3], std: [0.2, 0.2, 0.2]}
task: {classification: {metric: top1}}
rules:
  - {match: "classifier.*", mse: {bits: 8}}
  - match: ["*.weight", "*.w"]
    squant: {bits: 4, granularity: group, group_size: 64}
  - {match: "*.bias", keep: {}}
activations: {bits: 8}
companions: [bias_correction, batch_norm]
finetune:
  epochs: 3
  optimizer: {sgd: {lr: 0.001, momentum: 0.9}}
  regularize:
    - {match: "*.weight", dsmm: {strength: 0.01, alpha: 0.1}}
gates: {max_drop: {top1: 0.02}, max_size: 2MB}
"""


def _shown(path: Path) -> str:
    """A report in every format."""
    report = read_report(path)
    forms: tuple[Format, ...] = ("table", "json", "markdown", "csv")
    return "".join([*(render([report], form) for form in forms), render_html([report])])


def _of_text(scratch: Path) -> list[Target]:
    from fuzz.sound import compressed, sensitivity_file

    return [
        Target("recipe", {"a": RECIPE}, mutate_text, lambda path: repr(read_recipe(path))),
        Target(
            "report",
            {"a": compressed(scratch, "--bits", 3)[1]},
            mutate_json,
            _shown,
            ".json",
        ),
        Target(
            "sensitivity", {"a": sensitivity_file()}, mutate_json, lambda path: repr(read_sensitivity(path)), ".json"
        ),
    ]


# --- data -------------------------------------------------------------------------------------------------------------


def _of_data(scratch: Path) -> list[Target]:
    def npz(save: Any) -> bytes:
        stream = io.BytesIO()
        pixels = np.random.default_rng(0).integers(0, 255, (12, 4, 4, 3), dtype=np.uint8)
        save(stream, x=pixels, y=np.arange(12))
        return stream.getvalue()

    def image(form: str, mode: str = "RGB") -> bytes:
        from PIL import Image

        stream = io.BytesIO()
        Image.effect_noise((16, 16), 60).convert(mode).save(stream, form)
        return stream.getvalue()

    table = b"file_name,label\na.png,0\nb.png,3\n"
    images = {form: image(form) for form in ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP", "PPM")}

    def read_table(path: Path) -> Any:
        folder = path.with_name(f"{path.name}.folder")
        folder.mkdir(exist_ok=True)
        for name in ("a.png", "b.png"):
            (folder / name).write_bytes(images["PNG"])
        (folder / "metadata.csv").write_bytes(path.read_bytes())
        return samples(folder, ImagesData(images=str(folder), crop=8))

    def read_image(path: Path) -> Any:
        folder = path.with_name(f"{path.name}.folder")
        folder.mkdir(exist_ok=True)
        (folder / "a.png").write_bytes(path.read_bytes())
        return samples(folder, ImagesData(images=str(folder), resize=8, crop=8))

    return [
        Target(
            "npz",
            {"stored": npz(np.savez), "deflated": npz(np.savez_compressed)},
            mutate_bytes,
            lambda path: samples(path.parent, NpzData(npz=path.name)),
            ".npz",
        ),
        Target("image", images, mutate_bytes, read_image),
        Target("table of images", {"a": table}, mutate_text, read_table),
    ]


# --- checkpoints, and what a run leaves behind ------------------------------------------------------------------------


def _of_runs(scratch: Path) -> list[Target]:
    from fuzz.sound import journal_of_a_killed_run, training_state
    from qcompress.training.state import _read

    plain = checkpoint_bytes(w=gaussian(6, 10), b=gaussian(6), half=gaussian(3, 5).half(), ids=torch.arange(9))
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        save_statistics({f"w{HESSIAN}": torch.eye(10).repeat(1, 1, 1), "w.mean": gaussian(1, 10)}, Path(folder) / "s")
        statistics = (Path(folder) / "s").read_bytes()
    journal, key = journal_of_a_killed_run(scratch)

    def read_plain(path: Path) -> dict[str, str]:
        found = read_checkpoint(path)
        return {
            info.name: f"{info} {bytes(found.shard_of(info.name).bytes_of(info.name)).hex()}" for info in found.tensors
        }

    def read_state(path: Path) -> Any:
        try:
            tensors, document = _read(path)
        except (KeyError, ValueError) as error:
            # `load_state` says so of what is no state at all.
            raise TrainingError(str(path), f"is no saved state: {first_line(error)}", "start again") from None
        return {name: digest(value) for name, value in tensors.items()}, json.dumps(document)

    def read_journal(path: Path) -> list[str]:
        return [repr(record) for record in Journal(path, key).read()]

    def is_start(whole: list[str], found: list[str]) -> bool:
        return found == whole[: len(found)]

    return [
        Target("checkpoint", {"a": plain}, mutate_bytes, read_plain, ".safetensors"),
        Target(
            "statistics",
            {"a": statistics},
            mutate_bytes,
            lambda path: digest(read_statistics(path).gram("w").hessian),
            ".safetensors",
        ),
        Target("journal", {"a": journal}, mutate_text, read_journal, "", is_start),
        Target("state", {"a": training_state(scratch)}, mutate_bytes, read_state, ".safetensors", _never),
    ]


def _never(_: Any, __: Any) -> bool:
    return False
