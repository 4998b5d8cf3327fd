"""Says of each claim of docs/papers.md which figures it stands on and which verdict follows; runs their rows if asked.

    python benchmarks/verdicts.py [CLAIM...]
    QCOMPRESS_DATA=data python benchmarks/verdicts.py CLAIM --work DIR

A claim may hold * and ?. With --work the rows of the claims that were not run, or otherwise than they are defined now,
are run first, as `rows.py run` does.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

from claims import Claim, outcome, told
from definitions import ROWS
from definitions.papers import CLAIMS
from ledger import Ledger


def lines_of(claim: Claim, ledger: Ledger) -> Iterator[str]:
    """The verdict, then each comparison with its figures or the rows that it waits for."""
    found = outcome(claim, ledger)
    yield f"{claim.name}: {found.verdict}"
    for one in claim.comparisons:
        pairs = one.pairs(ledger)
        if pairs:
            seeds = f"{len(pairs)} seed{'s' * (len(pairs) > 1)}"
            yield f"  {one.title}: {told(pairs)}, {seeds}{'' if claim.holds(pairs) else ', not as claimed'}"
        else:
            names = [name for name in dict.fromkeys(one.rows) if ledger.status(name) != "current"]
            yield f"  {one.title}: {len(names)} rows to run, {names[0]} first"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("claims", nargs="*", metavar="CLAIM", help="* and ? stand for others")
    parser.add_argument("--work", metavar="DIR", help="run what is missing, and keep what is made there")
    options = parser.parse_args()
    chosen = [one for one in CLAIMS if not options.claims or any(fnmatchcase(one.name, p) for p in options.claims)]
    if not chosen:
        raise SystemExit(f"verdicts.py: no claim is called {' '.join(options.claims)}; without a name all are shown")
    if options.work:
        names = list(dict.fromkeys(name for claim in chosen for name in claim.rows))
        run = [sys.executable, str(Path(__file__).with_name("rows.py")), "run", *names, "--work", options.work]
        subprocess.run(run, check=True)
    ledger = Ledger(ROWS)
    for claim in chosen:
        print("\n".join(lines_of(claim, ledger)))


if __name__ == "__main__":
    main()
