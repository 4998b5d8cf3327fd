"""The data that a recipe names, as batches."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from qcompress.errors import DataError
from qcompress.model.batches import Batch, Batches
from qcompress.settings import Data, FactoryData, HubData, ImagesData, Normalize, NpzData, TextData

Change = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Source:
    """Where data come from, whatever kind they are.

    root   the recipe's folder, from which its paths start; then comes QCOMPRESS_DATA
    place  names the recipe's section in errors
    """

    root: Path
    place: str
    normalize: Normalize | None = None
    allow_code: bool = False

    def find(self, name: str) -> Path:
        """The file or folder of that name. Raises DataError."""
        base = os.environ.get("QCOMPRESS_DATA")
        for folder in (self.root, *([Path(base)] if base else [])):
            if (folder / name).exists():
                return folder / name
        where = "the recipe's folder" + (", nor in QCOMPRESS_DATA" if base else "; QCOMPRESS_DATA is not set")
        raise DataError(
            self.place, f"{name!r} is not in {where}", "check the path, or set QCOMPRESS_DATA to its folder"
        )

    def standardized(self, x: Tensor) -> Tensor:
        """Images or signals [samples, channels, ...] less the mean, over the standard deviation of each channel."""
        if self.normalize is None:
            return x
        mean, std = (torch.tensor(values).view(1, -1, *[1] * (x.ndim - 2)) for values in self._per_channel(x))
        return (x - mean) / std

    def _per_channel(self, x: Tensor) -> tuple[Sequence[float], Sequence[float]]:
        assert self.normalize is not None
        mean, std = self.normalize.mean, self.normalize.std
        if len(mean) not in (1, x.shape[1]):
            what = f"names {len(mean)} channels, and the data have {x.shape[1]}"
            raise DataError(
                self.place.rpartition(".")[0] + ".normalize", what, "give one mean and std for each channel"
            )
        return mean, std


def read_data(settings: Data, source: Source, seed: int) -> Batches:
    """The samples that a recipe's section asks for, checked as far as can be without reading them all.

    raises  DataError for what is missing, damaged or does not fit; UsageError for a missing extra
    """
    match settings:
        case NpzData():
            from qcompress.model.data_npz import read_npz

            total, read = read_npz(settings, source)
        case ImagesData():
            from qcompress.model.data_images import read_images

            total, read = read_images(settings, source)
        case HubData():
            from qcompress.model.data_text import read_hub

            total, read = read_hub(settings, source)
        case TextData():
            from qcompress.model.data_text import read_text

            total, read = read_text(settings, source)
        case FactoryData():
            from qcompress.model.data_factory import read_factory

            total, read = read_factory(settings, source)
    wanted = total if settings.samples is None else settings.samples
    if wanted > total:
        mend = f"ask for at most {total}, or leave `samples` out"
        raise DataError(source.place, f"{wanted} samples are asked for and there are {total}", mend)
    if total == 0:
        raise DataError(source.place, "there are no samples", "check the folder or the file")
    if not settings.shuffle:
        return Batches(wanted, settings.batch_size, read)
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(total, generator=generator)[:wanted].sort().values.tolist()

    def read_chosen(indices: Sequence[int]) -> Batch:
        return read([chosen[index] for index in indices])

    return Batches(wanted, settings.batch_size, read_chosen)
