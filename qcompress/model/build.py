"""The network that a recipe names is built here, asked for its facts, and given its weights, strictly."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qcompress.data.user_code import find_callable
from qcompress.errors import CheckpointError, ModelError, QcompressError, RecipeError, Subject, raise_all
from qcompress.model.factories import listed_network, refuse_arguments, without_network
from qcompress.model.layers import matrix_layer
from qcompress.types.config import Shape
from qcompress.types.plan import Axis, ModelFacts, TensorFacts, WeightKind
from qcompress.types.run import ModelRun
from qcompress.types.settings import ModelSettings

SHOWN_NAMES = 3
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def build_model(settings: ModelSettings, root: Path, allow_code: bool = False, place: str = "model") -> nn.Module:
    """The network in eval mode on the CPU, its weights at random.

    A class of transformers gets a Config of its own from `args`; every other callable gets them as keyword arguments.

    raises  ModelError for a factory that does not import, fails or gives no module; UsageError for a missing extra and,
            without `allow_code`, for what is no listed network, or has arguments that lead elsewhere
    """
    build = listed_network(settings)
    if build is None:
        build = partial(_call, find_callable(settings.factory, root, allow_code, f"{place}.factory"), settings.args)
    elif not allow_code:
        refuse_arguments(settings, place)
    try:
        with nullcontext() if allow_code else without_network():
            module = build()
    except QcompressError:
        raise
    except Exception as error:
        # The factory is anyone's code.
        what = f"{settings.factory} fails: {' '.join(f'{type(error).__name__}: {error}'.split())[:200]}"
        raise ModelError(place, what, "check model.args") from None
    if not isinstance(module, nn.Module):
        what = f"{settings.factory} gives a {type(module).__name__}, not a torch.nn.Module"
        raise ModelError(f"{place}.factory", what, "name a callable that builds the network")
    config = getattr(module, "config", None)
    if getattr(config, "use_cache", False):
        # A cache of keys grows with every call, and blocks are called many times on the same inputs.
        setattr(config, "use_cache", False)  # noqa: B010
    return module.eval()


def _call(factory: Callable[..., Any], args: Mapping[str, Any]) -> Any:
    config = getattr(factory, "config_class", None)
    if config is not None and isinstance(factory, type):
        return factory(config(**args))
    return factory(**args)


def build_network(model_run: ModelRun) -> nn.Module:
    """The network that a recipe names, untrained, in eval mode. Raises ModelError, RecipeError, UsageError."""
    recipe = model_run.recipe
    if recipe.model is None:
        raise RecipeError(recipe.source, "names no model", "add `model: {factory: ...}`")
    return build_model(recipe.model, model_run.root, model_run.allow_code, model_run.place("model"))


def load_weights(module: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Put every tensor of `state` where it belongs. Names and shapes must agree; dtypes become the module's.

    A batch norm's count of batches may be missing, and so may a name that shares its tensor with one that is there.

    raises  CheckpointError (Refusals where several) naming what is missing, left over or of another shape
    """
    refuse_misfit(module, {name: tuple(value.shape) for name, value in state.items()}, source)
    with torch.no_grad():
        for name, tensor in module.state_dict(keep_vars=True).items():
            if name in state:
                tensor.copy_(state[name])


def refuse_misfit(module: nn.Module, shapes: Mapping[str, Shape], source: str) -> None:
    """Raise CheckpointError, Refusals where several, naming what is missing, left over or of another shape."""
    own = module.state_dict(keep_vars=True)
    shared = tied_names(module)
    missing = [
        name
        for name in own
        if name not in shapes
        and not name.endswith("num_batches_tracked")
        and not any(alias in shapes for alias in _same(shared, name))
    ]
    surplus = sorted(set(shapes) - set(own))
    kind = type(module).__name__
    if missing or surplus:
        parts = [f"lacks {_listed(missing)}"] * bool(missing) + [f"has {_listed(surplus)} too many"] * bool(surplus)
        hint = "name the model that the checkpoint was saved from, with the same args"
        raise CheckpointError(source, f"does not fit {kind}: it {' and '.join(parts)}", hint)
    errors = []
    for name, tensor in own.items():
        if name in shapes and shapes[name] != tensor.shape:
            what = f"is {list(shapes[name])} in the checkpoint and {list(tensor.shape)} in {kind}"
            cause = f"have other shapes in the checkpoint than in {kind}"
            errors.append(CheckpointError(source, what, "check model.args", Subject(name), cause))
    raise_all(errors)


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:SHOWN_NAMES])
    more = len(names) - SHOWN_NAMES
    return f"{shown} and {more} more" if more > 0 else shown


def _same(shared: Mapping[str, str], name: str) -> set[str]:
    """All names of the tensor that `name` shares."""
    first = shared.get(name, name)
    return {first, *(alias for alias, twin in shared.items() if twin == first)}


def tied_names(module: nn.Module) -> dict[str, str]:
    """Names of the state dict that share a tensor with an earlier one -> that one."""
    first: dict[int, str] = {}
    tied: dict[str, str] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        if id(tensor) in first:
            tied[name] = first[id(tensor)]
        first.setdefault(id(tensor), name)
    return tied


def read_facts(model_run: ModelRun) -> ModelFacts:
    """What the recipe's network says of its tensors, from one without weights where it can be built so.

    raises  what `build_network` raises
    """
    return facts_of(build_skeleton(model_run))


def build_skeleton(model_run: ModelRun) -> nn.Module:
    """The network that a recipe names, without weights where it can be built so. Raises what `build_network` raises."""
    try:
        with torch.device("meta"):
            return build_network(model_run)
    except ModelError:
        # A constructor may read values, which tensors without data do not have.
        return build_network(model_run)


def facts_of(module: nn.Module) -> ModelFacts:
    """What a network says of its tensors."""
    axes, tied = channel_axes(module), tied_names(module)
    owners = dict(module.named_modules(remove_duplicate=False))
    facts = {}
    for name in module.state_dict():
        # A network may name what it saves otherwise than its modules.
        owner = owners.get(name.rpartition(".")[0], module)
        # MultiheadAttention multiplies by its last weight itself.
        called = type(owner).__name__ != "NonDynamicallyQuantizableLinear"
        kind = weight_kind(owner) if name.endswith("weight") and called else "else"
        facts[name] = TensorFacts(type(owner).__name__, axes.get(name), tied.get(name), called, kind)
    return facts


def weight_kind(module: nn.Module) -> WeightKind:
    """What a module does with its weight."""
    if matrix_layer(module) is not None:
        return "product"
    return "table" if isinstance(module, nn.Embedding) else "else"


def channel_axes(module: nn.Module) -> dict[str, Axis]:
    """Weight -> its channel axes, for modules that store them elsewhere than first."""
    axes = {}
    for name, one in module.named_modules():
        transposed = type(one).__name__ == "Conv1D" and type(one).__module__.startswith("transformers.")
        if transposed or isinstance(one, TRANSPOSED):
            axes[f"{name}.weight"] = Axis((1,), f"the model: {type(one).__name__} stores its outputs second")
    return axes
