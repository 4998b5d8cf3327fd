"""Files beside a checkpoint are read here: learned representatives, and statistics of inputs. Imports no torch."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qcompress.checkpoint.checkpoint import read_tensors, stream_checkpoint, tensor_view
from qcompress.checkpoint.safetensors_file import Container, read_container
from qcompress.checkpoint.staging import staged_output
from qcompress.errors import DataError, Subject
from qcompress.types.run import Gram

if TYPE_CHECKING:
    from torch import Tensor

SUFFIX = "representatives"
HESSIAN, MEAN = ".hessian", ".mean"


def representatives_path(checkpoint: Path) -> Path:
    """Where finetune-reg leaves what it learned: `model.reg.safetensors` beside `model.safetensors`."""
    # `.` and `..` have no name of their own.
    checkpoint = checkpoint.resolve() if checkpoint.name in ("", "..") else checkpoint
    return checkpoint.with_name(f"{checkpoint.name.removesuffix('.safetensors')}.reg.safetensors")


@functools.cache
def read_representatives(path: Path) -> Mapping[str, Tensor]:
    """Tensor name -> its representatives, float [levels]. Raises CheckpointError, DataError where there is no file."""
    if not path.is_file():
        hint = "train with min-squared, exponential, sine or cosine, or name their file with --representatives"
        raise DataError(str(path), "there are no learned representatives", hint)
    tensors, _ = read_tensors(path)
    ending = f".{SUFFIX}"
    return {name.removesuffix(ending): value for name, value in tensors.items() if name.endswith(ending)}


def count_representatives(path: Path, name: str, most: int) -> int:
    """How many different representatives a tensor has.

    most    as many as its codes can name
    raises  DataError where there is no file, and for a tensor with none, too many, or a set of them for each channel
    """
    import torch

    values = read_representatives(path).get(name)
    because = None
    if values is None:
        because = "no representatives were learned for it"
    elif values.ndim != 1:
        because = f"it has a grid for each channel, {list(values.shape)}, and no one codebook"
    elif values.numel() > most:
        because = f"it has {values.numel()} representatives, more than {int(math.log2(most))} bits can name"
    elif not bool(values.isfinite().all()):
        because = "its representatives hold NaN or Inf"
    if values is None or because is not None:
        hint = "give it a rule of its own with kmeans, more bits, or keep: {}"
        raise DataError(str(path), str(because), hint, Subject(name))
    return len(torch.unique(values.float()))


def save_statistics(statistics: Mapping[str, Tensor], path: Path) -> None:
    """Write statistics of inputs, float32, for `read_statistics`, whole or not at all. Raises ResourceError."""
    with staged_output(path, force=True, folder=False) as staged:
        stream_checkpoint(statistics, staged)


@dataclass(frozen=True)
class Statistics:
    """A file that `save_statistics` wrote; tensors are read on demand."""

    container: Container

    def gram(self, tensor: str) -> Gram:
        """What the file holds of one weight. Raises DataError where it holds nothing, or something else."""
        hessian, mean = self._read(tensor, HESSIAN), self._read(tensor, MEAN)
        groups, columns = hessian.shape[0], hessian.shape[-1]
        square = hessian.ndim == 3 and hessian.shape[1] == columns and tuple(mean.shape) == (groups, columns)
        if not square or not bool(hessian.isfinite().all()):
            raise self._error(tensor, "are damaged: no square, finite matrix for each group")
        if bool((hessian.diagonal(dim1=1, dim2=2) < 0).any()):
            raise self._error(tensor, "are damaged: a mean of squares is below zero")
        return Gram(hessian.double(), None, mean.double(), mean.double(), 0)

    def sensitivity(self, tensor: str, shape: tuple[int, ...]) -> Tensor | None:
        """What errors in each column of a weight [rows, ...] count: its mean squared input, float64 [groups, columns].

        None for a weight that the file does not know. Raises DataError where the file's is of another shape.
        """
        if f"{tensor}{HESSIAN}" not in self.container.by_name:
            return None
        gram = self.gram(tensor)
        refuse_misfit(gram, shape, f"tensor {tensor!r}")
        return gram.hessian.diagonal(dim1=1, dim2=2).clamp_min(0)

    def _read(self, tensor: str, part: str) -> Tensor:
        info = self.container.by_name.get(f"{tensor}{part}")
        if info is None or info.dtype != "F32":
            raise self._error(tensor, f"have no float32 tensor {tensor}{part}")
        return tensor_view(self.container, info).clone()

    def _error(self, tensor: str, what: str) -> DataError:
        hint = "gather them again with --save-statistics, or give this tensor a rule with squant"
        return DataError(str(self.container.path), f"the statistics {what}", hint, Subject(tensor))


def read_statistics(path: Path) -> Statistics:
    """The statistics at `path`, headers only. Raises DataError."""
    return Statistics(read_container(path, DataError))


def refuse_misfit(gram: Gram, shape: tuple[int, ...], where: str) -> None:
    """Raise DataError where statistics do not belong to a weight of shape [rows, ...]."""
    groups, columns = gram.hessian.shape[:2]
    if shape[0] % groups or math.prod(shape[1:]) != columns:
        what = f"its statistics are of {groups} groups of {columns} columns, and it has the shape {list(shape)}"
        raise DataError(where, what, "gather them on this checkpoint with --save-statistics")
