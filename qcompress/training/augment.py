"""What is done to images each time they are drawn: the same for the same seed, step and place in the batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from qcompress.errors import DataError
from qcompress.model.batches import Batch
from qcompress.training.parallel import ALONE, World

CROP = 4


def augment(batch: Batch, names: Sequence[str], generator: torch.Generator, world: World = ALONE) -> Batch:
    """The batch with its images changed.

    names      `flip`: left and right exchanged by a coin; `crop4`: a random crop after padding by 4 zeros, which are
               the mean where images are standardized
    generator  on the CPU, in the same state on all ranks, which together draw as one process with the whole batch would
    raises     DataError for inputs that are no images [samples, channels, height, width]
    """
    if not names:
        return batch
    images = batch.args[0] if batch.args else next(iter(batch.kwargs.values()))
    if images.ndim != 4:
        what = f"`augment` is for images, and a batch of inputs is {list(images.shape)}"
        raise DataError("data.train", what, "leave augment out")
    count = len(images) * world.size
    coins = torch.rand(count, generator=generator)[world.rank :: world.size]
    places = torch.randint(0, 2 * CROP + 1, (2, count), generator=generator)[:, world.rank :: world.size]
    if "flip" in names:
        flipped = (coins < 0.5).to(images.device).view(-1, 1, 1, 1)
        images = torch.where(flipped, images.flip(3), images)
    if "crop4" in names:
        images = _crop(images, places.to(images.device))
    if batch.args:
        return replace(batch, args=(images, *batch.args[1:]))
    first = next(iter(batch.kwargs))
    return replace(batch, kwargs={**batch.kwargs, first: images})


def _crop(images: Tensor, places: Tensor) -> Tensor:
    """Images of the same size from padded ones, each from its own place [2, samples]."""
    samples, channels, height, width = images.shape
    padded = F.pad(images, (CROP, CROP, CROP, CROP))
    rows = places[0].view(-1, 1) + torch.arange(height, device=images.device)
    columns = places[1].view(-1, 1) + torch.arange(width, device=images.device)
    sample = torch.arange(samples, device=images.device).view(-1, 1, 1, 1)
    channel = torch.arange(channels, device=images.device).view(1, -1, 1, 1)
    return padded[sample, channel, rows.view(samples, 1, -1, 1), columns.view(samples, 1, 1, -1)]
