"""The sections of a recipe that concern a live model: network, task, activation quantizers, training.

Their fields are the keys of the recipe, and their docstrings its reference. Times of training are shares of all steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

from annotated_types import Ge, Gt, Interval, MinLen

from qcompress.types.config import Section
from qcompress.types.words import quoted
from qcompress.types.written import Given, OneOf, Refused, Texts, shown_as

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
    offload  `blocks`: the weights of one block at a time are in memory, for networks of any size; `none`: all are.
             Where absent: blocks for a network that does not fit --max-memory
    """

    example: ClassVar = {"factory": "torchvision.models:resnet18"}

    factory: str
    args: Args = field(default_factory=dict)
    blocks: Texts = ()
    input: tuple[Annotated[int, Ge(1)], ...] = ()
    offload: Literal["blocks", "none"] | None = None

    def __post_init__(self) -> None:
        for name in WEIGHT_ARGUMENTS:
            if self.args.get(name) not in (None, False, ""):
                raise Refused(f"{quoted(name)} is set; remove it: weights come from the checkpoint", "args", name)

    @property
    def packages(self) -> tuple[str, ...]:
        top = self.factory.partition(".")[0].partition(":")[0]
        return tuple(name for name in LIBRARIES if name == top)


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
