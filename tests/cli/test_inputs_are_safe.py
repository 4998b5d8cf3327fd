"""No command writes over a file that it reads, whichever section of a recipe names it and by whatever name."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest
from conftest import Run, files_under, refused, small_tensors, write_checkpoint

from qcompress.compress.check import named_files
from qcompress.recipe import read_recipe
from qcompress.types.config import Section
from qcompress.types.data_settings import DATA_KINDS

RECIPE = """version: 1
model: {factory: "net.py:make", args: {sizes: sizes.json}}
data:
  calibration: {images: images}
  eval: {text: en.txt, target: de.txt, labels: labels.txt, tokenizer: tokenizer}
  train: {npz: train.npz}
task: {factory: {factory: "measure.py:score"}}
rules: [{match: "*.weight", mse: {}}]
budget: {bpw: 4, sensitivity: costs.json}
finetune:
  optimizer: {sgd: {lr: 0.1}}
  loss: "loss.py:loss"
  regularize: [{match: "*.weight", l2: {}}]
"""
NAMED = {
    "model.factory": "net.py",
    "model.args of the recipe, sizes.json": "sizes.json",
    "data.calibration.images": "images/cat/one.png",
    "data.eval.text": "en.txt",
    "data.eval.target": "de.txt",
    "data.eval.labels": "labels.txt",
    "data.eval.tokenizer": "tokenizer/vocab.txt",
    "data.train.npz": "train.npz",
    "task.factory": "measure.py",
    "budget.sensitivity": "costs.json",
    "finetune.loss": "loss.py",
}
"""What names each file."""

LIVE = ("-r", "r.yaml", "--allow-code", "-f")
WRITING = {
    "quantize -o": ("quantize", "m.safetensors", *LIVE, "-o"),
    "quantize --json": ("quantize", "m.safetensors", *LIVE, "-o", "o", "--json"),
    "quantize --save-statistics": ("quantize", "m.safetensors", *LIVE, "-o", "o", "--save-statistics"),
    "finetune-reg -o": ("finetune-reg", "m.safetensors", *LIVE, "-o"),
    "finetune-reg --json": ("finetune-reg", "m.safetensors", *LIVE, "-o", "o", "--json"),
    "eval --json": ("eval", "m.safetensors", *LIVE, "--json"),
    "recipe show --json": ("recipe", "show", "r.yaml", "-f", "--json"),
    "report --sensitivity -o": ("report", "m.safetensors", "--sensitivity", *LIVE, "-o"),
    "report --sensitivity --json": ("report", "m.safetensors", "--sensitivity", *LIVE, "--json"),
    "report --sensitivity --cache": ("report", "m.safetensors", "--sensitivity", *LIVE, "--cache"),
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("QCOMPRESS_DATA", raising=False)
    for name in NAMED.values():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(f"this is {name}")
    write_checkpoint(tmp_path / "m.safetensors", small_tensors())
    Path("r.yaml").write_text(RECIPE)
    return tmp_path


def test_the_files_that_a_recipe_names_are_known(folder: Path) -> None:
    found = named_files(read_recipe(Path("r.yaml"), []))
    assert {what.removesuffix(" of the recipe") for what in found} == NAMED.keys()
    for what, path in found.items():
        assert path.exists() and NAMED[what.removesuffix(" of the recipe")].startswith(str(path))


def test_every_option_that_means_a_file_is_known_to_be_one() -> None:
    """By what its line in the docstring says, from which the reference of recipes is made."""
    code = {("ModelSettings", "factory"), ("Training", "loss")}
    none = {("NpzData", "labels"), ("Recipe", "source")}
    meant = set()
    for kind in kinds_of(Section):
        for one in fields(kind):
            said = re.search(rf"^    {one.name} +(.*(?:\n     +.*)*)", kind.__doc__ or "", re.MULTILINE)
            if said is not None and re.search(r"\b(files?|folders?|path)\b", said[1]):
                meant.add((kind, one.name))
    assert len(meant) > 8
    for kind, name in meant:
        assert name in kind.paths or (kind.__name__, name) in code | none, f"{kind.__name__}.{name}"
    for name, kind in DATA_KINDS.items():
        assert name in kind.paths or name == "factory"


def kinds_of(kind: type[Section]) -> Iterator[type[Section]]:
    for one in kind.__subclasses__():
        yield one
        yield from kinds_of(one)


def test_a_file_that_is_found_in_the_folder_of_data_is_read_there(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = folder / "data"
    data.mkdir()
    (data / "train.npz").write_text("the other one")
    monkeypatch.setenv("QCOMPRESS_DATA", str(data))
    key = "data.train.npz of the recipe"
    assert named_files(read_recipe(Path("r.yaml"), []))[key] == Path("train.npz")
    Path("train.npz").unlink()
    assert named_files(read_recipe(Path("r.yaml"), []))[key] == data / "train.npz"


@pytest.mark.parametrize("file", [*NAMED.values(), "r.yaml"])
@pytest.mark.parametrize("output", WRITING)
def test_no_output_takes_the_place_of_an_input(run: Run, folder: Path, output: str, file: str) -> None:
    assert "would replace" in refused(run, folder, *WRITING[output], file)


@pytest.mark.parametrize("link", ["symbolic", "hard"])
@pytest.mark.parametrize("file", NAMED.values())
def test_nor_does_a_link_to_it(run: Run, folder: Path, file: str, link: str) -> None:
    other = folder / "link"
    if link == "symbolic":
        other.symlink_to(folder / file)
    else:
        other.hardlink_to(folder / file)
    for output in WRITING:
        assert "would replace" in refused(run, folder, *WRITING[output], "link")


def test_a_report_takes_no_place_of_an_input(run: Run, folder: Path) -> None:
    """`a.report.json` follows from -o, and a recipe's data may lie there."""
    Path("train.npz").rename("o.report.json")
    text = RECIPE.replace("train.npz", "o.report.json")
    Path("r.yaml").write_text(text)
    for command in ("quantize", "finetune-reg"):
        line = refused(run, folder, command, "m.safetensors", *LIVE, "-o", "o.safetensors")
        assert "the report would replace data.train.npz of the recipe" in line


def test_a_folder_of_output_swallows_no_input_that_a_link_leads_to(run: Run, folder: Path) -> None:
    """A class of images that is a link into the folder which is to be replaced."""
    Path("out/dog").mkdir(parents=True)
    Path("out/dog/one.png").write_text("a dog")
    Path("images/dog").symlink_to(folder / "out" / "dog")
    Path("network").mkdir()
    Path("m.safetensors").rename("network/model.safetensors")
    before = files_under(folder)
    ran = run("quantize", "network", *LIVE, "-o", "out")
    assert ran.code == 3 and "-o would replace data.calibration.images of the recipe" in ran.err
    assert files_under(folder) == before
