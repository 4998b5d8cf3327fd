"""What of this machine a command may use."""

from __future__ import annotations

import os

MOST_THREADS = 8


def default_threads() -> int:
    """The processors that this process may use, up to a few."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(usable, MOST_THREADS)
