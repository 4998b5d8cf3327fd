"""The sections of a recipe that concern a live model: network, data, task, activation quantizers, training.

Their fields are the keys of the recipe, and their docstrings its reference. Times of training are shares of all steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

from annotated_types import Ge, Gt, Interval, MinLen

from qcompress.types.config import Section
from qcompress.types.words import quoted
from qcompress.types.written import ByKey, Given, OneOf, Refused, Texts, shown_as

WEIGHT_ARGUMENTS = ("weights", "pretrained", "checkpoint_path")
"""Arguments of model factories that load weights of their own."""

LIBRARIES = ("torchvision", "timm", "transformers")
"""Packages whose networks a factory names."""

Share: TypeAlias = Annotated[float, Interval(ge=0, le=1)]
Args: TypeAlias = dict[str, Any]
"""Keyword arguments of a callable that a recipe names."""
Companion: TypeAlias = Literal["bias_correction", "batch_norm"]
"""`bias_correction` takes each layer's mean output error away; `batch_norm` re-estimates what batch norms have seen."""


@dataclass(frozen=True, kw_only=True)
class ModelSettings(Section):
    """Which network the checkpoint's weights belong to.

    factory  a network that torchvision, timm or transformers list, as "torchvision.models:resnet18"; with --allow-code
             any "package.module:callable" or "path/to/file.py:function"
    args     its keyword arguments; of a transformers class, of its Config
    blocks   globs over module names: the units that run one after another, where the model cannot be traced
    input    the shape of one input without its batch dimension, where no data shows it
    """

    example: ClassVar = {"factory": "torchvision.models:resnet18"}

    factory: str
    args: Args = field(default_factory=dict)
    blocks: Texts = ()
    input: tuple[Annotated[int, Ge(1)], ...] = ()

    def __post_init__(self) -> None:
        for name in WEIGHT_ARGUMENTS:
            if self.args.get(name) not in (None, False, ""):
                raise Refused(f"{quoted(name)} is set; remove it: weights come from the checkpoint", "args", name)

    @property
    def packages(self) -> tuple[str, ...]:
        top = self.factory.partition(".")[0].partition(":")[0]
        return tuple(name for name in LIBRARIES if name == top)


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


@dataclass(frozen=True, kw_only=True)
class Classification(Section):
    """One label for each sample from the logits [N, classes]: both metrics are measured, `metric` is the headline."""

    metrics: ClassVar[tuple[str, ...]] = ("top1", "top5")
    metric: Literal["top1", "top5"] = "top1"


@dataclass(frozen=True, kw_only=True)
class SequenceClassification(Section):
    """One label for each text, from a model that takes token ids and a mask: accuracy."""

    metrics: ClassVar[tuple[str, ...]] = ("accuracy",)


@dataclass(frozen=True, kw_only=True)
class CausalLm(Section):
    """The next token of every position: perplexity over all tokens but the first of a row."""

    metrics: ClassVar[tuple[str, ...]] = ("perplexity",)


@dataclass(frozen=True, kw_only=True)
class Translation(Section):
    """Greedy or beam decoding against reference sentences: BLEU by sacrebleu.

    length  most tokens of a translation
    beams   1 is greedy
    """

    metrics: ClassVar[tuple[str, ...]] = ("bleu",)

    length: Annotated[int, Ge(1)] = 64
    beams: Annotated[int, Interval(ge=1, le=64)] = 1

    @property
    def packages(self) -> tuple[str, ...]:
        return ("sacrebleu",)


@dataclass(frozen=True, kw_only=True)
class Reconstruction(Section):
    """Outputs against labels of the same shape: PSNR in decibels.

    peak  the largest value that a signal has
    """

    metrics: ClassVar[tuple[str, ...]] = ("psnr",)

    peak: Annotated[float, Gt(0)] = 1.0


@dataclass(frozen=True, kw_only=True)
class FactoryTask(Section):
    """A measure from code: the callable (outputs, batch) -> per-sample values; their mean is the metric.

    metric  its name
    higher  whether more is better
    """

    factory: str
    args: Args = field(default_factory=dict)
    metric: str = "score"
    higher: bool = True

    @property
    def metrics(self) -> tuple[str, ...]:
        return (self.metric,)


TASKS: Mapping[str, type[Task]] = {
    "classification": Classification,
    "sequence-classification": SequenceClassification,
    "causal-lm": CausalLm,
    "translation": Translation,
    "reconstruction": Reconstruction,
    "factory": FactoryTask,
}
"""The tasks by name; `metrics` of each are what it measures, by the names that gates use."""

Task: TypeAlias = Annotated[
    Classification | SequenceClassification | CausalLm | Translation | Reconstruction | FactoryTask,
    OneOf("task", TASKS),
    shown_as({"classification": {"metric": "top1"}}),
]


@dataclass(frozen=True, kw_only=True)
class ActivationSettings(Section):
    """Quantizers at the inputs of the compressed modules: per tensor, asymmetric, with an integer zero point.

    bits        1 to 8; the network's own input has 8 whatever this says
    range       from calibration data: `minmax`, `mse` (least squared error) or `percentile`; without data: `batch-norm`
                (mean + 6 standard deviations of what a batch norm gives, DFQ) or `noise` (as SQuant's code does). Where
                absent: mse with data, else batch-norm
    percentile  of the values that the range holds, for range: percentile
    """

    bits: Annotated[int, Interval(ge=1, le=8)] = 8
    range: Literal["minmax", "mse", "percentile", "batch-norm", "noise"] | None = None
    percentile: Annotated[float, Interval(gt=50, le=100)] | None = None

    def __post_init__(self) -> None:
        if self.percentile is not None and self.range != "percentile":
            raise ValueError("percentile needs range: percentile")
        if self.range == "percentile" and self.percentile is None:
            object.__setattr__(self, "percentile", 99.99)
        if self.range == "noise" and self.bits == 1:
            raise ValueError("range: noise has no rule for 1 bit; use another range")


@dataclass(frozen=True, kw_only=True)
class Sgd(Section):
    """Stochastic gradient descent.

    lr            learning rate at its highest
    weight_decay  of weights; biases, norms and what regularizers learn do not decay
    """

    lr: Annotated[float, Gt(0)]
    momentum: Annotated[float, Interval(ge=0, lt=1)] = 0.9
    nesterov: bool = False
    weight_decay: Annotated[float, Ge(0)] = 0.0

    def __post_init__(self) -> None:
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov needs momentum; give momentum: 0.9")


@dataclass(frozen=True, kw_only=True)
class AdamW(Section):
    """Adam with decoupled weight decay.

    lr            learning rate at its highest
    betas         of both moments
    weight_decay  of weights; biases, norms and what regularizers learn do not decay
    """

    lr: Annotated[float, Gt(0)]
    betas: tuple[Annotated[float, Interval(ge=0, lt=1)], Annotated[float, Interval(ge=0, lt=1)]] = (0.9, 0.999)
    epsilon: Annotated[float, Gt(0)] = 1e-8
    weight_decay: Annotated[float, Ge(0)] = 0.0


OPTIMIZERS: Mapping[str, type[Optimizer]] = {"sgd": Sgd, "adamw": AdamW}
Optimizer: TypeAlias = Annotated[Sgd | AdamW, OneOf("optimizer", OPTIMIZERS)]


@dataclass(frozen=True, kw_only=True)
class Constant(Section):
    """The learning rate stays."""


@dataclass(frozen=True, kw_only=True)
class Cosine(Section):
    """Half a cosine from the learning rate down.

    final  share of the learning rate at the end
    """

    final: Share = 0.0


@dataclass(frozen=True, kw_only=True)
class Step(Section):
    """The learning rate times `factor` at each of some times.

    at  shares of all steps
    """

    at: Annotated[tuple[Share, ...], MinLen(1)] = (0.5, 0.75)
    factor: Annotated[float, Gt(0)] = 0.1


SCHEDULES: Mapping[str, type[Schedule]] = {"constant": Constant, "cosine": Cosine, "step": Step}
Schedule: TypeAlias = Annotated[Constant | Cosine | Step, OneOf("schedule", SCHEDULES)]


@dataclass(frozen=True, kw_only=True)
class Distil(Section):
    """Learn from the network as it was too: (1 - share) of the task's loss, and share of the distance to its outputs.

    share        of the distance: temperature**2 times the Kullback-Leibler divergence of the softmaxes at that
                 temperature; for reconstruction the mean squared error
    temperature  of both softmaxes
    """

    share: Share = 0.5
    temperature: Annotated[float, Gt(0)] = 4.0


@dataclass(frozen=True, kw_only=True)
class Training(Section):
    """How training runs.

    optimizer        what makes a step of a gradient
    schedule         how the learning rate goes
    epochs           passes over the training data
    warm_up          share of the steps over which the learning rate rises from nothing
    label_smoothing  share of each target that is spread over all classes
    accumulate       batches whose gradients make one step
    clip_norm        the gradient's norm is cut to this; not where absent
    precision        of the forward pass; weights, gradients and regularizers stay float32
    memory_format    `channels_last`: how images lie in memory on their way through the network, for networks of
                     convolutions, which are faster so; results are the same but for rounding
    keep             the `last` weights, or the `best` by the task's metric on data.eval after each epoch
    batch_norm       `frozen`: batch norms keep the statistics that they have
    norm_batches     batches of data.train, augmented as for training, from which batch norms take their statistics anew
                     after each epoch; 0: none
    loss             "module:function" or "file.py:function": (output, batch) -> scalar; where absent the task's own
    log_steps        steps between two lines of the log
    save_steps       steps between two saved states for --resume; where absent each epoch, and every few minutes
    naive_bits       widths at which the report tries naive quantization before and after
    kmeans_bits      widths at which it tries k-means, one codebook a tensor
    """

    example: ClassVar = {"optimizer": {"sgd": {"lr": 0.001, "momentum": 0.9}}}

    optimizer: Optimizer
    schedule: Schedule = field(default_factory=Constant)
    distil: Given[Distil] = None
    epochs: Annotated[int, Ge(1)] = 1
    warm_up: Share = 0.0
    label_smoothing: Annotated[float, Interval(ge=0, lt=1)] = 0.0
    accumulate: Annotated[int, Ge(1)] = 1
    clip_norm: Annotated[float, Gt(0)] | None = None
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    memory_format: Literal["channels_last"] | None = None
    keep: Literal["last", "best"] = "last"
    batch_norm: Literal["train", "frozen"] = "train"
    norm_batches: Annotated[int, Ge(0)] = 0
    loss: str | None = None
    log_steps: Annotated[int, Ge(1)] = 50
    save_steps: Annotated[int, Ge(1)] | None = None
    naive_bits: tuple[Annotated[int, Interval(ge=1, le=8)], ...] = (2, 3, 4)
    kmeans_bits: tuple[Annotated[int, Interval(ge=1, le=8)], ...] = (1, 2)

    def __post_init__(self) -> None:
        if self.batch_norm == "frozen" and self.norm_batches:
            raise ValueError("batch_norm: frozen keeps the statistics; leave norm_batches out")
