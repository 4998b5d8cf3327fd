"""What a plan decides, why, what it refuses, and that the sizes it foretells are those of the files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from artifact.examples import gaussian, plan_for, recipe, rtn, rule, save, verify
from contexts import context_of
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompress.artifact.entry import planned_entry
from qcompress.artifact.layout import make_slots
from qcompress.checkpoint.checkpoint import read_checkpoint
from qcompress.compress.compress import compress
from qcompress.errors import DataError, InputError, QcompressError, RecipeError, Refusals
from qcompress.plan.files import make_shards
from qcompress.plan.plan import make_plan
from qcompress.plan.rules import find_deciders
from qcompress.registry import METHODS, MseConfig
from qcompress.types.data_settings import DataSettings, NpzData
from qcompress.types.plan import (
    KEPT,
    Axis,
    Budget,
    Decision,
    Family,
    Plan,
    Recipe,
    Rule,
    TensorFacts,
    TensorInfo,
    Widths,
)
from qcompress.types.run import Options

INFOS = (
    TensorInfo("a.weight", (8, 4), "F32"),
    TensorInfo("a.bias", (8,), "F32"),
    TensorInfo("b.weight", (8, 2, 3), "BF16"),
    TensorInfo("steps", (), "I64"),
    TensorInfo("scale", (), "F32"),
    TensorInfo("mask", (4, 4), "BOOL"),
    TensorInfo("empty", (0, 4), "F32"),
    TensorInfo("twin", (8, 4), "F32"),
)
TIED = {"twin": "a.weight"}


def decide(
    asked: Recipe, infos: tuple[TensorInfo, ...] = INFOS, config: dict[str, Any] | None = None
) -> dict[str, Decision]:
    plan = make_plan(asked, infos, TIED, config or {})
    assert [decision.tensor for decision in plan.decisions] == list(infos)
    assert plan.recipe is asked
    return {decision.tensor.name: decision for decision in plan.decisions}


def refusals(asked: Recipe, infos: tuple[TensorInfo, ...] = INFOS) -> list[str]:
    with pytest.raises(QcompressError) as caught:
        make_plan(asked, infos, TIED, {})
    assert isinstance(caught.value, RecipeError | Refusals)
    assert caught.value.exit_code == 3
    return caught.value.lines()


def test_a_wildcard_compresses_matrices_and_says_why_it_keeps_the_rest() -> None:
    found = decide(rtn())
    assert {name for name, decision in found.items() if decision.compresses} == {"a.weight", "b.weight"}
    assert {name: decision.reason for name, decision in found.items()} == {
        "a.weight": "rule *",
        "a.bias": "fewer than two dimensions",
        "b.weight": "rule *",
        "steps": "dtype I64 is kept",
        "scale": "fewer than two dimensions",
        "mask": "dtype BOOL is kept",
        "empty": "no elements",
        "twin": "tied to a.weight, stored once",
    }
    assert found["twin"].tied_to == "a.weight"


def test_the_first_rule_that_matches_decides_and_the_rest_is_kept() -> None:
    found = decide(
        recipe(rule("b.*"), rule("a.weight", "rtn", bits=8), rule("*.weight", "rtn", bits=2)),
        (*INFOS[:3], TensorInfo("c.weight", (2, 16), "F16")),
    )
    assert [(name, d.config.bits, d.reason) for name, d in found.items()] == [
        ("a.weight", 8, "rule a.weight"),
        ("a.bias", None, "no rule matches"),
        ("b.weight", None, "kept by rule b.*"),
        ("c.weight", 2, "rule *.weight"),
    ]


@pytest.mark.parametrize("name", ["a.bias", "scale", "twin"])
def test_a_name_without_a_wildcard_compresses_vectors_scalars_and_copies(name: str) -> None:
    found = decide(recipe(rule(name, "rtn", bits=8)))
    assert {one for one, decision in found.items() if decision.compresses} == {name}
    assert found[name].tied_to is None


def test_a_name_without_a_wildcard_keeps_a_copy_by_itself() -> None:
    assert decide(recipe(rule("twin")))["twin"].tied_to is None


def test_a_copy_of_a_copy_is_tied_to_what_is_stored() -> None:
    tied = {"a.weight": "twin", "twin": "b.weight"}
    for asked, stored in ((rtn(), "b.weight"), (recipe(rule("twin", "rtn", bits=4), rule("*", "rtn", bits=4)), "twin")):
        plan = make_plan(asked, INFOS, tied, {})
        found = {decision.tensor.name: decision for decision in plan.decisions}
        assert found["a.weight"].tied_to == stored
        assert found["a.weight"].reason == f"tied to {stored}, stored once"
        assert found[stored].tied_to is None


@pytest.mark.parametrize(("name", "why"), [("steps []", "dtype I64 is kept"), ("mask [4, 4]", "dtype BOOL is kept")])
def test_what_cannot_be_compressed_is_refused_where_it_is_named(name: str, why: str) -> None:
    match = name.partition(" ")[0]
    (line,) = refusals(recipe(rule(match, "rtn", bits=8)))
    assert line == f"rule {match}: {name}: rtn cannot compress it: {why}; use keep: {{}}"


def test_rules_that_decide_nothing_are_refused_all_at_once() -> None:
    lines = refusals(
        recipe(
            rule("*.weight", "rtn", bits=4),
            rule("a.weight", "rtn", bits=8),
            rule("c.*", "rtn", bits=4),
            rule("*.bias", "rtn", bits=4),
            rule("b.weight"),
            rule("mas?", "rtn", bits=4),
            rule("nowhere*"),
        )
    )
    assert len(lines) == 6
    assert (
        lines[0]
        == "rule a.weight: match 'a.weight' decides nothing: rule *.weight comes first; put the narrower rule first"
    )
    assert lines[1].startswith("rule c.*: match 'c.*' fits no tensor; nearest names: ")
    assert "compresses nothing: a.bias: fewer than two dimensions" in lines[2]
    assert lines[3].startswith("rule b.weight: match 'b.weight' decides nothing")
    assert "compresses nothing: mask: dtype BOOL is kept" in lines[4]
    assert lines[5].startswith("rule nowhere*: match 'nowhere*' fits no tensor")


def test_nothing_to_match_is_refused() -> None:
    assert refusals(rtn(), ()) == ["rule *: match '*' fits no tensor; the checkpoint has no tensors"]


@pytest.mark.parametrize(
    ("axis", "axes"),
    [(0, (0,)), (1, (1,)), (2, (2,)), (-1, (2,)), (-3, (0,)), ((0, 2), (0, 2)), ((2, 0), (2, 0)), ((-1, 0), (2, 0))],
)
def test_axes_are_counted_from_either_end(axis: Any, axes: tuple[int, ...]) -> None:
    assert decide(recipe(rule("b.weight", "rtn", bits=4, axis=axis)))["b.weight"].axis == axes


@pytest.mark.parametrize(
    ("axis", "why"),
    [
        (3, "axis 3 is out of range"),
        (-4, "axis -4 is out of range"),
        ((0, 3), "axis [0, 3] is out of range"),
        ((0, 0), "axis [0, 0] names one axis twice"),
        ((0, -3), "axis [0, -3] names one axis twice"),
        ((0, 1, 2), "axis [0, 1, 2] leaves no channels, or no columns"),
        ((), "axis [] leaves no channels, or no columns"),
    ],
)
def test_axes_that_a_tensor_does_not_have_are_refused(axis: Any, why: str) -> None:
    (line,) = refusals(recipe(rule("b.weight", "rtn", bits=4, axis=axis)))
    assert line == f"rule b.weight: b.weight [8, 2, 3]: {why}; give one to 2 of its axes 0, 1, 2"


def test_the_recipe_has_its_say_on_axes_before_the_checkpoint() -> None:
    infos, config = (TensorInfo("c_fc.weight", (8, 4), "F32"),), {"model_type": "gpt2"}
    found = decide(rtn(), infos, config)
    assert found["c_fc.weight"].axis == (1,)
    assert found["c_fc.weight"].reason == "rule *; config.json: Conv1D, stored transposed"
    found = decide(recipe(rule("c_fc.weight", "rtn", bits=4, axis=0)), infos, config)
    assert (found["c_fc.weight"].axis, found["c_fc.weight"].reason) == ((0,), "rule c_fc.weight")


def test_case_matters_and_brackets_are_classes() -> None:
    infos = (TensorInfo("A.w", (2, 2), "F32"), TensorInfo("a.w", (2, 2), "F32"), TensorInfo("x[0]", (2, 2), "F32"))
    found = decide(recipe(rule("a.*", "rtn", bits=4), rule("x[[]0]", "rtn", bits=4)), infos)
    assert [name for name, decision in found.items() if decision.compresses] == ["a.w", "x[0]"]


DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@st.composite
def checkpoints_and_rules(draw: st.DrawFn) -> tuple[dict[str, torch.Tensor], list[Rule], dict[str, str]]:
    names = draw(st.lists(st.text('abç"\\\n.', min_size=1, max_size=6), min_size=1, max_size=5, unique=True))
    tensors, rules = {}, []
    for index, name in enumerate(names):
        shape = draw(st.lists(st.integers(1, 6), max_size=3))
        columns = 2 * draw(st.integers(1, 4))
        tensors[name] = gaussian(*shape, columns, seed=index, dtype=draw(st.sampled_from(DTYPES)))
        if draw(st.booleans()) or not rules:
            options: dict[str, Any] = {"bits": draw(st.integers(2, 8)), "symmetric": draw(st.booleans())}
            options |= draw(st.sampled_from([{}, {"granularity": "tensor"}, {"group_size": 2}]))
            method = draw(st.sampled_from(["rtn", "mse"]))
            rules.append(rule(name, method, **options))
    return (
        tensors,
        rules,
        draw(st.dictionaries(st.text('xyz"ü', min_size=1, max_size=4), st.text(max_size=5), max_size=2)),
    )


@given(checkpoints_and_rules(), st.sampled_from(["packed", "zstd", "ans", "auto"]))
@settings(deadline=None, max_examples=60)
@pytest.mark.slow
def test_the_foretold_size_is_that_of_the_file(
    tmp_path_factory: pytest.TempPathFactory,
    made: tuple[dict[str, torch.Tensor], list[Rule], dict[str, str]],
    choice: Any,
) -> None:
    tensors, rules, metadata = made
    folder = tmp_path_factory.mktemp("size")
    source = save(folder / "m.safetensors", tensors, metadata or None)
    checkpoint = read_checkpoint(source)
    plan = plan_for(checkpoint, recipe(*rules))
    (shard,) = make_shards(checkpoint, plan, choice)
    compress(checkpoint, plan, Options(folder / "a.safetensors", choice=choice))
    size = (folder / "a.safetensors").stat().st_size
    assert size <= shard.layout.file_bytes
    if choice == "packed":
        assert size == shard.layout.file_bytes
        assert shard.layout.exact
    verify(folder / "a.safetensors")


@pytest.mark.parametrize(
    "method",
    [n for n, one in METHODS.items() if one.needs == "weights" and one.family == "quantize" and not one.rates],
)
@pytest.mark.parametrize("options", [{"bits": 3}, {"bits": 2, "granularity": "tensor"}, {"bits": 4, "group_size": 2}])
def test_every_method_stores_the_grid_that_its_config_foretells(method: str, options: dict[str, Any]) -> None:
    weight = gaussian(6, 8)
    config = METHODS[method].config(**options)
    decision = Decision(TensorInfo("w", (6, 8), "F32"), method, config, "")
    encoded = METHODS[method].load_encode()(weight, config, context_of(weight))
    slots = {slot.name.removeprefix("w.qc."): slot for slot in make_slots(decision, "packed")}
    for part in ("scale", "zero_point", "offset"):
        value = getattr(encoded, part)
        assert (value is not None) == (part in slots)
        assert value is None or tuple(value.shape) == slots[part].shape
    grid = (
        "zero-point"
        if encoded.zero_point is not None
        else "offset"
        if encoded.offset is not None
        else encoded.convention
    )
    assert planned_entry(decision).grid == grid


FACTS: dict[str, TensorFacts] = {
    "a.weight": TensorFacts("ConvTranspose1d", Axis((1,), "the model: ConvTranspose1d stores its outputs second")),
    "a.bias": TensorFacts("ConvTranspose1d"),
    "b.weight": TensorFacts("Linear", tied_to="a.weight"),
    "scale": TensorFacts("Linear", tied_to="nowhere.weight"),
    "nowhere.weight": TensorFacts("Linear", Axis((1,), "of no tensor here")),
}


def with_facts(asked: Recipe, tied: dict[str, str] | None = None) -> Plan:
    return make_plan(asked, INFOS, TIED if tied is None else tied, {}, model=FACTS)


def test_a_network_knows_axes_and_ties_that_no_header_shows() -> None:
    found = {decision.tensor.name: decision for decision in with_facts(rtn()).decisions}
    assert list(found) == [info.name for info in INFOS], "names that the checkpoint lacks change nothing"
    assert found["a.weight"].axis == (1,)
    assert found["a.weight"].reason == "rule *; the model: ConvTranspose1d stores its outputs second"
    assert (found["b.weight"].tied_to, found["b.weight"].config) == ("a.weight", KEPT)
    assert found["twin"].tied_to == "a.weight", "what the checkpoint says of itself holds too"
    assert found["scale"].tied_to is None, "a copy of what the checkpoint lacks is stored"


KINDS: dict[str, TensorFacts] = {
    "a.weight": TensorFacts("Linear", kind="product"),
    "b.weight": TensorFacts("Embedding", kind="table"),
    "twin": TensorFacts("Net"),
    "pos_embed": TensorFacts("Net"),
    "rnn.weight_ih_l0": TensorFacts("LSTM", kind="inner"),
    "aux.weight": TensorFacts("Linear", called=False, kind="idle"),
}
LOOSE = [
    TensorInfo("a.weight", (8, 6), "F32"),
    TensorInfo("b.weight", (8, 6), "F32"),
    TensorInfo("twin", (8, 6), "F32"),
]
KINDLY = [
    *LOOSE,
    TensorInfo("pos_embed", (1, 8, 6), "F32"),
    TensorInfo("rnn.weight_ih_l0", (8, 6), "F32"),
    TensorInfo("aux.weight", (8, 6), "F32"),
]
CALIBRATION = DataSettings(calibration=NpzData(npz="x.npz"))


def taken(
    *rules: Rule,
    facts: dict[str, TensorFacts] = KINDS,
    family: Family = "quantize",
    infos: list[TensorInfo] = LOOSE,
    **options: Any,
) -> dict[str, Decision]:
    asked = replace(recipe(*rules), data=CALIBRATION, family=family, **options)
    return {one.tensor.name: one for one in make_plan(asked, infos, {}, {}, model=facts).decisions}


@pytest.mark.parametrize("method", ["gptq", "adaround", "pdquant"])
def test_what_a_calibrated_method_cannot_take_gets_mse_or_is_kept(method: str) -> None:
    found = taken(rule("*", method, bits=3), infos=KINDLY)
    inner = "inner" in METHODS[method].takes
    assert {name: one.method for name, one in found.items()} == {
        "a.weight": method,
        "rnn.weight_ih_l0": method if inner else "mse",
        **dict.fromkeys(("b.weight", "twin", "aux.weight"), "mse"),
        "pos_embed": None,
    }
    assert found["b.weight"].config == MseConfig(bits=3)
    why = {
        "b.weight": "its module, Embedding, is not a matrix product",
        "twin": "its module, Net, is not a matrix product",
        "aux.weight": "no forward pass calls its module, Linear",
    } | ({} if inner else {"rnn.weight_ih_l0": "LSTM multiplies by it inside itself"})
    for name, reason in why.items():
        assert found[name].reason == f"rule *; mse, for {method} cannot take it: {reason}"
    assert found["pos_embed"].reason == "position, kept unless a rule names it"
    unknown = taken(rule("*", method, bits=3), facts={})
    assert {one.method for one in unknown.values()} == {method}, "without a network nothing speaks against it"


def test_a_budget_alone_keeps_what_has_no_width_to_go_by() -> None:
    """A bare parameter, a position table and what nothing calls; a vision transformer has the first two."""
    found = taken(rule("*", "rd"), infos=KINDLY, budget=Budget(bpw=2.0))
    assert {name for name, one in found.items() if one.method == "rd"} == {"a.weight", "b.weight", "rnn.weight_ih_l0"}
    assert found["twin"].reason == "rd cannot take it: its module, Net, is not a matrix product"
    assert found["aux.weight"].reason == "rd cannot take it: no forward pass calls its module, Linear"


@pytest.mark.parametrize(("method", "instead"), [("lsq", "mse"), ("pact", "mse"), ("dkm", "kmeans")])
def test_what_nothing_calls_is_not_trained(method: str, instead: str) -> None:
    found = taken(rule("?*.weight", method, bits=2), infos=KINDLY, family=METHODS[method].family)
    assert (found["aux.weight"].method, found["aux.weight"].config.bits) == (instead, 2)
    assert {found[name].method for name in ("a.weight", "b.weight")} == {method}


@pytest.mark.parametrize("method", [name for name, one in METHODS.items() if one.fits])
def test_every_method_on_a_live_model_takes_what_it_says(method: str) -> None:
    """Kinds that it does not name, and weights that no module is called for, are refused or left to another method."""
    one, options = METHODS[method], {"step": 0.5} if METHODS[method].rates else {"bits": 2}
    for kind in ("product", "table", "else"):
        for called in (True, False):
            facts = {info.name: TensorFacts("Some", called=called, kind=kind) for info in LOOSE}
            fits = (not one.takes or kind in one.takes) and (called or not one.called)
            try:
                found = taken(rule("?.weight", method, **options), facts=facts, family=one.family)
                assert (found["a.weight"].method == method) is fits
                assert fits or found["a.weight"].method in ("mse", "kmeans", None)
            except InputError:
                assert not fits


@pytest.mark.parametrize(
    ("asked", "facts", "line"),
    [
        (
            rule("b.weight", "gptq", bits=4),
            KINDS,
            "b.weight [8, 6]: gptq cannot take it: its module, Embedding, is not a matrix product",
        ),
        (
            rule("a.weight", "lsq", bits=4),
            {name: replace(one, called=False) for name, one in KINDS.items()},
            "a.weight [8, 6]: lsq cannot take it: the model reads this weight without",
        ),
        (
            rule("twin", "rd", step=0.3),
            KINDS,
            "twin [8, 6]: rd cannot take it: its module, Net, is not a matrix product",
        ),
    ],
)
def test_what_a_method_cannot_do_without_is_refused(asked: Rule, facts: dict[str, TensorFacts], line: str) -> None:
    with pytest.raises(InputError) as caught:
        taken(asked, facts=facts)
    (found,) = caught.value.lines()
    assert line in found
    assert "give it a rule of its own with mse, which needs weights alone, or keep: {}" in found


def test_a_budget_leaves_the_widths_of_what_gets_mse_open() -> None:
    configs = Widths({bits: METHODS["gptq"].config(bits=bits) for bits in (2, 4)})  # type: ignore[call-arg]
    found = taken(replace(rule("*", "gptq", bits=2), config=configs))
    assert found["b.weight"].method == "mse"
    assert found["b.weight"].widths.configs == {2: MseConfig(bits=2), 4: MseConfig(bits=4)}


def test_the_recipe_has_its_say_before_the_network_and_ties_of_metadata_too() -> None:
    first = with_facts(recipe(rule("*", "rtn", bits=4, axis=-2))).decisions[0]
    assert (first.axis, first.reason) == ((0,), "rule *")
    found = {decision.tensor.name: decision for decision in with_facts(rtn(), tied={"b.weight": "twin"}).decisions}
    assert found["b.weight"].tied_to == "twin"
    named = with_facts(recipe(rule("b.weight", "rtn", bits=4))).decisions[2]
    assert (named.tied_to, named.compresses) == (None, True), "a rule of its own unties a name"


def test_weights_that_hold_no_numbers_are_kept_and_nothing_else_changes() -> None:
    asked = []

    def nonfinite(tensor: TensorInfo) -> int:
        asked.append(tensor.name)
        return 3 if tensor.name == "a.weight" else 0

    plain = make_plan(rtn(), INFOS, TIED, {})
    found = make_plan(rtn(), INFOS, TIED, {}, nonfinite=nonfinite)
    assert asked == [decision.tensor.name for decision in plain.decisions if decision.compresses]
    for before, after in zip(plain.decisions, found.decisions, strict=True):
        if before.tensor.name == "a.weight":
            assert (after.method, after.config) == (None, KEPT)
            assert after.reason == "3 values are NaN or Inf (--skip-nonfinite)"
        else:
            assert after == before
    assert make_plan(rtn(), INFOS, TIED, {}, nonfinite=lambda _: 0) == plain


def test_no_value_is_counted_for_a_recipe_that_is_refused() -> None:
    with pytest.raises(RecipeError, match="fits no tensor"):
        make_plan(rtn(match="nowhere.*"), INFOS, TIED, {}, nonfinite=lambda tensor: pytest.fail(f"read {tensor.name}"))


def learned_plan(path: Path, values: dict[str, torch.Tensor], **options: Any) -> Plan:
    """The plan of `learned` for a.weight and b.weight where training left these values."""
    save(path, {f"{name}.representatives": value for name, value in values.items()})
    asked = replace(recipe(rule("?.weight", "learned", **options)), family="cluster")
    return make_plan(asked, INFOS, TIED, {}, representatives=path)


def test_learned_representatives_say_how_many_bits_their_codes_need(tmp_path: Path) -> None:
    values = {"a.weight": torch.tensor([1.0, -2.0, 0.5, 1.0, 3.0, 7.0]), "b.weight": torch.tensor([0.25])}
    found = {d.tensor.name: d for d in learned_plan(tmp_path / "reg.safetensors", values).decisions}
    one, single = found["a.weight"], found["b.weight"]
    assert (one.config.bits, one.codebook.entries) == (3, 5), "equal ones are one entry"
    assert (single.config.bits, single.codebook.entries) == (1, 1)
    assert one.config == METHODS["learned"].config(bits=3)
    without = make_plan(replace(recipe(rule("?.weight", "learned")), family="cluster"), INFOS, TIED, {})
    assert {d.config.bits for d in without.decisions if d.compresses} == {12}


def test_representatives_that_do_not_fit_are_named_all_at_once(tmp_path: Path) -> None:
    wrong = {
        "a.weight": (torch.ones(2, 3), "it has a grid for each channel, [2, 3], and no one codebook"),
        "b.weight": (torch.arange(5.0), "it has 5 representatives, more than 2 bits can name"),
    }
    path = tmp_path / "reg.safetensors"
    with pytest.raises(Refusals) as caught:
        learned_plan(path, {name: value for name, (value, _) in wrong.items()}, bits=2)
    hint = "give it a rule of its own with kmeans, more bits, or keep: {}"
    assert caught.value.lines() == [f"{path}: tensor {name!r}: {why}; {hint}" for name, (_, why) in wrong.items()]
    with pytest.raises(DataError, match="its representatives hold NaN or Inf"):
        learned_plan(tmp_path / "nan", {"a.weight": torch.tensor([0.0, float("nan")]), "b.weight": torch.ones(1)})
    with pytest.raises(DataError, match=r"tensor 'b\.weight': no representatives were learned for it"):
        learned_plan(tmp_path / "none", {"a.weight": torch.ones(1)})


def test_a_missing_file_of_representatives_is_one_error_and_methods_without_them_need_none(tmp_path: Path) -> None:
    path = tmp_path / "absent.safetensors"
    asked = replace(recipe(rule("?.weight", "learned")), family="cluster")
    with pytest.raises(DataError) as caught:
        make_plan(asked, INFOS, TIED, {}, representatives=path)
    assert len(caught.value.lines()) == 1 and "there are no learned representatives" in str(caught.value)
    assert make_plan(rtn(), INFOS, TIED, {}, representatives=path) == make_plan(rtn(), INFOS, TIED, {})


def test_a_plan_is_a_value() -> None:
    asked = rtn()
    assert make_plan(asked, INFOS, TIED, {}) == make_plan(asked, INFOS, TIED, {})


@pytest.mark.parametrize("name", ["layers[0].weight", "a*b.weight", "x?.weight", "[!a].weight"])
def test_a_match_that_is_a_name_means_that_tensor_alone(name: str) -> None:
    infos = tuple(
        TensorInfo(one, (8, 4), "F32") for one in (name, "layers0.weight", "aab.weight", "xy.weight", "b.weight")
    )
    found = decide(recipe(rule(name, "rtn", bits=4)), infos)
    assert [one for one, decision in found.items() if decision.compresses] == [name]
    others = infos[1:]
    found = decide(recipe(rule(name, "rtn", bits=4)), others)
    assert len([one for one, decision in found.items() if decision.compresses]) == 1, (
        "a glob where no tensor has the name"
    )


def test_one_dimension_is_compressed_where_its_name_has_brackets() -> None:
    infos = (TensorInfo("bias[0]", (64,), "F32"), TensorInfo("bias0", (64,), "F32"))
    found = decide(recipe(rule("bias[0]", "rtn", bits=8)), infos)
    assert [decision.compresses for decision in found.values()] == [True, False]


def test_rules_that_name_tensors_cost_no_more_than_the_tensors() -> None:
    """Each name is looked up once for each rule that could mean it, and not held against every rule."""
    infos = tuple(TensorInfo(f"layers.{n}.weight", (2, 2), "F32") for n in range(400))
    asked: list[str] = []

    class Counted(str):
        __slots__ = ()

        def __eq__(self, other: object) -> bool:
            asked.append(str(self))
            return str(self) == other

        __hash__ = str.__hash__

    rules = [rule(f"layers.{n}.weight", "rtn", bits=4) for n in range(400)]
    found = find_deciders(rules, dict.fromkeys((Counted(info.name) for info in infos), "matrix"))
    assert all(one is not None and one.match == name for name, one in found.items())
    assert len(asked) < 10 * len(infos)


MOE = (
    TensorInfo("model.embed_tokens.weight", (300, 32), "F32"),
    TensorInfo("lm_head.weight", (300, 32), "F32"),
    TensorInfo("model.layers.0.mlp.gate.weight", (4, 32), "F32"),
    TensorInfo("model.layers.0.mlp.experts.0.up.weight", (48, 32), "F32"),
    TensorInfo("model.norm.weight", (32,), "F32"),
    TensorInfo("pos_embed", (1, 17, 32), "F32"),
    TensorInfo("attn_mask", (17, 17), "F32"),
    TensorInfo("ids", (1, 17), "I64"),
)


def test_roles_are_matched_and_some_are_kept_unless_named() -> None:
    found = decide(recipe(rule("@embedding", "rtn", bits=8), rule("@router", "rtn", bits=6), *rtn().rules), MOE)
    assert {name.rpartition(".")[0] or name: one.config.bits for name, one in found.items()} == {
        "model.embed_tokens": 8,
        "lm_head": 4,
        "model.layers.0.mlp.gate": 6,
        "model.layers.0.mlp.experts.0.up": 4,
        "model.norm": None,
        "pos_embed": None,
        "attn_mask": None,
        "ids": None,
    }
    assert found["pos_embed"].reason == "position, kept unless a rule names it"
    assert [one.role for one in found.values()] == [
        *("embedding", "head", "router", "expert", "norm", "position", "mask", "mask"),
    ]


@pytest.mark.parametrize("match", ["pos_embed", "@position"])
def test_what_is_kept_by_its_role_is_compressed_by_name_or_role(match: str) -> None:
    found = decide(recipe(rule(match, "rtn", bits=8)), MOE)
    assert [name for name, one in found.items() if one.compresses] == ["pos_embed"]


def test_a_role_reaches_vectors_and_leaves_integers() -> None:
    assert decide(recipe(rule("@norm", "rtn", bits=8)), MOE)["model.norm.weight"].compresses
    found = decide(recipe(rule("@mask", "rtn", bits=8)), MOE)
    assert (found["attn_mask"].compresses, found["ids"].reason) == (True, "dtype I64 is kept")


def test_a_tied_head_is_not_untied_by_its_role() -> None:
    asked = recipe(
        Rule("@head", "rtn", METHODS["rtn"].config(bits=8), "a"), Rule("*", "rtn", rtn().rules[0].config, "a")
    )
    found = decide(asked, MOE, {"tie_word_embeddings": True})
    assert found["lm_head.weight"].tied_to == "model.embed_tokens.weight"


def test_a_rule_of_wildcards_alone_for_what_is_kept_says_how_to_name_it() -> None:
    (line,) = refusals(recipe(rule("*.gate.*", "rtn", bits=8)), MOE)
    what = "match '*.gate.*' compresses nothing: model.layers.0.mlp.gate.weight: router, kept unless a rule names it"
    assert line == f'rule *.gate.*: {what}; name the tensors, or their role: match "@router"'


def test_a_role_that_nothing_has_is_refused_with_those_that_are_there() -> None:
    (line,) = refusals(recipe(rule("@convolution", "rtn", bits=8)), MOE)
    hint = "roles here: @embedding, @head, @router, @expert, @position, @norm, @mask"
    assert line == f"rule @convolution: match '@convolution' fits no tensor; {hint}"


SMALL = (
    TensorInfo("gate.weight", (64, 1), "F32"),
    TensorInfo("short.weight", (64, 2), "F16"),
    TensorInfo("wide.weight", (4, 512), "F16"),
)


def test_one_value_a_channel_and_what_would_take_no_fewer_bytes_are_kept_unless_named() -> None:
    found = decide(rtn(8, granularity="channel"), SMALL)
    assert {name: one.reason for name, one in found.items()} == {
        "gate.weight": "one value a channel",
        "short.weight": "would take no fewer bytes than its 256",
        "wide.weight": "rule *",
    }
    assert decide(rtn(4, granularity="tensor"), SMALL)["short.weight"].compresses
    named = decide(recipe(*(rule(info.name, "rtn", bits=8) for info in SMALL)), SMALL)
    assert all(one.compresses for one in named.values())


def test_of_open_widths_those_stay_that_save_bytes() -> None:
    configs = Widths({bits: METHODS["rtn"].config(bits=bits) for bits in range(1, 9)})  # type: ignore[call-arg]
    asked = recipe(replace(rule("*", "rtn", bits=2), config=configs))
    found = decide(asked, (TensorInfo("a.weight", (8, 3), "F16"),))
    # A row has 6 bytes; its scale and zero point take 3, its codes of 6 bits 3 more.
    assert set(found["a.weight"].widths.configs) == {1, 2, 3, 4, 5}
