"""States between blocks are the same from a file."""

from __future__ import annotations

import errno
import gc
import os
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from qcompress.data.batches import Batch
from qcompress.errors import ResourceError
from qcompress.model.filed import SMALLEST_BYTES, FiledStates
from qcompress.model.stages import BlockState

NUMBERS = SMALLEST_BYTES // 4


def state(seed: int) -> BlockState:
    torch.manual_seed(seed)
    hidden = torch.randn(2, NUMBERS)
    waves = (torch.randn(NUMBERS, dtype=torch.float64), torch.randn(3))
    mask = torch.rand(SMALLEST_BYTES) > 0.5
    kwargs = {"waves": waves, "mask": mask, "half": torch.randn(2, NUMBERS).bfloat16(), "cache": None, "scale": 0.5}
    return BlockState(Batch((torch.arange(4),)), (hidden, torch.randn(NUMBERS, 2).T), kwargs, (hidden, None))


def assert_equal(found: Any, wanted: Any) -> None:
    torch.testing.assert_close(found.args, wanted.args, rtol=0, atol=0)
    torch.testing.assert_close({**found.kwargs, "cache": 0}, {**wanted.kwargs, "cache": 0}, rtol=0, atol=0)
    assert found.kwargs["cache"] is None and found.output[1] is None
    assert torch.equal(found.output[0], wanted.output[0]) and found.batch is not None


def test_states_come_back_as_they_were(tmp_path: Path) -> None:
    states = [state(seed) for seed in range(3)]
    filed = FiledStates(tmp_path)
    for one in states:
        filed.append(one)
    for found, wanted in zip(filed, states, strict=True):
        assert_equal(found, wanted)
        assert [x.stride() for x in found.args] == [x.stride() for x in wanted.args]
    for found, wanted in zip(filed[1:], states[1:], strict=True):
        assert_equal(found, wanted)


def test_what_is_one_tensor_stays_one(tmp_path: Path) -> None:
    filed = FiledStates(tmp_path)
    filed.append(state(0))
    found = filed[0]
    assert found.args[0] is found.output[0]


def test_large_tensors_are_not_held_and_the_file_has_no_name(tmp_path: Path) -> None:
    filed, whole = FiledStates(tmp_path), state(0)
    filed.append(whole)
    hidden = weakref.ref(whole.args[0])
    del whole
    gc.collect()
    assert hidden() is None
    assert not [*tmp_path.iterdir()]


def test_a_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filed = FiledStates(tmp_path)

    class Full:
        def seek(self, _: int) -> None: ...

        def write(self, _: memoryview) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(filed, "_file", Full())
    with pytest.raises(ResourceError, match="No space left"):
        filed.append(state(0))


def test_a_folder_that_takes_no_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="none"):
        FiledStates(tmp_path / "none")
