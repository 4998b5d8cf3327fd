"""Rows: what makes a figure of the pages, and the line of JSON that one run of it left in benchmarks/rows."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml

ROOT = Path(__file__).resolve().parents[1]
FOLDER = Path(__file__).with_name("rows")

Status = Literal["current", "changed", "missing"]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measurement: commands that run one after another, and where its figures stand in the JSON that they print.

    name       of the row; its first part names the file in benchmarks/rows
    commands   as one would type them in the checkout; `$QCOMPRESS_DATA` is the folder of networks and data, `$WORK` the
               folder of what is made, `$OUT` the file there that is the row's own, `$PEERS` and the like interpreters
    figures    figure -> command and way through what it prints: "0.accuracy.top1.artifact"
    seconds    of processor time that it takes, about
    needs      rows whose `$OUT` the commands read
    tolerance  share by which figures of a second run may differ: above 0 where they are times
    """

    name: str
    commands: tuple[str, ...]
    figures: Mapping[str, str]
    seconds: float
    needs: tuple[str, ...] = ()
    tolerance: float = 0.0

    @property
    def group(self) -> str:
        return self.name.partition("/")[0]

    @property
    def peers(self) -> set[str]:
        """The variables of interpreters that the commands name."""
        named = {name for command in self.commands for name in re.findall(r"\$([A-Z_]+)", command)}
        return named - {"QCOMPRESS_DATA", "WORK", "OUT"}


@dataclass(frozen=True, kw_only=True)
class Line:
    """What a run of a row left.

    definition         hash of the row as it was defined: commands, figures, recipes, and the same of what it needs
    recipe_sha256      of the resolved recipe, None where there is none
    artifact_sha256    of the file that the row wrote, None where it writes none
    weights_sha256     of the weights that this artifact decodes to; it outlives a change of the format
    commit             of the code that ran
    cpu_seconds        of each command, imports included; of its last process alone where it went on from a saved state
    peak_memory_bytes  the largest resident size of each
    machine            kind of processor, which may decide the last bit of a sum
    """

    row: str
    definition: str
    commands: tuple[str, ...]
    recipe_sha256: str | None
    artifact_sha256: str | None
    weights_sha256: str | None
    commit: str
    figures: Mapping[str, Any]
    cpu_seconds: tuple[float, ...]
    peak_memory_bytes: tuple[int, ...]
    versions: Mapping[str, str]
    machine: str

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def parse_line(text: str) -> Line:
    """Raises TypeError where a key is unknown or absent."""
    read = json.loads(text)
    return Line(**{key: tuple(value) if isinstance(value, list) else value for key, value in read.items()})


def look_up(found: Any, keys: Sequence[str]) -> Any:
    """What stands behind these keys in JSON, of a list of figures the one of that name; None where nothing stands."""
    for key in keys:
        if isinstance(found, list | tuple) and key.isdigit():
            found = found[int(key)] if int(key) < len(found) else None
        elif isinstance(found, list | tuple):
            found = next((one for one in found if key in (one.get("metric"), one.get("name"))), None)
        else:
            found = found.get(key) if isinstance(found, dict) else None
    return found


def work_file(name: str) -> str:
    """The file in the work folder that a row writes."""
    return f"$WORK/{name.replace('/', '_')}.safetensors"


def definition(row: Row, rows: Mapping[str, Row]) -> str:
    """The hash that a line must have to be the row's: of all that says what is run and read."""
    recipes = {
        word: parse_recipe(ROOT / word)
        for command in row.commands
        for word in command.split()
        if word.endswith(".yaml") and not word.startswith("$")
    }
    needs = [definition(rows[name], rows) for name in row.needs]
    told = json.dumps([row.commands, dict(row.figures), recipes, needs], sort_keys=True)
    return hashlib.sha256(told.encode()).hexdigest()[:16]


@cache
def parse_recipe(path: Path) -> Any:
    """A recipe without its comments."""
    return yaml.safe_load(path.read_text(encoding="utf-8"))


class Ledger:
    """The lines that lie in a folder, one file a group; rows and their files keep the order of the definitions."""

    def __init__(self, rows: Iterable[Row], folder: Path = FOLDER) -> None:
        self.rows = {row.name: row for row in rows}
        self.folder = folder
        self.lines: dict[str, Line] = {}
        for path in sorted(folder.glob("*.jsonl")):
            if path.name != "old.jsonl":
                lines = (parse_line(text) for text in path.read_text(encoding="utf-8").splitlines())
                self.lines |= {line.row: line for line in lines}

    def status(self, name: str) -> Status:
        """Whether the row has a line, and whether it was run as it is defined now."""
        if name not in self.lines:
            return "missing"
        return "current" if self.lines[name].definition == definition(self.rows[name], self.rows) else "changed"

    def put(self, line: Line) -> None:
        """Take a line in place of the row's earlier one, and write its group's file."""
        self.lines[line.row] = line
        group = self.rows[line.row].group
        lines = [
            self.lines[row.name].to_json()
            for row in self.rows.values()
            if row.group == group and row.name in self.lines
        ]
        self.folder.mkdir(exist_ok=True, parents=True)
        target = self.folder / f"{group}.jsonl"
        made = target.with_suffix(".part")
        made.write_text("\n".join(lines) + "\n", encoding="utf-8")
        made.replace(target)
