"""The network that a recipe names is built here, asked for its facts, and given its weights, strictly."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import _lru_cache_wrapper, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qcompress.data.batches import Batch
from qcompress.data.sources import open_batches
from qcompress.data.user_code import find_callable
from qcompress.errors import CheckpointError, InputError, ModelError, QcompressError, RecipeError, Subject, raise_all
from qcompress.model.factories import listed_network, refuse_arguments, without_network
from qcompress.model.layers import TRANSPOSED, MatrixLayer, has_channels_of_its_own
from qcompress.model.pretrained import Taken, is_pretrained, revert
from qcompress.model.pretrained import take as take_pretrained
from qcompress.model.products import caller_of, product_of, stacked_axis
from qcompress.types.config import Shape
from qcompress.types.plan import Axis, ModelFacts, TensorFacts, WeightKind
from qcompress.types.run import ModelRun
from qcompress.types.settings import ModelSettings

SHOWN_NAMES = 3


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


def take(module: nn.Module, state: Mapping[str, Tensor]) -> Taken:
    """What a network makes of the tensors of a checkpoint, which it does not get yet; they may have no data."""
    if is_pretrained(module):
        return take_pretrained(module, state)
    own = module.state_dict(keep_vars=True)
    taken = {name: value for name, value in state.items() if name in own}
    surplus, missing = sorted(set(state) - set(own)), [name for name in own if name not in state]
    return Taken({name: name for name in taken}, taken, tuple(surplus), tuple(missing))


def take_shapes(module: nn.Module, shapes: Mapping[str, Shape]) -> Taken:
    """The same of tensors of these names and shapes; what it takes has no data."""
    return take(module, {name: torch.empty(shape, device="meta") for name, shape in shapes.items()})


def stored_names(module: nn.Module, values: Mapping[str, Tensor], shapes: Mapping[str, Shape]) -> dict[str, Tensor]:
    """The values of a network's own state by the names that its checkpoint has for them, `shapes` being those there.

    What the network has merged is taken apart again.
    """
    taken = take_shapes(module, shapes)
    found = {name: values[place] for name, place in taken.places.items()}
    merged = taken.names(shapes).merged
    if merged:
        apart = revert(module, values)
        found |= {name: apart[name] for name in merged}
    return found


def load_weights(
    module: nn.Module,
    state: Mapping[str, Tensor],
    source: str,
    *,
    strict: bool = True,
    error: type[InputError] = CheckpointError,
) -> None:
    """Put every tensor of `state` where it belongs. Names and shapes must agree; dtypes become the module's.

    A batch norm's count of batches may be missing, and so may a name that shares its tensor with one that is there. A
    network of transformers takes the names and stacks that its library takes.

    strict  refuse what is missing and what is left over
    raises  `error` (Refusals where several) naming what is missing, left over or of another shape, and two different
            tensors that the network holds as one
    """
    taken = take(module, state)
    refuse_misfit(module, taken, source, strict=strict, error=error)
    with torch.no_grad():
        for name, tensor in module.state_dict(keep_vars=True).items():
            if name in taken.values:
                tensor.copy_(taken.values[name])


def refuse_misfit(
    module: nn.Module,
    taken: Taken,
    source: str,
    *,
    strict: bool = True,
    error: type[InputError] = CheckpointError,
) -> None:
    """Raise what `load_weights` raises for what a network makes of a checkpoint."""
    own, values = module.state_dict(keep_vars=True), taken.values
    shared = tied_names(module)
    missing = [
        name
        for name in taken.missing
        if not name.endswith("num_batches_tracked") and not any(alias in values for alias in _same(shared, name))
    ]
    kind = type(module).__name__
    if strict and (missing or taken.surplus):
        surplus = taken.surplus
        parts = [f"lacks {_listed(missing)}"] * bool(missing) + [f"has {_listed(surplus)} too many"] * bool(surplus)
        prefix = _prefix(missing, surplus)
        hint = "name the model that the checkpoint was saved from, with the same args"
        if prefix is not None:
            hint = f"its names begin with {prefix!r}: compress it with --strip-prefix {prefix}"
        raise error(source, f"does not fit {kind}: it {' and '.join(parts)}", hint)
    errors = []
    for name, tensor in own.items():
        if name in values and values[name].shape != tensor.shape:
            what = f"is {list(values[name].shape)} in the checkpoint and {list(tensor.shape)} in {kind}"
            cause = f"have other shapes in the checkpoint than in {kind}"
            errors.append(error(source, what, "check the sizes that it is built with", Subject(name), cause))
        elif name in shared and not _agree(values, name, shared[name]):
            what = f"differs from {shared[name]!r} in the checkpoint, and {kind} has one tensor for both"
            errors.append(error(source, what, "build it with tie_word_embeddings: false", Subject(name)))
    raise_all(errors)


def _prefix(missing: Sequence[str], surplus: Sequence[str]) -> str | None:
    """What stands before all the names that are too many, where without it they are those that are missing."""
    first = next((name for name in missing if surplus and surplus[0].endswith(f".{name}")), None)
    if first is None:
        return None
    prefix = surplus[0].removesuffix(first)
    short = {name.removeprefix(prefix) for name in surplus}
    return prefix if all(name.startswith(prefix) for name in surplus) and short >= set(missing) else None


def _agree(values: Mapping[str, Tensor], name: str, twin: str) -> bool:
    """Whether two names of one tensor are given the same values, as far as both are given any."""
    if name not in values or twin not in values or values[name].device.type == "meta":
        return True
    return values[name].shape != values[twin].shape or torch.equal(values[name], values[twin])


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


def read_facts(model_run: ModelRun, shapes: Mapping[str, Shape] | None = None) -> ModelFacts:
    """What the recipe's network says of its tensors, from one without weights where it can be built so.

    shapes  of the tensors of its checkpoint, by whose names the facts then go
    raises  what `build_network` raises
    """
    module = build_skeleton(model_run)
    if shapes is None:
        return facts_of(module)
    return facts_by(module, take_shapes(module, shapes), shapes, idle_modules(module, model_run))


def facts_by(module: nn.Module, taken: Taken, tensors: Iterable[str], idle: frozenset[str] = frozenset()) -> ModelFacts:
    """What a network says of these tensors of its checkpoint, by the names that they have there.

    idle  its modules that no forward pass calls
    """
    own, names = facts_of(module, idle), taken.names(tensors)
    back = {place: name for name, place in taken.places.items()}
    merged = TensorFacts(type(module).__name__, called=False, merged=True)
    stacks = {part: name for name, stack in names.stacks.items() for part in stack.parts}

    def fact(name: str) -> TensorFacts:
        one = own[names.place(name)]
        return replace(one, tied_to=None if one.tied_to is None else back.get(one.tied_to))

    def part(name: str) -> TensorFacts:
        stack = stacks.get(name)
        return merged if stack is None else replace(own[stack], axis=None, merged=True, stack=stack)

    return {name: fact(name) for name in taken.places} | {name: part(name) for name in sorted(names.merged)}


def build_skeleton(model_run: ModelRun) -> nn.Module:
    """The network that a recipe names, without weights where it can be built so. Raises what `build_network` raises."""
    try:
        with _without_data():
            return build_network(model_run)
    except ModelError:
        # A constructor may read values, which tensors without data do not have.
        return build_network(model_run)


@contextmanager
def _without_data() -> Iterator[None]:
    """Tensors that are made meanwhile have no data, and afterwards no `functools.lru_cache` still gives such ones.

    BEiT's positions, for one, are a cached function of the window alone. A tensor with data that is indexed by one
    without gives whatever lies in memory, and no error.
    """
    try:
        with torch.device("meta"):
            yield
    finally:
        for one in gc.get_objects():
            # Not isinstance, which would ask proxies that import what they stand for.
            if type(one) is _lru_cache_wrapper and _holds_no_data(one):
                one.cache_clear()


def _holds_no_data(cache: object) -> bool:
    """Whether something that a cache holds, tuples and the like looked into, is a tensor without data."""
    waiting, seen = gc.get_referents(cache), set[int]()
    while waiting:
        one = waiting.pop()
        if isinstance(one, Tensor) and one.device.type == "meta":
            return True
        if type(one) in (tuple, list, dict) and id(one) not in seen:
            seen.add(id(one))
            waiting += one.values() if isinstance(one, dict) else one
    return False


def example_batch(model_run: ModelRun, calibration: Sequence[Batch] = ()) -> Batch:
    """A batch that shows what the model takes: of the data that there is, or noise of the shape in the recipe.

    raises  RecipeError where nothing shows it, DataError
    """
    if calibration:
        return calibration[0].first(2)
    data, model = model_run.recipe.data, model_run.recipe.model
    if data is not None and data.eval is not None:
        return next(iter(open_batches(model_run, "eval"))).first(2)
    if model is not None and model.input:
        generator = torch.Generator().manual_seed(model_run.recipe.seed)
        noise: Tensor = torch.randn(2, *model.input, generator=generator)
        return Batch((noise,))
    what = "has no data that shows what it takes"
    raise RecipeError(model_run.place("model"), what, "add `input: [3, 224, 224]`, or data.calibration or data.eval")


def idle_modules(module: nn.Module, model_run: ModelRun) -> frozenset[str]:
    """The modules of a network without weights that a forward pass on the recipe's data does not call.

    None where it cannot be told: without data, for a network that has weights or that looks at values on its way.
    """
    tensors = [*module.parameters(), *module.buffers()]
    if not tensors or any(one.device.type != "meta" for one in tensors):
        return frozenset()
    calls: set[str] = set()
    handles = [
        one.register_forward_pre_hook(lambda *_, name=name: calls.add(name)) for name, one in module.named_modules()
    ]
    data = model_run.recipe.data
    try:
        shown = data is not None and data.calibration is not None
        first = [next(iter(open_batches(model_run, "calibration")))] if shown else []
        example = example_batch(model_run, first).to("meta")
        with torch.no_grad(), _without_data():
            module(*example.args, **example.kwargs)
    except Exception:
        # Missing data are told of elsewhere; the network's own code may raise anything.
        return frozenset()
    finally:
        for handle in handles:
            handle.remove()
    return frozenset(name for name, _ in module.named_modules()) - calls


def facts_of(module: nn.Module, idle: frozenset[str] = frozenset()) -> ModelFacts:
    """What a network says of its tensors; `idle` are its modules that no forward pass calls."""
    axes, tied = channel_axes(module), tied_names(module)
    owners = dict(module.named_modules(remove_duplicate=False))
    facts = {}
    for name in module.state_dict():
        # A network may name what it saves otherwise than its modules.
        owner = owners.get(name.rpartition(".")[0], module)
        # MultiheadAttention multiplies by its last weight itself.
        called = type(owner).__name__ != "NonDynamicallyQuantizableLinear"
        kind = weight_kind(module, name)
        if kind != "else" and caller_of(module, name) in idle:
            called, kind = False, "idle"
        facts[name] = TensorFacts(type(owner).__name__, axes.get(name), tied.get(name), called, kind)
    return facts


def weight_kind(module: nn.Module, tensor: str) -> WeightKind:
    """What a network does with one of its tensors."""
    product = product_of(module, tensor)
    if product is not None:
        return "product" if isinstance(product.layer, MatrixLayer) else "inner"
    owner, _, leaf = tensor.rpartition(".")
    looked_up = leaf == "weight" and owner and isinstance(module.get_submodule(owner), nn.Embedding)
    return "table" if looked_up else "else"


def channel_axes(module: nn.Module) -> dict[str, Axis]:
    """Weight -> its channel axes, for modules that store them elsewhere than first."""
    axes = {}
    for name, one in module.named_modules():
        transposed = type(one).__name__ == "Conv1D" and type(one).__module__.startswith("transformers.")
        if isinstance(one, TRANSPOSED) and has_channels_of_its_own(one):
            if one.weight.shape[1] > 1:
                axes[f"{name}.weight"] = Axis((0, 1), f"the model: {type(one).__name__} has an output a pair")
        elif transposed or isinstance(one, TRANSPOSED):
            axes[f"{name}.weight"] = Axis((1,), f"the model: {type(one).__name__} stores its outputs second")
        for leaf, value in one.named_parameters(recurse=False):
            stacked = stacked_axis(one, tuple(value.shape))
            if stacked is not None:
                axes[f"{name}.{leaf}"] = Axis(stacked, f"the model: {type(one).__name__} has a grid a row of an expert")
    return axes
