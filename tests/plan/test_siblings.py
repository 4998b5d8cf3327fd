"""Names tell norms where they are certain, and nothing where two could be meant or shapes do not fit."""

from __future__ import annotations

import pytest

from qcompress.plan.siblings import batch_norms_behind, norms_before
from qcompress.types.plan import TensorInfo


def infos(shapes: dict[str, tuple[int, ...]]) -> dict[str, TensorInfo]:
    return {name: TensorInfo(name, shape, "F32") for name, shape in shapes.items()}


def norm(name: str, channels: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.{part}": (channels,) for part in ("weight", "bias", "running_mean", "running_var")}


@pytest.mark.parametrize(
    ("weight", "behind"),
    [
        ("conv1", "bn1"),
        ("layer1.0.conv2", "layer1.0.bn2"),
        ("layer1.0.downsample.0", "layer1.0.downsample.1"),
        ("blocks.3.dw", "blocks.3.dw_bn"),
        ("block.conv", "block.bn"),
        ("convs.2", "bns.2"),
    ],
)
def test_a_batch_norm_is_found_by_its_name(weight: str, behind: str) -> None:
    shapes = {f"{weight}.weight": (8, 4, 3, 3)} | norm(behind, 8)
    assert batch_norms_behind(infos(shapes)) == {f"{weight}.weight": f"{behind}.running_var"}
    other = {f"{weight}.weight": (8, 4, 3, 3)} | norm(behind, 4)
    assert batch_norms_behind(infos(other)) == {}


def test_two_norms_that_could_be_meant_are_none() -> None:
    shapes = {"conv1.weight": (8, 4, 3, 3)} | norm("bn1", 8) | norm("conv1_bn", 8)
    assert batch_norms_behind(infos(shapes)) == {}


def test_projections_read_the_norm_before_them() -> None:
    layer = "model.layers.0"
    shapes = {
        f"{layer}.input_layernorm.weight": (8,),
        f"{layer}.self_attn.q_proj.weight": (8, 8),
        f"{layer}.self_attn.o_proj.weight": (8, 8),
        f"{layer}.post_attention_layernorm.weight": (8,),
        f"{layer}.mlp.up_proj.weight": (16, 8),
        f"{layer}.mlp.down_proj.weight": (8, 16),
    }
    assert norms_before(infos(shapes)) == {
        f"{layer}.self_attn.q_proj.weight": f"{layer}.input_layernorm.weight",
        f"{layer}.mlp.up_proj.weight": f"{layer}.post_attention_layernorm.weight",
    }
    # Beside this norm the one of that name stands behind attention.
    shapes[f"{layer}.pre_feedforward_layernorm.weight"] = (8,)
    assert norms_before(infos(shapes)) == {}
