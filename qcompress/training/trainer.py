"""A method that needs training is given a Trainer: it trains a module as the recipe says, and shows it data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from qcompress.data.batches import Batch
from qcompress.training.loop import Data, Trained, Watch, refuse_few, steps_an_epoch, train
from qcompress.training.losses import Loss
from qcompress.training.optimizers import Group
from qcompress.training.penalties import Penalties, attach_penalties
from qcompress.training.runaway import leave_out_tiny
from qcompress.training.temperatures import alpha_words, set_strengths
from qcompress.training.warnings import advise_before
from qcompress.types.plan import Rule
from qcompress.types.ranks import ALONE, World
from qcompress.types.run import FitContext, seeded_generator
from qcompress.types.settings import Training

INIT_SAMPLES = 256
"""What is learned beside the weights starts from so many samples, or one batch."""


def trainer_of(context: FitContext) -> Trainer:
    """What trains, of a method that needs training: the plan sees to it that there is one."""
    assert isinstance(context.trainer, Trainer)
    return context.trainer


@dataclass
class Trainer:
    """Trains a module on the recipe's data as its `finetune` section says; `trained` then says how that went.

    regularize  the rules of the regularizers
    rules       what becomes of the weights afterwards, or while they are trained
    penalties   of the weights of the module that `attach` was given
    """

    data: Data
    loss: Loss
    training: Training
    watch: Watch
    seed: int
    world: World = ALONE
    regularize: Sequence[Rule] = ()
    rules: Sequence[Rule] = ()
    penalties: Penalties = field(default_factory=lambda: Penalties([]), init=False)
    trained: Trained | None = field(default=None, init=False)

    def attach(self, module: nn.Module) -> list[str]:
        """Give the module's weights the penalties that the recipe asks for, before any quantizer hides their names.

        returns  what is to be said before training begins, a line each
        raises   what `attach_penalties` raises
        """
        penalties = attach_penalties(module, self.regularize)
        set_strengths(penalties, self.training, self.steps)
        self.penalties, lines = leave_out_tiny(penalties, self.training.optimizer.lr)
        for line in alpha_words(self.penalties, self.training, self.steps):
            self.watch.say(line)
        return lines + advise_before(self.penalties, self.training, self.rules)

    @property
    def steps(self) -> int:
        """Of the optimizer, all told."""
        return self.training.epochs * steps_an_epoch(self.data, self.training, self.world)

    def warn(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.watch.say(f"warning: {line}")

    def __call__(
        self,
        module: nn.Module,
        after_step: Callable[[float], None] = lambda _: None,
        groups: Sequence[Group] = (),
    ) -> Trained:
        """Train; penalties act on the weights beneath their quantizers, and on none that another method has compressed.

        after_step  called after each step with the share of all steps that are done
        groups      parameters of the module that have an optimizer's settings of their own, see `make_optimizer`
        raises      what `train` raises
        """
        self.penalties = Penalties([one for one in self.penalties.regularized if one.weight.requires_grad])
        self.trained = train(
            module,
            self.data,
            self.loss,
            self.training,
            self.penalties,
            self.watch,
            seed=self.seed,
            world=self.world,
            after_step=after_step,
            groups=groups,
        )
        return self.trained

    def first_batches(self, device: torch.device) -> list[Batch]:
        """A few batches of the training data, drawn by the seed, without augmentation; the same on every rank.

        raises  DataError where there are fewer samples than one step takes
        """
        refuse_few(self.data, self.training.accumulate, self.world)
        batches = self.data.batches
        drawn = batches.shuffled(seeded_generator(self.seed, "first batches", "cpu"))
        count = max(1, INIT_SAMPLES // batches.batch_size)
        return [batches.read(samples).to(device) for _, samples in zip(range(count), drawn, strict=False)]
