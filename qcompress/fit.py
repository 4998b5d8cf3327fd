"""A plan on a live model: methods, companions and activation quantizers in turn, each seeing what came before."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from qcompress.books import Evidence, make_shared_books
from qcompress.coding.half import exponent_for
from qcompress.coding.rows import rows_from_weight
from qcompress.encoded import ActivationGrid, Encoded, Fitted, Kept
from qcompress.errors import InputError, ModelError, raise_all
from qcompress.model.activations import measure_activations
from qcompress.model.companions import run_companions
from qcompress.model.graph import inputs_of_network
from qcompress.model.live import LiveModel, find_tensor, layer_name
from qcompress.model.moments import batch_norm_grids
from qcompress.registry import METHODS
from qcompress.settings import ActivationSettings
from qcompress.training.learn import Learn
from qcompress.types import Decision, Plan
from qcompress.worker import encode_rows

Say = Callable[[str], None]
"""Called with a line on what begins."""


def fit(
    live: LiveModel,
    plan: Plan,
    say: Say = lambda _: None,
    *,
    evidence: Evidence | None = None,
    rate: float | None = None,
    learn: Learn | None = None,
    tune: Callable[[LiveModel, Fitted], Fitted] = lambda _, fitted: fitted,
) -> Fitted:
    """What the plan's methods choose for a live model: codes, adjusted tensors, activation quantizers.

    Methods that need weights alone come first, then those that need the graph, then those that need data, so that the
    later ones can make up for the earlier; `live.quantized` ends as the artifact will be.

    evidence  what methods that need weights alone draw on; codebooks that tensors share are made here
    rate      bits a weight that the codes of methods without widths may take
    learn     trains a module, for the methods that need it
    tune      changes what the methods chose before companions and activations see it
    raises    ModelError for weights of no module, and whatever the methods raise
    """
    decisions = [decision for decision in plan.decisions if decision.compresses]
    _refuse_strangers(live, decisions)
    done = Fitted({})
    for name in sorted({d.method or "" for d in decisions}, key=_order):
        own = [decision for decision in decisions if decision.method == name]
        say(f"{name}: {len(own)} tensors")
        method = METHODS[name]
        if method.live is not None and live.calibration:
            assert rate is not None
            found = method.load_live()(live, own, rate * sum(decision.tensor.numel for decision in own))
        elif method.needs == "weights":
            found = _encode_weights(live, own, evidence or Evidence(plan.recipe.seed))
        else:
            found = method.load()(live, own, *([learn] if method.needs == "training" else []))
        done = _joined(done, found)
        live.put(found.encoded)
    done = tune(live, done)
    if plan.recipe.companions:
        say(", ".join(plan.recipe.companions))
        corrected = run_companions(live, plan.recipe.companions)
        done = _joined(done, Fitted(_kept(corrected.tensors), notes=corrected.notes))
    bare = [name for name in live.layers if name not in done.activations]
    if live.activations is not None and bare:
        say("activation ranges")
        done = _joined(done, Fitted({}, activations=_activation_grids(live, live.activations, bare)))
    return done


def _order(method: str) -> tuple[int, int]:
    return (("weights", "graph", "calibration", "training").index(METHODS[method].needs), [*METHODS].index(method))


def _refuse_strangers(live: LiveModel, decisions: Sequence[Decision]) -> None:
    """A method on a live model needs the module of each of its weights to be called."""
    errors: list[InputError] = []
    for decision in decisions:
        name = decision.tensor.name
        if METHODS[decision.method or ""].needs != "weights" and layer_name(name) not in live.layers:
            what = f"tensor {name!r} belongs to no module that a forward pass calls"
            errors.append(
                ModelError(live.place, what, f"give it a rule of its own, as {{match: {name!r}, squant: ...}}")
            )
    raise_all(errors)


def _encode_weights(live: LiveModel, decisions: Sequence[Decision], evidence: Evidence) -> Fitted:
    def weight_of(decision: Decision) -> Tensor:
        return find_tensor(live.module, decision.tensor.name).detach().cpu()

    evidence = replace(evidence, books=make_shared_books(decisions, weight_of, evidence))
    encoded: dict[str, Encoded] = {}
    for decision in decisions:
        weight = find_tensor(live.module, decision.tensor.name).detach()
        rows = rows_from_weight(weight, decision.axis).contiguous()
        largest = float(weight.abs().max()) if weight.numel() else 0.0
        on_cpu = METHODS[decision.method or ""].family == "cluster"
        found = encode_rows(rows.cpu() if on_cpu else rows, decision, exponent_for(largest), evidence)
        tensor = decision.tensor
        encoded[tensor.name] = replace(found, shape=tensor.shape, axis=decision.axis, dtype=tensor.dtype)
    return Fitted(encoded)


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
    )


def _kept(tensors: Mapping[str, Tensor]) -> dict[str, Encoded]:
    return {name: Kept(value) for name, value in tensors.items()}


def _activation_grids(live: LiveModel, settings: ActivationSettings, names: Sequence[str]) -> dict[str, ActivationGrid]:
    """The quantizers of these layers' inputs."""
    inputs = inputs_of_network(live)
    if settings.range == "batch-norm" or (settings.range is None and not live.calibration):
        return batch_norm_grids(live, settings.bits, inputs, names)
    return measure_activations(live, settings, inputs, names)
