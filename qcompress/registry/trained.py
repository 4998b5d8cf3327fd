"""The configs of methods that train a network on the grid that it will be stored on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Interval

from qcompress.registry.grids import GridConfig
from qcompress.types import Convention


@dataclass(frozen=True, kw_only=True)
class TrainedConfig(GridConfig):
    """What quantization-aware training shares; its grids are symmetric.

    learning_rate  of what is learned beside the weights; the optimizer's where absent
    """

    learning_rate: Annotated[float, Gt(0)] | None = None

    def __post_init__(self) -> None:
        if self.symmetric is False:
            raise ValueError("the grid of trained weights is symmetric; leave symmetric out")
        object.__setattr__(self, "symmetric", True)
        super().__post_init__()


@dataclass(frozen=True, kw_only=True)
class LsqConfig(TrainedConfig):
    """Learned step size quantization: the steps of weights and of inputs are trained with the network.

    bits   2 to 8
    start  where steps start: `error`, with the least squared error; `mean`, as published, 2 mean|v| / sqrt(Qp), which
           is too wide for a short training at 2 bits. Those of inputs start from the range of the recipe's activations
           where that is given
    """

    bits: Annotated[int, Interval(ge=2, le=8)]
    start: Literal["error", "mean"] = "error"

    @property
    def stored_convention(self) -> Convention:
        return "full"


@dataclass(frozen=True, kw_only=True)
class PactConfig(TrainedConfig):
    """PACT and DoReFa: inputs are clipped where training says, weights are quantized after a hyperbolic tangent.

    clip        where the clip of each input starts; where absent, with the least squared error of the inputs
    clip_decay  of the clips; the optimizer's weight_decay where absent
    scale       `weight`: the levels span the weights as they are after the tangent; `unit`: they span [-1, 1], as
                published, which needs a batch norm after the layer. At 1 bit both have the mean magnitude
    """

    clip: Annotated[float, Gt(0)] | None = None
    clip_decay: Annotated[float, Ge(0)] | None = None
    scale: Literal["weight", "unit"] = "weight"

    @property
    def stored_convention(self) -> Convention:
        return "mid-rise"
