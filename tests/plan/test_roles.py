"""Every tensor of many architectures has the role that a person gave it; architectures.py says how they are pinned."""

from __future__ import annotations

import pytest
from plan.architectures import BUILT, BY_HAND, Architecture, built, decide, firsts, read_pins

from qcompress.plan.network import Network
from qcompress.plan.roles import ROLES, find_roles
from qcompress.types.plan import ROLE_NAMES, TensorFacts, TensorInfo

PINNED = [*read_pins(BUILT), *read_pins(BY_HAND)]


@pytest.mark.parametrize("pinned", PINNED, ids=lambda one: one.name)
def test_every_tensor_has_its_role_and_axes(pinned: Architecture) -> None:
    found = decide(pinned.infos, pinned.config)
    assert {one.info.name: (one.role, one.axis) for one in found.values()} == {
        one.info.name: (one.role, one.axis) for one in pinned.tensors
    }


def test_the_pins_know_every_role_and_the_kinds_of_networks_that_people_have() -> None:
    assert {one.role for pinned in PINNED for one in pinned.tensors} == set(ROLE_NAMES) == set(ROLES)
    names = [pinned.name for pinned in PINNED]
    assert len(set(names)) == len(names)
    assert len({name.removesuffix(" in memory") for name in names if name.startswith("transformers ")}) >= 60


@pytest.mark.slow
def test_the_pins_are_those_of_the_networks_themselves() -> None:
    """Built anew, each network has the tensors that are pinned, with the roles that they have among all of it."""
    pins = {one.name: one for one in read_pins(BUILT)}
    for name, config, infos in built():
        pinned = pins.pop(name)
        assert config == pinned.config, name
        assert set(firsts(decide(infos, config))) == set(pinned.tensors), name
    assert not pins


def test_a_network_says_what_names_do_not() -> None:
    infos = [TensorInfo("a.weight", (40, 8), "F32"), TensorInfo("embed.weight", (40, 8), "F32")]
    facts = {"a.weight": TensorFacts("Embedding", kind="table"), "embed.weight": TensorFacts("Linear", kind="product")}
    assert find_roles(Network(infos, model=facts)) == {"a.weight": "embedding", "embed.weight": "head"}
    assert find_roles(Network(infos)) == {"a.weight": "head", "embed.weight": "embedding"}


def test_a_classifier_is_no_head_whatever_small_tables_have_as_many_rows() -> None:
    shapes = {"embeddings.token_type_embeddings.weight": (2, 8), "classifier.weight": (2, 8)}
    infos = [TensorInfo(name, shape, "F32") for name, shape in shapes.items()]
    assert find_roles(Network(infos))["classifier.weight"] == "matrix"
