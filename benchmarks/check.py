"""Runs rows again, and says which come out as their lines have them.

    QCOMPRESS_DATA=data python benchmarks/check.py --sample 3 --work DIR [NAME...] [--most-seconds 60] [--seed 0]

Of the rows whose line is of their present definition, those that NAME matches (* and ? stand for others), or so many of
them drawn by the seed. Figures and the decoded weights must be equal, times within the row's tolerance; the artifact's
bytes are compared too, and may differ where its format was changed since. Exits with 1 where a row does not come out.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Iterator
from typing import Any

from definitions import ROWS
from ledger import Ledger, Line
from rows import RowError, add_place, chosen, make, place_of, surroundings


def differences(before: Line, now: Line, tolerance: float) -> Iterator[str]:
    """What of a second run is not as it was, in words."""
    for figure in sorted({*before.figures, *now.figures}):
        yield from _unequal(figure, before.figures.get(figure), now.figures.get(figure), tolerance)
    if before.weights_sha256 != now.weights_sha256:
        yield "other weights"
    elif before.artifact_sha256 != now.artifact_sha256:
        yield BYTES


BYTES = "other bytes of the same weights"
"""What alone does not keep a row from coming out."""


def _unequal(name: str, before: Any, now: Any, tolerance: float) -> Iterator[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        for key in sorted({*before, *now}):
            yield from _unequal(f"{name} {key}", before.get(key), now.get(key), tolerance)
    elif before != now and not _is_near(before, now, tolerance):
        yield f"{name} {before}, now {now}"


def _is_near(before: Any, now: Any, tolerance: float) -> bool:
    numbers = isinstance(before, int | float) and isinstance(now, int | float)
    return numbers and abs(now - before) <= tolerance * abs(before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--sample", type=int, metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--most-seconds", type=float, default=60)
    add_place(parser)
    options = parser.parse_args()
    ledger, place = Ledger(ROWS), place_of(options)
    rows = [row for row in chosen(options.names) if row.seconds <= options.most_seconds]
    rows = [row for row in rows if ledger.status(row.name) == "current" and row.peers <= {*place.peers}]
    if options.sample is not None:
        drawn = random.Random(options.seed).sample(range(len(rows)), min(options.sample, len(rows)))
        rows = [rows[index] for index in sorted(drawn)]
    failed = 0
    for row in rows:
        before = ledger.lines[row.name]
        try:
            now = make(row, ledger, place, None)
        except RowError as error:
            failed += 1
            print(f"{row.name}: {error}", flush=True)
            continue
        found = list(differences(before, now, row.tolerance))
        came_out = not [one for one in found if one != BYTES]
        failed += not came_out
        told = f"{'came out' if came_out else 'DIFFERS'}{': ' if found else ''}{'; '.join(found)}"
        print(f"{row.name}: {told}{surroundings(before, now) if not came_out else ''}", flush=True)
    print(f"{len(rows) - failed} of {len(rows)} rows came out")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
