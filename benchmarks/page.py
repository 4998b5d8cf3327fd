"""docs/results.md in sections, each written by the script that measures it and kept by the others."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "results.md"


def put_section(name: str, lines: Sequence[str], path: Path = PAGE) -> None:
    """Put lines of Markdown in the place of a section, or at the end of the page."""
    text = path.read_text(encoding="utf-8")
    section = f"<!-- {name} -->\n" + "\n".join(lines).strip() + f"\n<!-- end of {name} -->"
    pattern = rf"<!-- {name} -->\n.*?<!-- end of {name} -->"
    found = re.search(pattern, text, flags=re.DOTALL)
    changed = text.replace(found[0], section) if found else f"{text.rstrip()}\n\n{section}\n"
    path.write_text(changed, encoding="utf-8")
