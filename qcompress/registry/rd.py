"""The config of the rate-distortion method, whose codes have no width: a budget chooses the steps of their grids."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt, Interval

from qcompress.types import Shape

Effort = Literal["fast", "normal", "high"]


@dataclass(frozen=True, kw_only=True)
class RdConfig:
    """Rate-distortion: unbounded codes by error feedback, entropy coded, their steps chosen for all tensors together.

    effort      `fast`: one kind of allocation, no price on bits; `normal`: the better of two allocations, codes priced
                and descended; `high`: trellis-coded as well, and a second sweep
    allocation  with data: `measured` sensitivities of the network's output, or the same `relative` error of every
                layer's normed output; the one that measures better where absent
    price       what a bit weighs against step**2 times conditional energy; where absent 0.03, of a trellis 0.12 with
                data and 0.06 without
    descent     sweeps of coordinate descent over the finished codes; 2 where absent, never with a trellis
    columns     steps that vary over input channels and kernel places; where it pays, where absent
    match       batch norms and biases matched to the full-precision network's on the calibration data
    prior       without data: `correlated` inputs of a convolution, errors summed to nothing by `flips`, or `none`
    damping     added to the Hessian's diagonal, as a share of its mean
    step        without a budget: the step of a tensor in units of the square root of its weights' deviation
    axis        the channel axis, or the pair of them in stacked experts; the plan's choice where absent
    """

    effort: Effort = "normal"
    allocation: Literal["measured", "relative"] | None = None
    price: Annotated[float, Interval(ge=0, le=1)] | None = None
    descent: Annotated[int, Ge(0)] | None = None
    columns: bool | None = None
    match: bool = True
    prior: Literal["correlated", "flips", "none"] = "correlated"
    damping: Annotated[float, Gt(0)] = 0.01
    step: Annotated[float, Gt(0)] | None = None
    axis: int | tuple[int, ...] | None = None

    form: ClassVar[str] = "lattice"
    bits: ClassVar[None] = None
    granularity: ClassVar[str] = "tensor"
    group_size: ClassVar[None] = None

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid", "strict": True}

    @property
    def trellis(self) -> bool:
        """Whether the codes drive a trellis."""
        return self.effort == "high"

    @property
    def rate(self) -> float:
        """The price, chosen."""
        if self.price is not None:
            return self.price
        return 0.0 if self.effort == "fast" else 0.12 if self.trellis else 0.03

    @property
    def sweeps(self) -> int:
        """The sweeps of descent, chosen."""
        if self.descent is not None:
            return 0 if self.trellis else self.descent
        return 2 if self.effort == "normal" else 0


def refuse_lattice(config: RdConfig, rows: Shape) -> str | None:
    """A lattice suits every weight: None."""
    return None
