"""docs/results.md in sections, each written by the script that measures it and kept by the others."""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "results.md"


def words_beside(name: str) -> list[str]:
    """The lines of `results_NAME.md`, where what is to be read in the figures is written by hand."""
    path = Path(__file__).with_name(f"results_{name}.md")
    return path.read_text().splitlines() if path.is_file() else []


def average(values: Sequence[float], digits: int = 4) -> str:
    """The mean, with its standard deviation where there are several; "-" of none."""
    if not values:
        return "-"
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def put_section(name: str, lines: Sequence[str], path: Path = PAGE) -> None:
    """Put lines of Markdown in the place of a section, or at the end of the page."""
    text = path.read_text(encoding="utf-8")
    section = f"<!-- {name} -->\n" + "\n".join(lines).strip() + f"\n<!-- end of {name} -->"
    pattern = rf"<!-- {name} -->\n.*?<!-- end of {name} -->"
    found = re.search(pattern, text, flags=re.DOTALL)
    changed = text.replace(found[0], section) if found else f"{text.rstrip()}\n\n{section}\n"
    path.write_text(changed, encoding="utf-8")
