"""What a method that needs training is given: it trains a module as the recipe says, and shows it data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from qcompress.model.batches import Batch
from qcompress.model.live import seeded_generator
from qcompress.settings import Training
from qcompress.training.loop import Data, Trained, Watch, refuse_few, train
from qcompress.training.losses import Loss
from qcompress.training.parallel import ALONE, World
from qcompress.training.penalties import Penalties

START_SAMPLES = 256
"""What is learned beside the weights starts from so many samples, or one batch."""


@dataclass
class Learn:
    """Trains a module on the recipe's data as its `finetune` section says; `trained` then says how that went."""

    data: Data
    loss: Loss
    training: Training
    watch: Watch
    seed: int
    world: World = ALONE
    trained: Trained | None = field(default=None, init=False)

    def __call__(
        self,
        module: nn.Module,
        after_step: Callable[[float], None] = lambda _: None,
        groups: Sequence[Mapping[str, Any]] = (),
    ) -> Trained:
        """Train.

        after_step  called after each step with the share of all steps that are done
        groups      parameters of the module that have an optimizer's settings of their own, see `make_optimizer`
        raises      what `train` raises
        """
        self.trained = train(
            module,
            self.data,
            self.loss,
            self.training,
            Penalties([]),
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
        refuse_few(self.data, self.training.options.accumulate, self.world)
        batches = self.data.batches
        drawn = batches.shuffled(seeded_generator(self.seed, "first batches", "cpu"))
        count = max(1, START_SAMPLES // batches.batch_size)
        return [batch.to(device) for _, batch in zip(range(count), drawn, strict=False)]
