"""Who imports whom, and what no module does: DESIGN's table, walked."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from qcompress.registry import EXPORTERS, METHODS

PACKAGE = Path(__file__).parent.parent / "qcompress"
FILES = sorted(PACKAGE.rglob("*.py"))

NOUNS = {"encoded", "errors", "settings", "types"}
KNOWN = NOUNS | {"registry"}
SHOWN = KNOWN | {"coding", "artifact", "checkpoint", "container"}
ALL = SHOWN | {
    *("recipe", "plan", "options", "solvers", "methods", "exporters", "report", "model", "training", "regularizers"),
}
VERBS = (
    *("allocate", "audit", "books", "calibrate", "compress", "demo", "evaluate", "finetune", "fit", "halves"),
    *("journal", "limit", "load", "minimize", "preflight", "probe", "rate"),
    *("representatives", "sensitivity", "shard_writer", "shards", "tune", "worker"),
)

MAY_IMPORT = {
    "errors": set(),
    "settings": set(),
    "types": {"settings"},
    "encoded": {"types"},
    "registry": NOUNS,
    "container": NOUNS,
    "recipe": KNOWN,
    "plan": KNOWN,
    "options": {"coding"},
    "coding": NOUNS,
    "checkpoint": NOUNS | {"coding", "container"},
    "artifact": NOUNS | {"coding", "container"},
    "regularizers": KNOWN,
    "model": KNOWN | {"coding", "checkpoint", "container", "regularizers"},
    "training": KNOWN | {"coding", "checkpoint", "model", "regularizers"},
    "solvers": NOUNS | {"coding"},
    "methods": KNOWN | {"coding", "solvers", "model", "training"},
    "exporters": SHOWN,
    "report": SHOWN,
    **{verb: ALL | set(VERBS) for verb in VERBS},
    "cli": ALL | set(VERBS),
    "__init__": {"load"},
    "__main__": {"cli"},
}

ONLY_IN = {
    "yaml": ("recipe",),
    "rich": ("cli", "report/render_table.py"),
    "typer": ("cli",),
    "click": ("cli",),
    "safetensors": ("checkpoint.py", "artifact", "exporters"),
    "constriction": ("coding/ans.py",),
    "zstandard": ("coding/zstd.py",),
    "pickle": (),
    "marshal": (),
    "shelve": (),
    "jinja2": ("report/render_html.py",),
}

FORBIDDEN_CALLS = {"eval", "exec", "print", "compile", "__import__", "breakpoint", "input"}


def part_of(path: Path) -> str:
    """The folder or the module that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Every imported module by its full name, within functions too, and its line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            module = node.module or ""
            yield from ((f"{module}.{alias.name}", node.lineno) for alias in node.names)


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def relative(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_imports_follow_the_table(path: Path) -> None:
    part = part_of(path)
    assert part in MAY_IMPORT, f"{part} is not in the table"
    allowed = MAY_IMPORT[part] | {part}
    for name, line in imports(parse(path)):
        top, *rest = name.split(".")
        ours = rest[0] if top == "qcompress" and rest else ""
        if ours and not (ours.startswith("__") or ours in ("load_state_dict", "load_into")):
            assert ours in allowed, f"{relative(path)}:{line}: {part} imports {ours}"
        homes = ONLY_IN.get(top)
        at_home = homes is None or any(relative(path) == home or part == home for home in homes)
        assert at_home, f"{relative(path)}:{line}: imports {top}"


@pytest.mark.parametrize("path", sorted((PACKAGE / "methods").rglob("*.py")), ids=relative)
def test_methods_do_not_import_one_another(path: Path) -> None:
    """A method that is a package imports its own parts."""
    folder = path.parent.name
    own = () if folder == "methods" else (f"qcompress.methods.{folder}.",)
    ours = [name for name, _ in imports(parse(path)) if name.startswith("qcompress.methods")]
    assert not [name for name in ours if not name.startswith(own)]


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_nothing_evaluates_unpickles_or_prints(path: Path) -> None:
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            assert name not in FORBIDDEN_CALLS | {"torch.load", "yaml.load", "os.system"}, (
                f"{relative(path)}:{node.lineno}: {name}"
            )
        if isinstance(node, ast.keyword) and node.arg in ("shell", "allow_pickle", "trust_remote_code"):
            assert isinstance(node.value, ast.Constant) and node.value.value is False


def test_the_registry_and_the_folder_of_methods_agree() -> None:
    folder = PACKAGE / "methods"
    files = {path.stem for path in folder.glob("*.py")} | {path.parent.name for path in folder.glob("*/__init__.py")}
    files -= {"__init__"}
    assert {method.target.split(":")[0].rsplit(".", 1)[1] for method in METHODS.values()} == files
    for name, method in METHODS.items():
        assert method.name == name
        assert callable(method.load())


def test_the_registry_and_the_folder_of_exporters_agree() -> None:
    files = {path.stem for path in (PACKAGE / "exporters").glob("*.py")} - {"__init__"}
    built = {name: exporter for name, exporter in EXPORTERS.items() if exporter.target}
    assert {exporter.target.split(":")[0].rsplit(".", 1)[1] for exporter in built.values()} == files
    for name, exporter in EXPORTERS.items():
        assert exporter.name == name
    for exporter in built.values():
        assert callable(exporter.load())


TORCH_FREE = [
    "cli",
    "cli.app",
    "cli.plan",
    "cli.report",
    "cli.verify",
    "artifact.reader",
    "artifact.staging",
    "artifact.writer",
    "checkpoint",
    "encoded",
    "limit",
    "options",
    "plan",
    "recipe",
    "registry",
    "report.gather",
    "report.render",
    "shards",
]


def test_what_torch_free_commands_import_leaves_torch_out() -> None:
    lines = [f"import qcompress.{name}\nassert 'torch' not in sys.modules, 'qcompress.{name}'" for name in TORCH_FREE]
    names = "import qcompress.recipe as r\n[getattr(r, name) for name in r.__all__]\nassert 'torch' not in sys.modules"
    program = "\n".join(["import sys", *lines, names])
    done = subprocess.run([sys.executable, "-c", program], cwd=PACKAGE.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
