"""The mean error that quantized weights leave in each layer's outputs: from batch norms, or from calibration data."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from qcompress.model.fold import NormedLayer
from qcompress.model.live import LiveModel, find_tensor
from qcompress.model.moments import input_moments
from qcompress.model.sweep import layer_inputs, run_stage


def mean_errors(
    live: LiveModel, reference: nn.Module, layers: Sequence[NormedLayer], caps: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """What each layer of `live.quantized` gives more on average than that of `reference`, float64 [channels].

    The error of the weight times the mean input that the batch norms before it tell of (Nagel et al. 2019, arXiv
    1906.04721, section 4.2.1); layers whose input no statistics reach are left out.

    reference  a copy of the network with the weights that were quantized
    caps       of its modules' outputs, see Fitted
    """
    models = input_moments(live, reference, caps)
    errors = {}
    for layer in layers:
        model = models.get(layer.name)
        if model is not None and model.mean_known:
            name = f"{layer.name}.weight"
            error = find_tensor(live.quantized, name) - find_tensor(reference, name)
            errors[layer.name] = replace(layer, weight=error).response(model.moments[0])
    return errors


@torch.no_grad()
def correct_by_data(
    live: LiveModel, reference: nn.Module, names: Collection[str], correct: Callable[[str, Tensor], None]
) -> None:
    """Call `correct` with each layer and the mean over the calibration data of what `live.quantized` gives more there.

    What it changes in `live.quantized`, the layers after it see. One pass through both networks, where AIMET's code
    runs the network once more for every layer.
    """
    clean = [live.stages[0].begin(batch) for batch in live.calibration]
    noisy = list(clean)
    for stage in live.stages:
        for name in (name for name in stage.layers if name in names):
            before, after = (
                _output_mean(module.get_submodule(name), layer_inputs(stage, module, states, [name])[name])
                for module, states in ((reference, clean), (live.quantized, noisy))
            )
            correct(name, after - before)
        clean, noisy = run_stage(stage, reference, clean), run_stage(stage, live.quantized, noisy)


def _output_mean(module: nn.Module, inputs: Sequence[Tensor]) -> Tensor:
    """The mean output for these inputs, over samples and places: float64 [channels]."""
    axis = -1 if isinstance(module, nn.Linear) else 1
    total, count = torch.zeros((), dtype=torch.float64), 0
    for x in inputs:
        rows = module(x).movedim(axis, -1).flatten(0, -2)
        total, count = total + rows.sum(0, dtype=torch.float64), count + len(rows)
    return total / count
