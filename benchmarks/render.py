"""Writes docs/results.md, docs/benchmarks.md and docs/papers.md from benchmarks/pages and the rows that were run.

    python benchmarks/render.py [--check]

A line `{{NAME}}` of a page stands for a table, and `{{NAME | LINE | COLUMN}}` within a sentence for one cell of it.
`{{verdict CLAIM}}` and `{{measured CLAIM}}` are what the rows say of a claim of definitions/papers.py, and `{{tally}}`
how many rows of the page have each verdict. --check writes nothing, and exits with 1 where a page is not what the rows
render to.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from claims import WORDS, outcome
from definitions import ROWS, TABLES
from definitions.papers import CLAIMS
from ledger import ROOT, Ledger
from tables import Pages, title

TEMPLATES = Path(__file__).with_name("pages")
DOCS = ROOT / "docs"


CLAIM = {claim.name: claim for claim in CLAIMS}


class PageError(Exception):
    """A page that names a table, a cell or a claim that is not there, or a cell that holds no figure."""


def render_page(text: str, pages: Pages) -> str:
    """A page's template with its tables and cells. Raises PageError."""

    def fill(found: re.Match[str]) -> str:
        name, *at = (part.strip() for part in found[1].split("|"))
        if name == "tally":
            return found[0]
        if name.startswith(("verdict ", "measured ")):
            return of_claim(*name.split(), pages)
        if name not in TABLES:
            raise PageError(f"no table is called {name}")
        table = TABLES[name]
        if not at:
            return pages.render(table)
        titles = [title(column) for column in table.columns]
        if len(at) != 2 or at[0] not in table.lines or at[1] not in titles:
            raise PageError(f"{found[0]} names no cell; lines are {list(table.lines)}, columns {titles}")
        shown = pages.cell(table, at[0], titles.index(at[1]))
        if shown.text == "-":
            raise PageError(f"{found[0]} holds no figure")
        return shown.marked

    filled = re.sub(r"\{\{(.*?)\}\}", fill, text)
    return filled.replace("{{tally}}", tally(filled))


def of_claim(what: str, name: str, pages: Pages) -> str:
    """The verdict on a claim, or the figures that it stands on. Raises PageError."""
    if name not in CLAIM:
        raise PageError(f"no claim is called {name}; there are {', '.join(CLAIM)}")
    found = outcome(CLAIM[name], pages.ledger)
    return found.text if what == "verdict" else found.measured


def tally(text: str) -> str:
    """How many numbered rows of the page's tables end in each verdict."""
    rows = re.findall(r"^\| [A-Z]\d+ \|.*\|([^|]*)\|$", text, re.MULTILINE)
    counts = {word: sum(row.strip().startswith(f"**{word}**") for row in rows) for word in WORDS}
    heads, cells = " | ".join(counts), " | ".join(map(str, counts.values()))
    return f"| {heads} |\n|{'---:|' * len(counts)}\n| {cells} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    pages, stale = Pages(Ledger(ROWS)), []
    for template in sorted(TEMPLATES.glob("*.md")):
        try:
            text = render_page(template.read_text(encoding="utf-8"), pages)
        except PageError as error:
            raise SystemExit(f"{template.name}: {error}") from None
        target = DOCS / template.name
        if check and target.read_text(encoding="utf-8") != text:
            stale.append(target.name)
        elif not check:
            target.write_text(text, encoding="utf-8")
    if stale:
        print(f"not what the rows render to: {', '.join(stale)}; run benchmarks/render.py", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
