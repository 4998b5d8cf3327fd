"""A model runs on batches of inputs and labels, read when they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from qcompress.data.foreign import find_file
from qcompress.errors import DataError, ModelError, QcompressError
from qcompress.types.data_settings import Normalize
from qcompress.types.ranks import ALONE, World


@dataclass(frozen=True)
class Batch:
    """Samples that run through a network at once: module(*args, **kwargs).

    args, kwargs  tensors with the samples along dimension 0
    labels        what is right, one a sample or one a position; None where the data have none
    lengths       int64 [samples]: what lies beyond is padding
    texts         reference sentences, one a sample
    """

    args: tuple[Tensor, ...] = ()
    kwargs: Mapping[str, Tensor] = field(default_factory=dict)
    labels: Tensor | None = None
    lengths: Tensor | None = None
    texts: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """Samples."""
        return len(self.args[0] if self.args else next(iter(self.kwargs.values())))

    def to(self, device: torch.device | str) -> Batch:
        return replace(
            self,
            args=tuple(x.to(device) for x in self.args),
            kwargs={name: x.to(device) for name, x in self.kwargs.items()},
            labels=None if self.labels is None else self.labels.to(device),
            lengths=None if self.lengths is None else self.lengths.to(device),
        )

    def channels_last(self) -> Batch:
        """The same values, those of images [samples, channels, height, width] with their channels last in memory."""

        def laid_out(x: Tensor) -> Tensor:
            return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x

        return replace(
            self,
            args=tuple(laid_out(x) for x in self.args),
            kwargs={name: laid_out(x) for name, x in self.kwargs.items()},
        )

    def first(self, samples: int) -> Batch:
        """The batch cut to its first samples."""
        return self.part(slice(samples))

    def part(self, samples: slice) -> Batch:
        """The batch of these samples."""
        return replace(
            self,
            args=tuple(x[samples] for x in self.args),
            kwargs={name: x[samples] for name, x in self.kwargs.items()},
            labels=None if self.labels is None else self.labels[samples],
            lengths=None if self.lengths is None else self.lengths[samples],
            texts=self.texts[samples],
        )


Reader: TypeAlias = Callable[[Sequence[int]], Batch]
"""Indices -> the batch of those samples."""

Cut: TypeAlias = Callable[[Tensor, int], Tensor]
"""A whole image [channels, height, width] and its place among those that are read -> a part of it."""

CutReader: TypeAlias = Callable[[Sequence[int], Cut], Batch]
"""Indices and how to cut the images -> the batch of those samples."""


def unchanged(batch: Batch) -> Batch:
    return batch


@dataclass(frozen=True)
class Batches:
    """`samples` samples in portions of `batch_size`; the same ones every time.

    read_raw  gives inputs as they are stored: images in bytes, black being 0
    finish    makes of those what the network takes, scaled and standardized
    read_cut  gives them cut as one likes, where `read_raw` does not give all that is stored
    """

    samples: int
    batch_size: int
    read_raw: Reader
    finish: Callable[[Batch], Batch] = unchanged
    read_cut: CutReader | None = None

    def read(self, indices: Sequence[int]) -> Batch:
        """These samples as the network takes them."""
        return self.finish(self.read_raw(indices))

    def __len__(self) -> int:
        return -(-self.samples // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        return self.of_rank(ALONE)

    def of_rank(self, world: World) -> Iterator[Batch]:
        """Every `size`-th batch, from this rank's own on: together the ranks have all of them."""
        for start in range(world.rank * self.batch_size, self.samples, world.size * self.batch_size):
            yield self.read(range(start, min(start + self.batch_size, self.samples)))

    def shuffled(self, generator: torch.Generator, world: int = 1, *, skip: int = 0) -> Iterator[list[int]]:
        """The samples of one epoch's steps in random order: each time a whole batch for each of `world` ranks.

        Of those, every `world`-th is a rank's. What is left over is left out, and so are the first `skip` steps.
        """
        order = torch.randperm(self.samples, generator=generator).tolist()
        size = self.batch_size * world
        for start in range(skip * size, self.samples - size + 1, size):
            yield order[start : start + size]


def run_model(module: nn.Module, batch: Batch) -> Tensor:
    """The logits, or whatever the model's output holds first. Raises ModelError where it does not run."""
    try:
        return first_tensor(module(*batch.args, **batch.kwargs))
    except QcompressError:
        raise
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError, KeyError) as error:
        shapes = ", ".join(str(list(x.shape)) for x in (*batch.args, *batch.kwargs.values()))
        what = f"does not run on inputs of {shapes}: {' '.join(str(error).split())[:200]}"
        raise ModelError(type(module).__name__, what, "check the data's shapes, and model.args") from None


def first_tensor(output: Any) -> Tensor:
    """The logits or whatever else an output holds first: of a tensor, a tuple, a mapping or an object with `logits`."""
    if isinstance(output, Tensor):
        return output
    if getattr(output, "logits", None) is not None:
        return first_tensor(output.logits)
    if isinstance(output, Mapping):
        return first_tensor(next(iter(output.values())))
    return first_tensor(output[0])


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
        return find_file(self.root, name, self.place)

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
