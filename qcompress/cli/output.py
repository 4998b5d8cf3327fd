"""Results go to stdout, all else to stderr, and JSON to whichever file was asked for."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from qcompress.cli import options as opt
from qcompress.errors import RecipeError, ResourceError, UsageError

if TYPE_CHECKING:
    from qcompress.checkpoint.outputs import Write
    from qcompress.report.document import Report
    from qcompress.report.render import Terminal
    from qcompress.report.table import View
    from qcompress.types.plan import Recipe

PLAIN_LINE_SECONDS = 10.0
NARROWEST = 60
"""Columns that a table is drawn for at least."""


@dataclass(frozen=True)
class Streams:
    """What a command was told of where its words go."""

    json_to: opt.Json = None
    quiet: opt.Quiet = False
    verbose: opt.Verbose = False
    no_color: opt.NoColor = False

    def say(self, text: str) -> None:
        """A line on what begins, unless the run is to be quiet."""
        if not self.quiet:
            print_note(text)

    @property
    def terminal(self) -> Terminal | None:
        """The terminal that stdout is; None for a file or a pipe."""
        from qcompress.report.render import Terminal

        if not sys.stdout.isatty():
            return None
        width = max(NARROWEST, shutil.get_terminal_size().columns)
        return Terminal(width, is_drawn_on(sys.stdout, self.no_color))


def read_stdin() -> str:
    """All of standard input. Raises RecipeError, for nothing else is read there, where it is not text."""
    try:
        return sys.stdin.read()
    except UnicodeDecodeError:
        raise RecipeError("stdin", "is not UTF-8 text", "send a recipe in YAML") from None


def print_result(text: str) -> None:
    """Results, and nothing else, go to stdout; what its encoding cannot hold is escaped."""
    text = text if text.endswith("\n") else f"{text}\n"
    try:
        sys.stdout.write(text)
    except UnicodeEncodeError:
        encoding = sys.stdout.encoding
        sys.stdout.write(text.encode(encoding, "backslashreplace").decode(encoding))


def _print_json(text: str) -> None:
    """A JSON document on stdout; what its encoding cannot hold is escaped as JSON escapes it."""
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        # Outside of strings JSON is ASCII.
        text = re.sub(r"[^\x00-\x7f]", lambda found: json.dumps(found[0])[1:-1], text)
    print_result(text)


def print_note(text: str) -> None:
    """Progress, warnings, hints and errors go to stderr, a line each."""
    from qcompress.errors import printable

    # Names come from files: one that holds control characters must not steer the terminal.
    # Where stderr is full or gone, there is nobody to tell, and the work itself is not at fault.
    with suppress(OSError):
        sys.stderr.write(f"{printable(text)}\n")
        sys.stderr.flush()


def is_drawn_on(stream: TextIO, no_color: bool) -> bool:
    """Whether colour and animation suit this stream."""
    plain = no_color or bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM") == "dumb"
    return stream.isatty() and not plain


def refuse_mixed(json_to: str | None, quiet: bool) -> None:
    """--json - and -q both claim stdout; --json FILE never takes the place of weights."""
    if json_to == "-" and quiet:
        raise UsageError("--json - --quiet", "both say what stdout holds", "give one of them, or --json FILE")
    if json_to is not None and Path(json_to).suffix == ".safetensors":
        raise UsageError(f"--json {json_to}", "is a place for weights", "name another file, or - for stdout")


def json_document(document: Mapping[str, object]) -> str:
    """A JSON document's text, indented."""
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


def write_text(text: str, json_to: str) -> None:
    """A JSON document's text, to stdout for "-", into a pipe, else whole or not at all to a file.

    Raises ResourceError.
    """
    from qcompress.checkpoint.outputs import is_stream
    from qcompress.checkpoint.staging import write_whole

    if json_to == "-":
        _print_json(text)
        return
    try:
        if is_stream(Path(json_to)):
            Path(json_to).write_text(text, encoding="utf-8")
        else:
            write_whole(text, Path(json_to))
    except (OSError, ResourceError) as error:
        what = error.what if isinstance(error, ResourceError) else error.strerror or str(error)
        raise ResourceError(json_to, what, "choose a writable file for --json") from error


def refuse_harm(
    reads: Mapping[str, Path | None],
    writes: Sequence[Write],
    json_to: str | None = None,
    *,
    recipe: Recipe | None = None,
    force: bool = False,
) -> None:
    """Raise OutputError where what a command writes would replace what it reads, or anything that is not its own.

    reads    "the recipe" -> its file; None and "-" are none
    json_to  of --json, which is written too
    recipe   names files that are read: data, code and others
    """
    from qcompress.checkpoint.outputs import Read, Write, is_own_json, refuse_meeting

    if json_to not in (None, "-"):
        writes = [*writes, Write(Path(json_to), "--json", streams=True, is_own=is_own_json)]
    found = [Read(path, what) for what, path in reads.items() if path is not None and str(path) != "-"]
    if recipe is not None:
        from qcompress.compress.check import named_files

        found += [Read(path, what, whole=True) for what, path in named_files(recipe).items()]
    refuse_meeting(found, writes, force=force)


def print_output(output: Path, text: Callable[[], str], view: View, streams: Streams) -> None:
    """The result of a command that makes `output`: `text()` where --json says, and the view, or with -q the path."""
    from qcompress.report.render import render_view

    if streams.json_to is not None:
        write_text(text(), streams.json_to)
    if streams.json_to != "-":
        print_result(str(output) if streams.quiet else render_view(view, streams.terminal))


def print_report(report: Report, output: Path, streams: Streams) -> None:
    """The result of a command that made an artifact, its warnings before it."""
    from qcompress.report.document_json import report_text
    from qcompress.report.view import view_report

    for warning in report.warnings:
        print_note(f"warning: {warning}")
    print_output(output, lambda: report_text(report), view_report(report), streams)


def print_rendered(rendered: Callable[[Terminal | None], str], output: Path | None, streams: Streams) -> None:
    """A text on stdout, or in a file, of which stdout then tells path and size, or with -q the path.

    Where --json takes stdout, nothing else is there.
    """
    from qcompress.checkpoint.staging import write_whole

    if output is not None:
        text = rendered(None)
        write_whole(text, output)
        if streams.json_to != "-":
            print_result(str(output) if streams.quiet else f"{output}: {len(text.encode()):,} bytes")
    elif streams.json_to != "-" and not streams.quiet:
        print_result(rendered(streams.terminal))


@contextmanager
def progress(total_bytes: int, streams: Streams) -> Iterator[Callable[[str, int], None]]:
    """A callable (tensor name, bytes) that shows progress on stderr: a bar on a terminal, else a line now and then.

    With -v it is a line for each tensor, whatever stderr is. What is done again, for a budget, starts at nothing again.
    """
    if streams.verbose:
        yield _PlainProgress(total_bytes, every_seconds=0.0).advance
    elif streams.quiet:
        yield lambda name, n_bytes: None
    elif is_drawn_on(sys.stderr, streams.no_color):
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
        )
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("", total=max(total_bytes, 1))

            def advance(name: str, n_bytes: int) -> None:
                if bar.finished:
                    bar.reset(task)
                bar.update(task, advance=n_bytes, description=name)

            yield advance
    else:
        yield _PlainProgress(total_bytes, PLAIN_LINE_SECONDS).advance


class _PlainProgress:
    """A line every few seconds, so that a log stays short and a CI job is not taken for dead."""

    def __init__(self, total_bytes: int, every_seconds: float) -> None:
        self._every = every_seconds
        self._total = max(total_bytes, 1)
        self._done = 0
        self._started = self._said = time.monotonic()

    def advance(self, name: str, n_bytes: int) -> None:
        now = time.monotonic()
        if self._done >= self._total:
            self._done, self._started = 0, now
        self._done += n_bytes
        if now - self._said >= self._every:
            self._said = now
            left = (now - self._started) * (self._total / max(self._done, 1) - 1)
            print_note(f"{100 * self._done // self._total}% after {name}, about {left:.0f} s left")


def sample_progress(streams: Streams) -> Callable[[str, int, int], None]:
    """A callable (what runs, samples done, samples in all) that says a line on stderr now and then, with -v each."""
    every = 0.0 if streams.verbose else PLAIN_LINE_SECONDS
    said = time.monotonic()

    def show(what: str, done: int, samples: int) -> None:
        nonlocal said
        now = time.monotonic()
        if not streams.quiet and now - said >= every:
            said = now
            print_note(f"{what}: {done:,} of {samples:,} samples")

    return show
