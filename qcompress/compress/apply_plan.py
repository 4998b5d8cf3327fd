"""A plan is applied to a live model: methods, corrections and activation quantizers, each seeing what came before."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import Tensor

from qcompress.calibration.activations import batch_norm_grids, measure_activations
from qcompress.calibration.corrections import run_companions
from qcompress.checkpoint.checkpoint import Checkpoint, tensor_view
from qcompress.coding.grids import decode
from qcompress.coding.message import share_codes
from qcompress.encode.encode_weight import ContextSources, encode_weight, make_shared_codebooks
from qcompress.errors import InputError, ModelError, RecipeError, Subject, raise_all
from qcompress.model.build import take
from qcompress.model.graph import inputs_of_network
from qcompress.model.live import LiveModel, put_tensors
from qcompress.model.moments import convolution_moments
from qcompress.model.products import caller_of, product_of
from qcompress.registry import METHODS, RdConfig
from qcompress.types.encoded import ActivationGrid, Encoded, Fitted, Kept
from qcompress.types.plan import Decision, Plan
from qcompress.types.run import FitContext
from qcompress.types.settings import ActivationSettings

ALONE = FitContext()
"""No budget, no training, and nobody who listens."""


def fit(
    live: LiveModel,
    plan: Plan,
    sources: ContextSources,
    context: FitContext = ALONE,
    tune: Callable[[LiveModel, Fitted], Fitted] = lambda _, fitted: fitted,
) -> Fitted:
    """What the plan's methods choose for a live model: codes, adjusted tensors, activation quantizers.

    Methods that need weights alone come first, then those that need the graph, then those that need data, so that the
    later ones can make up for the earlier; `live.quantized` ends as the artifact will be.

    sources  what methods that need weights alone draw on; codebooks that tensors share are made here
    context  what methods on a live model draw on
    tune     changes what the methods chose before corrections and activations see it
    raises   whatever the methods raise
    """
    decisions = [decision for decision in plan.decisions if decision.compresses]
    done = Fitted({})
    for name in sorted({d.method or "" for d in decisions}, key=_order):
        own = [decision for decision in decisions if decision.method == name]
        context.say(f"{name}: {len(own)} tensors")
        method = METHODS[name]
        if method.needs == "weights" and not _has_rates(live, own[0]):
            found = _encode_weights(live, own, sources)
        else:
            found = method.load_fit()(live, own, context)
        done = _joined(done, found)
        live.put(found.encoded)
    if live.unreached:
        done = _joined(done, Fitted({}, notes=(_unreached(live),)))
    done = tune(live, done)
    if plan.recipe.companions:
        context.say(", ".join(plan.recipe.companions))
        corrected = run_companions(live, plan.recipe.companions)
        kept: dict[str, Encoded] = {name: Kept(value) for name, value in corrected.tensors.items()}
        done = _joined(done, Fitted(kept, notes=corrected.notes))
    bare = [name for name in _quantized_inputs(live) if name not in done.activations]
    if live.activations is not None and bare:
        context.say("activation ranges")
        done = _joined(done, Fitted({}, activations=_activation_grids(live, live.activations, bare)))
    return done


def measure_stage(live: LiveModel, decisions: Sequence[Decision], context: FitContext) -> Fitted:
    """What methods measure of a stage of a network that goes block by block, before any of it is encoded."""
    own = [decision for decision in decisions if decision.compresses and _has_rates(live, decision)]
    return METHODS[own[0].method or ""].load_fit()(live, own, replace(context, measured=None)) if own else Fitted({})


def is_measured_first(live: LiveModel, decisions: Sequence[Decision]) -> bool:
    """Whether `measure_stage` has something to measure: steps are chosen for all stages together."""
    return any(decision.compresses and _has_rates(live, decision) for decision in decisions)


def _has_rates(live: LiveModel, decision: Decision) -> bool:
    """Whether a method chooses steps by what calibration data tell."""
    return METHODS[decision.method or ""].rates and bool(live.calibration)


def encode_merged(checkpoint: Checkpoint, plan: Plan, live: LiveModel, sources: ContextSources) -> dict[str, Encoded]:
    """The codes of those tensors that the network holds as parts of others only whose methods need weights alone.

    `live.quantized` then holds what they decode to. Raises RecipeError where one shares its codebook.
    """
    merged = [one for one in plan.decisions if one.tensor.name in live.names.merged and one.tied_to is None]
    wanted = [one for one in merged if one.compresses and one.stack is None]
    for one in wanted:
        if one.codebook.shared is not None:
            what = "is a part of another tensor in the network, and shares no codebook there"
            raise RecipeError(plan.recipe.source, what, "leave `share` out of its rule", Subject(one.tensor.name))
    if not wanted:
        return {}
    values = {one.tensor.name: tensor_view(checkpoint.shard_of(one.tensor.name), one.tensor) for one in merged}
    found = {one.tensor.name: encode_weight(values[one.tensor.name], one, sources, live.device) for one in wanted}
    values |= {name: decode(one).cpu() for name, one in found.items()}
    put_tensors(live.quantized, take(live.quantized, values).values)
    return dict(found)


def _unreached(live: LiveModel) -> str:
    first, *others = sorted(live.unreached)
    more = f" and {len(others)} more" if others else ""
    return f"rounded to nearest, no calibration sample reaches it: {first}{more}"


def _order(method: str) -> tuple[int, int]:
    return (("weights", "graph", "calibration", "training").index(METHODS[method].needs), [*METHODS].index(method))


def _quantized_inputs(live: LiveModel) -> list[str]:
    """The compressed modules whose inputs are quantized: not those that hold others beside a tensor of their own."""
    multiplies = {caller_of(live.module, name) for name in live.weights if product_of(live.module, name) is not None}
    alone = {name for name in live.layers if not [*live.module.get_submodule(name).children()]}
    return [name for name in live.layers if name in multiplies | alone]


def refuse_untrained(live: LiveModel, plan: Plan) -> None:
    """Raise ModelError, Refusals where several, for weights that are to be trained and that no forward pass uses."""
    errors: list[InputError] = []
    for decision in plan.decisions:
        name = decision.tensor.name
        trains = decision.compresses and METHODS[decision.method or ""].needs == "training"
        if trains and caller_of(live.module, name) not in live.layers:
            what = "belongs to no module that a forward pass calls"
            hint = "give it a rule of its own with a method that needs weights alone, such as mse"
            errors.append(ModelError(live.place, what, hint, Subject(name)))
    raise_all(errors)


def _encode_weights(live: LiveModel, decisions: Sequence[Decision], sources: ContextSources) -> Fitted:
    def weight_of(decision: Decision) -> Tensor:
        return live.weight(decision.tensor.name).cpu()

    world = live.world
    guessed = _guessed_inputs(decisions)
    moments = {name: found for name, found in convolution_moments(live).items() if name in guessed} if guessed else {}
    codebooks = make_shared_codebooks(decisions, weight_of, sources, world)
    sources = replace(sources, codebooks=codebooks, moments=moments)
    own = [decisions[place] for place in world.share([one.tensor.numel for one in decisions])]
    weights = ((one, live.weight(one.tensor.name)) for one in own)
    found: dict[str, Encoded] = {}
    for one, value in weights:
        world.check()
        found[one.tensor.name] = encode_weight(value, one, sources, value.device)
    told, _ = share_codes(found, {}, world)
    encoded = {one.tensor.name: told[one.tensor.name] for one in decisions}
    if not guessed:
        return Fitted(encoded)
    known = f"rd without data takes the inputs of {len(moments)} of {len(guessed)} convolutions from batch norms"
    return Fitted(encoded, notes=(f"{known}, and guesses those of others",))


def _guessed_inputs(decisions: Sequence[Decision]) -> set[str]:
    """The weights with a kernel whose inputs rd looks for in batch norms."""
    return {
        one.tensor.name
        for one in decisions
        if isinstance(one.config, RdConfig) and one.config.prior == "correlated" and len(one.tensor.shape) > 2
    }


def _joined(before: Fitted, after: Fitted) -> Fitted:
    compressed = {name for name, value in before.encoded.items() if not isinstance(value, Kept)}
    adjusted = {name for name, value in after.encoded.items() if isinstance(value, Kept)}
    return Fitted(
        # Training sees weights that others have compressed as weights that have changed.
        {
            **before.encoded,
            **{name: value for name, value in after.encoded.items() if name not in compressed & adjusted},
        },
        {**before.references, **after.references},
        {**before.activations, **after.activations},
        {**before.caps, **after.caps},
        before.notes + after.notes,
        {**before.measured, **after.measured},
    )


def _activation_grids(live: LiveModel, settings: ActivationSettings, names: Sequence[str]) -> dict[str, ActivationGrid]:
    """The quantizers of these layers' inputs."""
    inputs = inputs_of_network(live)
    if settings.range == "batch-norm" or (settings.range is None and not live.calibration):
        return batch_norm_grids(live, settings.bits, inputs, names)
    return measure_activations(live, settings, inputs, names)
