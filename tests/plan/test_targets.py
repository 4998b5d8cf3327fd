"""What a target makes of rules and of tensors: what it fills, refuses and keeps, and what its file takes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest
from conftest import Run

from qcompress.errors import QcompressError
from qcompress.plan.plan import make_plan
from qcompress.plan.targets import target_figures
from qcompress.recipe import parse_recipe, recipe_hash, recipe_yaml
from qcompress.registry import METHODS
from qcompress.registry.targets import TARGETS
from qcompress.types.plan import Decision, Plan, TensorInfo, Widths

HIDDEN, INNER = 256, 384
SHAPES: Mapping[str, tuple[int, ...]] = {
    "model.embed_tokens.weight": (512, HIDDEN),
    "model.layers.0.self_attn.q_proj.weight": (HIDDEN, HIDDEN),
    "model.layers.0.self_attn.k_proj.weight": (128, HIDDEN),
    "model.layers.0.self_attn.v_proj.weight": (128, HIDDEN),
    "model.layers.0.mlp.gate_proj.weight": (INNER, HIDDEN),
    "model.layers.0.mlp.up_proj.weight": (INNER, HIDDEN),
    "model.layers.0.mlp.down_proj.weight": (HIDDEN, INNER),
    "model.layers.0.input_layernorm.weight": (HIDDEN,),
    "lm_head.weight": (512, HIDDEN),
}
Q, K, V, _, UP, DOWN = (name for name in SHAPES if "_proj" in name)
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def plan_of(
    target: str, rules: list[Any], dtype: str = "BF16", shapes: Mapping[str, tuple[int, ...]] = SHAPES, **more: Any
) -> Plan:
    recipe = parse_recipe(json.dumps({"version": 1, "for": target, "rules": rules, **more}), "r.yaml")
    return make_plan(recipe, [TensorInfo(name, shape, dtype) for name, shape in shapes.items()], {}, {})


def by_name(plan: Plan) -> dict[str, Decision]:
    return {decision.tensor.name: decision for decision in plan.decisions}


def everywhere(method: str, **options: Any) -> list[Any]:
    return [{"match": "*", method: options}]


def width(target: str) -> dict[str, int]:
    return {} if TARGETS[target].only_bits else {"bits": 4}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("method", sorted(METHODS))
def test_what_a_target_fills_it_takes_or_it_refuses_the_method(target: str, method: str) -> None:
    rules = everywhere(method, **width(target))
    if TARGETS[target].refuse_method(METHODS[method]) is not None:
        with pytest.raises(QcompressError, match=rf"rules\[0\]\.{method}: {method} .*{target}"):
            plan_of(target, rules)
        return
    down = by_name(plan_of(target, rules))[DOWN]
    assert down.config.bits == (TARGETS[target].only_bits or 4)
    assert down.config.group_size == TARGETS[target].groups[0]
    assert down.config.scales == ("f16" if target.startswith("gguf") else "bf16")
    assert TARGETS[target].refuse(down.config.changed(scales=None), "matrix") is None


CONTRADICTIONS: list[tuple[str, str, dict[str, Any], str]] = [
    ("gguf-q4_0", "mse", {"bits": 3}, "3 bits a code, and gguf-q4_0 takes 4 bits"),
    ("gguf-q4_0", "mse", {"symmetric": False}, "grids with a real offset, and gguf-q4_0 takes 4 bits, symmetric grids"),
    ("gguf-q4_1", "rtn", {"zero_point": "integer"}, "grids with an integer zero point, and gguf-q4_1 takes 4 bits"),
    ("gguf-q4_1", "mse", {"search": "grid"}, "grids with an integer zero point"),
    ("gguf-q4_0", "mse", {"group_size": 64}, "groups of 64, and gguf-q4_0 takes .* groups of 32"),
    ("gguf-q4_0", "mse", {"granularity": "channel"}, "a scale a channel"),
    ("compressed-tensors", "mse", {"bits": 4, "granularity": "tensor"}, "a scale a tensor"),
    ("compressed-tensors", "mse", {"bits": 2}, "codes around a half"),
    ("compressed-tensors", "mse", {"bits": 1}, "1 bit a code"),
    ("mlx", "squant", {"bits": 7}, "7 bits a code, and mlx takes 2, 3, 4, 5, 6 or 8 bits"),
    ("mlx", "squant", {"bits": 4, "scales": "bf16"}, "scales: bf16, which mlx decides"),
    ("mlx", "squant", {}, "`bits` is missing"),
]


@pytest.mark.parametrize(("target", "method", "options", "words"), CONTRADICTIONS)
def test_what_contradicts_a_target_is_an_error_of_the_rule(
    target: str, method: str, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(QcompressError, match=rf"^r\.yaml:1: rules\[0\]\.{method}.*: {words}"):
        plan_of(target, everywhere(method, **options))


def test_a_channel_is_a_group_for_compressed_tensors_alone() -> None:
    plan = plan_of("compressed-tensors", everywhere("mse", bits=4, granularity="channel"))
    assert by_name(plan)[DOWN].config.unit == "channel"


def test_what_does_not_fit_is_kept_and_each_reason_told_once() -> None:
    shapes = {**SHAPES, "conv.weight": (8, 4, 3, 3), "odd.weight": (64, 33), "stack.experts.down_proj": (4, 64, 64)}
    plan = plan_of("compressed-tensors", everywhere("mse", bits=4, group_size=128), shapes=shapes)
    kept = {d.tensor.name: d.reason for d in plan.decisions if not d.compresses and len(d.tensor.shape) > 1}
    assert kept == {
        EMBEDDING: "compressed-tensors: it holds no embedding in codes",
        "conv.weight": "compressed-tensors: it holds no convolution in codes",
        "odd.weight": "compressed-tensors: groups of 128 do not divide rows of 33",
        "stack.experts.down_proj": "compressed-tensors: it holds weights of linear layers alone",
    }
    figures = target_figures(plan)
    assert figures is not None
    assert {reason: [*names] for reason, names in figures.kept.items()} == {why: [name] for name, why in kept.items()}


@pytest.mark.parametrize("match", [EMBEDDING, "@embedding"])
def test_what_a_rule_names_is_refused_where_it_does_not_fit(match: str) -> None:
    with pytest.raises(
        QcompressError, match=r"embed_tokens.weight.*compressed-tensors: it holds no embedding in codes"
    ):
        plan_of("compressed-tensors", [{"match": match, "mse": {"bits": 8}}, *everywhere("mse", bits=4)])


def test_tables_alone_may_have_other_bits_in_a_file_of_blocks() -> None:
    tables = {"match": ["@embedding", "@head"], "mse": {"bits": 8}}
    found = by_name(plan_of("gguf-q4_1", [tables, *everywhere("mse")]))
    assert {name: (found[name].config.bits, found[name].config.form) for name in (EMBEDDING, HEAD, Q)} == {
        EMBEDDING: (8, "symmetric"),
        HEAD: (8, "symmetric"),
        Q: (4, "offset"),
    }
    with pytest.raises(QcompressError, match=r"up_proj.*8 bits a code, and gguf-q4_1 takes 4 bits"):
        plan_of("gguf-q4_1", [{"match": UP, "mse": {"bits": 8}}, *everywhere("mse")])


def test_what_is_computed_as_one_has_one_grid() -> None:
    wide = {"match": K, "mse": {"bits": 8}}
    with pytest.raises(QcompressError, match=r"k_proj.*has 8 bits in groups of 64, and .*q_proj.weight has 4 bits"):
        plan_of("compressed-tensors", [wide, *everywhere("mse", bits=4)])
    with pytest.raises(QcompressError, match=r"k_proj.*is kept, and .*q_proj"):
        plan_of("compressed-tensors", [{"match": K, "keep": {}}, *everywhere("mse", bits=4)])
    assert by_name(plan_of("mlx", [wide, *everywhere("mse", bits=4)]))[K].config.bits == 8


def test_a_budget_chooses_among_the_widths_that_are_taken() -> None:
    def widths(target: str) -> dict[str, list[int]]:
        found = by_name(plan_of(target, everywhere("mse"), budget={"bpw": 5.0}))
        return {name: [*one.widths.configs] for name, one in found.items() if isinstance(one.config, Widths)}

    assert widths("mlx")[Q] == [2, 3, 4, 5, 6, 8]
    assert widths("compressed-tensors")[Q] == [3, 4, 5, 6, 7, 8]
    assert EMBEDDING not in widths("compressed-tensors")
    assert (widths("gguf-q4_0")[Q], widths("gguf-q4_0")[EMBEDDING]) == ([4], [4, 5, 8])


BITS_A_WEIGHT = [
    ("gguf-q4_0", {}, "F32", 4.5),
    ("gguf-q4_1", {}, "BF16", 5),
    ("gguf-q5_0", {}, "F32", 5.5),
    ("gguf-q5_1", {}, "F32", 6),
    ("gguf-q8_0", {}, "F32", 8.5),
    ("mlx", {"bits": 4}, "BF16", 4.5),
    ("mlx", {"bits": 4, "symmetric": True}, "F32", 5),
    ("mlx", {"bits": 3, "group_size": 128}, "F16", 3.25),
    # The shape, two integers of 64 bits.
    ("compressed-tensors", {"bits": 4, "group_size": 128}, "BF16", 4.125 + 128 / (HIDDEN * INNER)),
    ("compressed-tensors", {"bits": 8, "granularity": "channel"}, "F32", 8 + 32 / INNER + 128 / (HIDDEN * INNER)),
]


@pytest.mark.parametrize(("target", "options", "dtype", "bits"), BITS_A_WEIGHT)
def test_the_plan_says_what_weights_take_there(target: str, options: dict[str, Any], dtype: str, bits: float) -> None:
    figures = target_figures(plan_of(target, [{"match": DOWN, "mse": options}], dtype))
    assert figures is not None
    assert (figures.tensors, figures.bits_per_weight) == (1, pytest.approx(bits))


def test_a_recipe_with_a_target_reads_back_as_the_same() -> None:
    text = json.dumps({"version": 1, "for": "gguf-q4_1", "rules": everywhere("hqq")})
    recipe = parse_recipe(text, "r.yaml")
    shown = recipe_yaml(recipe)
    assert "\nfor: " in shown
    assert "scales" not in shown
    assert recipe_hash(parse_recipe(shown, "r.yaml")) == recipe_hash(recipe)
    assert parse_recipe(text, "r.yaml", target="gguf-q5_1").rules[0].options.bits == 5


def test_the_command_line_says_what_is_wrong(run: Run) -> None:
    cases: dict[tuple[object, ...], str] = {
        ("quantize", "x", "--for", "gguf-q4"): "--for gguf-q4: unknown target `gguf-q4`; did you mean",
        ("quantize", "x", "--for", "mlx"): "--for mlx: --bits is missing",
        ("quantize", "x", "--for", "mlx", "--bits", 7): "--bits 7 --for mlx: 7 bits a code, and mlx takes",
        (
            "cluster",
            "x",
            "--for",
            "mlx",
            "--bits",
            4,
        ): "--bits 4 --for mlx: kmeans makes codebooks, and mlx holds grids",
    }
    for arguments, words in cases.items():
        found = run(*arguments)
        assert found.code == 2
        assert words in found.error_lines[0]
