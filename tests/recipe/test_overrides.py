"""--set: a path, a value, and the same checks as the file's."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcompress.errors import InputError, QcompressError, UsageError
from qcompress.recipe import parse_recipe
from qcompress.registry import MseConfig, RtnConfig

TEXT = """\
version: 1
rules:
  - {match: a, rtn: {bits: 4}}
  - match: b
    mse:
"""


def lines(*overrides: str, text: str = TEXT + "      {bits: 2}\n") -> list[str]:
    with pytest.raises(InputError) as caught:
        parse_recipe(text, "r.yaml", overrides)
    return caught.value.lines()


def test_values_are_set() -> None:
    recipe = parse_recipe(
        TEXT,
        "r.yaml",
        [
            "rules.0.rtn.bits=2",
            "rules.0.rtn.bits=3",
            "rules.0.match=*.weight",
            "rules.1.mse.bits = 5",
            "rules.1.match=[x, 'y=z']",
            "seed=9",
            "gates.max_size=2KiB",
            "gates.max_drop={top1: 0.5}",
            "gates.max_drop.top5=1",
        ],
    )
    assert recipe.rules[0].match == "*.weight"
    assert recipe.rules[0].config == RtnConfig(bits=3)
    assert recipe.rules[1].config == MseConfig(bits=5)
    assert [rule.match for rule in recipe.rules] == ["*.weight", "x", "y=z"]
    assert recipe.seed == 9
    assert recipe.gates.max_size == 2048
    assert recipe.gates.max_drop == {"top1": 0.5, "top5": 1.0}


def test_a_whole_method_is_replaced() -> None:
    recipe = parse_recipe(TEXT, "r.yaml", ["rules.1={match: c, rtn: {bits: 1}}"])
    assert recipe.rules[1].where == "--set rules.1={match: c, rtn: {bits: 1}}: rules[1].rtn"


def test_errors_name_the_override() -> None:
    assert lines("rules.0.rtn.bits=9") == [
        "--set rules.0.rtn.bits=9: rules[0].rtn.bits: 9 is out of range; must be between 1 and 8"
    ]
    assert lines("rules.0.rtn.bit=2") == [
        "--set rules.0.rtn.bit=2: rules[0].rtn.bit: unknown key `bit`; did you mean `bits`?"
    ]
    assert lines("rule.0.rtn.bits=2") == ["--set rule.0.rtn.bits=2: rule: unknown key `rule`; did you mean `rules`?"]
    assert lines("rules.0.rtm.bits=2") == [
        "--set rules.0.rtm.bits=2: rules[0].rtm: unknown key or method `rtm`; did you mean `rtn`?"
    ]
    assert lines("seed=") == [
        "--set seed=: seed: `null` is not an integer; give an integer between 0 and 9223372036854775807"
    ]
    assert lines("seed=&x 3") == ["--set seed=&x 3: seed: anchor `&x`: a recipe has no anchors; remove it"]
    assert lines("seed=[1") == [
        "--set seed=[1: not YAML: expected ',' or ']', but got '<stream end>'; look at what starts on line 1"
    ]


def test_paths_that_lead_nowhere() -> None:
    assert lines("rules.2.rtn.bits=2") == [
        "--set rules.2.rtn.bits=2: rules: `2` is no item of a list of 2; give a number from 0 to 1"
    ]
    assert lines("rules.-1.rtn.bits=2") == [
        "--set rules.-1.rtn.bits=2: rules: `-1` is no item of a list of 2; give a number from 0 to 1"
    ]
    # Ten digits are no shorter number with the rest cut off.
    assert lines("rules.0000000001.rtn.bits=9") == [
        "--set rules.0000000001.rtn.bits=9: rules: `0000000001` is no item of a list of 2; give a number from 0 to 1"
    ]
    assert lines("rules.x=2", text="version: 1\nrules: []\n")[1] == (
        "--set rules.x=2: rules: `x` is no item of a list of 0; the list is empty"
    )
    assert lines("version.x=2") == [
        "--set version.x=2: version: 1 is neither a mapping nor a list and has no `x`; set version as a whole"
    ]


def test_errors_of_the_file_come_first() -> None:
    found = lines("seed=x", "rules.0.rtn.bits=0", text=TEXT)
    assert [line.partition(" rules")[0].partition(" seed")[0] for line in found] == ["r.yaml:5:", "--set", "--set"]
    assert "seed=x" in found[1]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", "--set seed: no `=`; write --set key.path=value, as in --set rules.0.rtn.bits=2"),
        ("=3", "--set =3: `` is not a path; write keys and list numbers with a dot between"),
        ("a..b=3", "--set a..b=3: `a..b` is not a path; write keys and list numbers with a dot between"),
    ],
)
def test_what_is_no_override_is_the_command_lines_error(override: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_recipe(TEXT, "r.yaml", [override])
    assert str(caught.value) == message


SEGMENTS = st.lists(st.sampled_from(["rules", "0", "1", "9" * 30, "rtn", "bits", "seed", "x", "²", ""]), max_size=20)
VALUES = st.sampled_from(
    ["1", "*", "*a", "{a: b}", "[", "!!x y", "", "a: b", "'", "\n- a\n- b", "---\na\n---\nb", "\t"]
)


@given(st.lists(st.one_of(st.text(max_size=20), st.tuples(SEGMENTS, VALUES).map(lambda o: f"{'.'.join(o[0])}={o[1]}"))))
def test_any_override_is_applied_or_refused(overrides: list[str]) -> None:
    try:
        recipe = parse_recipe(TEXT, "r.yaml", [*overrides, "rules.1.mse.bits=2"])
    except QcompressError as error:
        assert isinstance(error, InputError | UsageError)
        assert all(line.isprintable() for line in error.lines())
    else:
        assert len(recipe.rules) >= 2
