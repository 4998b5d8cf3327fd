"""Training within a run: for the methods that need it, and of the entries of codebooks while the codes stay.

Han, Mao, Dally 2016, arXiv 1510.00149: an entry's gradient is the sum of its weights' gradients. That sum grows with
the number of weights, and raw it diverges on layers of any size: by default it is divided by the root of that number.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from qcompress.books import Evidence
from qcompress.coding.codebook import centroid_values, store_centroids
from qcompress.coding.half import exponent_for
from qcompress.coding.rows import weight_from_rows
from qcompress.encoded import Codebook, Encoded, Fitted
from qcompress.evaluate import Setting, measure_task
from qcompress.finetune import train_data, training_loss
from qcompress.fit import fit
from qcompress.model.activations import attach_activations
from qcompress.model.live import LiveModel, layer_name
from qcompress.model.tasks import Measurement
from qcompress.registry import KmeansConfig, Tune
from qcompress.settings import Cosine, Sgd, Training, TrainingOptions
from qcompress.training.dress import places_of
from qcompress.training.learn import Learn
from qcompress.training.loop import Watch, train
from qcompress.training.losses import make_loss
from qcompress.training.parallel import ALONE, World
from qcompress.training.penalties import Penalties
from qcompress.types import BookKey, Decision, Plan, book_key


@dataclass
class Tuner:
    """Tunes what a plan's methods have clustered; `untuned` are then the task's metrics before.

    say  called with a line of words now and then
    """

    plan: Plan
    setting: Setting
    say: Callable[[str], None] = lambda _: None
    untuned: Sequence[Measurement] = ()

    def __call__(self, live: LiveModel, fitted: Fitted) -> Fitted:
        """The same with new entries in every codebook that is to be tuned, also in `live.quantized`."""
        decisions = [one for one in self.plan.decisions if _tune_of(one) is not None]
        if not decisions:
            return fitted
        recipe = self.setting.recipe
        if recipe.data is not None and recipe.data.eval is not None:
            self.untuned = measure_task(live.quantized, self.setting, "before tuning")
        tune = _tune_of(decisions[0])
        assert tune is not None and recipe.task is not None
        self.say(f"tuning of {len(decisions)} codebooks")
        training = Training(
            options=TrainingOptions(epochs=tune.epochs, batch_norm="frozen"),
            optimizer=Sgd(lr=tune.learning_rate),
            schedule=Cosine(),
        )
        loss = make_loss(recipe.task, root=self.setting.root, allow_code=self.setting.allow_code)
        with _entries(live, decisions, fitted) as entries:
            data = train_data(self.setting)
            train(live.quantized, data, loss, training, Penalties([]), Watch(say=self.say), seed=recipe.seed)
            tuned: dict[str, Encoded] = {name: one.encoded(decision) for name, (decision, one) in entries.items()}
        live.put(tuned)
        return replace(fitted, encoded={**fitted.encoded, **tuned})


def measure_kmeans(
    live: LiveModel, plan: Plan, setting: Setting, untuned: Sequence[Measurement], evidence: Evidence
) -> Sequence[Measurement]:
    """The task's metrics with codebooks of the same settings by k-means of the live model's weights, and no training;
    nothing where the plan is just that.

    untuned   the plan's own before tuning: where all its methods are k-means, that is what is asked for
    evidence  that the plan's own codebooks had: statistics weigh these alike
    """
    decisions = [one for one in plan.decisions if one.compresses and one.config.form == "codebook"]
    alone = all(one.method == "kmeans" for one in decisions)
    recipe = plan.recipe
    if not decisions or (alone and not any(map(_tune_of, decisions))):
        return ()
    if alone and recipe.activations is None and not recipe.companions:
        return untuned
    plain = replace(plan, decisions=tuple(_plain_kmeans(one) for one in plan.decisions))
    bare = replace(live, quantized=copy.deepcopy(live.module))
    found = fit(bare, plain, evidence=evidence)
    attach_activations(bare.quantized, found.activations)
    return measure_task(bare.quantized, setting, "k-means")


def _plain_kmeans(decision: Decision) -> Decision:
    if not decision.compresses or decision.config.form != "codebook":
        return decision
    config = decision.config
    if isinstance(config, KmeansConfig):
        return replace(decision, config=replace(config, tune=None))
    same = {name: getattr(config, name) for name in ("bits", "dim", "granularity", "group_size", "codebook", "axis")}
    return replace(decision, method="kmeans", config=KmeansConfig(**same))


def make_learn(setting: Setting, teacher: nn.Module, watch: Watch, world: World = ALONE) -> Learn:
    """What trains a module on the recipe's data as its `finetune` section says.

    teacher  the network as it was, for distillation
    """
    recipe = setting.recipe
    assert recipe.finetune is not None
    training = recipe.finetune.training
    return Learn(train_data(setting), training_loss(setting, teacher), training, watch, recipe.seed, world)


def _tune_of(decision: Decision) -> Tune | None:
    return getattr(decision.config, "tune", None) if decision.compresses else None


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
    """Divide the gradient of each entry by a power of the number of codes that name it, in all weights together."""
    power = {"sum": 0.0, "rms": 0.5, "mean": 1.0}[gradient]
    share = counts.clamp_min(1).to(values.dtype).pow(-power).unsqueeze(1)
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
    books: dict[BookKey | str, nn.Parameter] = {}
    counts: dict[BookKey | str, Tensor] = {}
    dressed: list[tuple[nn.Module, str]] = []
    try:
        for decision in decisions:
            name = decision.tensor.name
            encoded = fitted.encoded[name]
            assert isinstance(encoded, Codebook)
            key = book_key(decision) or name
            entries = _Entries(encoded, live.device, books.get(key))
            books[key] = entries.values
            counts[key] = entries.counts + counts.get(key, 0)
            found[name] = (decision, entries)
            # Tied copies follow, and their gradients count.
            for place in places_of(module, name):
                owner, leaf = module.get_submodule(layer_name(place)), place.rpartition(".")[2]
                parametrize.register_parametrization(owner, leaf, entries, unsafe=True)
                dressed.append((owner, leaf))
        for decision, entries in found.values():
            tune, key = _tune_of(decision), book_key(decision) or decision.tensor.name
            if tune is not None and key in counts:
                keep_zero = bool(getattr(decision.config, "zero", False))
                _scale_gradient(entries.values, counts.pop(key), tune.gradient, keep_zero=keep_zero)
        yield found
    finally:
        for owner, leaf in dressed:
            parametrize.remove_parametrizations(owner, leaf, leave_parametrized=False)
        module.requires_grad_(False).eval()
