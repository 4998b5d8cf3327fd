"""The resolved recipe: canonical, complete, and read back as itself."""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompress.recipe import parse_recipe, recipe_hash, recipe_json, recipe_yaml
from qcompress.registry import (
    METHODS,
    AdaroundConfig,
    DfqConfig,
    DkmConfig,
    GptqConfig,
    HqqConfig,
    KmeansConfig,
    LearnedConfig,
    LsqConfig,
    MseConfig,
    PactConfig,
    PdquantConfig,
    RdConfig,
    RtnConfig,
    SquantConfig,
)
from qcompress.types.plan import Gates, Recipe, Rule


def made(config: type, **options: st.SearchStrategy[object]) -> st.SearchStrategy[object]:
    """Configs of valid options; those that exclude each other are passed over."""

    def build(chosen: dict[str, object]) -> object | None:
        try:
            return config(**chosen)
        except ValueError:
            return None

    shared = {
        "granularity": st.sampled_from([None, "tensor", "channel", "group"]),
        "group_size": st.none() | st.integers(2, 10**6),
        "symmetric": st.booleans(),
        "scales": st.sampled_from([None, "f16", "bf16"]),
        "axis": st.none() | st.integers(-3, 3) | st.lists(st.integers(-3, 3), max_size=3).map(tuple),
    }
    known = {option.name for option in dataclasses.fields(config)}
    shared = {name: values for name, values in shared.items() if name in known}
    bits = {"bits": options.pop("bits", st.integers(1, 8))}
    drawn = st.fixed_dictionaries(bits, optional=shared | options)
    return drawn.map(build).filter(lambda made: made is not None)


POSITIVE = st.floats(min_value=1e-300, max_value=1e300)
PRESET = st.sampled_from([None, "paper"])
RANGE = st.sampled_from([None, "minmax", "mse", "tf-enhanced", "hessian"])
CONFIGS = {
    "rtn": made(
        RtnConfig,
        convention=st.sampled_from(["full-range", "narrow", "aimet", "gptq", "mid-rise"]),
        zero_point=st.sampled_from(["integer", "real"]),
    ),
    "mse": made(MseConfig, search=st.sampled_from(["als", "grid"]), norm=POSITIVE),
    "squant": made(
        SquantConfig,
        preset=PRESET,
        range=st.sampled_from(["minmax", "clip"]),
        stages=st.sampled_from(["E", "EK", "EKC"]),
    ),
    "hqq": made(HqqConfig, norm=st.floats(0.01, 1), beta=POSITIVE, round_zero=st.booleans()),
    "dfq": made(DfqConfig, preset=PRESET, relu6=st.sampled_from(["skip", "caps"]), fold=st.booleans()),
    "adaround": made(AdaroundConfig, preset=PRESET, range=RANGE, objective=st.sampled_from(["gram", "sampled"])),
    "gptq": made(GptqConfig, preset=PRESET, range=RANGE, act_order=st.booleans(), descent=st.integers(0, 9)),
    "pdquant": made(PdquantConfig, preset=PRESET, range=RANGE, drop=st.floats(0, 0.9)),
    "lsq": made(LsqConfig, bits=st.integers(2, 8), start=st.sampled_from(["error", "mean"]), learning_rate=POSITIVE),
    "rd": st.builds(RdConfig, effort=st.sampled_from(["fast", "normal", "high"]), step=POSITIVE, match=st.booleans()),
    "pact": made(PactConfig, clip=POSITIVE, clip_decay=POSITIVE, scale=st.sampled_from(["weight", "unit"])),
}
ENTRIES = st.sampled_from(["f16", "f32", "int8"])
CLUSTER_CONFIGS = {
    "kmeans": made(KmeansConfig, dim=st.integers(1, 8), init=st.sampled_from(["optimal", "random"]), codebook=ENTRIES),
    "learned": made(LearnedConfig, recentre=st.booleans(), codebook=ENTRIES),
    "dkm": made(DkmConfig, iterations=st.integers(1, 10), metric=st.sampled_from(["squared", "plain"])),
}
TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
METRICS = st.dictionaries(TEXT, st.floats(allow_nan=False, allow_infinity=False), max_size=3)


def rules_of(configs: dict[str, st.SearchStrategy[Any]]) -> st.SearchStrategy[tuple[Rule, ...]]:
    """Rules of the methods of one family."""
    # What begins with @ names a role.
    patterns = TEXT.filter(lambda text: not text.startswith("@")) | st.sampled_from(
        ["*", "null", "4e5", "1:30", "- a", "a: b", "yes"]
    )
    methods = st.sampled_from(sorted(configs)).flatmap(lambda name: st.tuples(st.just(name), configs[name]))
    rules = st.tuples(st.lists(patterns, min_size=1, max_size=3), st.just((None, None)) | methods)
    return st.lists(rules, min_size=1, max_size=4).map(
        lambda found: tuple(
            Rule(pattern, *action, f"rules[{index}]")
            for index, (globs, action) in enumerate(found)
            for pattern in globs
        )
    )


GATES = st.builds(
    Gates,
    max_size=st.none() | st.integers(1, 2**63 - 1),
    max_bpw=st.none() | POSITIVE,
    min_sqnr=st.none() | st.floats(-1e9, 1e9),
    min_metric=METRICS,
    max_drop=METRICS,
)
RECIPES = st.builds(
    Recipe, st.just("quantize"), rules_of(CONFIGS), seed=st.integers(0, 2**63 - 1), gates=GATES
) | st.builds(Recipe, st.just("cluster"), rules_of(CLUSTER_CONFIGS), seed=st.integers(0, 2**63 - 1), gates=GATES)


def test_strategies_cover_the_registry() -> None:
    assert {*CONFIGS, *CLUSTER_CONFIGS} == set(METHODS)


@settings(deadline=None)
@given(RECIPES)
def test_yaml_reads_back_as_the_same_recipe(recipe: Recipe) -> None:
    again = parse_recipe(recipe_yaml(recipe), "r.yaml", family=recipe.family)
    assert [(r.match, r.method, r.config) for r in again.rules] == [(r.match, r.method, r.config) for r in recipe.rules]
    assert (again.seed, again.gates, again.family) == (recipe.seed, recipe.gates, recipe.family)
    assert recipe_json(again) == recipe_json(recipe)
    assert recipe_hash(again) == recipe_hash(recipe)
    assert parse_recipe(json.dumps(recipe_json(recipe)), "r.json").rules[-1].config == recipe.rules[-1].config


@settings(deadline=None)
@given(RECIPES)
def test_another_reader_finds_the_same_data(recipe: Recipe) -> None:
    """PyYAML reads YAML 1.1: what is shown must not depend on the version."""
    assert yaml.safe_load(recipe_yaml(recipe)) == recipe_json(recipe)


SMALL = 'version: 1\nrules:\n  - {match: [a, b], rtn: {bits: 4, axis: [1]}}\n  - {match: "*", keep: {}}\n'


def test_shown_recipe() -> None:
    recipe = parse_recipe(SMALL + "gates: {max_size: 2KB, max_bpw: 1e-7, min_metric: {top1: 1}}\n", "r.yaml")
    assert recipe_yaml(recipe).splitlines() == [
        "version: 1",
        "seed: 0",
        "rules:",
        '  - match: ["a", "b"]',
        "    rtn: {bits: 4, granularity: channel, symmetric: false, axis: [1]}",
        '  - match: "*"',
        "    keep: {}",
        "gates:",
        "  max_size: 2000",
        "  max_bpw: 1.0e-07",
        "  min_metric: {top1: 1.0}",
    ]


def test_augmentations_are_shown_as_they_are_written() -> None:
    text = "version: 1\nrules: [{match: a, rtn: {bits: 2}}]\ndata: {train: {npz: a, augment: AUGMENT}}\n"
    written = "[{random_resized_crop: {size: 8}}, flip, {color_jitter: {hue: 0.1}}, rand_augment, {cutmix: {}}]"
    recipe = parse_recipe(text.replace("AUGMENT", written), "r.yaml")
    assert recipe_json(recipe)["data"]["train"]["augment"] == [
        {"random_resized_crop": {"size": 8, "scale": [0.08, 1.0], "ratio": [0.75, 4 / 3]}},
        "flip",
        {"color_jitter": {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.1}},
        {"rand_augment": {"num_ops": 2, "magnitude": 9}},
        {"cutmix": {"alpha": 1.0}},
    ]
    assert parse_recipe(recipe_yaml(recipe), "again").data == recipe.data


def test_canonical_data() -> None:
    data = recipe_json(parse_recipe(SMALL, "r.yaml"))
    assert data == {
        "version": 1,
        "seed": 0,
        "rules": [
            {"match": ["a", "b"], "rtn": {"bits": 4, "granularity": "channel", "symmetric": False, "axis": [1]}},
            {"match": "*", "keep": {}},
        ],
    }
    assert json.dumps(data) == json.dumps(data, sort_keys=True)


def test_rules_stay_apart() -> None:
    text = "version: 1\nrules:\n  - {match: a, rtn: {bits: 4}}\n  - {match: b, rtn: {bits: 4}}\n"
    assert [rule["match"] for rule in recipe_json(parse_recipe(text, "r.yaml"))["rules"]] == ["a", "b"]


def test_hash_is_of_what_is_decided() -> None:
    base = recipe_hash(parse_recipe(SMALL, "r.yaml"))
    assert re.fullmatch("[0-9a-f]{64}", base)
    same = SMALL.replace("bits: 4", "granularity: channel, bits: 4").replace("\nrules", "\n# comment\nseed: 0\nrules")
    assert recipe_hash(parse_recipe(same, "other.yaml")) == base
    for old, new in (
        ("bits: 4", "bits: 3"),
        ("[a, b]", "[b, a]"),
        ("[1]", "1"),
        ("rtn", "squant"),
        ("{}}", "{}}\nseed: 1"),
    ):
        assert recipe_hash(parse_recipe(SMALL.replace(old, new), "r.yaml")) != base


@pytest.mark.parametrize("method", METHODS)
def test_what_is_left_out_when_none_is_none_by_default(method: str) -> None:
    for option in dataclasses.fields(METHODS[method].config):
        assert option.default in (None, dataclasses.MISSING) or "None" not in str(option.type), option.name
