"""Second moments of every layer's inputs, saved once so that later runs need neither the model nor its data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qcompress.checkpoint import tensor_view, write_checkpoint
from qcompress.container import Container, read_container
from qcompress.errors import DataError
from qcompress.model.layers import Gram, matrix_layer
from qcompress.model.sweep import sweep

if TYPE_CHECKING:
    from qcompress.model.live import LiveModel

HESSIAN, MEAN = ".hessian", ".mean"


def measure_statistics(live: LiveModel) -> dict[str, Tensor]:
    """For each weight T of a matrix product `T.hessian` float32 [groups, columns, columns], `T.mean` [groups, columns].

    They are the means over positions of x x^T and of x, the layer's inputs in the full-precision network.
    """
    products = [name for name in live.layers if matrix_layer(live.module.get_submodule(name)) is not None]
    statistics: dict[str, Tensor] = {}
    for step in sweep(live, products, sequential=False):
        gram = step.gram()
        statistics[f"{step.name}.weight{HESSIAN}"] = gram.hessian.float().cpu()
        statistics[f"{step.name}.weight{MEAN}"] = gram.mean.float().cpu()
    return statistics


def save_statistics(statistics: Mapping[str, Tensor], path: Path) -> None:
    write_checkpoint(statistics, path)


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
        mend = "gather them again with --save-statistics, or give this tensor a rule with squant"
        return DataError(f"{self.container.path}: tensor {tensor!r}", f"the statistics {what}", mend)


def read_statistics(path: Path) -> Statistics:
    """The statistics at `path`, headers only. Raises DataError."""
    return Statistics(read_container(path, DataError))


def refuse_misfit(gram: Gram, shape: tuple[int, ...], where: str) -> None:
    """Raise DataError where statistics do not belong to a weight of shape [rows, ...]."""
    groups, columns = gram.hessian.shape[:2]
    if shape[0] % groups or torch.Size(shape[1:]).numel() != columns:
        what = f"its statistics are of {groups} groups of {columns} columns, and it has the shape {list(shape)}"
        raise DataError(where, what, "gather them on this checkpoint with --save-statistics")
