"""`preset: paper` of every method that has it: the constants of the papers, and what happens to options beside them."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from qcompress.registry import METHODS
from qcompress.registry.grids import PresetConfig

AIMET: dict[str, Any] = {"granularity": "tensor", "symmetric": True, "range": "tf-enhanced", "fold": True}
"""The defaults that the comparisons with DFQ and AdaRound were made with."""
CHANNEL: dict[str, Any] = {"granularity": "channel", "symmetric": False}

PAPER: dict[str, dict[str, Any]] = {
    # Guo et al. 2022, arXiv 2202.07471.
    "squant": {**CHANNEL, "range": "minmax", "stages": "EKC"},
    # Nagel et al. 2019, arXiv 1906.04721, as AIMET has it; biases are corrected by data where there are some.
    "dfq": {**AIMET, "equalize": True, "absorb": True, "bias_correction": None, "relu6": "relax"},
    # Nagel et al. 2020, arXiv 2004.10568, as AIMET has it.
    "adaround": {
        **AIMET,
        "objective": "sampled",
        "iterations": 15_000,
        "batch_size": 32,
        "learning_rate": 1e-3,
        "strength": 0.01,
        "warm_up": 0.2,
        "asymmetric": True,
    },
    # Frantar et al. 2022, arXiv 2210.17323.
    "gptq": {
        **CHANNEL,
        "range": "minmax",
        "damping": 0.01,
        "act_order": False,
        "asymmetric": False,
        "descent": 0,
        "sequential": True,
    },
    # Liu et al. 2023, arXiv 2212.07048: lambda_r 0.1, lambda_c 0.02.
    "pdquant": {
        **CHANNEL,
        "range": "mse",
        "iterations": 20_000,
        "batch_size": 32,
        "learning_rate": 3e-3,
        "activation_rate": 4e-5,
        "strength": 0.01,
        "warm_up": 0.2,
        "temperature": 4.0,
        "prediction": 1 / 0.1,
        "prediction_form": "exact",
        "distribution_correction": True,
        "correction_weight": 1 / 0.02,
        "correction_steps": 500,
        "drop": 0.5,
    },
}

OTHER: dict[str, Any] = {
    "granularity": "group",
    "symmetric": {True: False, False: True},
    "range": {"minmax": "mse", "mse": "minmax", "tf-enhanced": "minmax"},
    "stages": "EK",
    "bias_correction": "analytic",
    "relu6": "caps",
    "prediction_form": "quadratic",
    "objective": "gram",
}
"""Values that differ from those above, where adding one does not."""

REFUSED = {("squant", "range"): "clip", ("adaround", "objective"): "gram"}
"""What belongs to our variant alone, and so contradicts the preset."""


def resolved(config: PresetConfig) -> dict[str, Any]:
    found = dataclasses.asdict(config)
    return {
        name: value for name, value in found.items() if name not in ("bits", "preset", "group_size", "scales", "axis")
    }


def other(option: str, value: Any) -> Any:
    """A value that the option may have too."""
    if option in OTHER:
        return OTHER[option][value] if isinstance(OTHER[option], dict) else OTHER[option]
    return not value if isinstance(value, bool) else value / 2 if isinstance(value, float) else value + 1


def test_every_method_with_a_preset_is_held_to_its_paper() -> None:
    assert set(PAPER) == {name for name, one in METHODS.items() if issubclass(one.config, PresetConfig)}


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("method", PAPER)
def test_every_option_is_as_published(method: str, bits: int) -> None:
    assert resolved(METHODS[method].config(bits=bits, preset="paper")) == PAPER[method]


def test_adaround_takes_fewer_steps_at_eight_bits() -> None:
    config = METHODS["adaround"].config(bits=8, preset="paper")
    assert resolved(config) == {**PAPER["adaround"], "iterations": 10_000}


@pytest.mark.parametrize(("method", "option"), [(m, o) for m in PAPER for o in PAPER[m] if (m, o) not in REFUSED])
def test_what_is_given_takes_the_place_of_the_preset_and_moves_nothing_else(method: str, option: str) -> None:
    value = other(option, PAPER[method][option])
    found = METHODS[method].config(bits=4, preset="paper", **{option: value})
    assert value != PAPER[method][option]
    assert resolved(found) == {**PAPER[method], option: value}


@pytest.mark.parametrize(("method", "option"), REFUSED)
def test_what_contradicts_the_preset_is_refused(method: str, option: str) -> None:
    config, value = METHODS[method].config, REFUSED[method, option]
    with pytest.raises(ValueError, match=f"{option}: {value} is not the published method"):
        config(bits=4, preset="paper", **{option: value})
    config(bits=4, **{option: value})


@pytest.mark.parametrize("method", PAPER)
def test_groups_stand_beside_the_preset(method: str) -> None:
    found = METHODS[method].config(bits=4, preset="paper", group_size=32)
    assert (found.granularity, found.group_size) == ("group", 32)
