"""Images are changed each time they are drawn for training, as they are stored: black is 0, and padding is black.

What is drawn follows from the seed, the epoch and the batch or the sample: a resumed run and any number of ranks see
the same images.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qcompress.data.batches import Batch, Batches
from qcompress.data.foreign import first_line
from qcompress.data.user_code import import_package
from qcompress.errors import DataError
from qcompress.types.data_settings import (
    Augmentation,
    ColorJitter,
    Crop4,
    CutMix,
    Flip,
    MixUp,
    RandAugment,
    RandomResizedCrop,
    augmentation_name,
)
from qcompress.types.run import forked_seed, seeded_generator

CROP = 4
"""Black around an image, from which `crop4` cuts."""


@dataclass(frozen=True)
class Draw:
    """The drawing of one batch for all ranks together.

    seed        of the run
    epoch       tells the pass over the data from all others of the run
    batch       tells the batch from all others of the pass
    rank, size  which part of the batch is read, and of how many: every `size`-th sample
    """

    seed: int
    epoch: str
    batch: str
    rank: int = 0
    size: int = 1


def load_augmentations(augment: Sequence[Augmentation]) -> None:
    """Make ready what is not our own. Raises UsageError for a missing extra."""
    for step in augment:
        if step.packages:
            _transform(step)


def read_augmented(
    batches: Batches, augment: Sequence[Augmentation], indices: Sequence[int], draw: Draw, place: str = "data.train"
) -> Batch:
    """This rank's part of a batch, its images changed, as the network takes them.

    Images change as they are stored, one after the other; those of a folder that are cut at random are cut from the
    whole. Finished ones are then mixed, and labels become class probabilities, float32 [samples, classes], with as many
    classes as the batch shows.

    augment  in order; a cut at random first, mixing last
    indices  samples of the batch of all ranks
    place    names the data in errors
    raises   DataError for inputs that are no images [samples, channels, height, width], or not such as a step takes;
             UsageError for a missing extra
    """
    steps = [step for step in augment if not isinstance(step, MixUp | CutMix)]
    mixing = [step for step in augment if isinstance(step, MixUp | CutMix)]
    places = [*range(len(indices))][draw.rank :: draw.size]
    if mixing and draw.size > 1:
        # Each sample is mixed with the one before it in the whole batch, which another rank has.
        places = [place for own in places for place in ((own - 1) % len(indices), own)]
    drawn = _Drawn(draw, [indices[one] for one in places], places, len(indices), place)
    batch = drawn.read(batches, steps)
    if not mixing:
        return batches.finish(batch)
    mixed = drawn.mixed(batches.finish(batch), mixing)
    return mixed if draw.size == 1 else mixed.part(slice(1, None, 2))


@dataclass(frozen=True)
class _Drawn:
    """The samples of a drawn batch that are read, each with its place in the batch of all ranks, which has `count`."""

    draw: Draw
    samples: Sequence[int]
    places: Sequence[int]
    count: int
    name: str

    def read(self, batches: Batches, steps: Sequence[Augmentation]) -> Batch:
        """The samples as they are stored, changed."""
        if steps and isinstance(steps[0], RandomResizedCrop) and batches.read_cut is not None:
            first, *steps = steps
            with _own_random_numbers():
                batch = batches.read_cut(self.samples, lambda image, index: self._transformed(first, image, index))
        else:
            batch = batches.read_raw(self.samples)
        for step in steps:
            batch = _with_images(batch, self._changed(step, self._images(batch)))
        return batch

    def mixed(self, batch: Batch, steps: Sequence[Augmentation]) -> Batch:
        """Finished samples, each mixed with the one before it; of several ways of mixing, one by chance."""
        images, labels = self._images(batch), batch.labels
        if labels is None or labels.is_floating_point() or labels.ndim != 1 or int(labels.min()) < 0:
            what = "has no labels" if labels is None else "has labels that are no classes"
            hint = f"give one class a sample, or leave {augmentation_name(steps[0])} out"
            raise DataError(self.name, what, hint)
        classes = int(labels.max()) + 1
        with _own_random_numbers():
            self._seed("mixing", self.draw.batch)
            choice = int(torch.randint(len(steps), ()))
            images, labels = _transform(steps[choice], classes)(images, labels)
        return replace(_with_images(batch, images), labels=labels)

    def _images(self, batch: Batch) -> Tensor:
        images = batch.args[0] if batch.args else next(iter(batch.kwargs.values()))
        if images.ndim != 4:
            what = f"`augment` is for images, and a batch of inputs is {list(images.shape)}"
            raise DataError(self.name, what, "leave augment out")
        return images

    def _changed(self, step: Augmentation, images: Tensor) -> Tensor:
        match step:
            case Flip():
                return torch.where((self._places()[0] < 0.5).view(-1, 1, 1, 1), images.flip(3), images)
            case Crop4():
                return _crop(images, self._places()[1])
        if isinstance(step, ColorJitter | RandAugment) and (
            images.dtype != torch.uint8 or images.shape[1] not in (1, 3)
        ):
            kind = f"{images.shape[1]} channels of {str(images.dtype).removeprefix('torch.')}"
            what = f"{augmentation_name(step)} is for images in bytes with 1 or 3 channels, and these have {kind}"
            raise DataError(self.name, what, f"store them as uint8, or leave {augmentation_name(step)} out")
        with _own_random_numbers():
            return torch.stack([self._transformed(step, image, index) for index, image in enumerate(images)])

    def _places(self) -> tuple[Tensor, Tensor]:
        """A coin of each sample, and a row and a column from which to crop, [2, samples]."""
        generator = seeded_generator(self.draw.seed, f"{self.draw.epoch}, {self.draw.batch}", "cpu")
        coins = torch.rand(self.count, generator=generator)
        corners = torch.randint(0, 2 * CROP + 1, (2, self.count), generator=generator)
        places = torch.tensor(self.places)
        return coins[places], corners[:, places]

    def _transformed(self, step: Augmentation, image: Tensor, index: int) -> Tensor:
        """The image [channels, height, width] of the sample with this index, changed by torchvision."""
        self._seed(augmentation_name(step), str(self.samples[index]))
        try:
            changed: Tensor = _transform(step)(image)
        except (TypeError, ValueError, RuntimeError) as error:
            what = f"{augmentation_name(step)} does not take images of {list(image.shape)}: {first_line(error)}"
            raise DataError(self.name, what, "leave it out") from None
        return changed

    def _seed(self, what: str, which: str) -> None:
        torch.default_generator.manual_seed(forked_seed(self.draw.seed, f"{what} of {which}, {self.draw.epoch}"))


@contextmanager
def _own_random_numbers() -> Iterator[None]:
    """torchvision draws from torch's global generator on the CPU; afterwards it is as it was."""
    state = torch.get_rng_state()
    try:
        yield
    finally:
        torch.set_rng_state(state)


@cache
def _transform(step: Augmentation, classes: int | None = None) -> Any:
    """torchvision's transform of the same name. Raises UsageError for a missing extra."""
    transforms = import_package("torchvision.transforms.v2")
    more = {"num_classes": classes} if isinstance(step, MixUp | CutMix) else {}
    return getattr(transforms, type(step).__name__)(**asdict(step), **more)


def _with_images(batch: Batch, images: Tensor) -> Batch:
    """The batch with other images in the place of its first input."""
    if batch.args:
        return replace(batch, args=(images, *batch.args[1:]))
    first = next(iter(batch.kwargs))
    return replace(batch, kwargs={**batch.kwargs, first: images})


def _crop(images: Tensor, corners: Tensor) -> Tensor:
    """Images of the same size from padded ones, each from its own corner [2, samples]."""
    samples, channels, height, width = images.shape
    padded = F.pad(images, (CROP, CROP, CROP, CROP))
    rows = corners[0].view(-1, 1) + torch.arange(height)
    columns = corners[1].view(-1, 1) + torch.arange(width)
    sample = torch.arange(samples).view(-1, 1, 1, 1)
    channel = torch.arange(channels).view(1, -1, 1, 1)
    return padded[sample, channel, rows.view(samples, 1, -1, 1), columns.view(samples, 1, 1, -1)]
