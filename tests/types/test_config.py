"""What every method's config says of itself, and a config whose bits a budget has yet to choose."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest

from qcompress.registry import (
    METHODS,
    DkmConfig,
    GptqConfig,
    HqqConfig,
    KmeansConfig,
    LearnedConfig,
    LsqConfig,
    MseConfig,
    PactConfig,
    RdConfig,
    RtnConfig,
    SquantConfig,
)
from qcompress.types.config import MethodConfig
from qcompress.types.plan import KEPT, Widths

READ = (
    *("form", "granularity", "unit", "group_size", "dim", "axis", "stored_convention", "codebook", "share"),
    *("table", "sub_blocks", "subzero", "offsets", "row_exponents", "scales"),
)
"""All that the plan and the layout read of a config beside its bits."""


def default(name: str, bits: int = 4) -> MethodConfig:
    config = METHODS[name].config
    return config(bits=bits) if any(one.name == "bits" for one in fields(config)) else config()


@pytest.mark.parametrize("name", METHODS)
def test_every_config_says_all_that_is_read_of_it(name: str) -> None:
    config = default(name)
    assert config.form != "kept"
    assert config.unit in ("tensor", "channel", "group")
    assert config.unit == (config.granularity or "tensor")
    assert config.bits == (None if METHODS[name].rates else 4)
    assert (config.group_size is not None) == (config.unit == "group")
    assert (config.dim, config.axis, config.share) == (1, None, None)
    assert config.refuse((4, 3, 2)) is None


def test_a_kept_tensor_has_a_config_too() -> None:
    assert {name: getattr(KEPT, name) for name in ("bits", *READ)} == {
        "bits": None,
        "form": "kept",
        "granularity": "tensor",
        "unit": "tensor",
        "group_size": None,
        "dim": 1,
        "axis": None,
        "stored_convention": "full",
        "codebook": "f16",
        "share": None,
        "table": "f16",
        "sub_blocks": 1,
        "subzero": 0,
        "offsets": False,
        "row_exponents": False,
        "scales": None,
    }
    assert KEPT.refuse((3, 5)) is None


FORMS: list[tuple[MethodConfig, str]] = [
    (RtnConfig(bits=4), "zero-point"),
    (RtnConfig(bits=4, symmetric=True), "symmetric"),
    (MseConfig(bits=4), "offset"),
    (MseConfig(bits=4, search="grid"), "zero-point"),
    (SquantConfig(bits=4), "offset"),
    (SquantConfig(bits=4, preset="paper"), "zero-point"),
    (SquantConfig(bits=4, preset="paper", symmetric=True), "symmetric"),
    (HqqConfig(bits=4), "offset"),
    (GptqConfig(bits=4), "offset"),
    (GptqConfig(bits=4, preset="paper"), "zero-point"),
    (LsqConfig(bits=4), "symmetric"),
    (PactConfig(bits=4), "symmetric"),
    (KmeansConfig(bits=4), "codebook"),
    (LearnedConfig(), "codebook"),
    (DkmConfig(bits=4), "codebook"),
    (RdConfig(), "unbounded"),
]


@pytest.mark.parametrize(("config", "form"), FORMS, ids=str)
def test_forms(config: MethodConfig, form: str) -> None:
    assert config.form == form


def test_bits_of_a_code_are_asked_only_where_there_are_some() -> None:
    assert RtnConfig(bits=3).code_bits == 3
    for config in (KEPT, RdConfig(), Widths({2: RtnConfig(bits=2)})):
        with pytest.raises(AssertionError):
            _ = config.code_bits


CHANGES: list[tuple[MethodConfig, dict[str, Any]]] = [
    (RtnConfig(bits=4, group_size=32), {"bits": 2}),
    (MseConfig(bits=4, granularity="tensor", effort="normal"), {"bits": 8}),
    (KmeansConfig(bits=4, dim=2, group_size=4, codebook="int8"), {"bits": 3, "codebook": "f32"}),
    (LearnedConfig(), {"bits": 5}),
    (RdConfig(effort="high", prior="none"), {"step": 0.5, "match": False}),
]


@pytest.mark.parametrize(("config", "options"), CHANGES, ids=str)
def test_what_is_changed_is_another_config_and_nothing_else_differs(
    config: MethodConfig, options: dict[str, Any]
) -> None:
    before = {one.name: getattr(config, one.name) for one in fields(config)}
    changed = config.changed(**options)
    assert type(changed) is type(config)
    assert {one.name: getattr(changed, one.name) for one in fields(changed)} == {**before, **options}
    assert {one.name: getattr(config, one.name) for one in fields(config)} == before
    assert config.changed() == config and config.changed(**before) == config


def test_a_change_is_checked_as_any_config_is() -> None:
    with pytest.raises(ValueError, match="group_size needs granularity: group"):
        RtnConfig(bits=4, group_size=32).changed(granularity="channel")
    with pytest.raises(TypeError):
        RtnConfig(bits=4).changed(codebook="f16")


WIDE: list[MethodConfig] = [
    RtnConfig(bits=4, symmetric=True, granularity="tensor", axis=1),
    MseConfig(bits=4, group_size=8, axis=(0, 2)),
    KmeansConfig(bits=4, dim=2, codebook="int8", share="layer", axis=-1),
    KmeansConfig(bits=4, group_size=8, codebook="f32"),
]


@pytest.mark.parametrize("config", WIDE, ids=str)
def test_open_widths_answer_for_the_widest(config: MethodConfig) -> None:
    configs = {bits: config.changed(bits=bits) for bits in (2, 3, 4)}
    widths = Widths(configs)
    assert widths.bits is None
    assert widths.widest == config
    assert {name: getattr(widths, name) for name in READ} == {name: getattr(config, name) for name in READ}
    assert all(widths.at(bits) is one for bits, one in configs.items())
    assert Widths({4: configs[4], 2: configs[2]}).widest == config, "whatever their order"


def test_all_that_a_config_has_is_read_of_widths_too() -> None:
    """A property that comes to the base is one that Widths hands on."""
    own = {name for name, value in vars(MethodConfig).items() if isinstance(value, property)}
    assert own - {"code_bits", "unit"} == set(READ) - {"unit"}
    assert own - {"code_bits", "unit"} <= set(vars(Widths))
