"""What the contract over exporters cannot know of each: how another tool reads its files, and what they hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from artifact.examples import make_artifact
from safetensors.torch import load_file
from torch import Tensor

from qcompress.artifact.entry import FORMS, GRIDS
from qcompress.checkpoint.checkpoint import read_checkpoint


@dataclass(frozen=True)
class Member:
    """What the contract cannot know of an exporter.

    read     the tensors of an exported file or folder as the consumer decodes them, by the checkpoint's names, those
             that are tied too
    holds    the grid forms that its files hold exactly
    make     an artifact that it holds, in a folder
    cases    others that it holds
    writes   a folder, a file, or whichever of them the artifact is
    refuses  a part of the reason why it refuses an artifact whatever its forms; empty where it does not
    """

    read: Callable[[Path], Mapping[str, Tensor]]
    holds: frozenset[str]
    make: Callable[[Path], Path] = make_artifact
    cases: Mapping[str, Callable[[Path], Path]] = field(default_factory=dict)
    writes: Literal["same", "folder", "file"] = "same"
    refuses: Callable[[Path], str] = lambda path: ""

    def writes_folder(self, path: Path) -> bool:
        return path.is_dir() if self.writes == "same" else self.writes == "folder"


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Every tensor by the safetensors library; a tied name that is not stored is in config.json or in the metadata."""
    found: dict[str, Tensor] = {}
    for file in sorted(path.glob("*.safetensors")) if path.is_dir() else [path]:
        found |= load_file(file)
    return found | {name: found[twin] for name, twin in read_checkpoint(path).tied.items()}


MEMBERS = {"safetensors": Member(read_safetensors, frozenset({*GRIDS, *FORMS} - {"affine"}))}
