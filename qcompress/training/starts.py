"""Where the quantizers of inputs start: what flows into the layers of the network as it was."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from qcompress.encoded import ActivationGrid
from qcompress.model.activations import INPUT_BITS, grids_of_inputs, watched_inputs
from qcompress.model.graph import inputs_of_network
from qcompress.model.live import LiveModel
from qcompress.settings import ActivationSettings
from qcompress.training.learn import Learn


@dataclass(frozen=True)
class Start:
    """One layer's inputs before training.

    grid      of the width that is asked for, from the settings' range
    mean      of the magnitudes
    lowest    of the values
    features  numbers of one sample
    fixed     whether it is the network's own input: 8 bits over its whole range, which are not trained
    """

    grid: ActivationGrid
    mean: float
    lowest: float
    features: int
    fixed: bool

    @property
    def middle(self) -> int:
        """The code of zero on a grid of no range: the middle one where values lie below zero."""
        return 2 ** (self.grid.bits - 1) if self.lowest < 0 else 0


def input_starts(live: LiveModel, learn: Learn) -> dict[str, Start]:
    """Module name -> its start, for every layer that is compressed and sees floats; none without activation settings.

    raises  DataError where an input holds NaN or Inf, or there are too few samples
    """
    if live.activations is None:
        return {}
    batches = learn.first_batches(live.device)
    own = inputs_of_network(live)

    def run() -> None:
        for batch in batches:
            live.module(*batch.args, **batch.kwargs)

    with torch.no_grad():
        moments = _moments(live, run)
        settings = live.activations
        others = {name: settings.bits for name in moments if name not in own}
        grids = grids_of_inputs(
            live.module, run, settings if settings.range else ActivationSettings(range="mse"), others
        )
        whole = {name: INPUT_BITS for name in moments if name in own}
        grids |= grids_of_inputs(live.module, run, ActivationSettings(range="minmax"), whole)
    return {
        name: Start(grids[name], one.total / one.count, one.lowest, one.features, name in own)
        for name, one in moments.items()
    }


@dataclass
class _Moments:
    total: float = 0.0
    count: int = 0
    lowest: float = 0.0
    features: int = 0

    def add(self, x: Tensor) -> None:
        self.total += float(x.abs().sum(dtype=torch.float64))
        self.count += x.numel()
        self.lowest = min(self.lowest, float(x.min()))
        self.features = x.numel() // max(len(x), 1)


def _moments(live: LiveModel, run: Callable[[], None]) -> dict[str, _Moments]:
    found: dict[str, _Moments] = {}
    with watched_inputs(live.module, live.layers, lambda name, x: found.setdefault(name, _Moments()).add(x)):
        run()
    return found
