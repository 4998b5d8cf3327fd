"""These tests walk the imports: which room uses which, in one direction, and what no module does."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from qcompress.registry import EXPORTERS, METHODS

PACKAGE = Path(__file__).parent.parent / "qcompress"
FILES = sorted(PACKAGE.rglob("*.py"))

MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "types": {"errors"},
    "registry": {"types"},
    "recipe": {"errors", "types", "registry"},
    "coding": {"errors", "types"},
    "coding.unbounded": {"types", "coding"},
    "checkpoint": {"errors", "types", "coding"},
    "artifact": {"errors", "types", "coding", "coding.unbounded", "checkpoint"},
    "plan": {"errors", "types", "registry", "recipe", "checkpoint", "artifact"},
    "data": {"errors", "types"},
    "model": {"errors", "types", "coding", "data"},
    "solvers": {"types", "coding", "coding.unbounded"},
    "clustering": {"types", "registry", "coding"},
    "calibration": {"types", "checkpoint", "model"},
    "regularizers": {"errors", "registry", "coding"},
    "training": {"errors", "types", "registry", "checkpoint", "plan", "data", "model", "calibration", "regularizers"},
    "methods": {"errors", "types", "registry", "coding", "model", "solvers", "clustering", "calibration", "training"},
    "methods.rd": {"types", "registry", "coding", "coding.unbounded", "data", "model", "solvers", "calibration"},
    "methods.pdquant": {"errors", "types", "registry", "coding", "model", "solvers", "calibration"},
    "exporters": {"errors", "types", "coding", "checkpoint", "artifact", "plan"},
    "runtime": {"types", "coding", "artifact", "model"},
    "report": {"errors", "types", "coding", "checkpoint", "artifact", "plan"},
    "report.html": {"errors", "types", "plan", "report"},
    "encode": {
        *("errors", "types", "registry", "coding", "coding.unbounded", "checkpoint", "artifact", "plan"),
        *("clustering", "report"),
    },
    "budget": {
        *("errors", "types", "registry", "recipe", "coding", "checkpoint", "artifact", "plan", "data", "model"),
        *("solvers", "report", "encode"),
    },
    "compress": {
        *("errors", "types", "registry", "recipe", "coding", "checkpoint", "artifact", "plan", "data", "model"),
        *("calibration", "training", "methods", "exporters", "runtime", "report", "encode", "budget"),
    },
    "__init__": {"types", "compress"},
    "transformers": {"data", "runtime"},
    "demo": {"errors", "checkpoint", "report", "compress"},
    "cli": {
        *("errors", "types", "registry", "recipe", "checkpoint", "artifact", "plan", "data"),
        *("exporters", "report", "report.html", "budget", "compress", "demo"),
    },
    "__main__": {"cli"},
}
"""Every room from the bottom of the house to the top, and the rooms below it that it uses."""

ONLY_IN = {
    "yaml": ("recipe",),
    "rich": ("cli", "report/render.py"),
    "typer": ("cli",),
    "click": ("cli",),
    "safetensors": ("checkpoint", "artifact", "exporters"),
    "constriction": ("coding/ans.py",),
    "numba": ("coding/compiled.py",),
    "zstandard": ("coding/frames.py",),
    "pickle": (),
    "marshal": (),
    "shelve": (),
    "jinja2": ("report/html/render_html.py",),
}

LOADS_BY_NAME = {
    "cli/export.py",
    "compress/apply_plan.py",
    "data/user_code.py",
    "encode/encode_weight.py",
    "recipe/__init__.py",
    "registry/__init__.py",
    "registry/contract.py",
    "regularizers/penalty.py",
}
"""Modules that load others by a name: what the registry and recipes name."""
BY_NAME = {"importlib.import_module", "sys.modules", "qcompress.registry.load", "qcompress.registry.contract.load"}

FORBIDDEN_CALLS = {"eval", "exec", "print", "compile", "__import__", "breakpoint", "input"}


def room_of(path: Path) -> str:
    """The folder of a file, dotted; of the few modules at the top, their own name."""
    folder = path.relative_to(PACKAGE).parent
    return ".".join(folder.parts) or path.stem


def room_of_module(name: str) -> str:
    """The room of a module, or of a name that a module holds, as an import spells it."""
    path = PACKAGE.joinpath(*name.split(".")[1:])
    while not (path.is_dir() or path.with_suffix(".py").is_file()):
        path = path.parent
    if path == PACKAGE:
        return "__init__"
    return room_of(path / "__init__.py" if path.is_dir() else path.with_suffix(".py"))


def imports(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Every imported module by its full name, within functions too, and its line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            module = node.module or ""
            yield from ((f"{module}.{alias.name}", node.lineno) for alias in node.names)


def module_of(path: Path) -> str:
    """The name under which a file is imported; a package's is that of its folder."""
    parts = ("qcompress", *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def relative(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def test_every_room_has_a_row_and_uses_only_rooms_below_it() -> None:
    """The table is the order: so there is no circle, and no room that uses everything without saying so."""
    assert {room_of(path) for path in FILES} == set(MAY_IMPORT)
    assert len(MAY_IMPORT) <= 31
    order = list(MAY_IMPORT)
    for index, (room, used) in enumerate(MAY_IMPORT.items()):
        assert used <= set(order[:index]), f"{room} uses rooms above it"


def test_nothing_lies_loose_at_the_top() -> None:
    assert {path.stem for path in PACKAGE.glob("*.py")} == {"__init__", "__main__", "errors", "transformers"}


def test_rooms_import_what_the_table_says() -> None:
    found: dict[str, set[str]] = {room: set() for room in MAY_IMPORT}
    for path in FILES:
        room = room_of(path)
        for name, line in imports(parse(path)):
            if name.split(".")[0] == "qcompress":
                other = room_of_module(name)
                assert other in MAY_IMPORT[room] | {room}, f"{relative(path)}:{line}: {room} imports {other}"
                found[room].add(other)
    assert {room: used - {room} for room, used in found.items()} == MAY_IMPORT, "the table names what nothing imports"


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_libraries_are_imported_where_they_belong(path: Path) -> None:
    for name, line in imports(parse(path)):
        homes = ONLY_IN.get(name.split(".")[0])
        at_home = homes is None or any(
            relative(path) == home or relative(path).startswith(f"{home}/") for home in homes
        )
        assert at_home, f"{relative(path)}:{line}: imports {name}"


def test_modules_import_one_another_in_one_direction() -> None:
    names = {module_of(path): path for path in FILES}
    graph = {
        module: {
            name if name in names else name.rpartition(".")[0]
            for name, _ in imports(parse(path))
            if name in names or name.rpartition(".")[0] in names
        }
        - {module}
        for module, path in names.items()
    }
    TopologicalSorter(graph).prepare()


@pytest.mark.parametrize("path", sorted((PACKAGE / "methods").rglob("*.py")), ids=relative)
def test_methods_do_not_import_one_another(path: Path) -> None:
    """A method that is a package imports its own parts."""
    folder = path.parent.name
    own = () if folder == "methods" else (f"qcompress.methods.{folder}.",)
    ours = [name for name, _ in imports(parse(path)) if name.startswith("qcompress.methods")]
    assert not [name for name in ours if not name.startswith(own)]


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_modules_are_loaded_by_name_in_few_places(path: Path) -> None:
    """Elsewhere they are imported, so that the table of rooms sees them."""
    tree = parse(path)
    found = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    loads = {name for name in found if name in ("importlib.import_module", "sys.modules")}
    loads |= {name for name in found if name.endswith((".load_encode", ".load_fit"))}
    loads |= {name for name, _ in imports(tree) if name in BY_NAME}
    assert not loads or relative(path) in LOADS_BY_NAME, f"{relative(path)}: {sorted(loads)}"


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
    forbidden = {"torch.load", "yaml.load", "os.system", *(f"builtins.{name}" for name in FORBIDDEN_CALLS)}
    assert not forbidden & {name for name, _ in imports(parse(path))}


def test_the_registry_and_the_folder_of_methods_agree() -> None:
    folder = PACKAGE / "methods"
    files = {path.stem for path in folder.glob("*.py")} | {path.parent.name for path in folder.glob("*/__init__.py")}
    files -= {"__init__"}
    assert {(method.module or name).rpartition(".")[2] for name, method in METHODS.items()} == files
    for name, method in METHODS.items():
        assert method.name == name
        assert method.encodes or method.fits
        assert not method.encodes or callable(method.load_encode())
        assert not method.fits or callable(method.load_fit())


def test_the_registry_and_the_folder_of_exporters_agree() -> None:
    """What is no exporter there is imported by one, or writes what they plan."""
    files = {path.stem: path for path in (PACKAGE / "exporters").glob("*.py") if path.stem != "__init__"}
    built = {name: exporter for name, exporter in EXPORTERS.items() if exporter.target}
    members = {exporter.target.split(":")[0].rsplit(".", 1)[1] for exporter in built.values()}
    reached, waiting = set[str](), {*members, "write_export"}
    while waiting:
        one = waiting.pop()
        reached.add(one)
        found = {
            name.split(".")[2] for name, _ in imports(parse(files[one])) if name.startswith("qcompress.exporters.")
        }
        waiting |= found - reached
    assert reached == set(files)
    for name, exporter in EXPORTERS.items():
        assert exporter.name == name
    for exporter in built.values():
        assert callable(exporter.load())


TORCH_FREE = [
    "cli",
    "cli.app",
    "cli.report",
    "cli.run",
    "cli.verify",
    "artifact.reader",
    "artifact.writer",
    "checkpoint.checkpoint",
    "plan.allocate",
    "plan.files",
    "plan.plan",
    "plan.plan_json",
    "recipe",
    "registry",
    "report.gather",
    "report.html.render_html",
    "report.render",
    "types.encoded",
    "types.run",
]


def test_what_torch_free_commands_import_leaves_torch_out() -> None:
    lines = [f"import qcompress.{name}\nassert 'torch' not in sys.modules, 'qcompress.{name}'" for name in TORCH_FREE]
    names = "import qcompress.recipe as r\n[getattr(r, name) for name in r.__all__]\nassert 'torch' not in sys.modules"
    program = "\n".join(["import sys", *lines, names])
    done = subprocess.run([sys.executable, "-c", program], cwd=PACKAGE.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_way_without_data_loads_no_model() -> None:
    """What compresses a bare checkpoint imports no live model, data or training, nor what torch.fx traces with."""
    program = (
        "import sys, qcompress.compress.compress\n"
        "rooms = ('model', 'data', 'training')\n"
        "loaded = [n for n in sys.modules if n.startswith(tuple(f'qcompress.{room}' for room in rooms))]\n"
        "assert not loaded, loaded\n"
        "assert 'sympy' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=PACKAGE.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
