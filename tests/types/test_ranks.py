"""Ranks of a run: how torchrun names them, which samples and which work are whose, and what they tell one another."""

from __future__ import annotations

import importlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from worlds import together

from qcompress.data.augment import Draw
from qcompress.data.batches import Batch, Batches
from qcompress.errors import UsageError
from qcompress.training.loop import Data
from qcompress.types.ranks import ALONE, World, deal, join_world, launched_here, launched_rank, launched_size


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
    assert ALONE.exchange(b"abc") == [b"abc"] and ALONE.tell({"a": [1, None]}) == [{"a": [1, None]}]
    assert ALONE.spread([3, 1], int, lambda item: 2 * item) == [6, 2]
    assert World(0, 3).is_first and not World(2, 3).is_first


@given(st.lists(st.integers(0, 100), max_size=30), st.integers(1, 6))
def test_things_are_dealt_out_whole_and_evenly(sizes: list[int], count: int) -> None:
    hands = deal(sizes, count)
    assert sorted(place for hand in hands for place in hand) == [*range(len(sizes))]
    assert all(hand == sorted(hand) for hand in hands)
    totals = [sum(sizes[place] for place in hand) for hand in hands]
    # Whoever got a thing had the least before it.
    assert max(totals) - min(totals) <= max(sizes, default=0)
    assert [World(rank, count).share(sizes) for rank in range(count)] == hands


@given(st.lists(st.integers(0, 9), max_size=7), st.integers(1, 4))
def test_what_is_spread_is_done_once_and_told_to_all(items: list[int], size: int) -> None:
    done: list[int] = []

    def doubled(item: int) -> int:
        done.append(item)
        return 2 * item

    told = together(size, lambda world: world.spread(items, lambda item: item, doubled))
    assert told == [[2 * item for item in items]] * size
    assert sorted(done) == sorted(items)


def test_torchrun_says_who_one_is(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert (launched_rank(), launched_size()) == (0, 1)
    with join_world("cpu") as world:
        assert world is ALONE and not torch.distributed.is_initialized()
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert (launched_rank(), launched_size(), launched_here()) == (2, 4, 2)
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "")
    assert (launched_rank(), launched_size()) == (0, 1)


def test_a_world_that_torchrun_did_not_start_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Schedulers of clusters set WORLD_SIZE too."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with (
        pytest.raises(UsageError, match=r"^WORLD_SIZE: is 2, and RANK, MASTER_ADDR, MASTER_PORT .* not set"),
        join_world("cpu"),
    ):
        pass


def test_ranks_that_are_started_again_hear_nothing_of_those_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun keeps one store for all restarts; in it stands where to find ranks that are gone."""
    from torch.distributed import HashStore

    store = HashStore()
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    # The package holds a function of the module's name.
    module = importlib.import_module("torch.distributed.rendezvous")
    monkeypatch.setattr(module, "rendezvous", lambda _: iter([(store, 0, 1)]))
    for attempt in range(2):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(attempt))
        with join_world("cpu") as world:
            assert world.store is not None
            assert not world.store.check(["left"])
            world.store.set("left", "here")
            world.check()
