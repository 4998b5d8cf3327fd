"""Configs and entries of the methods on affine grids that need the weights alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, TypeAlias

from annotated_types import Ge, Gt, Interval

from qcompress.registry.contract import Method
from qcompress.types.config import Convention, Form, Granularity, MethodConfig, ScaleDtype
from qcompress.types.plan import searched_convention

DEFAULT_GROUP_SIZE = 64

Preset = Literal["paper"]
Defaults: TypeAlias = Mapping[str, object]
"""Options by name, for those that the recipe leaves open."""


@dataclass(frozen=True, kw_only=True)
class GridConfig(MethodConfig):
    """What every method on an affine grid shares.

    bits         of a code
    granularity  one grid for the whole tensor, for each channel, or for each group of a channel's values; where absent
                 `channel`, or `group` where `group_size` is given
    group_size   values of a group; the last group of a channel has what is left; where absent 64
    symmetric    a grid around zero, which stores a scale alone
    scales       the dtype that holds scales and offsets exactly, as other tools store them; `for` a target decides it;
                 where absent they are float16 numbers times a power of two, which no range of float16 bounds
    axis         the channel axis, or the pair of them in stacked experts; where absent the checkpoint's, else 0
    """

    example: ClassVar = {"bits": 4}

    bits: Annotated[int, Interval(ge=1, le=8)]
    granularity: Granularity | None = None
    group_size: Annotated[int, Ge(2)] | None = None
    symmetric: bool | None = None
    scales: ScaleDtype | None = None
    axis: int | tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        granularity = self.granularity or ("group" if self.group_size else "channel")
        if granularity != "group" and self.group_size is not None:
            raise ValueError(f"group_size needs granularity: group, not {granularity}")
        object.__setattr__(self, "granularity", granularity)
        if granularity == "group" and self.group_size is None:
            object.__setattr__(self, "group_size", DEFAULT_GROUP_SIZE)
        object.__setattr__(self, "symmetric", bool(self.symmetric))

    @property
    def form(self) -> Form:
        """What the grid stores beside its scale."""
        return "symmetric" if self.symmetric else "offset"

    @property
    def stored_convention(self) -> Convention:
        return searched_convention(self.bits)


@dataclass(frozen=True, kw_only=True)
class RtnConfig(GridConfig):
    """Round to nearest on the min-max range: the papers' naive quantization.

    convention  how a symmetric scale follows from the largest weight, with `symmetric: true` (methods differ, see
                docs/methods.md): `full-range` lets the larger end lie on the extra code (AutoRound), `narrow` drops
                that code, `aimet` and `gptq` follow those tools, `mid-rise` has no zero; where absent `full-range`, at
                1 bit `mid-rise`
    zero_point  of a grid that is not symmetric: an `integer`, so that zero lies on the grid; or `real`, so that the
                lowest level is the least weight (Q4_1 of GGUF); where absent `integer`
    """

    convention: Literal["full-range", "narrow", "aimet", "gptq", "mid-rise"] | None = None
    zero_point: Literal["integer", "real"] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.zero_point and self.symmetric:
            raise ValueError("zero_point is of grids that are not symmetric; leave it out, or symmetric: true")
        if self.convention and not self.symmetric:
            raise ValueError("convention needs symmetric: true")
        if self.symmetric and self.convention is None:
            object.__setattr__(self, "convention", "mid-rise" if self.bits == 1 else "full-range")
        if self.convention in ("narrow", "aimet") and self.bits == 1:
            raise ValueError(f"a {self.convention} grid of 1 bit has no step; use mid-rise")

    @property
    def form(self) -> Form:
        if self.symmetric:
            return "symmetric"
        return "offset" if self.zero_point == "real" else "zero-point"

    @property
    def stored_convention(self) -> Convention:
        match self.convention:
            case "narrow" | "mid-rise" as stored:
                return stored
            case _:
                return "full"


@dataclass(frozen=True, kw_only=True)
class MseConfig(GridConfig):
    """The grid of least error: by alternating least squares, or by a search over shrunken ranges.

    search  `als` refits scale and real offset to the codes (squared error); `grid` tries shrunken min-max ranges with
            an integer zero point (error to the power `norm`)
    effort  of als: `high` tries three times as many starts, for about 0.1 dB; where absent `normal` in groups, else
            `high`
    norm    the power of the error that `grid` minimises; where absent 2.4
    """

    search: Literal["als", "grid"] = "als"
    effort: Literal["normal", "high"] | None = None
    norm: Annotated[float, Gt(0)] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.search == "als" and self.norm not in (None, 2.0):
            raise ValueError("norm needs search: grid; least squares has norm 2")
        if self.search == "grid" and self.effort is not None:
            raise ValueError("effort needs search: als; the grid search knows one effort")
        if self.search == "als" and self.effort is None:
            object.__setattr__(self, "effort", "normal" if self.granularity == "group" else "high")
        if self.norm is None:
            object.__setattr__(self, "norm", 2.0 if self.search == "als" else 2.4)

    @property
    def form(self) -> Form:
        if self.symmetric:
            return "symmetric"
        return "offset" if self.search == "als" else "zero-point"


@dataclass(frozen=True, kw_only=True)
class PresetConfig(GridConfig):
    """What methods share that can be asked to be as published; without a preset they are as measures best.

    preset  `paper`: whatever is not given is as in the official code
    """

    preset: Preset | None = None

    def _follow(self, paper: Defaults, usual: Defaults) -> None:
        """Set every option that was not given: from the first with the preset, else from the second."""
        self._fill(paper if self.preset == "paper" else usual)


@dataclass(frozen=True, kw_only=True)
class SquantConfig(PresetConfig):
    """SQuant: flip roundings until the errors of each kernel and each channel sum to nearly nothing.

    preset  `paper`: as published, with the range `minmax` on a grid with an integer zero point
    range   `minmax`: from the least to the largest weight; `clip`: the least-squares range, in convolutions stretched
            so that what is coded keeps its size, with the clipped error counted in the sums
    stages  E rounds, K flips within kernels, C flips within channels
    """

    range: Literal["minmax", "clip"] | None = None
    stages: Literal["E", "EK", "EC", "EKC"] = "EKC"

    def __post_init__(self) -> None:
        if self.preset == "paper" and self.range == "clip":
            raise ValueError("range: clip is not the published method; leave preset out, or range")
        self._follow({"range": "minmax"}, {"range": "clip"})
        super().__post_init__()

    @property
    def form(self) -> Form:
        return "zero-point" if self.preset == "paper" and not self.symmetric else super().form


@dataclass(frozen=True, kw_only=True)
class HqqConfig(GridConfig):
    """Half-quadratic quantization: the min-max scale, and a zero point fitted under an l_p norm.

    norm        the p of the norm
    beta        weight of the quadratic term
    iterations  half-quadratic steps
    round_zero  start from an integer zero point; where absent `true` at 4 bits, as the official default
    """

    norm: Annotated[float, Interval(gt=0, le=1)] = 0.7
    beta: Annotated[float, Gt(0)] = 10.0
    iterations: Annotated[int, Interval(ge=1, le=1000)] = 20
    round_zero: bool | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.symmetric:
            raise ValueError("hqq fits a zero point, so symmetric: true has no meaning here")
        if self.round_zero is None:
            object.__setattr__(self, "round_zero", self.bits == 4)


GRIDS: tuple[Method, ...] = (
    Method("rtn", "quantize", RtnConfig, "weights"),
    Method("mse", "quantize", MseConfig, "weights"),
    Method("squant", "quantize", SquantConfig, "weights"),
    Method("hqq", "quantize", HqqConfig, "weights"),
)
