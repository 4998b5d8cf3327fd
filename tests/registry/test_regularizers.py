"""What the options of regularizers refuse, and what their presets fill."""

from __future__ import annotations

from typing import Any

import pytest

from qcompress.registry.regularizers import (
    CosineConfig,
    DsmmConfig,
    ExponentialConfig,
    LinfConfig,
    MinSquaredConfig,
    SineConfig,
)

REFUSED: list[tuple[type[Any], dict[str, Any], str]] = [
    (DsmmConfig, {"alpha": "auto", "learnable": True}, "alpha: auto"),
    (DsmmConfig, {"dim": 2, "granularity": "channel"}, "places"),
    (DsmmConfig, {"weight_decay": 1e-4}, "must not decay"),
    (DsmmConfig, {"coupling": "proximal"}, "no closed proximal form"),
    (DsmmConfig, {"start": 0.5, "ramp": 0.6}, "pass the end"),
    (DsmmConfig, {"normalize": "var"}, "normalize: std"),
    (SineConfig, {}, "minima"),
    (SineConfig, {"levels": 4, "bits": 2}, "minima"),
    (SineConfig, {"levels": 4, "granularity": "channel"}, "granularity"),
    (SineConfig, {"bits": 2, "range": "sigma"}, "its own range"),
    (SineConfig, {"levels": 4, "range": (1.0, -1.0)}, "low end"),
    (CosineConfig, {}, "missing"),
    (LinfConfig, {"coupling": "proximal"}, "no closed proximal form"),
    (MinSquaredConfig, {"coupling": "proximal", "normalize": "var"}, "not normalized"),
]


@pytest.mark.parametrize(("config", "options", "words"), REFUSED)
def test_refused(config: type[Any], options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        config(**options)


def test_presets_fill_only_what_is_open() -> None:
    paper = DsmmConfig(preset="paper-dsmm")
    assert (paper.strength, paper.alpha, paper.learnable, paper.start) == (0.01, 0.1, True, 0.0)
    assert DsmmConfig(preset="paper-dsmm", alpha=10.0, learnable=False).alpha == 10.0
    assert DsmmConfig().alpha == "auto" and DsmmConfig(alpha=0.1).learnable
    faithful = ExponentialConfig(preset="paper-qar", strength=0.5)
    assert (faithful.gradient, faithful.start, faithful.strength) == ("none", 0.0, 0.5)
    assert MinSquaredConfig(preset="paper-qar", learnable=False).init == "linear"
    assert SineConfig(levels=4, preset="paper-qar").outside == "periodic"
