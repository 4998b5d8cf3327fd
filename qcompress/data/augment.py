"""Images are changed each time they are drawn for training, as they are stored: black is 0, and padding is black.

What is drawn follows from the seed and from the epoch, the step or the sample, so that a resumed run and any number of
ranks see the same images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from qcompress.data.batches import Batch, Batches
from qcompress.errors import DataError
from qcompress.types.run import seeded_generator

CROP = 4
"""Black around an image, from which `crop4` cuts."""


@dataclass(frozen=True)
class Draw:
    """The drawing of one batch for all ranks together.

    seed        of the run
    name        tells this batch from all others of the run
    rank, size  which part of the batch is read, and of how many: every `size`-th sample
    """

    seed: int
    name: str
    rank: int = 0
    size: int = 1


def read_augmented(
    batches: Batches, augment: Sequence[str], indices: Sequence[int], draw: Draw, place: str = "data.train"
) -> Batch:
    """This rank's part of a batch, its images changed, as the network takes them.

    augment  `flip`: left and right exchanged by a coin; `crop4`: a random crop after padding by 4 pixels that are 0 as
             stored, which is black
    indices  samples of the batch of all ranks
    place    names the data in errors
    raises   DataError for inputs that are no images [samples, channels, height, width]
    """
    batch = batches.read_raw(indices[draw.rank :: draw.size])
    if augment:
        images = batch.args[0] if batch.args else next(iter(batch.kwargs.values()))
        if images.ndim != 4:
            what = f"`augment` is for images, and a batch of inputs is {list(images.shape)}"
            raise DataError(place, what, "leave augment out")
        batch = _with_images(batch, _flipped_and_cropped(images, augment, len(indices), draw))
    return batches.finish(batch)


def _with_images(batch: Batch, images: Tensor) -> Batch:
    """The batch with other images in the place of its first input."""
    if batch.args:
        return replace(batch, args=(images, *batch.args[1:]))
    first = next(iter(batch.kwargs))
    return replace(batch, kwargs={**batch.kwargs, first: images})


def _flipped_and_cropped(images: Tensor, names: Sequence[str], count: int, draw: Draw) -> Tensor:
    """Images of one rank, by coins and places that are drawn for the `count` images of all ranks."""
    generator = seeded_generator(draw.seed, draw.name, "cpu")
    coins = torch.rand(count, generator=generator)[draw.rank :: draw.size]
    places = torch.randint(0, 2 * CROP + 1, (2, count), generator=generator)[:, draw.rank :: draw.size]
    if "flip" in names:
        images = torch.where((coins < 0.5).view(-1, 1, 1, 1), images.flip(3), images)
    if "crop4" in names:
        images = _crop(images, places)
    return images


def _crop(images: Tensor, places: Tensor) -> Tensor:
    """Images of the same size from padded ones, each from its own place [2, samples]."""
    samples, channels, height, width = images.shape
    padded = F.pad(images, (CROP, CROP, CROP, CROP))
    rows = places[0].view(-1, 1) + torch.arange(height)
    columns = places[1].view(-1, 1) + torch.arange(width)
    sample = torch.arange(samples).view(-1, 1, 1, 1)
    channel = torch.arange(channels).view(1, -1, 1, 1)
    return padded[sample, channel, rows.view(samples, 1, -1, 1), columns.view(samples, 1, 1, -1)]
