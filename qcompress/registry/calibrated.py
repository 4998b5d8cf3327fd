"""The configs of methods that need a live model: its graph, or calibration data.

`preset: paper` fills what is left open with the defaults of the official code; without it, with what measures best.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Interval

from qcompress.registry.grids import GridConfig
from qcompress.types import Convention, GridForm

Preset = Literal["paper"]
Range = Literal["minmax", "mse", "tf-enhanced", "hessian"]


@dataclass(frozen=True, kw_only=True)
class LiveConfig(GridConfig):
    """What the methods on a live model share.

    preset  `paper`: whatever is not given is as in the official code
    range   how the grid's range is chosen: `minmax`; `mse`, the least squared error of the weights; `tf-enhanced`,
            AIMET's histogram; `hessian`, the least error of the layer's output, which needs calibration data
    """

    preset: Preset | None = None
    range: Range | None = None

    @property
    def form(self) -> GridForm:
        if self.symmetric:
            return "symmetric"
        return "offset" if self.range in ("mse", "hessian") else "zero-point"

    @property
    def stored_convention(self) -> Convention:
        return "full" if self.range == "tf-enhanced" else super().stored_convention

    def _fill(self, paper: dict[str, Any], fast: dict[str, Any]) -> None:
        """Set every option that was not given from the preset."""
        for name, value in (paper if self.preset == "paper" else fast).items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)


@dataclass(frozen=True, kw_only=True)
class DfqConfig(LiveConfig):
    """Data-free quantization: fold batch norms, equalize neighbouring layers, absorb high biases, correct biases.

    fold             fold every batch norm into the layer before it; where absent, where equalization needs it
    equalize         cross-layer equalization of pairs, and of what has depthwise layers in between; where absent, with
                     one grid a tensor: channels that have grids of their own gain nothing
    absorb           high-bias absorption: smaller activation ranges, at a loss where batch norms mispredict; off where
                     absent
    bias_correction  `analytic` from the batch norms' statistics, `empirical` from calibration data, `none`; empirical
                     where there is calibration data, else analytic
    relu6            across ReLU6, `skip` equalization; or keep it exact by per-channel `caps` that the artifact stores;
                     or `relax` it: channels that shrink are cut off later than they were, up to never
    """

    fold: bool | None = None
    equalize: bool | None = None
    absorb: bool | None = None
    bias_correction: Literal["analytic", "empirical", "none"] | None = None
    relu6: Literal["skip", "caps", "relax"] | None = None

    def __post_init__(self) -> None:
        paper = self.preset == "paper"
        if paper and self.granularity is None and self.group_size is None:
            object.__setattr__(self, "granularity", "tensor")
        official: dict[str, Any] = {"symmetric": True, "relu6": "relax", "fold": True, "equalize": True, "absorb": True}
        fast: dict[str, Any] = {"relu6": "skip", "equalize": self.granularity == "tensor", "absorb": False}
        either = {"range": "tf-enhanced"}
        self._fill(official | either, fast | either)
        if self.range == "hessian":
            raise ValueError("range: hessian needs the inputs of each layer, which dfq never sees; use mse")
        super().__post_init__()


@dataclass(frozen=True, kw_only=True)
class AdaroundConfig(LiveConfig):
    """AdaRound: learn for each weight whether to round up or down, layer by layer, against the layer's output.

    objective      `gram`: full-batch steps on the inputs' Gram matrix; `sampled`: random batches, as published
    iterations     steps a layer
    learning_rate  of Adam
    strength       weight of the rounding regularizer; relative to the output's energy for gram
    warm_up        share of the steps without the regularizer
    fold           fold batch norms first, so that the range and the following activation are those of the folded layer
    asymmetric     inputs from the already quantized network, targets from the full-precision one
    batch_size     samples a step of sampled
    """

    objective: Literal["gram", "sampled"] | None = None
    iterations: Annotated[int, Ge(1)] | None = None
    learning_rate: Annotated[float, Gt(0)] | None = None
    strength: Annotated[float, Ge(0)] | None = None
    warm_up: Annotated[float, Interval(ge=0, lt=1)] = 0.2
    fold: bool | None = None
    asymmetric: bool = True
    batch_size: Annotated[int, Ge(1)] = 32

    def __post_init__(self) -> None:
        paper = self.preset == "paper"
        if paper and self.granularity is None and self.group_size is None:
            object.__setattr__(self, "granularity", "tensor")
        official = {
            "objective": "sampled",
            "iterations": 15_000 if self.bits < 8 else 10_000,
            "learning_rate": 1e-3,
            "fold": True,
            "symmetric": True,
            "range": "tf-enhanced",
        }
        fast: dict[str, Any] = {"objective": "gram", "fold": False, "range": "hessian"}
        self._fill(official, fast)
        gram = self.objective == "gram"
        usual: dict[str, Any] = {"iterations": 500, "learning_rate": 3e-2, "strength": 0.1}
        published: dict[str, Any] = {"iterations": 10_000, "learning_rate": 1e-3, "strength": 0.01}
        self._fill(published, usual if gram else published)
        super().__post_init__()


@dataclass(frozen=True, kw_only=True)
class PdquantConfig(LiveConfig):
    """PD-Quant: learn rounding and activation steps block by block, against the network's prediction.

    iterations               steps a block
    batch_size               samples a step
    learning_rate            of the rounding, by Adam
    activation_rate          of the activation steps, by Adam with a cosine
    strength                 weight of the rounding regularizer; relative to the output's energy without `preset: paper`
    warm_up                  share of the steps without it
    temperature              of the softmax in the prediction difference
    prediction               weight of the prediction difference (1 / lambda_r)
    prediction_form          `exact` through the rest of the network, or its `quadratic` form from a few probes a sample
    distribution_correction  move calibration activations towards the batch norms' statistics
    correction_weight        weight of staying close in it (1 / lambda_c)
    correction_steps         its steps a batch
    drop                     probability that an activation stays in full precision in a step, and that an input does
    """

    iterations: Annotated[int, Ge(1)] | None = None
    batch_size: Annotated[int, Ge(1)] = 32
    learning_rate: Annotated[float, Gt(0)] | None = None
    activation_rate: Annotated[float, Gt(0)] = 4e-5
    strength: Annotated[float, Ge(0)] | None = None
    warm_up: Annotated[float, Interval(ge=0, lt=1)] = 0.2
    temperature: Annotated[float, Gt(0)] = 4.0
    prediction: Annotated[float, Ge(0)] = 10.0
    prediction_form: Literal["exact", "quadratic"] | None = None
    distribution_correction: bool | None = None
    correction_weight: Annotated[float, Ge(0)] = 50.0
    correction_steps: Annotated[int, Ge(1)] | None = None
    drop: Annotated[float, Interval(ge=0, lt=1)] | None = None

    def __post_init__(self) -> None:
        official = {
            "iterations": 20_000,
            "learning_rate": 3e-3,
            "prediction_form": "exact",
            "distribution_correction": True,
            "correction_steps": 500,
            "strength": 0.01,
            "drop": 0.5,
            "range": "mse",
        }
        fast = {
            "iterations": 300,
            "learning_rate": 3e-2,
            "prediction_form": "quadratic",
            "distribution_correction": False,
            "correction_steps": 100,
            "strength": 0.1,
            "drop": 0.0,
            "range": "hessian",
        }
        self._fill(official, fast)
        super().__post_init__()

    @property
    def form(self) -> GridForm:
        if self.symmetric:
            return "symmetric"
        return "zero-point" if self.preset == "paper" else super().form


@dataclass(frozen=True, kw_only=True)
class GptqConfig(LiveConfig):
    """GPTQ: round column by column, and let the columns still to come make up for each error.

    damping     added to the Hessian's diagonal, as a share of its mean
    act_order   columns of the most active inputs first
    asymmetric  aim at the full-precision network's outputs, not only at this layer's on quantized inputs
    descent     sweeps of coordinate descent over the finished codes
    sequential  inputs from the already quantized network, layer by layer; else all at once from the original one
    """

    damping: Annotated[float, Ge(0)] = 0.01
    act_order: bool | None = None
    asymmetric: bool | None = None
    descent: Annotated[int, Ge(0)] | None = None
    sequential: bool = True

    def __post_init__(self) -> None:
        official: dict[str, Any] = {"act_order": False, "asymmetric": False, "descent": 0, "range": "minmax"}
        self._fill(official, {"act_order": True, "asymmetric": True, "descent": 2, "range": "hessian"})
        super().__post_init__()
