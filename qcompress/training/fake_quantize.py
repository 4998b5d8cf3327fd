"""Quantizers of weights and inputs are initialized here, attached to a live model for training, and come off again."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from qcompress.calibration.activations import INPUT_BITS, attach_quantizer, grids_of_inputs, watched_inputs
from qcompress.errors import TrainingError
from qcompress.model.graph import inputs_of_network
from qcompress.model.live import LiveModel, layer_name
from qcompress.training.optimizers import Group
from qcompress.training.trainer import Trainer
from qcompress.training.warnings import advise_after
from qcompress.types.encoded import ActivationGrid, Encoded, Kept
from qcompress.types.settings import ActivationSettings

INPUT = "qcompress_input"
"""The name under which a layer holds the quantizer of its inputs: what is learned there is a parameter of the model."""
LEAST_SHARE = 2.0**-10
"""A step or a clip stays above this share of where it started: one that crossed zero would never come back."""


@dataclass(frozen=True)
class ActivationInit:
    """One layer's inputs before training, from which its quantizer starts.

    grid      of the width that is asked for, from the settings' range
    mean      of the magnitudes
    lowest    of the values
    features  numbers of one sample
    fixed     whether it is the network's own input: 8 bits over its whole range, which are not trained
    """

    grid: ActivationGrid
    mean: float
    lowest: float
    features: int
    fixed: bool

    @property
    def middle(self) -> int:
        """The code of zero on a grid of no range: the middle one where values lie below zero."""
        return 2 ** (self.grid.bits - 1) if self.lowest < 0 else 0


def activation_inits(live: LiveModel, trainer: Trainer) -> dict[str, ActivationInit]:
    """Module name -> what it starts from: every compressed layer that sees floats; none without activation settings.

    raises  DataError where an input holds NaN or Inf, or there are too few samples
    """
    if live.activations is None:
        return {}
    batches = trainer.first_batches(live.device)
    own = inputs_of_network(live)

    def run() -> None:
        for batch in batches:
            live.module(*batch.args, **batch.kwargs)

    with torch.no_grad():
        moments = _moments(live, run)
        settings = live.activations
        others = {name: settings.bits for name in moments if name not in own}
        grids = grids_of_inputs(
            live.module, run, settings if settings.range else ActivationSettings(range="mse"), others
        )
        whole = {name: INPUT_BITS for name in moments if name in own}
        grids |= grids_of_inputs(live.module, run, ActivationSettings(range="minmax"), whole)
    return {
        name: ActivationInit(grids[name], one.total / one.count, one.lowest, one.features, name in own)
        for name, one in moments.items()
    }


@dataclass
class _Moments:
    total: float = 0.0
    count: int = 0
    lowest: float = 0.0
    features: int = 0

    def add(self, x: Tensor) -> None:
        self.total += float(x.abs().sum(dtype=torch.float64))
        self.count += x.numel()
        self.lowest = min(self.lowest, float(x.min()))
        self.features = x.numel() // max(len(x), 1)


def _moments(live: LiveModel, run: Callable[[], None]) -> dict[str, _Moments]:
    found: dict[str, _Moments] = {}
    with watched_inputs(live.module, live.layers, lambda name, x: found.setdefault(name, _Moments()).add(x)):
        run()
    return found


@contextmanager
def fake_quantized(
    live: LiveModel, weights: Mapping[str, nn.Module], inputs: Mapping[str, nn.Module] | None = None
) -> Iterator[nn.Module]:
    """`live.quantized`, all of it ready to be trained but the weights that other methods have compressed.

    weights  tensor name -> what makes the weight that goes forward; tied copies of it follow
    inputs   module name -> what its first input passes through
    """
    module = live.quantized
    module.requires_grad_(True)
    with ExitStack() as stack:
        stack.callback(lambda: module.requires_grad_(False).eval())
        for name, parameter in module.named_parameters():
            if name not in weights and layer_name(name) in live.layers and parameter.ndim >= 2:
                parameter.requires_grad_(False)
        for name, quantizer in (inputs or {}).items():
            layer = module.get_submodule(name)
            layer.add_module(INPUT, quantizer)
            stack.callback(layer.__delattr__, INPUT)
            stack.callback(attach_quantizer(layer, quantizer).remove)
        for name, quantizer in weights.items():
            for place in places_of(module, name):
                owner, leaf = module.get_submodule(layer_name(place)), place.rpartition(".")[2]
                parametrize.register_parametrization(owner, leaf, quantizer, unsafe=True)
                stack.callback(parametrize.remove_parametrizations, owner, leaf, leave_parametrized=False)
        yield module


@contextmanager
def trained_beneath(
    live: LiveModel,
    trainer: Trainer,
    weights: Mapping[str, nn.Module],
    inputs: Mapping[str, nn.Module] | None = None,
    after_step: Callable[[float], None] = lambda _: None,
    groups: Sequence[Group] = (),
) -> Iterator[nn.Module]:
    """`live.quantized` as training beneath its quantizers has left it, which are still in place.

    The recipe's regularizers act on the weights beneath.

    weights, inputs  as for `fake_quantized`
    raises           DataError, ModelError, RecipeError, TrainingError
    """
    trainer.warn(trainer.attach(live.quantized))
    with fake_quantized(live, weights, inputs) as module:
        trained = trainer(module, after_step, groups)
        trainer.warn((*trained.warnings, *advise_after(trainer.penalties)))
        yield module


def train_grids(
    live: LiveModel,
    trainer: Trainer,
    weights: Mapping[str, nn.Module],
    inputs: Mapping[str, nn.Module],
    bounded: Sequence[tuple[Tensor, Tensor]],
    groups: Sequence[Group],
) -> dict[str, Tensor]:
    """Tensor name -> the trained weight beneath its grid; all quantizers come off `live.quantized` again.

    weights, inputs  as for `fake_quantized`
    bounded          (parameter, the least it may be): what a step leads below that is brought back to it
    groups           parameters that have an optimizer's settings of their own
    raises           DataError, TrainingError
    """

    def after_step(_: float) -> None:
        with torch.no_grad():
            for parameter, least in bounded:
                parameter.clamp_(min=least)

    with trained_beneath(live, trainer, weights, inputs, after_step, groups) as module:
        return {name: trained_weight(module, name) for name in weights}


def trained_weight(module: nn.Module, name: str) -> Tensor:
    """A copy of the weight beneath its parametrization. Raises TrainingError where it is not finite."""
    owner: Any = module.get_submodule(layer_name(name))
    weight: Tensor = owner.parametrizations[name.rpartition(".")[2]].original.detach()
    if not bool(weight.isfinite().all()):
        raise TrainingError(f"tensor {name!r}", "training left NaN or Inf in it", "lower the learning rate")
    return weight.clone()


def adjusted_tensors(live: LiveModel, encoded: Collection[str]) -> dict[str, Encoded]:
    """Every real tensor of `live.quantized` that differs from the network as it was.

    encoded  those that are not asked for, nor tied copies of them
    """
    before = live.module.state_dict()
    excluded = {place for name in encoded for place in places_of(live.quantized, name)}
    return {
        name: Kept(value.detach().clone())
        for name, value in live.quantized.state_dict().items()
        if name not in excluded
        and name in before
        and value.is_floating_point()
        and not torch.equal(value, before[name])
    }


def places_of(module: nn.Module, name: str) -> list[str]:
    """Every name of the parameter that is called `name`, that one first."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    own = parameters[name]
    return [name, *(other for other, value in parameters.items() if value is own and other != name)]
