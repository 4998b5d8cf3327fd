"""Ranks of a data-parallel run: how torchrun names them, and which samples are whose."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from qcompress.data.augment import Draw
from qcompress.data.batches import Batch, Batches
from qcompress.training.loop import Data
from qcompress.training.parallel import ALONE, World, join_world, launched_rank, launched_size


def drawn(samples: int, batch_size: int, world: World, seed: int = 0) -> list[list[int]]:
    """The numbers of the samples of every batch that a rank trains on."""
    batches = Batches(samples, batch_size, lambda chosen: Batch((torch.tensor(list(chosen)),)))
    steps = batches.shuffled(torch.Generator().manual_seed(seed), world.size)
    data = Data(batches)
    return [data.read(step, Draw(seed, "", "", world.rank, world.size)).args[0].tolist() for step in steps]


@given(st.integers(1, 40), st.integers(1, 5), st.integers(1, 4), st.integers(0, 5))
def test_ranks_share_an_epoch_without_overlap(samples: int, batch_size: int, size: int, seed: int) -> None:
    shares = [drawn(samples, batch_size, World(rank, size), seed) for rank in range(size)]
    assert len({len(share) for share in shares}) == 1, "all ranks take as many steps"
    flat = [sample for share in shares for batch in share for sample in batch]
    assert len(flat) == len(set(flat)) and set(flat) <= set(range(samples))
    assert len(shares[0]) == samples // size // batch_size


@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 5))
def test_together_they_draw_what_one_process_with_the_whole_batch_draws(batch_size: int, size: int, seed: int) -> None:
    samples = 3 * batch_size * size + 1
    alone = drawn(samples, batch_size * size, ALONE, seed)
    shares = [drawn(samples, batch_size, World(rank, size), seed) for rank in range(size)]
    for step, whole in enumerate(alone):
        assert sorted(sample for share in shares for sample in share[step]) == sorted(whole)


def test_one_rank_alone_needs_nothing() -> None:
    module, value = nn.Linear(2, 2), torch.tensor(3.0)
    assert ALONE.is_first and ALONE.wrap(module) is module and ALONE.mean(value) is value
    ALONE.wait()
    assert World(0, 3).is_first and not World(2, 3).is_first


def test_torchrun_says_who_one_is(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert (launched_rank(), launched_size()) == (0, 1)
    with join_world(torch.device("cpu")) as world:
        assert world is ALONE and not torch.distributed.is_initialized()
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert (launched_rank(), launched_size()) == (2, 4)
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "")
    assert (launched_rank(), launched_size()) == (0, 1)
