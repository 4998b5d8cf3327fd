"""Configs and entries of the methods that share weights: codes name the entries of a codebook."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Gt, Interval

from qcompress.registry.contract import Method
from qcompress.types.config import CodebookDtype, Form, Granularity, MethodConfig, Rows, Section, Shape, Share

CENTROID_BYTES = {"f16": 2, "f32": 4, "int8": 1}


@dataclass(frozen=True, kw_only=True)
class Tune(Section):
    """Centroid tuning: entries are trained, codes stay.

    epochs         passes over data.train
    learning_rate  of SGD with momentum 0.9, falling along half a cosine; `mean` wants some 30 times as much
    gradient       the sum of an entry's weights' gradients, as it is (`sum`), or divided by their number (`mean`) or
                   its root (`rms`): the raw sum diverges on layers of any size
    """

    epochs: Annotated[int, Ge(1)] = 3
    learning_rate: Annotated[float, Gt(0)] = 1e-4
    gradient: Literal["rms", "sum", "mean"] = "rms"


@dataclass(frozen=True, kw_only=True)
class ClusterConfig(MethodConfig):
    """What all methods with a codebook share.

    bits         a codebook has 2**bits entries, fewer where fewer values differ
    dim          neighbouring channels that have one code together: bits / dim bits a weight; must divide the channels
    granularity  one codebook for the whole tensor, for each channel, or for each `group_size` channels; where absent
                 `tensor`, or `group` where `group_size` is given
    group_size   channels that share a codebook
    codebook     how entries are stored; codes are chosen against what is stored
    tune         centroid tuning on data.train, which needs a model: `epochs` (3), `learning_rate` (0.0001), `gradient`
    axis         the channel axis, or the pair of them in stacked experts; where absent the checkpoint's, else 0
    """

    example: ClassVar = {"bits": 4}

    bits: Annotated[int, Interval(ge=1, le=12)]
    dim: Annotated[int, Interval(ge=1, le=8)] = 1
    granularity: Granularity | None = None
    group_size: Annotated[int, Ge(1)] | None = None
    codebook: CodebookDtype = "f16"
    tune: Tune | None = None
    axis: int | tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        granularity = self.granularity or ("group" if self.group_size else "tensor")
        object.__setattr__(self, "granularity", granularity)
        if granularity == "group" and self.group_size is None:
            raise ValueError("granularity: group needs group_size, the channels that share a codebook")
        if granularity != "group" and self.group_size is not None:
            raise ValueError(f"group_size needs granularity: group, not {granularity}")
        if granularity == "channel" and self.dim > 1:
            raise ValueError("a vector spans channels; use granularity: tensor or group with dim")

    @property
    def form(self) -> Form:
        return "codebook"

    def refuse(self, rows: Rows) -> str | None:
        """Why a weight cannot have such a codebook; whether it pays, `refuse_cost` tells."""
        count = rows[0]
        if count % self.dim:
            return f"dim {self.dim} does not divide its {count} channels"
        channels = {"tensor": count, "channel": 1, "group": self.group_size or 1}[self.unit]
        if count % channels:
            return f"group_size {channels} does not divide its {count} channels"
        if channels % self.dim:
            return f"dim {self.dim} does not divide the {channels} channels of a codebook"
        return None


@dataclass(frozen=True, kw_only=True)
class KmeansConfig(ClusterConfig):
    """k-means: the codebook of least squared error, exact for scalars of 16 bits.

    init   where scalar codebooks begin: `optimal` ends at the global optimum, or within a bound of it; `linear` between
           the ends, `density` at equal shares of the weights, `random` weights, or `k-means++`. Vectors begin with
           `k-means++` unless `random` is asked for
    zero   one entry is exactly 0; scalars only
    share  one codebook for several tensors of the same settings: those of a `layer` (all whose names agree up
           to the first number, as in `model.layers.3`; without one, of one parent module), of a `type` (whose names end
           in the same two parts, as in `q_proj.weight`), or all of the `model`
    """

    init: Literal["optimal", "linear", "density", "random", "k-means++"] = "optimal"
    zero: bool = False
    share: Share | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.share is not None and self.granularity != "tensor":
            raise ValueError(f"share: {self.share} needs granularity: tensor, not {self.granularity}")
        if self.dim > 1 and self.zero:
            raise ValueError("zero is for scalars; leave it out with dim")
        if self.dim > 1 and self.init in ("linear", "density"):
            raise ValueError(f"init: {self.init} is for scalars; use k-means++ or random with dim")


@dataclass(frozen=True, kw_only=True)
class LearnedConfig(ClusterConfig):
    """The representatives that finetune-reg learned: assign each weight to the nearest, then recentre.

    bits      the most that the representatives may need; the artifact has as many as they do
    recentre  move each representative to the mean of its weights
    """

    bits: Annotated[int, Interval(ge=1, le=12)] = 12
    recentre: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dim > 1 or self.granularity != "tensor":
            raise ValueError("representatives are scalars, one set a tensor; leave dim and granularity out")

    def refuse(self, rows: Rows) -> str | None:
        return None


@dataclass(frozen=True, kw_only=True)
class DkmConfig(ClusterConfig):
    """Differentiable k-means: weights are trained as soft means of their centroids.

    iterations   of soft k-means in each step, all of them unrolled by the gradient
    metric       the distance that is softened: `squared`, or `plain` Euclidean
    temperature  fixed, in units of the metric; where absent a share of each codebook's gaps
    temperature_share  of the squared mean gap (of the gap, for the plain metric) at the start and the end of training
    levels       `f32` computes on all weights; `bf16` and `f16` on the distinct values of weights rounded to 16 bits,
                 with the gradient straight through: much faster, for dim 1
    """

    iterations: Annotated[int, Interval(ge=1, le=10)] = 3
    metric: Literal["squared", "plain"] = "squared"
    temperature: Annotated[float, Gt(0)] | None = None
    temperature_share: tuple[Annotated[float, Gt(0)], Annotated[float, Gt(0)]] = (0.5, 0.02)
    levels: Literal["f32", "bf16", "f16"] = "f32"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.levels != "f32" and self.dim > 1:
            raise ValueError(f"levels: {self.levels} is for scalars; leave it out with dim")


def refuse_cost(config: ClusterConfig, shapes: Sequence[Shape], stored_bytes: int) -> str | None:
    """Why weights [rows, ...], one or all that share a codebook, would not be smaller with it, or None.

    stored_bytes  what all of them take in the checkpoint
    """
    numbers = sum(math.prod(shape) for shape in shapes)
    if isinstance(config, LearnedConfig) or numbers == 1:
        return None
    rows = shapes[0][0]
    tables = {"tensor": 1, "channel": rows, "group": rows // (config.group_size or 1)}[config.unit]
    entries = min(2**config.bits, numbers // tables // config.dim)
    table = tables * entries * config.dim * CENTROID_BYTES[config.codebook]
    codes = sum(shape[0] // config.dim * -(-math.prod(shape[1:]) * config.bits // 8) for shape in shapes)
    if table + codes < stored_bytes:
        return None
    codebooks = f"{tables} x {entries} entries of {config.dim}"
    return f"{codes} bytes of codes and {table} of codebook ({codebooks}) are no less than the {stored_bytes} of now"


CLUSTERS: tuple[Method, ...] = (
    Method("kmeans", "cluster", KmeansConfig, "weights", statistics=True),
    Method("learned", "cluster", LearnedConfig, "weights", statistics=True, representatives=True),
    Method("dkm", "cluster", DkmConfig, "training", called=True, adjusts=True),
)
