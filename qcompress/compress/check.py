"""What can be found out about a run before its work begins is found here."""

from __future__ import annotations

from qcompress.types.plan import Recipe


def refuse_code(recipe: Recipe, allow_code: bool) -> None:
    """Raise UsageError, one line, where a recipe names code and the user has not consented to run it."""
    if not allow_code:
        from qcompress.model.factories import refuse_code

        refuse_code(recipe)
