"""Runs the rows of the pages one at a time, and keeps what each gave as a line of benchmarks/rows.

    QCOMPRESS_DATA=data python benchmarks/rows.py list [NAME...]
    QCOMPRESS_DATA=data python benchmarks/rows.py run 'methods/resnet20/*' --work DIR [--peer PEERS=PYTHON]

A name may hold * and ?. A row whose line is of its present definition is skipped, unless --again. The code that runs
must be committed: a line names its commit; --trial runs it as it stands, and keeps nothing. PYTHON is an interpreter
that has the peers (benchmarks/requirements-peers.txt); rows that need one that is not given are skipped.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shlex
import string
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from definitions import ROWS, TABLES
from ledger import ROOT, Ledger, Line, Row, definition, look_up, work_file
from tables import prune_old

CODE = ("qcompress", "recipes", "benchmarks", ":!benchmarks/rows", ":!benchmarks/pages")
"""What a commit must hold of the code for a line to name it."""
PEER_VERSIONS = {
    "PEERS": ("torch", "hqq", "optimum-quanto", "compressed-tensors"),
    "NNCODEC": ("torch", "nncodec"),
    "NUMBA": ("torch", "numba"),
    "LLMCOMPRESSOR": ("torch", "llmcompressor", "transformers", "compressed-tensors"),
    "COREMLTOOLS": ("torch", "coremltools", "scikit-learn"),
}


class RowError(Exception):
    """A row that cannot be run, or whose command failed."""


@dataclass(frozen=True)
class Place:
    """Where rows run: the folder of networks and data, the folder of what is made, interpreters of peers."""

    data: Path
    work: Path
    peers: Mapping[str, str]

    def words(self, command: str, row: Row) -> list[str]:
        """The command as the system takes it. Raises RowError for a peer that is not there."""
        values = {"QCOMPRESS_DATA": str(self.data), "WORK": str(self.work), **self.peers}
        values["OUT"] = string.Template(work_file(row.name)).substitute(values)
        if absent := sorted(row.peers - set(values)):
            raise RowError(f"needs an interpreter: --peer {absent[0]}=PYTHON")
        words = [string.Template(word).substitute(values) for word in shlex.split(command)]
        if words[0] == "qcompress":
            return [sys.executable, "-m", "qcompress", *words[1:]]
        return [sys.executable, *words[1:]] if words[0] == "python" else words

    def output(self, row: Row) -> Path:
        return Path(string.Template(work_file(row.name)).substitute(WORK=self.work))


def commit_of_code() -> str:
    """The last commit that touched the code. Raises RowError where the code differs from it."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    if changed := git("status", "--porcelain", "--", *CODE):
        raise RowError(f"the code differs from its commit; commit it, or give --trial\n{changed}")
    return git("log", "-1", "--format=%h", "--abbrev=10", "--", *CODE)


def peer_versions(row: Row, place: Place) -> dict[str, str]:
    """Of the packages of other interpreters that the row's commands name."""
    found: dict[str, str] = {}
    for peer in sorted(row.peers):
        names = PEER_VERSIONS[peer]
        code = f"import importlib.metadata as m, json; print(json.dumps({{n: m.version(n) for n in {names!r}}}))"
        done = subprocess.run([place.peers[peer], "-c", code], capture_output=True, text=True, check=True)
        found |= {
            f"{name} of the peer" if name == "torch" else name: one for name, one in json.loads(done.stdout).items()
        }
    return found


def run_command(words: Sequence[str], place: Place, stem: Path) -> tuple[Any, float, int]:
    """What a command printed as JSON (else None), its processor seconds and its largest resident bytes."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "QCOMPRESS_DATA": str(place.data)}
    with Path(f"{stem}.json").open("w+") as printed, Path(f"{stem}.log").open("w+") as told:
        process = subprocess.Popen(words, cwd=ROOT, env=environment, stdout=printed, stderr=told)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            told.seek(0)
            raise RowError(f"exit {process.returncode}: {shlex.join(words)}\n{told.read()[-2000:]}")
        printed.seek(0)
        text = printed.read()
    try:
        document = json.loads(text)
    except ValueError:
        document = None
    return document, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024


def find_figure(documents: Sequence[Any], way: str) -> Any:
    """What stands at "1.accuracy.top1.artifact": the command, then keys. Raises RowError where nothing stands there."""
    found = look_up(documents, way.split("."))
    if found is None:
        raise RowError(f"nothing stands at {way}")
    return found


def rounded(figure: Any) -> Any:
    """A figure, or what holds figures, with six digits: more are of no use, and some are not the same twice."""
    match figure:
        case float():
            return float(f"{figure:.6g}")
        case dict():
            return {key: rounded(value) for key, value in figure.items()}
        case list():
            return [rounded(value) for value in figure]
    return figure


def run_row(row: Row, rows: Mapping[str, Row], place: Place, commit: str) -> Line:
    """The line of a row that is run now, what it needs being there. Raises RowError."""
    output = place.output(row)
    output.unlink(missing_ok=True)
    documents, seconds, peaks = [], [], []
    for index, command in enumerate(row.commands):
        stem = output.with_name(f"{output.stem}.{index}")
        document, used, largest = run_command(place.words(command, row), place, stem)
        documents.append(document)
        seconds.append(round(used, 2))
        peaks.append(largest)
    made = [str(output)] if output.is_file() else []
    told, _, _ = run_command(
        [sys.executable, "benchmarks/fingerprint.py", *made], place, output.with_name(f"{output.stem}.told")
    )
    first = documents[0] if isinstance(documents[0], dict) else {}
    return Line(
        row=row.name,
        definition=definition(row, rows),
        commands=row.commands,
        recipe_sha256=first.get("recipe_hash"),
        artifact_sha256=hashlib.sha256(output.read_bytes()).hexdigest() if made else None,
        weights_sha256=told["weights_sha256"],
        commit=commit,
        figures={figure: rounded(find_figure(documents, way)) for figure, way in row.figures.items()},
        cpu_seconds=tuple(seconds),
        peak_memory_bytes=tuple(peaks),
        versions=told["versions"] | peer_versions(row, place),
        machine=told["machine"],
    )


def surroundings(before: Line, now: Line) -> str:
    """What the lines were made with, where it differs."""
    told = [
        f"{name} {before.versions.get(name)}"
        for name in now.versions
        if before.versions.get(name) != now.versions[name]
    ]
    told += [before.machine] if before.machine != now.machine else []
    return f" (made with {', '.join(told)})" if told else ""


def chosen(patterns: Sequence[str], rows: Sequence[Row] = ROWS) -> list[Row]:
    """The rows whose names match; all without a pattern. Exits where a pattern matches none."""
    for pattern in patterns:
        if not any(fnmatchcase(row.name, pattern) for row in rows):
            raise SystemExit(f"rows.py: no row is called {pattern}; see `rows.py list`")
    return [row for row in rows if not patterns or any(fnmatchcase(row.name, pattern) for pattern in patterns)]


def make(row: Row, ledger: Ledger, place: Place, commit: str | None) -> Line:
    """The line of a row, which is run now, after what it needs and is not there. Without a commit no line is kept.

    raises  RowError
    """
    for name in row.needs:
        needed = ledger.rows[name]
        if not place.output(needed).is_file() or (commit is not None and ledger.status(name) != "current"):
            make(needed, ledger, place, commit)
    line = run_row(row, ledger.rows, place, commit or "trial")
    if commit is not None:
        ledger.put(line)
    return line


def listed(rows: Sequence[Row], ledger: Ledger) -> Iterator[str]:
    for row in rows:
        line = ledger.lines.get(row.name)
        commit = f" {line.commit}" if line else ""
        yield f"{row.name:48} {ledger.status(row.name)}{commit}, {row.seconds:.0f} s"


def add_place(parser: argparse.ArgumentParser) -> None:
    """The options of where rows run."""
    parser.add_argument("--work", type=lambda text: Path(text).resolve(), required=True, help="folder of what is made")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PYTHON", help=", ".join(PEER_VERSIONS))


def place_of(options: argparse.Namespace) -> Place:
    if "QCOMPRESS_DATA" not in os.environ:
        raise SystemExit("QCOMPRESS_DATA is not set; point it at the folder with the networks and their data")
    options.work.mkdir(exist_ok=True, parents=True)
    return Place(
        Path(os.environ["QCOMPRESS_DATA"]).resolve(), options.work, dict(one.split("=", 1) for one in options.peer)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    for verb in ("list", "run"):
        verbs.add_parser(verb).add_argument("names", nargs="*", metavar="NAME", help="rows; * and ? stand for others")
    run = verbs.choices["run"]
    add_place(run)
    run.add_argument("--again", action="store_true", help="rows too whose line is current")
    run.add_argument("--trial", action="store_true", help="run uncommitted code, and keep no line")
    run.add_argument("--most-seconds", type=float, default=float("inf"), help="leave out rows that take longer")
    run.add_argument(
        "--stop-after", type=float, default=float("inf"), metavar="MINUTES", help="begin no row after that"
    )
    options = parser.parse_args()
    rows, ledger = chosen(options.names), Ledger(ROWS)
    if options.verb == "list":
        print("\n".join(listed(rows, ledger)))
        return
    try:
        commit = None if options.trial else commit_of_code()
    except RowError as error:
        raise SystemExit(f"rows.py: {error}") from None
    place, begun, failed = place_of(options), time.monotonic(), 0
    for row in rows:
        is_late = time.monotonic() - begun > 60 * options.stop_after
        if (
            is_late
            or row.seconds > options.most_seconds
            or (ledger.status(row.name) == "current" and not options.again)
        ):
            continue
        try:
            line = make(row, ledger, place, commit)
        except RowError as error:
            failed += 1
            print(f"{row.name}: {error}", file=sys.stderr, flush=True)
        else:
            print(f"{row.name}: {json.dumps(line.figures)[:300]}, {sum(line.cpu_seconds):.0f} s", flush=True)
    if commit is not None:
        prune_old(ledger, TABLES)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
