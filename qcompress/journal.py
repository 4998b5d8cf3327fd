"""What a resumable run has finished, a line of JSON a tensor, so that a killed run goes on where it stopped.

Work in progress may only be trusted where nothing has changed: the first line holds a hash of the plan, the layout and
the input's headers, and each later line the CRC-32 of a tensor's input and of everything that was written for it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Self

from qcompress.artifact.layout import Layout, render_header
from qcompress.artifact.manifest import Entry, Manifest
from qcompress.artifact.writer import Filled
from qcompress.encoded import ClassUse
from qcompress.report.document import LayerFigures


@dataclass(frozen=True)
class Record:
    """One finished tensor: all that the run needs to know of it later."""

    tensor: str
    entry: Entry
    figures: LayerFigures
    input_crc32: int
    slots: Mapping[str, Filled]
    side_bytes: int = 0


def run_key(layout: Layout, manifest: Manifest, more: str) -> str:
    """SHA-256 of everything but the weights that decides a file's bytes: recipe, headers, layout, tool, and `more`: the
    device, and what was made of all weights together."""
    header = render_header(layout.slots, manifest)
    return hashlib.sha256(header + f"\n{layout.header_bytes}\n{more}".encode()).hexdigest()


class Journal:
    """The records of one unfinished file; only appended to."""

    def __init__(self, path: Path, key: str) -> None:
        self.path = path
        self.key = key
        self._file: IO[str] | None = None

    def read(self) -> list[Record]:
        """The records of an earlier run with the same key, in its order; a line cut off by the kill ends them."""
        try:
            first, *lines = self.path.read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError):
            return []
        if first != json.dumps({"key": self.key}):
            return []
        records = []
        for line in lines:
            try:
                records.append(_parse_record(json.loads(line)))
            except (ValueError, TypeError, KeyError):
                break
        return records

    def start(self, records: list[Record]) -> None:
        """Begin the file anew with the records that still hold."""
        self._file = self.path.open("w", encoding="utf-8")
        self._file.write(json.dumps({"key": self.key}) + "\n")
        for record in records:
            self._write(record)
        self._flush()

    def append(self, record: Record) -> None:
        """Note a tensor whose data are written."""
        self._write(record)
        self._flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def _write(self, record: Record) -> None:
        assert self._file is not None
        self._file.write(json.dumps(asdict(record), separators=(",", ":")) + "\n")

    def _flush(self) -> None:
        assert self._file is not None
        self._file.flush()
        os.fsync(self._file.fileno())


def _parse_record(line: Mapping[str, Any]) -> Record:
    entry, figures = dict(line["entry"]), dict(line["figures"])
    entry |= {key: tuple(entry[key]) for key in ("shape", "axis")}
    figures = {key: tuple(value) if isinstance(value, list) else value for key, value in figures.items()}
    if figures["classes"] is not None:
        figures["classes"] = tuple(ClassUse(**one) for one in figures["classes"])
    slots = {name: Filled(**{**slot, "shape": tuple(slot["shape"])}) for name, slot in line["slots"].items()}
    return Record(
        str(line["tensor"]),
        Entry(**entry),
        LayerFigures(**figures),
        int(line["input_crc32"]),
        slots,
        int(line["side_bytes"]),
    )
