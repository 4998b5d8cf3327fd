"""What becomes of an artifact in another tool's format: a plan, made before a byte is written, and a report of it.

Importing it imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from qcompress.types.config import Shape

if TYPE_CHECKING:
    from typing_extensions import Buffer


@dataclass(frozen=True)
class ExportOptions:
    """What an exporter is told; it heeds what its entry in the registry names.

    keep_unfit    write a tensor that the format cannot hold dense, in its own dtype, in place of refusing it
    mixed         let the weights that vLLM fuses into one have different grids
    pad_hidden    fill hidden sizes of feed-forward layers up with zeros to what the format can hold
    round_scales  round scales and offsets to the float16 numbers of the format, where they are none
    """

    keep_unfit: bool = False
    mixed: bool = False
    pad_hidden: bool = False
    round_scales: bool = False


@dataclass(frozen=True)
class Target:
    """One tensor that an export writes.

    dtype    as its container names it
    source   the tensor of the artifact that it is made of
    held     what the report counts it under, as "Q4_0" or "F32"
    weights  how many weights it holds; 0 where it only belongs to some
    pieces   its bytes, checked, in order; raises ArtifactError
    """

    name: str
    dtype: str
    shape: Shape
    n_bytes: int
    source: str
    held: str
    weights: int
    pieces: Callable[[], Iterator[Buffer]]


@dataclass(frozen=True)
class ExportFile:
    """One file of weights: its head, then its tensors, each at a multiple of `alignment` bytes from the file's start.

    name  of the file in its folder; empty where the export is one file
    """

    name: str
    head: bytes
    targets: tuple[Target, ...]
    alignment: int = 1

    def filling(self, n_bytes: int) -> int:
        """The zeros behind so many bytes, up to where a tensor may start."""
        return -n_bytes % self.alignment

    @property
    def n_bytes(self) -> int:
        return len(self.head) + sum(target.n_bytes + self.filling(target.n_bytes) for target in self.targets)


@dataclass(frozen=True)
class HeldAs:
    """The tensors of an export that one type of its format holds.

    n_bytes  with all that belongs to them
    """

    name: str
    tensors: int
    weights: int
    n_bytes: int


@dataclass(frozen=True)
class ExportPlan:
    """All that an export writes, decided before a byte of it is written.

    folder  whether it is a folder; else it is its one file
    texts   files that are written as they stand here
    copied  files that are copied
    notes   what a user should know, one line each
    """

    folder: bool
    files: tuple[ExportFile, ...]
    texts: Mapping[str, bytes] = field(default_factory=dict)
    copied: Sequence[Path] = ()
    notes: Sequence[str] = ()

    @property
    def data_bytes(self) -> int:
        return sum(target.n_bytes for file in self.files for target in file.targets)

    @property
    def sizes(self) -> dict[str, int]:
        """File -> its bytes, in the order of their names."""
        sizes = {file.name: file.n_bytes for file in self.files}
        sizes |= {name: len(text) for name, text in self.texts.items()}
        sizes |= {path.name: path.stat().st_size for path in self.copied}
        return dict(sorted(sizes.items()))

    @property
    def n_bytes(self) -> int:
        return sum(self.sizes.values())

    @property
    def held(self) -> list[HeldAs]:
        """By what the weights are held, the most bytes first."""
        targets = [target for file in self.files for target in file.targets]
        names = dict.fromkeys(target.held for target in targets)
        found = [
            HeldAs(
                name,
                len({target.source for target in targets if target.held == name}),
                sum(target.weights for target in targets if target.held == name),
                sum(target.n_bytes for target in targets if target.held == name),
            )
            for name in names
        ]
        return sorted(found, key=lambda one: (-one.n_bytes, one.name))
