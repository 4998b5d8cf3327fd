"""The figures of the house: rooms, arrows and sizes of the package, and the way that each command takes through it.

    python benchmarks/house.py [--root DIR] [--only WORDS] [--json FILE]

`--root` names another checkout, such as a worktree of an earlier commit. `--json -` prints JSON in place of tables.
Each command runs in a process of its own, on a network with three weights, under the profiler of the interpreter:

functions  functions of ours that ran, each counted once; neither lambdas nor comprehensions
files      our files that they stand in
modules    modules and packages of ours that were imported when the command ended
edges      ordered pairs of our files of which one called the other without anyone in between
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file
from timing import render, show

NAME = "qcompress"
LONG, MANY = 60, 10
"""Lines of a function, and its arguments, above which it is counted."""

COMMANDS = {
    "quantize --bits 2 --dry-run": "quantize m.safetensors --bits 2 --dry-run",
    "quantize --bits 2": "quantize m.safetensors --bits 2",
    "cluster --bits 4": "cluster m.safetensors --bits 4",
    "quantize --bpw 2.5 --method squant": "quantize m.safetensors --bpw 2.5 --method squant",
    "quantize --bpw 2 (rd)": "quantize m.safetensors --bpw 2",
    "quantize -r gptq W4A8": "quantize m.safetensors -r gptq.yaml --allow-code",
    "finetune-reg (dsmm)": "finetune-reg m.safetensors -r dsmm.yaml --allow-code -o trained.safetensors",
    "report artifact": "report artifact.safetensors",
}
BEFORE = {"report artifact": "quantize m.safetensors --bits 2 -o artifact.safetensors"}
"""What must have run, not counted, before a command can."""

NETWORK = """
from torch import nn
import torch.nn.functional as F

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 4)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        return self.fc(F.relu(x + self.bn2(self.conv2(x))).mean((2, 3)))
"""
RECIPE = """
version: 1
model: {factory: net.py:Net}
data:
  calibration: {npz: data.npz, samples: 32, batch_size: 16}
  train: {npz: data.npz, batch_size: 16}
  eval: {npz: data.npz}
task: {classification: {metric: top1}}
"""
GPTQ = RECIPE + 'rules: [{match: "*.weight", gptq: {bits: 4}}]\nactivations: {bits: 8}\n'
DSMM = (
    RECIPE
    + """
finetune:
  epochs: 1
  optimizer: {sgd: {lr: 0.01}}
  regularize: [{match: "*.weight", dsmm: {}}]
"""
)


@dataclass(frozen=True)
class Walk:
    """What one command ran of ours."""

    functions: int
    files: int
    modules: int
    edges: int


class House:
    """The package of a checkout, parsed."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.package = root / NAME
        self.text = {path: path.read_text(encoding="utf-8") for path in sorted(self.package.rglob("*.py"))}
        self.trees = {path: ast.parse(text, str(path)) for path, text in self.text.items()}

    def room(self, path: Path) -> str:
        """The folder of a file, dotted; of a module at the top its own name."""
        return ".".join(path.relative_to(self.package).parent.parts) or path.stem

    @cached_property
    def rooms(self) -> set[str]:
        return {self.room(path) for path in self.text}

    @cached_property
    def imports(self) -> dict[Path, set[Path]]:
        """The other files that each file imports, within functions and for types alone too."""
        modules = {}
        for path in self.text:
            parts = path.relative_to(self.root).with_suffix("").parts
            modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
        found = {}
        for path, tree in self.trees.items():
            names = [name for name in imported_names(tree) if name.split(".")[0] == NAME]
            known = (modules.get(name) or modules.get(name.rpartition(".")[0]) for name in names)
            found[path] = {other for other in known if other is not None} - {path}
        return found

    @cached_property
    def arrows(self) -> set[tuple[str, str]]:
        """Ordered pairs of different rooms of which the first imports the second."""
        pairs = {(self.room(path), self.room(other)) for path, used in self.imports.items() for other in used}
        return {(one, other) for one, other in pairs if one != other}

    def upward(self) -> int | None:
        """How many arrows lead up in the order of this checkout's table; None where the table has other rooms."""
        order = rooms_in_order(self.root / "tests" / "test_architecture.py")
        if set(order) != self.rooms:
            return None
        return sum(order.index(other) > order.index(one) for one, other in self.arrows)

    def functions(self) -> Iterator[tuple[Path, ast.FunctionDef | ast.AsyncFunctionDef]]:
        for path, tree in self.trees.items():
            for node in ast.walk(tree):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    yield path, node

    def figures(self) -> dict[str, int | None]:
        """What the sources tell, by name."""
        many = [path for path, node in self.functions() if count_arguments(node) > MANY]
        words = {path: len(re.findall(r"\bAny\b", text)) for path, text in self.text.items()}
        return {
            "rooms": len(self.rooms),
            "files": len(self.text),
            "lines": sum(len(text.splitlines()) for text in self.text.values()),
            "room arrows": len(self.arrows),
            "upward arrows": self.upward(),
            "file circles": count_circles(self.imports),
            f"functions over {LONG} lines": sum(count_lines(node) > LONG for _, node in self.functions()),
            f"functions with over {MANY} arguments, outside cli": sum(self.room(path) != "cli" for path in many),
            "Any": sum(words.values()),
            "Any, outside model": sum(n for path, n in words.items() if self.room(path).split(".")[0] != "model"),
        }


def imported_names(tree: ast.AST) -> Iterator[str]:
    """Every imported name in full: the module, or the module and what is taken from it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def rooms_in_order(tests: Path) -> list[str]:
    """The keys of `MAY_IMPORT` that are spelt out, the lowest room first."""
    for node in ast.parse(tests.read_text(encoding="utf-8")).body:
        if not isinstance(node, ast.Assign | ast.AnnAssign) or not isinstance(node.value, ast.Dict):
            continue
        target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
        if ast.unparse(target) == "MAY_IMPORT":
            return [str(key.value) for key in node.value.keys if isinstance(key, ast.Constant)]
    raise SystemExit(f"{tests}: has no MAY_IMPORT")


def count_circles(graph: Mapping[Path, set[Path]]) -> int:
    """How many groups of files there are that all lead to one another."""

    def reached_from(start: Path) -> set[Path]:
        found: set[Path] = set()
        ahead = [start]
        while ahead:
            new = graph[ahead.pop()] - found
            found |= new
            ahead.extend(new)
        return found

    reached = {path: reached_from(path) for path in graph}
    return len(
        {frozenset(one for one in found if path in reached[one]) for path, found in reached.items() if path in found}
    )


def count_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def count_arguments(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """The arguments of a function but for the object or class that a method is called on."""
    every = node.args
    named = [one.arg for one in (*every.posonlyargs, *every.args, *every.kwonlyargs)]
    return len([name for name in named if name not in ("self", "cls")]) + bool(every.vararg) + bool(every.kwarg)


def write_inputs(folder: Path) -> None:
    """A checkpoint with three weights, its network, 64 images and the recipes, all in the folder."""
    random = np.random.default_rng(0)

    def normal(*shape: int) -> NDArray[np.float32]:
        return (0.2 * random.standard_normal(shape)).astype(np.float32)

    tensors: dict[str, NDArray[Any]] = {"conv1.weight": normal(8, 3, 3, 3), "conv2.weight": normal(8, 8, 3, 3)}
    tensors |= {"fc.weight": normal(4, 8), "fc.bias": normal(4)}
    for name in ("bn1", "bn2"):
        tensors |= {f"{name}.{part}": normal(8) for part in ("bias", "running_mean")}
        tensors |= {f"{name}.{part}": 1 + normal(8) ** 2 for part in ("weight", "running_var")}
        tensors[f"{name}.num_batches_tracked"] = np.array(9)
    save_file(tensors, folder / "m.safetensors", metadata={"format": "pt"})
    pixels = random.integers(0, 256, size=(64, 8, 8, 3)).astype(np.uint8)
    np.savez(folder / "data.npz", x=pixels, y=random.integers(4, size=64))
    (folder / "net.py").write_text(NETWORK)
    (folder / "gptq.yaml").write_text(GPTQ)
    (folder / "dsmm.yaml").write_text(DSMM)


def walk(root: Path, name: str) -> Walk:
    """The figures of one command, run in a folder and a process of its own."""
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        write_inputs(folder)
        if name in BEFORE:
            run_process([sys.executable, "-m", NAME, *BEFORE[name].split()], root, folder)
        kept = folder / "walk.json"
        run_process(
            [sys.executable, __file__, "--walk-to", str(kept), "--root", str(root), "--only", name], root, folder
        )
        return Walk(**json.loads(kept.read_text()))


def run_process(command: list[str], root: Path, folder: Path) -> None:
    """Run a command with the checkout's package in the folder. Exits where it fails."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("QCOMPRESS_")}
    environment |= {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: exit {done.returncode}\n{done.stderr}")


def walk_here(root: Path, words: list[str]) -> Walk:
    """The figures of a command that runs in this process. Exits where the command fails."""
    from qcompress.cli.app import run

    package = f"{root / NAME}{os.sep}"
    ran: set[CodeType] = set()
    edges: set[tuple[str, str]] = set()

    def note(frame: FrameType, event: str, _argument: object) -> None:
        code = frame.f_code
        if event != "call" or not code.co_filename.startswith(package):
            return
        ran.add(code)
        caller = frame.f_back
        if caller is not None and caller.f_code.co_filename.startswith(package):
            edges.add((caller.f_code.co_filename, code.co_filename))

    with profiled(note):
        code = run(words)
    if code:
        raise SystemExit(code)
    functions = [one for one in ran if is_function(one)]
    return Walk(
        functions=len(functions),
        files=len({one.co_filename for one in functions}),
        modules=sum(name.split(".")[0] == NAME for name in sys.modules),
        edges=sum(caller != called for caller, called in edges),
    )


class profiled:
    """While it is entered, every call in every thread that begins meanwhile is told to `note`."""

    def __init__(self, note: Callable[[FrameType, str, object], None]) -> None:
        self.note = note

    def __enter__(self) -> None:
        threading.setprofile(self.note)
        sys.setprofile(self.note)

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)
        threading.setprofile(None)


def is_function(code: CodeType) -> bool:
    """Whether it is the code of a function with a name, not of a module, a class, a lambda or a comprehension."""
    # Only functions have fast locals; what the compiler names itself begins with "<".
    return bool(code.co_flags & 1) and not code.co_name.startswith("<")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path(__file__).parents[1])
    parser.add_argument("--only", default="", help="commands whose names hold these words")
    parser.add_argument("--json", help="a file to write, or -")
    parser.add_argument("--walk-to", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    root = arguments.root.resolve()
    if arguments.walk_to:
        found = walk_here(root, COMMANDS[arguments.only].split())
        arguments.walk_to.write_text(json.dumps(asdict(found)))
        return
    figures = House(root).figures()
    walks = [{"command": name, **asdict(walk(root, name))} for name in COMMANDS if arguments.only in name]
    tables = [
        render([{"figure": name, "": value} for name, value in figures.items()]),
        *([render(walks)] if walks else []),
    ]
    show({"house": figures, "walks": walks}, "\n\n".join(tables), arguments.json)


if __name__ == "__main__":
    main()
