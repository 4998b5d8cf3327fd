"""The ranks of a data-parallel run join here as torchrun starts them; one rank alone needs nothing."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as distributed
from torch import nn
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True)
class World:
    """This process among its equals.

    rank, size  the number of this process, and how many there are
    """

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module, its gradients averaged over all ranks as they are computed."""
        return module if self.size == 1 else DistributedDataParallel(module)

    def mean(self, value: torch.Tensor) -> torch.Tensor:
        """The mean of a scalar over all ranks."""
        if self.size == 1:
            return value
        total = value.detach().clone()
        distributed.all_reduce(total)
        return total / self.size

    def wait(self) -> None:
        """Until every rank is here."""
        if self.size > 1:
            distributed.barrier()


ALONE = World()


def launched_size() -> int:
    """How many processes torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def launched_rank() -> int:
    """The number of this process among those that torchrun started; 0 without it."""
    return int(os.environ.get("RANK") or 0)


@contextlib.contextmanager
def join_world(device: torch.device) -> Iterator[World]:
    """The ranks that torchrun started, joined: by NCCL on CUDA, else by gloo."""
    if launched_size() == 1:
        yield ALONE
        return
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield World(distributed.get_rank(), distributed.get_world_size())
    finally:
        distributed.destroy_process_group()
