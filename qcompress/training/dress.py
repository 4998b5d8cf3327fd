"""Quantizers on a live model while it is trained: on weights as parametrizations, at inputs as hooks; they come off."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from qcompress.errors import TrainingError
from qcompress.model.activations import attach_quantizer
from qcompress.model.live import LiveModel, layer_name

INPUT = "qcompress_input"
"""The name under which a layer holds the quantizer of its inputs: what is learned there is a parameter of the model."""


@contextmanager
def dressed(
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


def trained_weight(module: nn.Module, name: str) -> Tensor:
    """A copy of the weight beneath its parametrization. Raises TrainingError where it is not finite."""
    owner: Any = module.get_submodule(layer_name(name))
    weight: Tensor = owner.parametrizations[name.rpartition(".")[2]].original.detach()
    if not bool(weight.isfinite().all()):
        raise TrainingError(f"tensor {name!r}", "training left NaN or Inf in it", "lower the learning rate")
    return weight.clone()


def shared_names(module: nn.Module, names: Collection[str]) -> set[str]:
    """The names of all parameters that are these: their own, and those of tied copies."""
    return {place for name in names for place in places_of(module, name)}


def places_of(module: nn.Module, name: str) -> list[str]:
    """Every name of the parameter that is called `name`, that one first."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    own = parameters[name]
    return [name, *(other for other, value in parameters.items() if value is own and other != name)]
