"""What a recipe needs of the extras is known from its sections, and told before any work."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, Run, process_environment, small_tensors, write_checkpoint
from test_house import PROJECT, normal

from qcompress.compress.check_export import CONSUMERS
from qcompress.data.user_code import EXTRAS
from qcompress.types.data_settings import AUGMENTATIONS, HubData, ImagesData, TextData
from qcompress.types.settings import LIBRARIES, TASKS, ModelSettings

AUGMENTED: dict[str, dict[str, Any]] = {
    "flip": {},
    "crop4": {},
    "random_resized_crop": {"size": 8},
    "color_jitter": {"hue": 0.1},
    "rand_augment": {},
    "mixup": {},
    "cutmix": {},
}
RECIPE = """version: 1
model: {factory: "qcompress.demo:DigitsNet"}
data:
  calibration: {images: images}
  train: {npz: x.npz, augment: [rand_augment, mixup]}
task: {classification: {}}
finetune: {optimizer: {sgd: {lr: 0.1}}, regularize: [{match: "*.weight", l2: {}}]}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("images").mkdir()
    Path("x.npz").touch()
    Path("r.yaml").write_text(RECIPE)
    return tmp_path


def test_every_package_that_is_imported_is_one_that_some_section_needs() -> None:
    """So that none is first found missing in the middle of a run."""
    imported = set()
    for path in (ROOT / "qcompress").rglob("*.py"):
        for call in ast.walk(ast.parse(path.read_text())):
            if isinstance(call, ast.Call) and getattr(call.func, "id", None) == "import_package":
                imported |= {str(one.value).partition(".")[0] for one in call.args if isinstance(one, ast.Constant)}
    sections = (
        *(AUGMENTATIONS[name](**options) for name, options in AUGMENTED.items()),
        *(ModelSettings(factory=f"{name}.models:net") for name in LIBRARIES),
        ImagesData(images="images"),
        HubData(dataset="rows", inputs=("text",), tokenizer="folder"),
        TextData(text="lines", tokenizer="tokenizer.json"),
        *(TASKS[name]() for name in TASKS if name != "factory"),
    )
    needed = {package for section in sections for package in section.packages}
    checking = {package for packages, _ in CONSUMERS.values() for package in packages}
    assert EXTRAS.keys() == needed | checking - {"safetensors"}
    assert imported - {"qcompress", "safetensors"} <= EXTRAS.keys()


def brings(extra: str) -> set[str]:
    """The packages that pyproject.toml names for an extra, as their modules are named."""
    named = PROJECT["optional-dependencies"][extra]
    return {normal(one).replace("-", "_").replace("pillow", "PIL") for one in named}


def test_every_hint_names_an_extra_that_brings_the_package() -> None:
    for package, extra in EXTRAS.items():
        assert package in brings(extra) | {"tokenizers"}, "tokenizers comes with transformers"


@pytest.mark.parametrize("to", [to for to in CONSUMERS if to != "safetensors"])
def test_a_consumer_has_an_extra_of_its_name_with_all_that_checks_its_exports(to: str) -> None:
    assert set(CONSUMERS[to][0]) <= brings(to)


def test_augmentations_need_torchvision_but_for_our_own() -> None:
    needing = {name for name, options in AUGMENTED.items() if AUGMENTATIONS[name](**options).packages}
    assert AUGMENTED.keys() == AUGMENTATIONS.keys()
    assert needing == AUGMENTATIONS.keys() - {"flip", "crop4"}


@pytest.mark.parametrize("more", [(), ("-n",)])
def test_training_tells_what_it_needs_before_it_begins(
    run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch, more: tuple[str, ...]
) -> None:
    """Whether it trains or only says what it would do; what calibration would need is no matter."""
    found = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name in ("torchvision", "PIL") else found(name)
    )
    ran = run("finetune-reg", "-r", "r.yaml", "-o", "t.safetensors", *more)
    assert ran.code == 2
    assert ran.err == "error: torchvision: the package torchvision is not installed; pip install 'qcompress[vision]'\n"


@pytest.mark.parametrize("command", ["recipe check r.yaml", "quantize m.safetensors -r r.yaml -n"])
def test_a_recipe_without_a_network_is_checked_without_torch(folder: Path, command: str) -> None:
    """In a process that has none of the packages."""
    data = "{calibration: {images: images}, train: {npz: x.npz, augment: [mixup]}}"
    Path("r.yaml").write_text(f'version: 1\ndata: {data}\nrules: [{{match: "*", mse: {{bits: 3}}}}]\n')
    write_checkpoint(folder / "m.safetensors", small_tensors())
    script = f"""
import importlib.util, sys
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name in {[*EXTRAS]} else found(name, *rest)
from qcompress.cli.app import run
code = run({command.split()})
assert not {{"torch", *{[*EXTRAS]}}} & sys.modules.keys()
sys.exit(code)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], env=process_environment(), cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 2, done.stderr
    lines = {line for line in done.stderr.splitlines() if line.startswith("error: ")}
    assert lines == {
        f"error: {name}: the package {name} is not installed; pip install 'qcompress[vision]'"
        for name in ("PIL", "torchvision")
    }
