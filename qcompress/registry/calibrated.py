"""Configs and entries of the methods that work on a model in memory: on its graph, with data, by training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Gt, Interval

from qcompress.registry.contract import Method
from qcompress.registry.grids import Defaults, GridConfig, PresetConfig
from qcompress.types.config import Convention, Form, MethodConfig

Effort = Literal["fast", "normal", "high"]
Range = Literal["minmax", "mse", "tf-enhanced", "hessian"]


@dataclass(frozen=True, kw_only=True)
class LiveConfig(PresetConfig):
    """What the methods on a live model share.

    range   how the grid's range is chosen: `minmax`; `mse`, the least squared error of the weights; `tf-enhanced`,
            AIMET's histogram; `hessian`, the least error of the layer's output, which needs calibration data
    """

    range: Range | None = None

    def _aimet(self) -> Defaults:
        """AIMET's grids, of folded layers: symmetric, one a tensor."""
        tensor = {} if self.group_size else {"granularity": "tensor"}
        return {**tensor, "symmetric": True, "range": "tf-enhanced", "fold": True}

    @property
    def form(self) -> Form:
        if self.symmetric:
            return "symmetric"
        return "offset" if self.range in ("mse", "hessian") else "zero-point"

    @property
    def stored_convention(self) -> Convention:
        return "full" if self.range == "tf-enhanced" else super().stored_convention


@dataclass(frozen=True, kw_only=True)
class DfqConfig(LiveConfig):
    """Data-free quantization: fold batch norms, equalize neighbouring layers, absorb high biases, correct biases.

    preset           `paper`: as in AIMET, on a symmetric grid a tensor, with layers equalized in one pass
    range            how the grid's range is chosen: `minmax`; `mse`, the least squared error of the weights;
                     `tf-enhanced`, AIMET's histogram; not `hessian`, which needs the inputs of each layer
    fold             fold each batch norm into the layer before it; where absent where equalization needs it
    equalize         cross-layer equalization of pairs, and of what has depthwise layers in between; channels that have
                     grids of their own gain nothing by it; where absent with one grid a tensor
    absorb           high-bias absorption: smaller activation ranges, at a loss where batch norms mispredict
    bias_correction  `analytic` from the batch norms' statistics, `empirical` from calibration data, `none`; where
                     absent `empirical` with calibration data, else `analytic`
    relu6            across ReLU6, `skip` equalization; or keep it exact by per-channel `caps` that the artifact stores;
                     or `relax` it: channels that shrink are cut off later than they were, up to never
    """

    fold: bool | None = None
    equalize: bool | None = None
    absorb: bool | None = None
    bias_correction: Literal["analytic", "empirical", "none"] | None = None
    relu6: Literal["skip", "caps", "relax"] | None = None

    def __post_init__(self) -> None:
        official = {**self._aimet(), "relu6": "relax", "equalize": True, "absorb": True}
        equalize = self.granularity == "tensor"
        self._follow(official, {"range": "tf-enhanced", "relu6": "skip", "equalize": equalize, "absorb": False})
        if self.range == "hessian":
            raise ValueError("range: hessian needs the inputs of each layer, which dfq never sees; use mse")
        super().__post_init__()


@dataclass(frozen=True, kw_only=True)
class AdaroundConfig(LiveConfig):
    """AdaRound: learn for each weight whether to round up or down, layer by layer, against the layer's output.

    preset         `paper`: as in AIMET, on a symmetric grid a tensor
    objective      `gram`: full-batch steps on the inputs' Gram matrix; `sampled`: random batches, as published
    iterations     steps a layer; with `preset: paper` at 8 bits 10,000
    learning_rate  of Adam; 0.001 with `sampled`
    strength       weight of the rounding regularizer, relative to the output's energy with `gram`; 0.01 with `sampled`
    warm_up        share of the steps without the regularizer
    fold           fold batch norms first, so that the range and the following activation are those of the folded layer
    asymmetric     inputs from the already quantized network, targets from the full-precision one
    batch_size     samples a step of `sampled`
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
        if self.preset == "paper" and self.objective == "gram":
            raise ValueError("objective: gram is not the published method; leave preset out, or objective")
        official = {
            **self._aimet(),
            "objective": "sampled",
            "iterations": 15_000 if self.bits < 8 else 10_000,
            "learning_rate": 1e-3,
        }
        fast: Defaults = {"objective": "gram", "fold": False, "range": "hessian"}
        self._follow(official, fast)
        gram = self.objective == "gram"
        usual: Defaults = {"iterations": 500, "learning_rate": 3e-2, "strength": 0.1}
        published: Defaults = {"iterations": 10_000, "learning_rate": 1e-3, "strength": 0.01}
        self._fill(usual if gram else published)
        super().__post_init__()


@dataclass(frozen=True, kw_only=True)
class PdquantConfig(LiveConfig):
    """PD-Quant: learn rounding and activation steps block by block, against the network's prediction.

    preset                   `paper`: as in the official code, on a grid a channel with an integer zero point
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
        self._follow(official, fast)
        super().__post_init__()

    @property
    def form(self) -> Form:
        if self.symmetric:
            return "symmetric"
        return "zero-point" if self.preset == "paper" else super().form


@dataclass(frozen=True, kw_only=True)
class GptqConfig(LiveConfig):
    """GPTQ: round column by column, and let the columns still to come make up for each error.

    preset      `paper`: as in the official code, on a grid a channel with an integer zero point
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
        official: Defaults = {"act_order": False, "asymmetric": False, "descent": 0, "range": "minmax"}
        self._follow(official, {"act_order": True, "asymmetric": True, "descent": 2, "range": "hessian"})
        super().__post_init__()


@dataclass(frozen=True, kw_only=True)
class RdConfig(MethodConfig):
    """Rate-distortion: unbounded codes by error feedback, entropy coded, their steps chosen for all tensors together.

    effort      `fast`: one kind of allocation and no price on bits; `normal`: the better of two allocations, codes
                priced and descended; `high`: coded by a trellis as well and, with data, swept once more: about five
                times the time
    allocation  with data: steps by what each layer does to the network's output (`measured`), or by the same error of
                each layer's normed output (`relative`); where absent the one that measures better
    price       Lagrange multiplier lambda of rate against distortion, in units of step squared times conditional
                energy; where absent 0.03, with a trellis 0.12, or 0.06 without data; 0 with `effort: fast`
    descent     sweeps of coordinate descent over the finished codes; where absent 2, with a trellis or `effort: fast` 0
    columns     with data: steps that vary over input channels and places of the kernel; where absent where it pays,
                above 1.2 bits a weight
    match       with data: batch norms and biases matched to what the full-precision network gives
    prior       without data: inputs of convolutions are taken for `correlated`, with a model each channel with the mean
                and variance that the batch norms before it tell, without one, or as `alike`, all with those behind a
                ReLU; or the errors of each kernel and of each channel are summed to nothing by `flips`, or `none`
    damping     added to the Hessian's diagonal, as a share of its mean
    step        without data: the step of each tensor in units of the square root of its deviation; where absent the
                budget's
    axis        the channel axis, or the pair of them in stacked experts; where absent the checkpoint's, else 0
    """

    effort: Effort = "normal"
    allocation: Literal["measured", "relative"] | None = None
    price: Annotated[float, Interval(ge=0, le=1)] | None = None
    descent: Annotated[int, Ge(0)] | None = None
    columns: bool | None = None
    match: bool = True
    prior: Literal["correlated", "alike", "flips", "none"] = "correlated"
    damping: Annotated[float, Gt(0)] = 0.01
    step: Annotated[float, Gt(0)] | None = None
    axis: int | tuple[int, ...] | None = None

    bits: ClassVar[None] = None

    @property
    def form(self) -> Form:
        return "unbounded"

    @property
    def trellis(self) -> bool:
        """Whether the codes drive a trellis."""
        return self.effort == "high"

    @property
    def lam(self) -> float:
        """Lambda of rate against distortion: the price, chosen."""
        if self.price is not None:
            return self.price
        return 0.0 if self.effort == "fast" else 0.12 if self.trellis else 0.03

    @property
    def sweeps(self) -> int:
        """The sweeps of descent, chosen."""
        if self.descent is not None:
            return 0 if self.trellis else self.descent
        return 2 if self.effort == "normal" else 0


@dataclass(frozen=True, kw_only=True)
class ExactConfig(MethodConfig):
    """What rd makes of weights on few values: a code for each, which a budget decides and no recipe asks for.

    bits         of a code; None of a constant
    granularity  what has its own values, the tensor or each row
    codebook     how they are stored
    form         `constant` of a single value
    axis         see RdConfig
    """

    bits: int | None = None
    granularity: Literal["tensor", "channel"] = "tensor"
    codebook: Literal["f32"] = "f32"
    form: Literal["codebook", "constant"] = "codebook"
    axis: int | tuple[int, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class TrainedConfig(GridConfig):
    """What quantization-aware training shares; its grids are symmetric.

    learning_rate  of the steps or clips, which are learned beside the weights; where absent the optimizer's
    """

    learning_rate: Annotated[float, Gt(0)] | None = None

    def __post_init__(self) -> None:
        if self.symmetric is False:
            raise ValueError("the grid of trained weights is symmetric; leave symmetric out")
        if self.scales is not None:
            raise ValueError("steps are trained, and not rounded to another dtype; leave scales out")
        object.__setattr__(self, "symmetric", True)
        super().__post_init__()


@dataclass(frozen=True, kw_only=True)
class LsqConfig(TrainedConfig):
    """Learned step size quantization: the steps of weights and of inputs are trained with the network.

    bits   2 to 8
    start  where steps start: `error`, with the least squared error; `mean`, as published, at 2 mean|v| / sqrt(Qp),
           which is too wide for a short training at 2 bits. Those of inputs start from the range of the recipe's
           activations where that is given
    """

    bits: Annotated[int, Interval(ge=2, le=8)]
    start: Literal["error", "mean"] = "error"

    @property
    def stored_convention(self) -> Convention:
        return "full"


@dataclass(frozen=True, kw_only=True)
class PactConfig(TrainedConfig):
    """PACT and DoReFa: inputs are clipped where training says, weights are quantized after a hyperbolic tangent.

    clip        where the clip of each input starts; where absent with the least squared error of the inputs
    clip_decay  weight decay of the clips; where absent the optimizer's
    scale       `weight`: the levels span the weights as they are after the tangent; `unit`: they span [-1, 1], as
                published, which needs a batch norm after the layer. At 1 bit both have the mean magnitude
    """

    clip: Annotated[float, Gt(0)] | None = None
    clip_decay: Annotated[float, Ge(0)] | None = None
    scale: Literal["weight", "unit"] = "weight"

    @property
    def stored_convention(self) -> Convention:
        return "mid-rise"


CALIBRATED: tuple[Method, ...] = (
    Method("dfq", "quantize", DfqConfig, "graph", called=True, adjusts=True),
    Method(
        *("adaround", "quantize", AdaroundConfig, "calibration"),
        takes=("product", "inner"),
        adjusts=True,
        statistics=True,
    ),
    Method("gptq", "quantize", GptqConfig, "calibration", takes=("product", "inner"), statistics=True),
    Method("pdquant", "quantize", PdquantConfig, "calibration", takes=("product",), called=True),
    Method("rd", "quantize", RdConfig, "weights", takes=("product", "inner", "table"), adjusts=True, rates=True),
    Method("lsq", "quantize", LsqConfig, "training", called=True, adjusts=True),
    Method("pact", "quantize", PactConfig, "training", called=True, adjusts=True),
)
