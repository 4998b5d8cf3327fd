"""Configs and entries of the weight regularizers. Imports no torch.

`preset: paper-dsmm` and `preset: paper-qar` fill what is left open as the papers have it, without it with what measures
best (docs/results.md). Times are shares of all steps; strengths multiply the penalty that each docstring names.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, TypeAlias

from annotated_types import Ge, Gt, Interval

from qcompress.types.config import PenaltyConfig, Shape
from qcompress.types.settings import Share

Strength: TypeAlias = Annotated[float, Ge(0)]
Layers = Literal["all", "conv", "dense"]
Reduction = Literal["sum", "mean"]
RangeOf = Literal["minmax", "quantile", "sigma"]

MOST_LEVELS = 4096


@dataclass(frozen=True, kw_only=True)
class RegularizerConfig(PenaltyConfig):
    """What all regularizers share.

    strength         factor of the penalty
    start            share of the steps before it begins
    ramp             share of the steps over which it grows to its strength
    hold             share of the steps that it then stays; where absent to the end
    shape            how it grows
    layers           weights of all convolutions and dense layers, or of one kind; other tensors only where named
    layer_reduction  over the layers of this rule
    normalize        divide by the weight's standard deviation or variance, which the gradient takes for constants
    coupling         `coupled`: part of the loss; `decoupled`: a step of its own at the learning rate, beside the
                     optimizer's; `proximal`: the exact minimum near the weight, where there is a closed form
    every            it is applied every so many steps, scaled by their number
    learning_rate    of what the regularizer learns; where absent the optimizer's
    weight_decay     of what the regularizer learns: only 0 is meaningful
    """

    strength: Strength | None = None
    start: Share | None = None
    ramp: Share | None = None
    hold: Share | None = None
    shape: Literal["linear", "cosine", "tanh"] = "linear"
    layers: Layers = "all"
    layer_reduction: Reduction = "sum"
    normalize: Literal["none", "std", "var"] = "none"
    coupling: Literal["coupled", "decoupled", "proximal"] = "coupled"
    every: Annotated[int, Ge(1)] = 1
    learning_rate: Annotated[float, Gt(0)] | None = None
    weight_decay: float = 0.0

    has_proximal: ClassVar[bool] = False

    def __post_init__(self) -> None:
        self._fill({"start": 0.0, "ramp": 0.0})
        assert self.start is not None and self.ramp is not None
        if self.weight_decay:
            raise ValueError("what a regularizer learns must not decay; leave weight_decay out here")
        if self.start + self.ramp + (self.hold or 0.0) > 1 + 1e-9:
            raise ValueError("start, ramp and hold pass the end of training; they are shares that sum to at most 1")
        if self.coupling == "proximal" and not self.has_proximal:
            raise ValueError("there is no closed proximal form; use coupling: decoupled")
        if self.coupling == "proximal" and self.normalize != "none":
            raise ValueError("proximal steps are not normalized; leave normalize out")

    @property
    def levels(self) -> int | None:
        """How many minima or representatives of its own it pulls weights to; None where it has none."""
        return None


@dataclass(frozen=True, kw_only=True)
class DsmmConfig(RegularizerConfig):
    """Differentiable soft min-max: the range of a weight by softmax-weighted averages, plus exp(-alpha).

    strength     factor of the penalty; `schedule`: for each weight the least at which a learned alpha settles within
                 the schedule, at -ln(2 variance)
    preset       `paper-dsmm`: strength 0.01, alpha from 0.1, learned. The paper leaves open: sum over layers (ours),
                 which weights (all convolutions and dense layers), decay and learning rate of alpha (none, the
                 optimizer's). Without it: strength 0.1 and alpha: auto
    alpha        the temperature, in units of 1 / weight; `auto` keeps it at 2 standard deviations of the weight
    learnable    whether alpha is trained; not with auto
    alpha_min    alpha is kept at least here: below 0 the penalty would widen the range
    granularity  one range a tensor, or one a channel, whose mean is taken
    dim          weights a vector, for vector codebooks: the mean of one range for each place in the vector
    reduction    over channels or places
    """

    strength: Strength | Literal["schedule"] | None = None  # type: ignore[assignment]
    preset: Literal["paper-dsmm"] | None = None
    alpha: Annotated[float, Gt(0)] | Literal["auto"] | None = None
    learnable: bool | None = None
    alpha_min: Annotated[float, Gt(0)] = 1e-3
    granularity: Literal["tensor", "channel"] = "tensor"
    dim: Annotated[int, Interval(ge=1, le=8)] = 1
    reduction: Reduction = "mean"

    def __post_init__(self) -> None:
        paper = {"strength": 0.01, "alpha": 0.1}
        self._fill(paper if self.preset == "paper-dsmm" else {"strength": 0.1, "alpha": "auto"})
        self._fill({"learnable": self.alpha != "auto"})
        if self.learnable and self.alpha == "auto":
            raise ValueError("alpha: auto follows the weight; use learnable: false, or give a number to start from")
        if self.strength == "schedule" and not self.learnable:
            raise ValueError("strength: schedule leads a learned alpha; use preset: paper-dsmm, or give a number")
        if self.dim > 1 and self.granularity == "channel":
            raise ValueError("dim counts places in a vector; use granularity: tensor with it")
        if self.normalize == "var":
            raise ValueError("a range is in units of the weight; use normalize: std")
        super().__post_init__()


@dataclass(frozen=True, kw_only=True)
class PeriodicConfig(RegularizerConfig):
    """What sine and cosine share.

    levels     minima, evenly spaced in the range
    range      `minmax`, `quantile` (1 to 99 %) or `sigma` (2.5 standard deviations to either side) of the weight when
               the penalty begins; or [low, high]
    outside    beyond the range: `periodic` goes on, `hinge` grows linearly, `clamp` stays
    power      1: the absolute value, 2: the square, which is smooth
    height     of the penalty half-way between minima: `one` for all, as published; or that of their `gap` over pi, to
               the power, so that all weights are pulled alike whatever their layer's scale
    reduction  over the weights
    """

    preset: Literal["paper-qar"] | None = None
    levels: Annotated[int, Interval(ge=2, le=MOST_LEVELS)] | None = None
    range: RangeOf | tuple[float, float] | None = None
    outside: Literal["periodic", "hinge", "clamp"] | None = None
    power: Literal[1, 2] = 1
    height: Literal["one", "gap"] = "one"
    reduction: Reduction = "sum"

    def __post_init__(self) -> None:
        paper = self.preset == "paper-qar"
        self._fill({"outside": "periodic", "range": "minmax"} if paper else {"outside": "hinge", "range": "quantile"})
        self._fill({"strength": 1e-4} if paper else {"strength": 1e-4, "start": 0.3, "ramp": 0.4})
        if isinstance(self.range, tuple) and self.range[0] >= self.range[1]:
            raise ValueError("range: its low end is not below its high end; give [low, high]")
        super().__post_init__()


@dataclass(frozen=True, kw_only=True)
class SineConfig(PeriodicConfig):
    """|sin(pi (levels - 1) u)|, u in [0, 1] over the range: minima at both ends and evenly between.

    preset       `paper-qar`: from the first step, on the range that the weights then have, summed. The paper leaves
                 open: strength (ours 1e-4), range, sum or mean. Without it: on the range when it begins, 0.3 to 0.7 of
                 the steps
    bits         in place of levels: the min-max grid that rtn would use now, a step of its own for each channel
    granularity  of that grid
    """

    bits: Annotated[int, Interval(ge=1, le=8)] | None = None
    granularity: Literal["tensor", "channel"] | None = None

    def __post_init__(self) -> None:
        if (self.levels is None) == (self.bits is None):
            raise ValueError("the minima are not said; give levels, or bits for the grid that quantize will use")
        if self.bits is None and self.granularity is not None:
            raise ValueError("granularity is that of the grid of so many bits; give bits, or leave it out")
        if self.bits is not None:
            self._fill({"granularity": "channel"})
            if self.range is not None or self.outside is not None:
                raise ValueError("the grid of so many bits has its own range; leave range and outside out")
        super().__post_init__()


@dataclass(frozen=True, kw_only=True)
class CosineConfig(PeriodicConfig):
    """|cos(pi levels u)|, u in [0, 1] over the range: minima in the middle of so many equal parts, none at the ends.

    preset  `paper-qar`: as for sine; the formula itself is reconstructed from the paper's words
    """

    def __post_init__(self) -> None:
        if self.levels is None:
            raise ValueError("`levels` is missing; give the number of minima")
        super().__post_init__()


@dataclass(frozen=True, kw_only=True)
class RepresentativesConfig(RegularizerConfig):
    """What min-squared and exponential share.

    levels     representatives
    learnable  whether they are trained; else they stay where they begin
    init       where they begin: `kmeans`, `quantile`, `density` (alike), or `linear` over `range`
    range      of linear: `minmax`, `quantile` (1 to 99 %), `sigma` (2.5 standard deviations), or [low, high]
    share      one set a layer, a kind of layer, or for the whole model
    gradient   of a representative: divided by the `count` of its weights, which is stable at any learning rate below 1,
               or `none`
    reseed     move a representative that no weight is nearest to into the most populous cell
    reduction  over the weights
    """

    preset: Literal["paper-qar"] | None = None
    levels: Annotated[int, Interval(ge=2, le=MOST_LEVELS)] = 16
    learnable: bool = True
    init: Literal["kmeans", "quantile", "density", "linear"] | None = None
    range: RangeOf | tuple[float, float] = "minmax"
    share: Literal["layer", "type", "model"] = "layer"
    gradient: Literal["count", "none"] | None = None
    reseed: bool | None = None
    reduction: Reduction = "sum"

    has_proximal: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.preset == "paper-qar":
            self._fill({"gradient": "none", "reseed": False, "init": "quantile" if self.learnable else "linear"})
        else:
            self._fill({"gradient": "count", "reseed": True, "start": 0.3, "ramp": 0.4})
            self._fill({"init": "kmeans" if self.learnable else "linear"})
        super().__post_init__()


@dataclass(frozen=True, kw_only=True)
class MinSquaredConfig(RepresentativesConfig):
    """The squared distance of each weight to the nearest representative.

    preset  `paper-qar`: from the first step, gradients as they come, summed. The paper leaves open: strength (ours
            1e-3), sum or mean, where representatives begin (quantiles of the weights). Without it: k-means of the
            weights when it begins, 0.3 to 0.7 of the steps
    """

    def __post_init__(self) -> None:
        self._fill({"strength": 1e-3 if self.preset else 0.05})
        super().__post_init__()


@dataclass(frozen=True, kw_only=True)
class ExponentialConfig(RepresentativesConfig):
    """1 - exp(-scale |w - c|) of each weight and its nearest representative c: bounded, and sharp at the minimum.

    preset  `paper-qar`: as for min-squared, strength 1e-4
    scale   in units of 1 / weight
    """

    scale: Annotated[float, Gt(0)] = 1.0

    def __post_init__(self) -> None:
        self._fill({"strength": 1e-4 if self.preset else 3e-3})
        super().__post_init__()


@dataclass(frozen=True, kw_only=True)
class L2Config(RegularizerConfig):
    """Half the sum of squares: strength adds to weight_decay. Heavy L2 is ten times the usual decay.

    reduction  over the weights
    """

    strength: Strength = 1e-3
    reduction: Reduction = "sum"

    has_proximal: ClassVar[bool] = True


@dataclass(frozen=True, kw_only=True)
class _TailConfig(RegularizerConfig):
    """What the regularizers of tails and shape share.

    granularity  one value a tensor, or one a channel
    reduction    over channels
    """

    granularity: Literal["tensor", "channel"] = "tensor"
    reduction: Reduction = "mean"


@dataclass(frozen=True, kw_only=True)
class LinfConfig(_TailConfig):
    """The largest magnitude."""

    strength: Strength = 0.01


@dataclass(frozen=True, kw_only=True)
class MarginConfig(_TailConfig):
    """A learned margin M plus what magnitudes pass it by: at its best M the largest magnitude, its force spread.

    margin         where M begins, in standard deviations of the weight
    tail_fraction  the excess is divided by this share of the weights: at its best M the mean magnitude of that share;
                   where absent the excess is summed
    """

    strength: Strength = 1e-3
    margin: Annotated[float, Gt(0)] = 2.0
    tail_fraction: Annotated[float, Interval(gt=0, le=1)] | None = None


@dataclass(frozen=True, kw_only=True)
class KurtosisConfig(_TailConfig):
    """(kurtosis - target)**2: a uniform distribution has 1.8 (KURE, Chmiel et al. 2020).

    target  the kurtosis that is aimed at
    """

    strength: Strength = 1.0
    target: float = 1.8


@dataclass(frozen=True)
class Regularizer:
    """One regularizer: `target` is "module:Class" of a regularizers.penalty.Penalty, imported only when it runs."""

    name: str
    config: type[RegularizerConfig]
    target: str


def _regularizer(name: str, config: type[RegularizerConfig]) -> Regularizer:
    member = config.__name__.removesuffix("Config")
    return Regularizer(name, config, f"qcompress.regularizers.{name.replace('-', '_')}:{member}")


REGULARIZERS: Mapping[str, Regularizer] = {
    one.name: one
    for one in (
        _regularizer("dsmm", DsmmConfig),
        _regularizer("sine", SineConfig),
        _regularizer("cosine", CosineConfig),
        _regularizer("min-squared", MinSquaredConfig),
        _regularizer("exponential", ExponentialConfig),
        _regularizer("l2", L2Config),
        _regularizer("linf", LinfConfig),
        _regularizer("margin", MarginConfig),
        _regularizer("kurtosis", KurtosisConfig),
    )
}


def refuse_levels(config: RegularizerConfig, shape: Shape) -> str | None:
    """Why a weight of this shape cannot have so many representatives, or None."""
    count = math.prod(shape)
    if config.levels is None or config.levels <= count:
        return None
    return f"{config.levels} representatives for {count} weights"
