"""How a live model is trained: a recipe's `finetune` section. Times are shares of all steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

from annotated_types import Ge, Gt, Interval, MinLen

from qcompress.settings.live import STRICT

Share = Annotated[float, Interval(ge=0, le=1)]


@dataclass(frozen=True, kw_only=True)
class Sgd:
    """Stochastic gradient descent.

    lr            learning rate at its highest
    weight_decay  of weights; biases, norms and what regularizers learn do not decay
    """

    lr: Annotated[float, Gt(0)]
    momentum: Annotated[float, Interval(ge=0, lt=1)] = 0.9
    nesterov: bool = False
    weight_decay: Annotated[float, Ge(0)] = 0.0

    __pydantic_config__: ClassVar[Any] = STRICT

    def __post_init__(self) -> None:
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov needs momentum; give momentum: 0.9")


@dataclass(frozen=True, kw_only=True)
class AdamW:
    """Adam with decoupled weight decay.

    lr            learning rate at its highest
    betas         of both moments
    weight_decay  of weights; biases, norms and what regularizers learn do not decay
    """

    lr: Annotated[float, Gt(0)]
    betas: tuple[Annotated[float, Interval(ge=0, lt=1)], Annotated[float, Interval(ge=0, lt=1)]] = (0.9, 0.999)
    epsilon: Annotated[float, Gt(0)] = 1e-8
    weight_decay: Annotated[float, Ge(0)] = 0.0

    __pydantic_config__: ClassVar[Any] = STRICT


Optimizer: TypeAlias = Sgd | AdamW
OPTIMIZERS: Mapping[str, type[Any]] = {"sgd": Sgd, "adamw": AdamW}


@dataclass(frozen=True, kw_only=True)
class Constant:
    """The learning rate stays."""

    __pydantic_config__: ClassVar[Any] = STRICT


@dataclass(frozen=True, kw_only=True)
class Cosine:
    """Half a cosine from the learning rate down.

    final  share of the learning rate at the end
    """

    final: Share = 0.0

    __pydantic_config__: ClassVar[Any] = STRICT


@dataclass(frozen=True, kw_only=True)
class Step:
    """The learning rate times `factor` at each of some times.

    at  shares of all steps
    """

    at: Annotated[tuple[Share, ...], MinLen(1)] = (0.5, 0.75)
    factor: Annotated[float, Gt(0)] = 0.1

    __pydantic_config__: ClassVar[Any] = STRICT


Schedule: TypeAlias = Constant | Cosine | Step
SCHEDULES: Mapping[str, type[Any]] = {"constant": Constant, "cosine": Cosine, "step": Step}


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """How training runs.

    epochs           passes over the training data
    warm_up          share of the steps over which the learning rate rises from nothing
    label_smoothing  share of each target that is spread over all classes
    accumulate       batches whose gradients make one step
    clip_norm        the gradient's norm is cut to this; not where absent
    precision        of the forward pass; weights, gradients and regularizers stay float32
    keep             the `last` weights, or the `best` by the task's metric on data.eval after each epoch
    batch_norm       `frozen`: batch norms keep the statistics that they have
    norm_batches     batches of data.train from which batch norms take their statistics anew after each epoch; 0: none
    loss             "module:function" or "file.py:function": (output, batch) -> scalar; the task's own where absent
    log_steps        steps between two lines of the log
    save_steps       steps between two saved states for --resume; where absent each epoch, and every few minutes
    naive_bits       widths at which the report tries naive quantization before and after
    kmeans_bits      widths at which it tries k-means, one codebook a tensor
    """

    epochs: Annotated[int, Ge(1)] = 1
    warm_up: Share = 0.0
    label_smoothing: Annotated[float, Interval(ge=0, lt=1)] = 0.0
    accumulate: Annotated[int, Ge(1)] = 1
    clip_norm: Annotated[float, Gt(0)] | None = None
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    keep: Literal["last", "best"] = "last"
    batch_norm: Literal["train", "frozen"] = "train"
    norm_batches: Annotated[int, Ge(0)] = 0
    loss: str | None = None
    log_steps: Annotated[int, Ge(1)] = 50
    save_steps: Annotated[int, Ge(1)] | None = None
    naive_bits: tuple[Annotated[int, Interval(ge=1, le=8)], ...] = (2, 3, 4)
    kmeans_bits: tuple[Annotated[int, Interval(ge=1, le=8)], ...] = (1, 2)

    __pydantic_config__: ClassVar[Any] = STRICT

    def __post_init__(self) -> None:
        if self.batch_norm == "frozen" and self.norm_batches:
            raise ValueError("batch_norm: frozen keeps the statistics; leave norm_batches out")


@dataclass(frozen=True, kw_only=True)
class Distil:
    """Learn from the network as it was too: (1 - share) of the task's loss, and share of the distance to its outputs.

    share        of the distance: temperature**2 times the Kullback-Leibler divergence of the softmaxes at that
                 temperature; for reconstruction the mean squared error
    temperature  of both softmaxes
    """

    share: Share = 0.5
    temperature: Annotated[float, Gt(0)] = 4.0

    __pydantic_config__: ClassVar[Any] = STRICT


@dataclass(frozen=True, kw_only=True)
class Training:
    """A `finetune` section but for its regularizers."""

    options: TrainingOptions = field(default_factory=TrainingOptions)
    optimizer: Optimizer
    schedule: Schedule = field(default_factory=Constant)
    distil: Distil | None = None
