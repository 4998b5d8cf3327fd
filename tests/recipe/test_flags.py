"""A recipe from flags: one rule, and errors that name the flag and exit with 2."""

from __future__ import annotations

import pytest

from qcompress import registry
from qcompress.errors import UsageError
from qcompress.recipe import parse_recipe, recipe_from_flags, recipe_json
from qcompress.registry import DEFAULT_METHOD, METHODS, HqqConfig, RtnConfig


def error(method: str | None, options: dict[str, object], family: registry.Family = "quantize") -> str:
    with pytest.raises(UsageError) as caught:
        recipe_from_flags(method, options, family)
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_flags_make_one_rule() -> None:
    flags = {"bits": 3, "group_size": 32, "granularity": None, "symmetric": True}
    recipe = recipe_from_flags("rtn", flags)
    (rule,) = recipe.rules
    assert (rule.match, rule.method, rule.where, recipe.source) == ("*", "rtn", "command line", "command line")
    assert rule.config == RtnConfig(bits=3, group_size=32, symmetric=True)


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if not method.rates])
def test_flags_and_yaml_make_the_same_recipe(method: str) -> None:
    written = parse_recipe(f'{{version: 1, rules: [{{match: "*", {method}: {{bits: 2}}}}]}}', "r.yaml")
    family = METHODS[method].family
    assert recipe_json(recipe_from_flags(method, {"bits": 2}, family)) == recipe_json(written)


def test_bits_alone_is_the_default_method() -> None:
    assert recipe_from_flags(None, {"bits": 2}).rules[0].method == DEFAULT_METHOD
    assert recipe_from_flags("hqq", {"bits": 4, "norm": 1}).rules[0].config == HqqConfig(bits=4, norm=1.0)


def test_wrong_flags() -> None:
    assert error("rtn", {"bits": 9}) == "--bits 9: 9 is out of range; must be between 1 and 8"
    assert error("rtn", {"bits": 9, "granularity": "x"}).startswith("--bits 9: ")
    assert error("rtn", {"granularity": "x", "bits": 9}).startswith("--granularity x: ")
    assert error(None, {}) == "command line: --bits is missing; add --bits, an integer between 1 and 8"
    assert error("rtn", {}) == "--method rtn: --bits is missing; add --bits, an integer between 1 and 8"
    assert error("rtm", {"bits": 4}) == "--method rtm: unknown method `rtm`; did you mean `rtn`?"
    assert error("rd", {"bits": 4}).startswith("--bits 4: not an option of `rd`; ")
    assert error("rtn", {"bits": 4, "granularity": "chanel"}) == (
        "--granularity chanel: unknown value `chanel`; did you mean `channel`?"
    )
    assert error("rtn", {"bits": 4, "dim": 2}) == (
        "--dim 2: not an option of `rtn`; `rtn` takes `--bits`, `--granularity`, `--group-size`, `--symmetric`"
    )
    assert error("hqq", {"bits": 4, "symmetric": True}) == (
        "--method hqq --bits 4 --symmetric: hqq fits a zero point, so symmetric: true has no meaning here; "
        "see `hqq` in docs/recipes.md"
    )
    assert error("rtn", {"bits": 4, "group_size": 8, "granularity": "tensor", "symmetric": False}) == (
        "--method rtn --bits 4 --group-size 8 --granularity tensor --asymmetric: "
        "group_size needs granularity: group, not tensor; see `rtn` in docs/recipes.md"
    )


def test_families() -> None:
    assert recipe_from_flags(None, {"bits": 2}, "cluster").rules[0].method == "kmeans"
    assert error("rtn", {"bits": 2}, "cluster") == "--method rtn: `rtn` is a quantize method; use `qcompress quantize`"
    assert error("kmeans", {"bits": 2}) == "--method kmeans: `kmeans` is a cluster method; use `qcompress cluster`"
    recipe = recipe_from_flags("learned", {}, "cluster")
    assert (recipe.family, recipe.rules[0].method) == ("cluster", "learned")
