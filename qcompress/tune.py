"""Training within a run: for the methods that need it, and of the entries of codebooks while the codes stay.

Han, Mao, Dally 2016, arXiv 1510.00149: an entry's gradient is the sum of its weights' gradients. That sum grows with
the number of weights, and raw it diverges on layers of any size: by default it is divided by the root of that number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from qcompress.coding.codebook import centroid_values, store_centroids
from qcompress.coding.half import exponent_for
from qcompress.coding.rows import weight_from_rows
from qcompress.evaluate import Setting, measure_task
from qcompress.finetune import train_data, training_loss
from qcompress.model.live import LiveModel, layer_name
from qcompress.model.tasks import Measurement
from qcompress.registry import Tune
from qcompress.settings import Cosine, Sgd, Training, TrainingOptions
from qcompress.training.learn import Learn
from qcompress.training.loop import Watch, train
from qcompress.training.losses import make_loss
from qcompress.training.parallel import ALONE, World
from qcompress.training.penalties import Penalties
from qcompress.types import Codebook, Decision, Encoded, Fitted, Plan


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
    """A weight as the entries that its codes name; the entries are what is trained."""

    def __init__(self, encoded: Codebook, device: torch.device, gradient: str, *, keep_zero: bool) -> None:
        super().__init__()
        self.source = encoded
        values = centroid_values(encoded)
        tables, entries, self.dim = values.shape
        offsets = torch.arange(tables).repeat_interleave(len(encoded.codes) // tables) * entries
        self.places = (encoded.codes.long() + offsets.unsqueeze(1)).to(device)
        self.values = nn.Parameter(values.flatten(0, 1).to(device))
        counts = torch.bincount(self.places.flatten(), minlength=tables * entries).clamp_min(1).unsqueeze(1)
        power = {"sum": 0.0, "rms": 0.5, "mean": 1.0}[gradient]
        share = counts.to(self.values.dtype).pow(-power)
        if keep_zero:
            share = share * (self.values.detach() != 0)
        self.values.register_hook(lambda slope: slope * share)  # type: ignore[no-untyped-call]

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


@contextmanager
def _entries(
    live: LiveModel, decisions: Sequence[Decision], fitted: Fitted
) -> Iterator[dict[str, tuple[Decision, _Entries]]]:
    """The quantized copy with entries in place of weights, and nothing else that is trained; it comes off clean."""
    module = live.quantized
    module.requires_grad_(False)
    found: dict[str, tuple[Decision, _Entries]] = {}
    try:
        for decision in decisions:
            name = decision.tensor.name
            encoded = fitted.encoded[name]
            assert isinstance(encoded, Codebook)
            tune = _tune_of(decision)
            assert tune is not None
            keep_zero = bool(getattr(decision.config, "zero", False))
            entries = _Entries(encoded, live.device, tune.gradient, keep_zero=keep_zero)
            owner, leaf = module.get_submodule(layer_name(name)), name.rpartition(".")[2]
            parametrize.register_parametrization(owner, leaf, entries, unsafe=True)
            found[name] = (decision, entries)
        yield found
    finally:
        for name in found:
            owner, leaf = module.get_submodule(layer_name(name)), name.rpartition(".")[2]
            parametrize.remove_parametrizations(owner, leaf, leave_parametrized=False)
        module.requires_grad_(False).eval()
