"""Which axes a plan takes for channels, and which tensors for one, from names, shapes, siblings and config.json."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from artifact.educational_decoder import expand
from artifact.examples import denses, gaussian, rtn, run, save_folder, verify

from qcompress.compress.load import load_state_dict
from qcompress.plan.axes import find_axes, find_tied
from qcompress.plan.network import Network
from qcompress.plan.roles import find_roles
from qcompress.types.config import Shape
from qcompress.types.plan import Axis, TensorFacts, TensorInfo


def network(shapes: Mapping[str, Shape], config: Mapping[str, Any] | None = None, **known: Any) -> Network:
    return Network([TensorInfo(name, shape, "F32") for name, shape in shapes.items()], config or {}, **known)


def axes_of(
    shapes: Mapping[str, Shape], config: Mapping[str, Any] | None = None, **known: Any
) -> dict[str, tuple[int, ...]]:
    found = network(shapes, config, **known)
    return {name: axis.axes for name, axis in find_axes(found, find_roles(found)).items()}


def tied_of(shapes: Mapping[str, Shape], config: Mapping[str, Any]) -> dict[str, str]:
    found = network(shapes, config)
    return find_tied(found, find_roles(found))


TABLES = {"model.embed_tokens.weight": (50, 8), "lm_head.weight": (50, 8), "model.layers.0.mlp.up.weight": (32, 8)}


@pytest.mark.parametrize(
    ("config", "tied"),
    [
        ({"tie_word_embeddings": True}, True),
        ({"tie_word_embeddings": False}, False),
        ({}, False),
        ({"text_config": {"tie_word_embeddings": True}}, True),
        ({"thinker_config": {"text_config": {"tie_word_embeddings": True}}}, True),
        ({"tie_word_embeddings": False, "text_config": {"tie_word_embeddings": True}}, False),
    ],
)
def test_a_head_is_tied_where_config_json_says_so_at_any_depth(config: dict[str, Any], tied: bool) -> None:
    assert tied_of(TABLES, config) == ({"lm_head.weight": "model.embed_tokens.weight"} if tied else {})


def test_a_head_of_another_shape_is_not_tied() -> None:
    assert tied_of({**TABLES, "lm_head.weight": (51, 8)}, {"tie_word_embeddings": True}) == {}


def test_shared_embeddings_of_an_encoder_and_decoder_name_one_source() -> None:
    names = ["shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"]
    found = tied_of(dict.fromkeys(names, (48, 4)), {"tie_word_embeddings": True})
    assert found == dict.fromkeys(names[1:], "shared.weight")


GPT2 = {
    "h.0.attn.c_attn.weight": (8, 24),
    "h.0.attn.c_attn.bias": (24,),
    "h.0.attn.c_proj.weight": (8, 8),
    "h.0.attn.c_proj.bias": (8,),
    "h.0.mlp.c_fc.weight": (8, 32),
    "h.0.mlp.c_fc.bias": (32,),
    "h.0.mlp.c_proj.weight": (32, 8),
    "h.0.mlp.c_proj.bias": (8,),
    "wte.weight": (50, 8),
}


@pytest.mark.parametrize("config", [{"model_type": "gpt2"}, {"decoder": {"model_type": "gpt2"}}, {}])
def test_conv1d_of_gpt2_has_its_channels_last_as_config_or_biases_tell(config: dict[str, Any]) -> None:
    assert axes_of(GPT2, config) == {name: (1,) for name in GPT2 if name.endswith("weight") and ".c_" in name}


def test_a_matrix_whose_bias_has_a_value_a_row_is_not_transposed() -> None:
    straight = {name: shape[::-1] for name, shape in GPT2.items()}
    assert axes_of(straight) == {}
    assert axes_of({"a.weight": (8, 8), "a.bias": (8,), "c_proj.weight": (8, 8)}) == {}


def test_an_axis_goes_all_the_way_to_the_artifact(tmp_path: Path) -> None:
    tensors = {name: gaussian(*shape) for name, shape in GPT2.items()}
    source = save_folder(tmp_path / "gpt2", {"model.safetensors": tensors}, {"model_type": "gpt2"})
    run(source, tmp_path / "out", rtn(4))
    entries = verify(tmp_path / "out").files[0].manifest.tensors
    assert {name: one.axis for name, one in entries.items()} == {
        name: (1 if ".c_" in name else 0,) for name in tensors if name.endswith("weight")
    }


def test_a_transposed_convolution_is_seen_by_its_bias() -> None:
    shapes = {"up.weight": (16, 8, 3, 3), "up.bias": (8,), "even.weight": (8, 8, 3, 3), "even.bias": (8,)}
    assert axes_of(shapes | {"grouped.weight": (16, 4, 3), "grouped.bias": (8,)}) == {
        "up.weight": (1,),
        "grouped.weight": (1,),
    }


def test_what_a_network_says_of_an_axis_holds() -> None:
    facts = {name: TensorFacts("Linear", kind="product") for name in GPT2}
    facts["h.0.mlp.c_fc.weight"] = TensorFacts("Conv1D", Axis((1,), "the model: it is so"), kind="product")
    assert axes_of(GPT2, model=facts) == {"h.0.mlp.c_fc.weight": (1,)}


OUT_IN = {"gate_up_proj": (4, 24, 8), "down_proj": (4, 8, 12)}
IN_OUT = {"gate_up_proj": (4, 8, 24), "down_proj": (4, 12, 8)}
BIASES = {"gate_up_proj_bias": (4, 24), "down_proj_bias": (4, 8)}


def block(experts: Mapping[str, Shape], name: str = "model.layers.0.mlp.experts") -> dict[str, Shape]:
    return {f"{name}.{part}": shape for part, shape in experts.items()}


@pytest.mark.parametrize(("experts", "last"), [(OUT_IN, 1), (IN_OUT, 2)])
@pytest.mark.parametrize(
    "config", [{}, {"model_type": "mixtral"}, {"model_type": "gpt_oss"}, {"x": {"num_experts": 4}}]
)
@pytest.mark.parametrize("biases", [{}, BIASES])
def test_experts_are_told_by_their_shapes_whatever_config_says(
    experts: dict[str, Shape], last: int, config: dict[str, Any], biases: dict[str, Shape]
) -> None:
    found = axes_of(block({**experts, **biases}), config)
    assert found == dict.fromkeys(block(experts), (0, last))


def test_square_experts_are_told_by_their_biases_siblings_or_type() -> None:
    square = {"gate_up_proj": (4, 8, 16), "down_proj": (4, 8, 8)}
    assert axes_of(block(square)) == dict.fromkeys(block(square), (0, 2))
    alone = block({"down_proj": (4, 8, 8)})
    assert axes_of(alone) == dict.fromkeys(alone, (0, 1))
    assert axes_of(alone, {"model_type": "llama4_text"}) == dict.fromkeys(alone, (0, 2))


@pytest.mark.parametrize(("up", "down", "last"), [((4, 24, 8), (4, 8, 24), 1), ((4, 8, 24), (4, 24, 8), 2)])
def test_experts_without_a_gate_are_told_by_the_width_of_the_network(up: Shape, down: Shape, last: int) -> None:
    experts = block({"up_proj": up, "down_proj": down})
    for known, config in (({"model.layers.0.mlp.gate.weight": (4, 8)}, {}), ({}, {"text": {"hidden_size": 8}})):
        assert axes_of(experts | known, config) == dict.fromkeys(experts, (0, last))


def test_granites_experts_are_layers_of_three_dimensions_beside_a_router() -> None:
    moe = "model.layers.0.block_sparse_moe"
    experts = {f"{moe}.input_linear.weight": (4, 24, 8), f"{moe}.output_linear.weight": (4, 8, 12)}
    found = network(experts | {f"{moe}.router.layer.weight": (4, 8)}, {"num_local_experts": 4})
    roles = find_roles(found)
    assert [roles[name] for name in experts] == ["expert", "expert"]
    assert {name: axis.axes for name, axis in find_axes(found, roles).items()} == dict.fromkeys(experts, (0, 1))


def test_attention_of_xlnet_has_heads_and_widths_for_channels() -> None:
    shapes = {f"layer.0.rel_attn.{name}": (32, 4, 8) for name in "qkvor"}
    assert axes_of(shapes) == {name: (1, 2) for name in shapes if not name.endswith("o")}


def test_a_pile_of_matrices_has_a_grid_a_row_and_a_convolution_one_a_channel() -> None:
    shapes = {"blocks.0.mix": (4, 32, 48), "conv.weight": (64, 32, 3), "wide.weight": (16, 64, 41)}
    assert axes_of(shapes) == {"blocks.0.mix": (0, 1), "wide.weight": (0, 1)}
    assert axes_of(shapes | {"wide.bias": (16,)}) == {"blocks.0.mix": (0, 1)}


def test_stacked_experts_survive_as_their_rows_need(tmp_path: Path) -> None:
    rows = gaussian(8, 32, 64) * (10.0 ** (gaussian(32).abs() - 2))[None, :, None]
    tensors = {"mlp.experts.gate_up_proj": rows, "mlp.experts.down_proj": gaussian(8, 64, 16)}
    source = save_folder(tmp_path / "moe", {"model.safetensors": tensors})
    run(source, tmp_path / "out", rtn(4))
    state = load_state_dict(tmp_path / "out")
    assert denses(state) == expand(tmp_path / "out")
    error = (state["mlp.experts.gate_up_proj"] - rows).square().sum(dim=2) / rows.square().sum(dim=2)
    assert float(error.max()) < 0.05
