"""Several ranks in one process: a thread each, that meet as processes do which torchrun started.

Only one of them runs at a time, because tracing a network patches what all threads share.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

from torch import Tensor

from qcompress.errors import OtherRankFailed
from qcompress.types.ranks import World

Result = TypeVar("Result")


class Room:
    """Where the ranks meet; once one has failed nobody waits there any more."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size, timeout=60)
        self.given: list[object] = [None] * size
        self.turn = threading.Lock()

    def meet(self, rank: int, own: Result) -> list[Result]:
        """What each rank gives, in their order."""
        try:
            self.given[rank] = own
            self._wait()
            found = list(self.given)
            self._wait()
        except threading.BrokenBarrierError:
            raise OtherRankFailed(3) from None
        return found  # type: ignore[return-value]

    def _wait(self) -> None:
        self.turn.release()
        try:
            self.barrier.wait()
        finally:
            self.turn.acquire()


@dataclass(frozen=True)
class ThreadWorld(World):
    room: Room = field(default_factory=lambda: Room(1))

    def exchange(self, own: bytes) -> list[bytes]:
        return self.room.meet(self.rank, own)

    def sum(self, value: Tensor) -> Tensor:
        first, *others = self.room.meet(self.rank, value.clone())
        for other in others:
            first = first + other
        return value.copy_(first)

    def check(self) -> None:
        if self.room.barrier.broken:
            raise OtherRankFailed(3)


def together(size: int, function: Callable[[World], Result]) -> list[Result]:
    """What the function gives on each of so many ranks. Raises the error of the one that failed first."""
    room = Room(size)
    failed: list[BaseException] = []

    def ran(rank: int) -> Result:
        with room.turn:
            try:
                return function(ThreadWorld(rank, size, room=room))
            except BaseException as error:
                failed.append(error)
                room.barrier.abort()
                raise

    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(ran, rank) for rank in range(size)]
    if failed:
        raise next((error for error in failed if not isinstance(error, OtherRankFailed)), failed[0])
    return [future.result() for future in futures]
