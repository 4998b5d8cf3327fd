"""Chunks of codes among processes. The coder holds the interpreter's lock, so threads would gain nothing."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import TypeVar

from qcompress.errors import ResourceError

Job = TypeVar("Job")
Done = TypeVar("Done")

JOB_CHUNKS = 8
"""Chunks that are handed to a process together: some 50 ms of work."""

LEAST_CODES = 1 << 28
"""An artifact of fewer codes is decoded in some six seconds, and a process takes one or two to start."""


@contextmanager
def decoding_processes(codes: int, workers: int) -> Iterator[Executor | None]:
    """An executor for an artifact of so many entropy-coded codes; None where it would not pay.

    Its processes start with the first job that is large enough.
    """
    if workers < 2 or codes < LEAST_CODES:
        yield None
        return
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as executor:
        yield executor


def run_jobs(do: Callable[[Job], Done], jobs: Iterable[Job], chunks: int, executor: Executor | None) -> Iterator[Done]:
    """What `do` makes of every job, in their order; in this process where the matrix has too few chunks to share.

    raises  what `do` raises; ResourceError where a process has died
    """
    if executor is None or chunks < 2 * JOB_CHUNKS:
        yield from map(do, jobs)
        return
    try:
        yield from executor.map(do, jobs)
    except BrokenProcessPool:
        raise ResourceError("memory", "a decoding process was ended", "use --threads 1") from None
