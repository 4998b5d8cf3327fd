"""docs/papers.md: each row has a verdict, verdicts on figures follow from rows, and recipes and commands plan."""

from __future__ import annotations

import json
import re
import shlex
import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from claims import WORDS, Claim, Comparison, Side, Verdict, outcome
from conftest import ROOT, Run, skip_without_package
from definitions import ROWS
from definitions.papers import CLAIMS
from ledger import Ledger, Row, definition
from render import TEMPLATES, PageError, render_page
from tables import Pages
from test_provenance import LINE
from verdicts import lines_of

from qcompress.model.build import build_model
from qcompress.recipe import read_recipe
from qcompress.types.plan import Recipe

TEMPLATE = (TEMPLATES / "papers.md").read_text(encoding="utf-8")
PAGE = (ROOT / "docs" / "papers.md").read_text(encoding="utf-8")
NUMBERED = re.compile(r"^\| ([A-Z])(\d+) \|.*\|([^|]*)\|$", re.MULTILINE)
ABOUT_FIGURES = ("shows", "shows in part", "does not show", "not run yet")


def commands() -> Iterator[tuple[str, ...]]:
    """The words behind `qcompress` of every command on the page that has a dry run."""
    for block in re.findall(r"^```bash\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE):
        for line in block.replace("\\\n", " ").splitlines():
            before, found, after = line.partition("qcompress ")
            if found and "recipes" not in before:
                yield tuple(shlex.split(after))


COMMANDS = tuple(commands())


def recipe_of(words: tuple[str, ...]) -> Path:
    return ROOT / words[words.index("-r") + 1]


def test_every_row_of_the_page_ends_in_a_verdict() -> None:
    rows = NUMBERED.findall(PAGE)
    assert len(rows) > 100
    assert {f"{letter}{number}: {last}" for letter, number, last in rows if not verdict_of(last)} == set()
    for letter in "DRQ":
        numbers = [int(number) for one, number, _ in rows if one == letter]
        assert numbers == sorted(set(numbers)), letter


def verdict_of(cell: str) -> str | None:
    found = re.match(r" \*\*([a-z ]+)\*\*", cell)
    return found[1] if found and found[1] in WORDS else None


def test_verdicts_on_figures_are_never_written_by_hand() -> None:
    written = [verdict_of(last) for _, _, last in NUMBERED.findall(TEMPLATE)]
    assert set(written) & set(ABOUT_FIGURES) == set()


def test_every_claim_is_on_the_page_and_names_rows_that_are_defined() -> None:
    assert set(re.findall(r"\{\{verdict ([\w-]+)\}\}", TEMPLATE)) <= {claim.name for claim in CLAIMS}
    assert {claim.name for claim in CLAIMS if f"{{{{measured {claim.name}}}}}" not in TEMPLATE} == set()
    rows = {row.name for row in ROWS}
    assert {name for claim in CLAIMS for name in claim.rows} <= rows
    assert len({claim.name for claim in CLAIMS}) == len(CLAIMS)
    with pytest.raises(PageError, match="no claim is called who"):
        render_page("{{verdict who}}", Pages(Ledger(ROWS)))


def test_tests_and_claims_that_the_page_names_exist() -> None:
    sources = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    assert {name for name in re.findall(r"`(test_\w+)`", PAGE) if f"def {name}(" not in sources} == set()
    named = set(re.findall(r"`verdicts\.py ([\w-]+)`", PAGE))
    assert named <= {claim.name for claim in CLAIMS}


RECIPES = sorted(
    {ROOT / "recipes" / name for name in re.findall(r"recipes/([\w/-]+\.yaml)", PAGE)}
    | {
        path
        for name in re.findall(r"\(\.\./recipes/([\w-]+)\)", PAGE)
        for path in (ROOT / "recipes" / name).glob("*.yaml")
    }
)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_of_the_page_is_sound(
    run: Run, path: Path, small_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QCOMPRESS_DATA", str(small_data))
    done = run("recipe", "check", str(path), *of_little_data(read_recipe(path)))
    assert done.code == 0, done.err


def of_little_data(recipe: Recipe) -> tuple[str, ...]:
    """No more samples are asked for, in all or at once, than there are in the tests' folder."""
    parts = ("calibration", "train", "eval")
    asked = [name for name in parts if getattr(getattr(recipe.data, name, None), "samples", None) is not None]
    changes = [f"data.{name}.samples=2" for name in asked]
    changes += ["data.train.batch_size=1"] if getattr(recipe.data, "train", None) is not None else []
    return tuple(word for change in changes for word in ("--set", change))


def write_headers(path: Path, shapes: dict[str, list[int]]) -> None:
    """A checkpoint of zeros that takes no room on the disk: a plan reads its headers alone."""
    header, offset = {}, 0
    for name, shape in sorted(shapes.items()):
        size = 4 * torch.Size(shape).numel()
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + offset)


def write_checkpoint_of(recipe: Recipe, place: Path, target: Path) -> None:
    """The network's tensors, and what training has learned of those that a rule wants it for."""
    assert recipe.model is not None
    with torch.device("meta"):
        state = build_model(recipe.model, place, allow_code=True, place="model").state_dict()
    write_headers(target, {name: list(value.shape) for name, value in state.items()})
    if any(rule.method == "learned" for rule in recipe.rules):
        learned = {f"{name}.representatives": [16] for name, value in state.items() if value.ndim > 1}
        write_headers(target.with_suffix(".reg.safetensors"), learned)


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_command_of_the_page_plans(
    run: Run, words: tuple[str, ...], small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = read_recipe(recipe_of(words))
    assert recipe.model is not None
    skip_without_package(recipe.model.factory)
    monkeypatch.setenv("QCOMPRESS_DATA", str(small_data))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    if words[1] != "-r":
        checkpoint = tmp_path / Path(words[1]).name
        write_checkpoint_of(recipe, recipe_of(words).parent, checkpoint)
        words = (words[0], str(checkpoint), *words[2:])
    done = run(*words, *of_little_data(recipe), "--dry-run", "--json", "-")
    assert done.code == 0, done.err
    planned = json.loads(done.out)
    rows = planned["weights"] if words[0] == "finetune-reg" else planned["tensors"]
    reached = [row["name"] for row in rows if row.get("regularizer") or row.get("bits")]
    wanted = words[0] != "finetune-reg" or (recipe.finetune is not None and recipe.finetune.regularize)
    assert bool(reached) == bool(wanted)


def test_every_training_of_the_page_is_followed_by_what_reads_it() -> None:
    """A checkpoint that a command reads is one that a command before it has written, or one of those that one has."""
    given = {"mobilebert", "mobilenet_v1", "mobilenet_v2", "resnet50", "resnet101"}
    for words in COMMANDS:
        if words[1] != "-r" and "$" not in words[1]:
            assert Path(words[1]).stem in given, words
        output = words[words.index("-o") + 1] if "-o" in words else recipe_of(words).with_suffix(".safetensors").name
        given.add(Path(output).stem)


def ledger_of(folder: Path, **figures: float | None) -> Ledger:
    """Rows a/one and a/two of three seeds; `one0=.5` gives the first seed of a/one a line."""
    rows = [
        Row(name=f"a/{name}/seed{seed}", commands=(), figures={}, seconds=1)
        for name in ("one", "two")
        for seed in "012"
    ]
    ledger = Ledger(rows, folder)
    for key, value in figures.items():
        name = f"a/{key[:-1]}/seed{key[-1]}"
        known = definition(ledger.rows[name], ledger.rows)
        ledger.lines[name] = replace(LINE, row=name, definition=known, figures={"top1": value})
    return ledger


ONE, TWO = (Side(rows=tuple(f"a/{name}/seed{seed}" for seed in "012")) for name in ("one", "two"))
PLAIN = Claim(name="c", comparisons=(Comparison(title="net", ours=ONE, base=TWO),))
NEAR = {"one0": 0.500, "two0": 0.505, "one1": 0.520, "two1": 0.500}


@pytest.mark.parametrize(
    ("changes", "figures", "wanted"),
    [
        ({}, {}, "not run yet"),
        ({}, {"one0": 0.9, "two1": 0.5}, "not run yet"),
        ({}, {"one0": 0.9, "two0": 0.5}, "shows"),
        ({}, {"one0": 0.5, "two0": 0.9}, "does not show"),
        ({}, {"one0": 0.505, "two0": 0.5}, "does not show"),
        ({}, {"one0": 0.9, "two0": 0.5, "one1": 0.4, "two1": 0.5}, "does not show"),
        ({"paired": False}, {"one0": 0.9, "two0": 0.5, "one1": 0.4, "two1": 0.5}, "shows"),
        ({"within": 0.5}, {"one0": 0.9, "two0": 0.5}, "does not show"),
        ({"wanted": "equal"}, NEAR, "shows"),
        ({"wanted": "equal"}, {"one0": 0.9, "two0": 0.5}, "does not show"),
        ({"wanted": "not below"}, {"one0": 0.9, "two0": 0.5}, "shows"),
        ({"wanted": "not below"}, {"one0": 0.495, "two0": 0.5}, "shows"),
        ({"wanted": "not below"}, {"one0": 0.4, "two0": 0.5}, "does not show"),
        ({"floor": 0.15}, {"one0": 0.14, "two0": 0.1}, "does not show"),
        ({"floor": 0.15}, {"one0": 0.40, "two0": 0.1}, "shows"),
    ],
)
def test_a_verdict_follows_from_figures(
    tmp_path: Path, changes: dict[str, object], figures: dict[str, float], wanted: Verdict
) -> None:
    claim = replace(PLAIN, **changes)  # type: ignore[arg-type]
    assert outcome(claim, ledger_of(tmp_path, **figures)).verdict == wanted


def test_a_verdict_tells_what_it_stands_on(tmp_path: Path) -> None:
    turned = Comparison(title="turned", ours=TWO, base=ONE)
    later = Comparison(
        title="later", ours=replace(ONE, rows=("a/one/seed2",)), base=replace(TWO, rows=("a/two/seed2",))
    )
    both = replace(PLAIN, comparisons=(*PLAIN.comparisons, turned, later))
    ledger = ledger_of(tmp_path, one0=0.9, two0=0.5, one1=0.7, two1=0.5)
    found = outcome(both, ledger)
    assert found.text == "**shows in part** (1 of 2, 1 to run)"
    assert found.measured == "net 0.500 → 0.800; turned 0.800 → 0.500"
    assert outcome(replace(both, share=0.5), ledger).verdict == "shows"
    assert outcome(PLAIN, ledger_of(tmp_path)).measured == "-"
    assert outcome(replace(PLAIN, floor=0.95), ledger).text == "**does not show** (1 at chance level)"
    wide = replace(PLAIN, comparisons=PLAIN.comparisons * 5)
    assert outcome(wide, ledger).measured == "+0.300 to +0.300, median +0.300"
    assert list(lines_of(both, ledger)) == [
        "c: shows in part",
        "  net: 0.500 → 0.800, 2 seeds",
        "  turned: 0.800 → 0.500, 2 seeds, not as claimed",
        "  later: 2 rows to run, a/one/seed2 first",
    ]


def test_a_row_that_was_run_otherwise_counts_as_not_run(tmp_path: Path) -> None:
    ledger = ledger_of(tmp_path, one0=0.9, two0=0.5)
    name = "a/one/seed0"
    ledger.lines[name] = replace(ledger.lines[name], definition="of before")
    assert outcome(PLAIN, ledger).verdict == "not run yet"


def test_gains_are_compared(tmp_path: Path) -> None:
    ledger = ledger_of(tmp_path, one0=0.9, one1=0.4, two0=0.5, two1=0.3)
    first, second = (Side(rows=(f"a/one/seed{seed}",), less=(f"a/two/seed{seed}",)) for seed in "01")
    claim = replace(PLAIN, comparisons=(Comparison(title="gain", ours=first, base=second),))
    found = outcome(claim, ledger)
    assert (found.verdict, found.measured) == ("shows", "gain 0.100 → 0.400")
    assert outcome(claim, ledger_of(tmp_path, one0=0.9, one1=0.4, two0=0.5)).verdict == "not run yet"
