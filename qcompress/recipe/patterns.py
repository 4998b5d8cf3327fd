"""The globs over tensor names that a rule matches."""

from __future__ import annotations

from qcompress.recipe.tree import Node, Problems, shown


def make_patterns(node: Node, problems: Problems) -> list[str]:
    """The globs of a rule's `match`: one, or a list."""
    items = node.value if isinstance(node.value, list) else [node]
    if not items:
        problems.add(node, "a list without a pattern", 'give at least one glob, as "*.weight"')
    patterns = []
    for item in items:
        if isinstance(item.value, str) and item.value:
            patterns.append(item.value)
        elif not item.is_broken:
            what = "an empty pattern" if item.value == "" else f"{shown(item.data())} is not a pattern"
            problems.add(item, what, 'give a glob over tensor names, as "*.weight"')
    return patterns
