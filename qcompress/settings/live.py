"""The sections of a recipe that bring a live model, as plain values: no torch, nothing read yet.

Paths are as the recipe has them: looked up from its folder, then from QCOMPRESS_DATA.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

from annotated_types import Ge, Gt, Interval, MinLen

STRICT: Any = {"extra": "forbid", "strict": True}


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """Which network the checkpoint's weights belong to.

    factory  "package.module:callable", or "path/to/file.py:function", which needs --allow-code
    args     its keyword arguments; of a transformers class, of its Config
    blocks   globs over module names: the units that run one after another, where the model cannot be traced
    input    the shape of one input without its batch dimension, where no data shows it
    """

    factory: str
    args: dict[str, Any] = field(default_factory=dict)
    blocks: tuple[str, ...] = ()
    input: tuple[Annotated[int, Ge(1)], ...] = ()

    __pydantic_config__: ClassVar[Any] = STRICT


@dataclass(frozen=True, kw_only=True)
class Portion:
    """How much of a data source is used, and in which portions.

    samples     the first so many, or with `shuffle` drawn by the seed; all where absent
    batch_size  samples that run through the network at once
    """

    samples: Annotated[int, Ge(1)] | None = None
    batch_size: Annotated[int, Ge(1)] = 64
    shuffle: bool = False

    __pydantic_config__: ClassVar[Any] = STRICT


@dataclass(frozen=True, kw_only=True)
class NpzData(Portion):
    """Arrays of an npz file: uint8 images [N, H, W, C], other integer or float arrays, token ids.

    inputs      the array that the model takes, a list of them, or a mapping from its keyword arguments to arrays
    labels      the array of labels; where absent, `y` if the file has one
    scale       integer arrays other than ids become (x - zero_point) * scale; uint8 images x / 255 where absent
    zero_point  see scale
    lengths     the array of sequence lengths: what lies beyond is padding
    """

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

    images: str
    resize: Annotated[int, Ge(1)] | None = None
    crop: Annotated[int, Ge(1)] = 224


@dataclass(frozen=True, kw_only=True)
class HubData(Portion):
    """A folder that `datasets.save_to_disk` wrote.

    split      of a dataset dict
    inputs     columns that the model takes by name; with a tokenizer, one or two columns of text
    labels     the column of labels
    tokenizer  a folder that transformers.AutoTokenizer reads
    length     tokens a sample at most
    """

    dataset: str
    split: str | None = None
    inputs: tuple[str, ...]
    labels: str | None = "label"
    tokenizer: str | None = None
    length: Annotated[int, Ge(1)] = 128


@dataclass(frozen=True, kw_only=True)
class TextData(Portion):
    """Lines or running text and a tokenizer.

    text       one file: running text for causal-lm, sentences for the others
    target     the file of translations, line by line
    labels     the file of integer labels, line by line
    tokenizer  a folder or a tokenizer.json
    length     tokens a sample: windows of running text, the most of a sentence
    """

    text: str
    tokenizer: str
    target: str | None = None
    labels: str | None = None
    length: Annotated[int, Ge(2)] = 256


@dataclass(frozen=True, kw_only=True)
class FactoryData(Portion):
    """A torch Dataset from code: items are (input, label), (inputs, label) or a mapping of keyword arguments."""

    factory: str
    args: dict[str, Any] = field(default_factory=dict)


Data: TypeAlias = NpzData | ImagesData | HubData | TextData | FactoryData

DATA_KINDS: Mapping[str, type[Any]] = {
    "npz": NpzData,
    "images": ImagesData,
    "dataset": HubData,
    "text": TextData,
    "factory": FactoryData,
}
"""The data sources by the key that tells one from another."""


AUGMENTATIONS = ("flip", "crop4")
"""Left and right exchanged by a coin; a random crop after padding by 4."""


@dataclass(frozen=True, kw_only=True)
class TrainData:
    """Training data and what is done to an image each time it is drawn."""

    source: Data
    augment: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Normalize:
    """Per channel: (x - mean) / std, after images have become numbers from 0 to 1."""

    mean: Annotated[tuple[float, ...], MinLen(1)]
    std: Annotated[tuple[float, ...], MinLen(1)]

    __pydantic_config__: ClassVar[Any] = STRICT

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std):
            raise ValueError(f"mean has {len(self.mean)} values and std {len(self.std)}; give one for each channel")
        if not all(value > 0 for value in self.std):
            raise ValueError("std holds a value that is not above 0; give standard deviations")


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """What a live model runs on: each part where the recipe has it."""

    calibration: Data | None = None
    eval: Data | None = None
    train: TrainData | None = None
    normalize: Normalize | None = None


@dataclass(frozen=True, kw_only=True)
class Classification:
    """One label for each sample from the logits [N, classes]: both metrics are measured, `metric` is the headline."""

    metric: Literal["top1", "top5"] = "top1"

    __pydantic_config__: ClassVar[Any] = STRICT


@dataclass(frozen=True, kw_only=True)
class SequenceClassification:
    """One label for each text, from a model that takes token ids and a mask: accuracy."""

    __pydantic_config__: ClassVar[Any] = STRICT


@dataclass(frozen=True, kw_only=True)
class CausalLm:
    """The next token of every position: perplexity over all tokens but the first of a row."""

    __pydantic_config__: ClassVar[Any] = STRICT


@dataclass(frozen=True, kw_only=True)
class Translation:
    """Greedy or beam decoding against reference sentences: BLEU by sacrebleu.

    length  most tokens of a translation
    beams   1 is greedy
    """

    length: Annotated[int, Ge(1)] = 64
    beams: Annotated[int, Interval(ge=1, le=64)] = 1

    __pydantic_config__: ClassVar[Any] = STRICT


@dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """Outputs against labels of the same shape: PSNR in decibels.

    peak  the largest value that a signal has
    """

    peak: Annotated[float, Gt(0)] = 1.0

    __pydantic_config__: ClassVar[Any] = STRICT


@dataclass(frozen=True, kw_only=True)
class FactoryTask:
    """A measure from code: the callable (outputs, batch) -> per-sample values; their mean is the metric.

    metric  its name
    higher  whether more is better
    """

    factory: str
    args: dict[str, Any] = field(default_factory=dict)
    metric: str = "score"
    higher: bool = True

    __pydantic_config__: ClassVar[Any] = STRICT


Task: TypeAlias = Classification | SequenceClassification | CausalLm | Translation | Reconstruction | FactoryTask

TASKS: Mapping[str, type[Any]] = {
    "classification": Classification,
    "sequence-classification": SequenceClassification,
    "causal-lm": CausalLm,
    "translation": Translation,
    "reconstruction": Reconstruction,
    "factory": FactoryTask,
}


@dataclass(frozen=True, kw_only=True)
class ActivationSettings:
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

    __pydantic_config__: ClassVar[Any] = STRICT

    def __post_init__(self) -> None:
        if self.percentile is not None and self.range != "percentile":
            raise ValueError("percentile needs range: percentile")
        if self.range == "percentile" and self.percentile is None:
            object.__setattr__(self, "percentile", 99.99)
        if self.range == "noise" and self.bits == 1:
            raise ValueError("range: noise has no rule for 1 bit; use another range")


Companion: TypeAlias = Literal["bias_correction", "batch_norm"]
"""`bias_correction` takes each layer's mean output error away; `batch_norm` re-estimates what batch norms have seen."""
