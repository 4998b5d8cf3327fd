"""These tests hold the documents against the program: sessions run, options and methods are there, links lead on."""

from __future__ import annotations

import ast
import importlib.util
import os
import pkgutil
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import ROOT, Ran, Run, Tensors, package_or_skip, process_environment, write_checkpoint
from exporters.networks import LLAMA, llama_tensors, save_network
from typer.main import get_command

from qcompress.cli.app import app
from qcompress.compress.check_export import CONSUMERS
from qcompress.recipe import parse_recipe
from qcompress.registry import EXPORTERS, METHODS
from qcompress.registry.regularizers import REGULARIZERS

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
CLI = (ROOT / "docs" / "cli.md").read_text()
CI = (ROOT / "docs" / "ci.md").read_text()

NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?")
SHELL_SIGNS = re.compile(r"[|&;<>$()*]")


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


@dataclass
class Step:
    """One command of a session and the lines that the document shows for it."""

    command: str
    shown: list[str] = field(default_factory=list)


def steps_of(text: str) -> list[Step]:
    steps: list[Step] = []
    for line in "\n".join(blocks(text, "console")).splitlines():
        if line.startswith("$ "):
            steps.append(Step(line[2:]))
        elif line.strip() and line != "...":
            steps[-1].shown.append(line)
    return steps


def resnet20() -> Tensors:
    """The names and shapes of the network of README's sessions; other weights."""
    random = np.random.default_rng(0)
    tensors: Tensors = {}

    def add(name: str, *shape: int) -> None:
        tensors[name] = (0.05 * random.standard_normal(shape)).astype(np.float32)

    def add_norm(name: str, channels: int) -> None:
        for part in ("weight", "bias", "running_mean", "running_var"):
            add(f"{name}.{part}", channels)

    add("conv1.weight", 16, 3, 3, 3)
    add_norm("bn1", 16)
    inner = 16
    for layer, outer in enumerate((16, 32, 64), start=1):
        for block in range(3):
            for number, channels in enumerate((inner, outer), start=1):
                add(f"layer{layer}.{block}.conv{number}.weight", outer, channels, 3, 3)
                add_norm(f"layer{layer}.{block}.bn{number}", outer)
            inner = outer
    add("linear.weight", 10, 64)
    add("linear.bias", 10)
    return tensors


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("network") / "model.safetensors", resnet20())


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the shapes of the Llama of deploy.md's sessions; weights by chance."""
    sizes = {"vocab_size": 1024, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 8}
    config = {**LLAMA, **sizes, **heads, "tie_word_embeddings": True, "dtype": "float32"}
    return save_network(tmp_path_factory.mktemp("llama") / "llama", config, llama_tensors(config))


def shape_of(line: str) -> str:
    """A line without its figures, units and spacing."""
    return re.sub(r"\s+", " ", re.sub(r" (?:[KM]?B)\b|%", "", NUMBER.sub("#", line))).strip(" .")


def figures_of(line: str) -> list[float]:
    return [float(number.replace(",", "")) for number in NUMBER.findall(line)]


def alike(shown: str, printed: str, figures: bool) -> bool:
    """Whether two lines say the same; with `figures` the same numbers too, but for what another machine may change."""
    if shown.endswith("..."):
        return shape_of(printed).startswith(shape_of(shown))
    if shape_of(shown) != shape_of(printed):
        return False
    return not figures or np.allclose(figures_of(shown), figures_of(printed), rtol=0.02, atol=0.1)


def assert_shown(step: Step, ran: Ran, figures: bool) -> None:
    """Every line that the document shows was printed, in that order."""
    printed: Iterator[str] = iter([*ran.out.splitlines(), *ran.err.splitlines()])
    for shown in step.shown:
        assert any(alike(shown, line, figures) for line in printed), f"{step.command}: not printed: {shown}"


def skip_without_consumer(words: list[str]) -> None:
    """Skip a session whose exports nothing that is installed here can check."""
    if "--check" in words:
        for package in CONSUMERS[words[words.index("--to") + 1]][0]:
            package_or_skip("mlx.core" if package == "mlx" else package)


def run_session(text: str, folder: Path, run: Run, shell: Callable[..., Ran], figures: bool) -> None:
    """Run the sessions of a document. Every command succeeds, unless what it shows or `echo $?` says otherwise."""
    recipes = [block for block in blocks(text, "yaml") if block.startswith("version: 1")]
    if recipes:
        (folder / "recipe.yaml").write_text(recipes[-1])
    code = 0
    for step in steps_of(text):
        if step.command == "echo $?":
            assert step.shown == [str(code)]
            continue
        if SHELL_SIGNS.search(step.command):
            ran = shell(step.command, folder)
        else:
            words = shlex.split(step.command)
            assert words[0] == "qcompress"
            skip_without_consumer(words)
            ran = run(*words[1:])
        code = ran.code
        assert (code != 0) == any(line.startswith("error: ") for line in step.shown), (step.command, ran.err)
        assert_shown(step, ran, figures)


def run_python(text: str, folder: Path) -> None:
    """Run the blocks of Python of a document, each in a process of its own, in the folder of its sessions."""
    for block in blocks(text, "python"):
        if "from transformers" in block:
            package_or_skip("transformers")
        words = [sys.executable, "-c", block]
        done = subprocess.run(words, cwd=folder, env=process_environment(), capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr


SESSIONS = {path.name: path.read_text() for path in DOCUMENTS if steps_of(path.read_text())}
"""What is run in one folder, by its name: a document, or one section of the page whose sections are of many tools."""
for section in re.split(r"^## ", SESSIONS.pop("deploy.md"), flags=re.MULTILINE)[1:]:
    if steps_of(section):
        SESSIONS[f"deploy.md, {section.splitlines()[0]}"] = section


@pytest.mark.parametrize("name", SESSIONS)
def test_sessions_run_as_shown(
    name: str,
    network: Path,
    llama: Path,
    tmp_path: Path,
    run: Run,
    shell: Callable[..., Ran],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "session"
    folder.mkdir()
    (folder / "model.safetensors").symlink_to(network)
    (folder / "llama").symlink_to(llama)
    (folder / "recipes").symlink_to(ROOT / "recipes")
    pixels = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), np.uint8)
    np.savez(folder / "images.npz", x=pixels, y=np.arange(20) % 10)
    monkeypatch.chdir(folder)
    run_session(SESSIONS[name], folder, run, shell, figures=False)
    if name.startswith("deploy.md"):
        run_python(SESSIONS[name], folder)


@pytest.mark.slow
def test_the_figures_of_the_readme(
    tmp_path: Path, run: Run, shell: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = os.environ.get("QCOMPRESS_DATA")
    if not data:
        pytest.skip("QCOMPRESS_DATA is not set: README's network is not here")
    folder = tmp_path / "session"
    folder.mkdir()
    (folder / "model.safetensors").symlink_to(Path(data).resolve() / "cifar10" / "resnet20.safetensors")
    monkeypatch.chdir(folder)
    run_session((ROOT / "README.md").read_text(), folder, run, shell, figures=True)


def commands() -> dict[str, Any]:
    """Every command by its words, the program itself included."""
    root: Any = get_command(app)
    found = {"qcompress": root}
    for name, command in root.commands.items():
        inner = getattr(command, "commands", None)
        if inner is None:
            found[f"qcompress {name}"] = command
        else:
            found |= {f"qcompress {name} {part}": sub for part, sub in inner.items()}
    return found


COMMANDS = commands()


def section_of(words: str) -> str:
    sections = re.findall(rf"^## {words}(?: [A-Z\[][^\n]*)?\n(.*?)(?=^## |\Z)", CLI, re.DOTALL | re.MULTILINE)
    assert len(sections) == 1, f"docs/cli.md needs one section: ## {words}"
    return str(sections[0])


def options_of(command: Any) -> list[Any]:
    """Its options, but for those of every command."""
    return [one for one in command.params if one.param_type_name == "option" and "--help" not in one.opts]


@pytest.mark.parametrize("words", COMMANDS)
def test_every_command_has_its_options_described(words: str) -> None:
    cells = re.findall(r"^\| (`-.*?) \| \S.*\|$", section_of(words), re.MULTILINE)
    described = set(re.findall(r"(?<![\w-])(--?[a-z][a-z-]*)", " ".join(cells)))
    options = options_of(COMMANDS[words])
    assert described == {name for option in options for name in (*option.opts, *option.secondary_opts)}


def test_every_variable_is_described() -> None:
    variables = {
        (parameter.envvar, f"`{parameter.opts[0]}`")
        for command in COMMANDS.values()
        for parameter in command.params
        if getattr(parameter, "envvar", None)
    }
    rows = set(re.findall(r"^\| `(QCOMPRESS_\w+)` \| (`--[\w-]+`) \|$", CLI, re.MULTILINE))
    assert rows == variables


def test_every_method_and_format_is_mentioned() -> None:
    readme = (ROOT / "README.md").read_text()
    assert {name for name in METHODS if f"| `{name}` |" not in readme} == set()
    assert {name for name in METHODS if f"`{name}`" not in CLI} == set()
    assert {name for name in EXPORTERS if f"`{name}`" not in CLI} == set()


def anchor_of(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", path.read_text()) if "://" not in link]
    assert {link for link in links if not (path.parent / link.split("#")[0]).exists()} == set()
    for link in links:
        name, _, anchor = link.partition("#")
        if anchor:
            page = (path.parent / name).read_text() if name else path.read_text()
            assert anchor in map(anchor_of, re.findall(r"^#+ (.*)$", page, re.MULTILINE)), link


@pytest.mark.parametrize("path", [*DOCUMENTS, ROOT / "CHANGELOG.md"], ids=lambda path: path.name)
def test_files_and_python_names_that_are_mentioned_exist(path: Path) -> None:
    mentioned = re.findall(r"`((?:qcompress|benchmarks|tests|docs)(?:/[\w.-]+)+|qcompress(?:\.\w+)+)", path.read_text())
    assert {name for name in mentioned if "/" in name and not (ROOT / name).exists()} == set()
    for name in mentioned:
        if "/" not in name:
            pkgutil.resolve_name(name)


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda path: path.name)
def test_benchmarks_import_what_there_is(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "qcompress":
            for alias in node.names:
                pkgutil.resolve_name(f"{node.module}.{alias.name}")


def github_steps() -> list[dict[str, Any]]:
    (job,) = [block for block in blocks(CI, "yaml") if block.startswith("name:")]
    steps: list[dict[str, Any]] = yaml.safe_load(job)["jobs"]["compress"]["steps"]
    return steps


def run_job(shell: Callable[..., Ran], folder: Path) -> tuple[dict[str, int], str]:
    """The exit code of each step that ran, as GitHub runs them, and the step summary."""
    summary = folder / "summary.md"
    summary.touch()
    codes: dict[str, int] = {}
    for step in github_steps():
        wanted = not any(codes.values()) or step.get("if") == "always()"
        if "run" in step and step["name"] != "Install" and wanted:
            ran = shell(f"set -eo pipefail\n{step['run']}", folder, GITHUB_STEP_SUMMARY=str(summary))
            codes[step["name"]] = ran.code
    return codes, summary.read_text()


RECIPE = 'version: 1\nrules: [{match: "*", squant: {bits: BITS}}]\n'


def test_the_github_job(shell: Callable[..., Ran], network: Path, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").symlink_to(network)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.replace("BITS", "2"))
    codes, summary = run_job(shell, tmp_path)
    assert codes == {"Check the recipe": 0, "Compress": 0, "Verify": 0, "Report": 0}
    assert summary.startswith("**small.safetensors**")
    kept = next(step for step in github_steps() if step.get("name") == "Keep")
    assert all((tmp_path / name).exists() for name in kept["with"]["path"].split())

    (tmp_path / "small.report.json").rename(tmp_path / "main.report.json")
    (tmp_path / "small.safetensors").unlink()
    recipe.write_text(RECIPE.replace("BITS", "1"))
    codes, summary = run_job(shell, tmp_path)
    assert codes == {"Check the recipe": 0, "Compress": 4, "Report": 0}
    assert "FAILED min-sqnr" in summary

    compare = next(block for block in blocks(CI, "bash") if block.startswith("qcompress report"))
    ran = shell(compare, tmp_path, GITHUB_STEP_SUMMARY=str(tmp_path / "changes.md"))
    # At 1 bit hardly anything is left of the weights.
    assert ran.code == 0 and all("errors drown" in line for line in ran.err.splitlines())
    assert "changes against A" in (tmp_path / "changes.md").read_text()

    recipe.write_text("version: 1\nruls: []\n")
    (tmp_path / "small.safetensors").unlink()
    codes, _ = run_job(shell, tmp_path)
    assert codes == {"Check the recipe": 3, "Report": 0}


@pytest.mark.slow
def test_the_shell_of_any_other_ci(shell: Callable[..., Ran], network: Path, tmp_path: Path) -> None:
    (script,) = [block for block in blocks(CI, "bash") if block.startswith("code=0")]
    (tmp_path / "model.safetensors").symlink_to(network)
    ran = shell(script, tmp_path)
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.startswith("compressed to model-w3.safetensors\n")
    assert re.search(r"^\d+ bytes, worst layer \S+\.weight$", ran.out, re.MULTILINE)
    # The output is there now, which is exit code 3.
    assert shell(script, tmp_path).out == "failed with 3\n"
    (tmp_path / "model-w3.safetensors").unlink()
    assert "a limit is broken: look at model-w3.report.json" in shell(script.replace("bpw 4", "bpw 1"), tmp_path).out


@pytest.fixture(scope="module")
def tables() -> Any:
    spec = importlib.util.spec_from_file_location("tables", ROOT / "docs" / "tables.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tables_of_the_commands_are_fresh(tables: Any) -> None:
    assert tables.commands_page() == CLI, "run: python docs/tables.py"
    marked = set(re.findall(r"<!-- options of (.*) -->", CLI))
    assert marked == {words for words, command in COMMANDS.items() if options_of(command)}


def test_the_table_of_roles_is_fresh(tables: Any) -> None:
    assert tables.ROLES_PAGE.read_text(encoding="utf-8") == tables.roles_page(), "run: python docs/tables.py"


def test_tables_of_options_are_fresh(tables: Any) -> None:
    pages = tables.pages()
    for path, text in pages.items():
        assert path.read_text(encoding="utf-8") == text, "run: python docs/tables.py"
    marked = set(re.findall(r"<!-- options of (\S+) -->", "".join(pages.values())))
    sections = {"Budget", "Gates", "WrittenFinetune", "augment"}
    assert marked == {*METHODS, *REGULARIZERS, *tables.SHARED, *sections}


def test_recipes_in_the_training_page_are_valid() -> None:
    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```yaml\n(.*?)```", text, flags=re.DOTALL)
    assert blocks
    for block in blocks:
        parse_recipe(block, "docs")


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_prose_is_wrapped(path: Path) -> None:
    """At 120 columns, but for tables, code and what a console showed, which are lines of their own."""
    prose = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)
    long = [line for line in prose.splitlines() if len(line) > 120 and not line.startswith(("|", "    ", "<!--"))]
    assert long == []


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200
