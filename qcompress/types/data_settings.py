"""The section `data` of a recipe: where calibration, evaluation and training data come from.

Fields are the keys of the recipe, and docstrings its reference.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, TypeAlias

from annotated_types import Ge, Gt, Interval, MinLen

from qcompress.types.config import Section
from qcompress.types.settings import Args
from qcompress.types.written import ByKey, Given, OneOf, Refused, Texts, shown_as


@dataclass(frozen=True, kw_only=True)
class Portion(Section):
    """How much of a data source is used, and in which portions.

    samples     the first so many, or with `shuffle` drawn by the seed; all where absent
    batch_size  samples that run through the network at once
    """

    samples: Annotated[int, Ge(1)] | None = None
    batch_size: Annotated[int, Ge(1)] = 64
    shuffle: bool = False


@dataclass(frozen=True, kw_only=True)
class NpzData(Portion):
    """Arrays of an npz file: uint8 images [N, H, W, C], other integer or float arrays, token ids.

    inputs      the array that the model takes, a list of them, or a mapping from its keyword arguments to arrays
    labels      the array of labels; where absent, `y` if the file has one
    scale       integer arrays other than ids become (x - zero_point) * scale; uint8 images x / 255 where absent
    zero_point  see scale
    lengths     the array of sequence lengths: what lies beyond is padding
    """

    paths: ClassVar = ("npz",)

    npz: str
    inputs: str | tuple[str, ...] | dict[str, str] = "x"
    labels: str | None = None
    scale: float | None = None
    zero_point: float | None = None
    lengths: str | None = None


@dataclass(frozen=True, kw_only=True)
class ImagesData(Portion):
    """A folder of images: a folder a class, in the order of their names, or a metadata.csv with file_name and label.

    resize  the shorter side is brought to this first
    crop    the centre that the model sees
    """

    paths: ClassVar = ("images",)

    images: str
    resize: Annotated[int, Ge(1)] | None = None
    crop: Annotated[int, Ge(1)] = 224

    @property
    def packages(self) -> tuple[str, ...]:
        return ("PIL",)


@dataclass(frozen=True, kw_only=True)
class HubData(Portion):
    """A folder that `datasets.save_to_disk` wrote.

    split      of a dataset dict
    inputs     columns that the model takes by name; with a tokenizer, one or two columns of text
    labels     the column of labels
    tokenizer  a folder that transformers.AutoTokenizer reads
    length     tokens a sample at most
    """

    paths: ClassVar = ("dataset", "tokenizer")

    dataset: str
    split: str | None = None
    inputs: Texts
    labels: str | None = "label"
    tokenizer: str | None = None
    length: Annotated[int, Ge(1)] = 128

    @property
    def packages(self) -> tuple[str, ...]:
        return ("datasets", *_tokenizer_packages(self.tokenizer))


@dataclass(frozen=True, kw_only=True)
class TextData(Portion):
    """Lines or running text and a tokenizer.

    text       one file: running text for causal-lm, sentences for the others
    target     the file of translations, line by line
    labels     the file of integer labels, line by line
    tokenizer  a folder or a tokenizer.json
    length     tokens a sample: windows of running text, the most of a sentence
    """

    paths: ClassVar = ("text", "tokenizer", "target", "labels")

    text: str
    tokenizer: str
    target: str | None = None
    labels: str | None = None
    length: Annotated[int, Ge(2)] = 256

    @property
    def packages(self) -> tuple[str, ...]:
        return _tokenizer_packages(self.tokenizer)


def _tokenizer_packages(tokenizer: str | None) -> tuple[str, ...]:
    """A folder is read by transformers, a file by tokenizers."""
    if tokenizer is None:
        return ()
    return ("tokenizers",) if tokenizer.endswith(".json") else ("transformers",)


@dataclass(frozen=True, kw_only=True)
class FactoryData(Portion):
    """A torch Dataset from code: items are (input, label), (inputs, label) or a mapping of keyword arguments."""

    factory: str
    args: Args = field(default_factory=dict)


DATA_KINDS: Mapping[str, type[Data]] = {
    "npz": NpzData,
    "images": ImagesData,
    "dataset": HubData,
    "text": TextData,
    "factory": FactoryData,
}
"""The data sources by the key that tells one from another."""

SOURCE = "data source"
Data: TypeAlias = Annotated[
    NpzData | ImagesData | HubData | TextData | FactoryData,
    ByKey(SOURCE, DATA_KINDS),
    shown_as({"npz": "val.npz"}),
]


@dataclass(frozen=True, kw_only=True)
class Flip(Section):
    """Left and right are exchanged by a coin."""


@dataclass(frozen=True, kw_only=True)
class Crop4(Section):
    """A random crop of the same size, after padding by 4 black pixels."""


@dataclass(frozen=True, kw_only=True)
class OfTorchvision(Section):
    """Something done to images that torchvision does."""

    @property
    def packages(self) -> tuple[str, ...]:
        return ("torchvision",)


@dataclass(frozen=True, kw_only=True)
class RandomResizedCrop(OfTorchvision):
    """A random part of the image, resized to a square; of a folder's images the whole ones are cut, in place of `crop`.

    size   height and width of the result
    scale  the part's share of the area, from and to
    ratio  its width over its height, from and to
    """

    size: Annotated[int, Ge(1)]
    scale: tuple[Annotated[float, Gt(0)], Annotated[float, Interval(gt=0, le=1)]] = (0.08, 1.0)
    ratio: tuple[Annotated[float, Gt(0)], Annotated[float, Gt(0)]] = (3 / 4, 4 / 3)

    def __post_init__(self) -> None:
        for name, (low, high) in (("scale", self.scale), ("ratio", self.ratio)):
            if low > high:
                raise ValueError(f"{name} goes from {low:g} down to {high:g}; give the smaller one first")


@dataclass(frozen=True, kw_only=True)
class ColorJitter(OfTorchvision):
    """Random changes of colour, in random order: factors from 1 - x to 1 + x, and a turn of the hue.

    brightness  x, from 0
    contrast    x
    saturation  x
    hue         the turn at most, in full circles
    """

    brightness: Annotated[float, Ge(0)] = 0.0
    contrast: Annotated[float, Ge(0)] = 0.0
    saturation: Annotated[float, Ge(0)] = 0.0
    hue: Annotated[float, Interval(ge=0, le=0.5)] = 0.0

    def __post_init__(self) -> None:
        if not (self.brightness or self.contrast or self.saturation or self.hue):
            raise ValueError("color_jitter changes nothing; give brightness, contrast, saturation or hue")


@dataclass(frozen=True, kw_only=True)
class RandAugment(OfTorchvision):
    """Some of fourteen changes of shape and colour, drawn for each image (Cubuk et al. 2020, arXiv 1909.13719).

    num_ops    how many
    magnitude  how far each goes
    """

    num_ops: Annotated[int, Ge(1)] = 2
    magnitude: Annotated[int, Interval(ge=0, le=30)] = 9


@dataclass(frozen=True, kw_only=True)
class MixUp(OfTorchvision):
    """Each image and its label are mixed with another's of the batch (Zhang et al. 2018, arXiv 1710.09412).

    alpha  of the Beta distribution that a batch's share is drawn from
    """

    alpha: Annotated[float, Gt(0)] = 1.0


@dataclass(frozen=True, kw_only=True)
class CutMix(OfTorchvision):
    """A rectangle of each image comes from another of the batch, as its label does in part (arXiv 1905.04899).

    alpha  of the Beta distribution that the rectangle's share is drawn from
    """

    alpha: Annotated[float, Gt(0)] = 1.0


AUGMENTATIONS: Mapping[str, type[Augmentation]] = {
    "flip": Flip,
    "crop4": Crop4,
    "random_resized_crop": RandomResizedCrop,
    "color_jitter": ColorJitter,
    "rand_augment": RandAugment,
    "mixup": MixUp,
    "cutmix": CutMix,
}
"""What can be done to an image each time it is drawn, by name."""

Augmentation: TypeAlias = Annotated[
    Flip | Crop4 | RandomResizedCrop | ColorJitter | RandAugment | MixUp | CutMix, OneOf("augmentation", AUGMENTATIONS)
]

MIXING = (MixUp, CutMix)
"""What mixes finished images of a batch, and their labels."""


def augmentation_name(step: Augmentation) -> str:
    return next(name for name, kind in AUGMENTATIONS.items() if type(step) is kind)


@dataclass(frozen=True, kw_only=True)
class TrainData(Section):
    """Training data, in a recipe the keys of its source and these.

    augment  what is done to an image each time it is drawn, in order: random_resized_crop first, mixup and cutmix last
    """

    source: Data
    augment: Annotated[tuple[Augmentation, ...], shown_as(["flip", "crop4"])] = ()

    def __post_init__(self) -> None:
        if self.augment and isinstance(self.source, TextData):
            raise Refused("augment is for images, and the data are text; leave it out", "augment")
        names = [augmentation_name(step) for step in self.augment]
        twice = next((name for index, name in enumerate(names) if name in names[:index]), None)
        if twice is not None:
            raise Refused(f"augment has {twice} twice; remove one", "augment")
        if "random_resized_crop" in names[1:]:
            raise Refused(
                "random_resized_crop is not the first of augment; put it there: it cuts whole images", "augment"
            )
        mixed = [isinstance(step, MIXING) for step in self.augment]
        if mixed != sorted(mixed):
            first = names[mixed.index(True)]
            raise Refused(f"{first} is not at the end of augment; put it there: it mixes finished images", "augment")


@dataclass(frozen=True, kw_only=True)
class Normalize(Section):
    """Per channel: (x - mean) / std, after images have become numbers from 0 to 1."""

    example: ClassVar = {"mean": [0.5], "std": [0.5]}

    mean: Annotated[tuple[float, ...], MinLen(1)]
    std: Annotated[tuple[float, ...], MinLen(1)]

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std):
            raise ValueError(f"mean has {len(self.mean)} values and std {len(self.std)}; give one for each channel")
        if not all(value > 0 for value in self.std):
            raise ValueError("std holds a value that is not above 0; give standard deviations")


@dataclass(frozen=True, kw_only=True)
class DataSettings(Section):
    """What the network runs on.

    calibration  what methods learn from; labels are not looked at
    eval         what the task is measured on
    train        what training learns from
    """

    example: ClassVar = {"eval": {"npz": "val.npz"}}

    calibration: Given[Data] = None
    eval: Given[Data] = None
    train: Given[
        Annotated[TrainData, ByKey(SOURCE, DATA_KINDS, TrainData), shown_as({"npz": "t.npz", "augment": ["flip"]})]
    ] = None
    normalize: Given[Normalize] = None
