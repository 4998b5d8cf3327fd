"""The command line is words in, one library call, words out. Importing it imports neither torch nor pydantic."""

from __future__ import annotations

from qcompress.cli.app import main

__all__ = ["main"]
