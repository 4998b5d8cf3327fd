"""What is finished of a file that is being written lies in a journal beside it, from which a later run may go on."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any, Self

from qcompress.artifact.entry import Entry
from qcompress.artifact.layout import Layout, render_header
from qcompress.artifact.manifest import Manifest, manifest_frame
from qcompress.artifact.writer import Filled
from qcompress.report.document import LayerFigures
from qcompress.types.encoded import ClassUse
from qcompress.types.run import Say


@dataclass(frozen=True)
class Record:
    """One finished tensor: all that the run needs to know of it later. A kept one has no entry and no figures."""

    tensor: str
    entry: Entry | None
    figures: LayerFigures | None
    input_crc32: int
    slots: Mapping[str, Filled]
    side_bytes: int = 0


def run_key(layout: Layout, manifest: Manifest, more: str) -> str:
    """SHA-256 of everything but the weights that decides a file's bytes: recipe, headers, layout, tool, and `more`: the
    device, and what was made of all weights together."""
    parts = [
        render_header(layout.slots, compact=layout.compact),
        manifest_frame(manifest),
        f"{layout.header_bytes}\n{more}".encode(),
    ]
    return hashlib.sha256(b"\n".join(parts)).hexdigest()


class Journal:
    """The records of one unfinished file; only appended to.

    Each line begins with the SHA-256 of what follows and of the line before, so that no line can be changed, moved or
    taken out unseen; the first line's is over the key.
    """

    def __init__(self, path: Path, key: str) -> None:
        self.path = path
        self.key = key
        self._file: IO[str] | None = None
        self._last = key

    def read(self, say: Say = lambda _: None) -> list[Record]:
        """The records of an earlier run with the same key, in its order, up to the first line that does not hold.

        say  told how many lines are dropped; nothing of the last one, which a kill may have cut off
        """
        try:
            first, *lines = self.path.read_text(encoding="utf-8", errors="replace").split("\n")
        except OSError:
            return []
        if first != json.dumps({"key": self.key}):
            return []
        records: list[Record] = []
        last = self.key
        for line in lines:
            digest, _, text = line.partition(" ")
            last = _chained(last, text)
            if digest != last:
                break
            records.append(parse_record(json.loads(text)))
        dropped = len(lines) - 1 - len(records)
        if dropped > 0:
            what = f"{dropped} of {len(lines) - 1} lines are damaged and dropped"
            say(f"{self.path.name}: {what}; those tensors are encoded again")
        return records

    def start(self, records: list[Record]) -> None:
        """Begin the file anew with the records that still hold."""
        self._last = self.key
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
        text = json.dumps(asdict(record), separators=(",", ":"))
        self._last = _chained(self._last, text)
        self._file.write(f"{self._last} {text}\n")

    def _flush(self) -> None:
        assert self._file is not None
        self._file.flush()
        os.fsync(self._file.fileno())


def _chained(before: str, text: str) -> str:
    return hashlib.sha256(f"{before}\n{text}".encode()).hexdigest()


def parse_record(line: Mapping[str, Any]) -> Record:
    slots = {name: Filled(**{**slot, "shape": tuple(slot["shape"])}) for name, slot in line["slots"].items()}
    record = Record(str(line["tensor"]), None, None, int(line["input_crc32"]), slots, int(line["side_bytes"]))
    if line["entry"] is None:
        return record
    entry, figures = dict(line["entry"]), dict(line["figures"])
    entry |= {key: tuple(entry[key]) for key in ("shape", "axis")}
    figures = {key: tuple(value) if isinstance(value, list) else value for key, value in figures.items()}
    if figures["classes"] is not None:
        figures["classes"] = tuple(ClassUse(**one) for one in figures["classes"])
    return replace(record, entry=Entry(**entry), figures=LayerFigures(**figures))
