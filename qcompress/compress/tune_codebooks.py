"""The entries of codebooks are trained while the codes stay; plain k-means is measured beside it.

Han, Mao, Dally 2016, arXiv 1510.00149: an entry's gradient is the sum of its weights' gradients. That sum grows with
the number of weights, and raw it diverges on layers of any size: by default it is divided by the root of that number.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from qcompress.calibration.activations import attach_activations
from qcompress.coding.grids import centroid_values, exponent_for, store_centroids
from qcompress.coding.rows import weight_from_rows
from qcompress.compress.apply_plan import fit
from qcompress.compress.evaluate import is_measured, measure_task
from qcompress.compress.finetune import train_data
from qcompress.data.measurement import Measurement
from qcompress.encode.encode_weight import ContextSources
from qcompress.model.live import LiveModel, layer_name
from qcompress.registry import ClusterConfig, KmeansConfig, Tune
from qcompress.training.fake_quantize import places_of
from qcompress.training.loop import Watch, train
from qcompress.training.losses import make_loss
from qcompress.training.penalties import Penalties
from qcompress.types.encoded import Codebook, Encoded, Fitted
from qcompress.types.plan import CodebookKey, Decision, Plan, codebook_key
from qcompress.types.run import ModelRun, Say
from qcompress.types.settings import Cosine, Sgd, Training

GRADIENT_POWERS = {"sum": 0.0, "rms": 0.5, "mean": 1.0}
"""The power of the number of an entry's codes that its gradient is divided by."""


@dataclass
class CodebookTuner:
    """Tunes what a plan's methods have clustered; `untuned` are then the task's metrics before.

    say  called with a line of words now and then
    """

    plan: Plan
    model_run: ModelRun
    say: Say = lambda _: None
    untuned: Sequence[Measurement] = ()

    def __call__(self, live: LiveModel, fitted: Fitted) -> Fitted:
        """The same with new entries in every codebook that is to be tuned, also in `live.quantized`."""
        decisions = [one for one in self.plan.decisions if _tune_of(one) is not None]
        if not decisions:
            return fitted
        recipe = self.model_run.recipe
        if is_measured(recipe):
            self.untuned = measure_task(live.quantized, self.model_run, "before tuning")
        tune = _tune_of(decisions[0])
        assert tune is not None and recipe.task is not None
        self.say(f"tuning of {len(decisions)} codebooks")
        training = Training(
            epochs=tune.epochs,
            batch_norm="frozen",
            optimizer=Sgd(lr=tune.learning_rate),
            schedule=Cosine(),
        )
        loss = make_loss(recipe.task, root=self.model_run.root, allow_code=self.model_run.allow_code)
        with _entries(live, decisions, fitted) as entries:
            data = train_data(self.model_run)
            train(live.quantized, data, loss, training, Penalties([]), Watch(say=self.say), seed=recipe.seed)
            tuned: dict[str, Encoded] = {name: one.encoded(decision) for name, (decision, one) in entries.items()}
        live.put(tuned)
        return replace(fitted, encoded={**fitted.encoded, **tuned})


def measure_kmeans(
    live: LiveModel, plan: Plan, model_run: ModelRun, untuned: Sequence[Measurement], sources: ContextSources
) -> Sequence[Measurement]:
    """The task's metrics with codebooks of the same settings by k-means of the live model's weights, without training.

    Nothing where the plan is just that.

    untuned   the plan's own before tuning: where all its methods are k-means, that is what is asked for
    sources   that the plan's own codebooks had: statistics weigh these alike
    """
    decisions = [one for one in plan.decisions if one.compresses and isinstance(one.config, ClusterConfig)]
    alone = all(one.method == "kmeans" for one in decisions)
    recipe = plan.recipe
    if not decisions or (alone and not any(map(_tune_of, decisions))):
        return ()
    if alone and recipe.activations is None and not recipe.companions:
        return untuned
    plain = replace(plan, decisions=tuple(_plain_kmeans(one) for one in plan.decisions))
    bare = replace(live, quantized=copy.deepcopy(live.module))
    found = fit(bare, plain, sources)
    attach_activations(bare.quantized, found.activations)
    return measure_task(bare.quantized, model_run, "k-means")


def _plain_kmeans(decision: Decision) -> Decision:
    """The decision by k-means with the same settings and without tuning, if it makes a codebook."""
    config = decision.config
    if not decision.compresses or not isinstance(config, ClusterConfig):
        return decision
    if isinstance(config, KmeansConfig):
        return replace(decision, config=replace(config, tune=None))
    plain = KmeansConfig(
        bits=config.bits,
        dim=config.dim,
        granularity=config.granularity,
        group_size=config.group_size,
        codebook=config.codebook,
        axis=config.axis,
    )
    return replace(decision, method="kmeans", config=plain)


def _tune_of(decision: Decision) -> Tune | None:
    """How a decision's codebook is tuned; None where it is not."""
    return decision.config.tune if decision.compresses and isinstance(decision.config, ClusterConfig) else None


class _Entries(nn.Module):
    """A weight as the entries that its codes name; the entries are what is trained.

    values  of another weight that shares its codebook: the one parameter is then trained for both
    """

    def __init__(self, encoded: Codebook, device: torch.device, values: nn.Parameter | None = None) -> None:
        super().__init__()
        self.source = encoded
        found = centroid_values(encoded)
        tables, entries, self.dim = found.shape
        offsets = torch.arange(tables).repeat_interleave(len(encoded.codes) // tables) * entries
        self.places = (encoded.codes.long() + offsets.unsqueeze(1)).to(device)
        self.values = nn.Parameter(found.flatten(0, 1).to(device)) if values is None else values

    @property
    def counts(self) -> Tensor:
        """How many codes name each entry, int64 [tables * entries]."""
        return torch.bincount(self.places.flatten(), minlength=len(self.values))

    def forward(self, _: Tensor) -> Tensor:
        """The weight that codes and entries give, float32 in the weight's shape, whatever it was before."""
        found = F.embedding(self.places, self.values)
        vectors, columns, dim = found.shape
        rows = found.movedim(2, 1).reshape(vectors * dim, columns)
        return weight_from_rows(rows, self.source.shape, self.source.axis)

    def encoded(self, decision: Decision) -> Codebook:
        """The same codes with the entries as they are now, stored as the decision's config says."""
        values = self.values.detach().cpu().view(self.source.centroids.shape)
        exponent = exponent_for(float(values.abs().max()))
        centroids, scale, exponent = store_centroids(values, decision.config.codebook, exponent)
        return replace(self.source, centroids=centroids, scale=scale, exponent=exponent)


def _scale_gradient(values: nn.Parameter, counts: Tensor, gradient: str, *, keep_zero: bool) -> None:
    """Divide the gradient of each entry by a power of the number of codes that name it, in all weights together.

    counts     int64 [tables * entries]
    keep_zero  entries that are exactly 0 get no gradient
    """
    share = counts.clamp_min(1).to(values.dtype).pow(-GRADIENT_POWERS[gradient]).unsqueeze(1)
    if keep_zero:
        share = share * (values.detach() != 0)
    values.register_hook(lambda slope: slope * share)  # type: ignore[no-untyped-call]


@contextmanager
def _entries(
    live: LiveModel, decisions: Sequence[Decision], fitted: Fitted
) -> Iterator[dict[str, tuple[Decision, _Entries]]]:
    """The quantized copy with entries in place of weights, and nothing else that is trained; it comes off clean."""
    module = live.quantized
    module.requires_grad_(False)
    found: dict[str, tuple[Decision, _Entries]] = {}
    codebooks: dict[CodebookKey | str, nn.Parameter] = {}
    counts: dict[CodebookKey | str, Tensor] = {}
    fake_quantized: list[tuple[nn.Module, str]] = []
    try:
        for decision in decisions:
            name = decision.tensor.name
            encoded = fitted.encoded[name]
            assert isinstance(encoded, Codebook)
            key = codebook_key(decision) or name
            entries = _Entries(encoded, live.device, codebooks.get(key))
            codebooks[key] = entries.values
            counts[key] = entries.counts + counts.get(key, 0)
            found[name] = (decision, entries)
            # Tied copies follow, and their gradients count.
            for place in places_of(module, name):
                owner, leaf = module.get_submodule(layer_name(place)), place.rpartition(".")[2]
                parametrize.register_parametrization(owner, leaf, entries, unsafe=True)
                fake_quantized.append((owner, leaf))
        for decision, entries in found.values():
            tune, key = _tune_of(decision), codebook_key(decision) or decision.tensor.name
            if tune is not None and key in counts:
                keep_zero = isinstance(decision.config, KmeansConfig) and decision.config.zero
                _scale_gradient(entries.values, counts.pop(key), tune.gradient, keep_zero=keep_zero)
        yield found
    finally:
        for owner, leaf in fake_quantized:
            parametrize.remove_parametrizations(owner, leaf, leave_parametrized=False)
        module.requires_grad_(False).eval()
