"""The ranks of a run are the processes that torchrun started: how they divide work, and what they tell one another.

All that they say goes through `World`, so that none waits for a rank that has failed. One process alone needs nothing
of it. Importing this imports no torch.
"""

from __future__ import annotations

import contextlib
import heapq
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from qcompress.errors import OtherRankFailed, QcompressError, ResourceError, UsageError

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.distributed import Work
    from torch.distributed.distributed_c10d import Store

Item = TypeVar("Item")

ATTEMPT = "TORCHELASTIC_RESTART_COUNT"
"""Where torchrun says how often it has restarted the ranks."""
LAUNCHED = ("RANK", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun sets beside WORLD_SIZE, and ranks need to meet."""
PATIENCE = timedelta(days=30)
"""How long a rank waits for the others: one of them may be at a tensor that takes hours, and torchrun sees who dies."""
LEAVE_SECONDS = 20.0
"""How long a failed rank waits until the others have heard of it: torchrun ends them as soon as it has left."""
LONGEST_PAUSE = 0.02
"""Seconds between two looks at whether the others have come."""
FAILED, FAILURES, LEFT = "qcompress/failed", "qcompress/failures", "qcompress/left"
"""What ranks leave word under: the exit code of the first that failed, and how many have failed, and have left."""


@dataclass(frozen=True)
class World:
    """This process among its equals. Every rank calls what communicates, in the same order.

    rank, size  the number of this process, and how many there are
    store       where a rank that fails leaves word of it; None of one process alone
    """

    rank: int = 0
    size: int = 1
    store: Store | None = None

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    def share(self, sizes: Sequence[int]) -> list[int]:
        """Which of things of these sizes are this rank's, in their order."""
        return deal(sizes, self.size)[self.rank]

    def spread(
        self, items: Sequence[Item], size_of: Callable[[Item], int], function: Callable[[Item], object]
    ) -> list[Any]:
        """`function` of every item, a value of JSON, each computed by one rank and told to all."""
        if self.size == 1:
            return [function(item) for item in items]
        own = self.share([size_of(item) for item in items])
        told = self.tell({str(place): function(items[place]) for place in own})
        found = {place: value for part in told for place, value in part.items()}
        return [found[str(place)] for place in range(len(items))]

    def tell(self, own: object) -> list[Any]:
        """What each rank has to say, a value of JSON, in the order of ranks."""
        return [json.loads(text) for text in self.exchange(json.dumps(own).encode())]

    def tell_in_turn(self, own: Sequence[object]) -> list[Any]:
        """What all ranks have to say of things, values of JSON, of which this rank has every `size`-th, in order."""
        told = self.tell(own)
        return [told[place % self.size][place // self.size] for place in range(sum(map(len, told)))]

    def exchange(self, own: bytes) -> list[bytes]:
        """What each rank gives, in the order of ranks."""
        if self.size == 1:
            return [own]
        import numpy as np
        import torch
        from torch import distributed

        lengths = torch.zeros(self.size, dtype=torch.int64)
        lengths[self.rank] = len(own)
        self.sum(lengths)
        data = torch.zeros(int(lengths.max()), dtype=torch.uint8)
        data[: len(own)] = torch.from_numpy(np.frombuffer(own, np.uint8).copy())
        found = [torch.empty_like(data) for _ in range(self.size)]
        self._finish(lambda: distributed.all_gather(found, data, async_op=True))
        return [part[:length].numpy().tobytes() for part, length in zip(found, lengths.tolist(), strict=True)]

    def sum(self, value: Tensor) -> Tensor:
        """The sum of a tensor over all ranks, in its place."""
        if self.size > 1:
            from torch import distributed

            self._finish(lambda: distributed.all_reduce(value, async_op=True))
        return value

    def mean(self, value: Tensor) -> Tensor:
        """The mean of a scalar over all ranks."""
        return value if self.size == 1 else self.sum(value.detach().clone()) / self.size

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module, its gradients averaged over all ranks as they are computed."""
        if self.size == 1:
            return module
        from torch.nn.parallel import DistributedDataParallel

        return DistributedDataParallel(module)

    def wait(self) -> None:
        """Until every rank is here."""
        if self.size > 1:
            import torch

            self.sum(torch.zeros(1))

    def check(self) -> None:
        """Raise OtherRankFailed where another rank has failed, so that this one does not work on in vain."""
        if self.store is None:
            return
        try:
            code = int(self.store.get(FAILED)) if self.store.check([FAILED]) else 0
        except RuntimeError as error:
            raise self._lost() from error
        if code:
            raise OtherRankFailed(code)

    def _finish(self, begin: Callable[[], Work | None]) -> None:
        """Wait for what was begun to communicate, and hear meanwhile of a rank that fails."""
        pause = 1e-4
        try:
            work = begin()
            assert work is not None
            while not work.is_completed():
                self.check()
                time.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE)
            work.wait()
        except RuntimeError as error:
            # Whoever failed and left has said so; whoever was killed has not.
            self.check()
            raise self._lost() from error

    def _lost(self) -> ResourceError:
        what = "another process of this run has ended without a word"
        hint = "see what torchrun says of it; with --resume and torchrun's --max-restarts 1 a run goes on by itself"
        return ResourceError(f"rank {self.rank} of {self.size}", what, hint)

    def leave(self, error: Exception) -> Exception:
        """Tell the others of a failure, wait until they know, and give what this rank is to raise: the first that
        failed speaks for all."""
        code = _exit_code(error)
        with contextlib.suppress(RuntimeError):
            assert self.store is not None
            if not isinstance(error, OtherRankFailed):
                if self.store.add(FAILURES, 1) > 1:
                    self.store.wait([FAILED])
                    error = OtherRankFailed(int(self.store.get(FAILED)))
                else:
                    self.store.set(FAILED, str(code))
            self.store.add(LEFT, 1)
            deadline = time.monotonic() + LEAVE_SECONDS
            while self.store.add(LEFT, 0) < self.size and time.monotonic() < deadline:
                time.sleep(LONGEST_PAUSE)
        return error


ALONE = World()


def _exit_code(error: Exception) -> int:
    """What the command line makes of an error."""
    if isinstance(error, QcompressError):
        return error.exit_code
    return 5 if isinstance(error, (OSError, MemoryError)) else 1


def deal(sizes: Sequence[int], count: int) -> list[list[int]]:
    """The places of things of these sizes, dealt out to `count` hands: the largest first, each to whom has least."""
    hands: list[list[int]] = [[] for _ in range(count)]
    least = [(0, hand) for hand in range(count)]
    for place in sorted(range(len(sizes)), key=lambda place: -sizes[place]):
        total, hand = heapq.heappop(least)
        hands[hand].append(place)
        heapq.heappush(least, (total + sizes[place], hand))
    return [sorted(hand) for hand in hands]


def launched_size() -> int:
    """How many processes torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def launched_here() -> int:
    """How many of them run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or 1)


def launched_rank() -> int:
    """The number of this process among those that torchrun started; 0 without it."""
    return int(os.environ.get("RANK") or 0)


@contextlib.contextmanager
def join_world(device: str) -> Iterator[World]:
    """The ranks that torchrun started, joined: by gloo, and by NCCL for what lies on CUDA.

    A rank that fails ends them all: it raises its error, and the others OtherRankFailed with its exit code.

    device  "cpu" or "cuda"
    raises  UsageError where variables of torchrun are set in part only
    """
    if launched_size() == 1:
        yield ALONE
        return
    missing = [name for name in LAUNCHED if not os.environ.get(name)]
    if missing:
        what = f"is {launched_size()}, and {', '.join(missing)} of torchrun not set"
        raise UsageError("WORLD_SIZE", what, "start several processes with torchrun, or unset WORLD_SIZE for one")
    import torch
    from torch import distributed
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK") or 0))
    shared, rank, size = next(iter(rendezvous("env://")))
    # The store outlives the ranks: what those before a restart left there, where to find them above all, is not for us.
    store = PrefixStore(f"qcompress/attempt/{os.environ.get(ATTEMPT, 0)}", shared)
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    group_store = PrefixStore("group", store)
    distributed.init_process_group(backend, store=group_store, rank=rank, world_size=size, timeout=PATIENCE)
    world = World(rank, size, store)
    try:
        yield world
        # Whoever is done before the others hears here of one that fails afterwards.
        world.wait()
    except Exception as error:
        raised = world.leave(error)
        if raised is error:
            raise
        raise raised from None
    finally:
        distributed.destroy_process_group()
