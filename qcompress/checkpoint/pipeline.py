"""A diffusers pipeline is a folder of networks, each a checkpoint folder of its own. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from qcompress.checkpoint.checkpoint import FETCH, INDEX_SUFFIX, read_json
from qcompress.checkpoint.safetensors_file import weight_files
from qcompress.errors import CheckpointError

MODEL_INDEX = "model_index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def is_pipeline(path: Path) -> bool:
    """Whether a path is a folder that says of itself which networks it is made of."""
    return (path / MODEL_INDEX).is_file()


def read_pipeline(folder: Path) -> list[Path]:
    """The folders of a pipeline that hold weights, in the order of their names.

    raises  CheckpointError for components that model_index.json names and that are not there, or are pickles
    """
    for name, kind in read_json(folder / MODEL_INDEX).items():
        if name.startswith("_") or not isinstance(kind, list) or not any(kind):
            continue
        part = folder / name
        if Path(name).name != name or not part.is_dir():
            what = f"promises the component {name!r}, which is not there: an unfinished download"
            raise CheckpointError(str(folder / MODEL_INDEX), what, FETCH)
        if not _has_weights(part) and any(file for glob in PICKLES for file in part.glob(glob)):
            what, hint = "holds no .safetensors file, only pickles", "convert it to safetensors first"
            raise CheckpointError(str(part), what, hint)
    found = [part for part in _folders(folder) if _has_weights(part)]
    if not found:
        raise CheckpointError(
            str(folder), "is a pipeline, and no component holds a .safetensors file", "check the path"
        )
    return found


def other_folders(folder: Path) -> Iterator[Path]:
    """The folders of a pipeline without weights, such as that of its tokenizer, and those within them."""
    waiting = [part for part in _folders(folder) if not _has_weights(part)]
    while waiting:
        part = waiting.pop(0)
        yield part
        waiting += _folders(part)


def _folders(folder: Path) -> list[Path]:
    # A link to a folder may lead anywhere.
    return sorted(
        part for part in folder.iterdir() if part.is_dir() and not part.is_symlink() and not part.name.startswith(".")
    )


def _has_weights(folder: Path) -> bool:
    return bool(weight_files(folder) or weight_files(folder, INDEX_SUFFIX))
