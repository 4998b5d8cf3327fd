"""Chunks among processes: the same codes, the same errors, and processes only where they pay."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from streamed import streams_of

from qcompress.artifact.reader import read_artifact
from qcompress.cli.app import run
from qcompress.coding import ans as jobs
from qcompress.coding.ans import (
    CHUNK_CODES,
    JOB_CHUNKS,
    decoding_processes,
    encode_ans,
    fit_table,
    run_jobs,
)
from qcompress.coding.compiled import Compiler
from qcompress.coding.packing import count_codes, pack, row_bytes
from qcompress.coding.payload import decode_payload
from qcompress.coding.stored import in_memory
from qcompress.coding.unbounded.streams import stream_tiles
from qcompress.coding.unbounded.tables import fit_pool, make_source
from qcompress.compress.load import load_state_dict
from qcompress.errors import ResourceError
from qcompress.types.encoded import Unbounded

ROWS, COLUMNS = 4200, 1024
CHUNKS = -(-ROWS // (CHUNK_CODES // COLUMNS))


@pytest.fixture(scope="module")
def executor() -> Iterator[Executor]:
    with ProcessPoolExecutor(2, get_context("spawn")) as made:
        yield made


def test_the_matrix_is_shared() -> None:
    assert CHUNKS >= 2 * JOB_CHUNKS
    assert CHUNKS % JOB_CHUNKS, "the last job has fewer chunks"


@pytest.mark.parametrize("trellis", [False, True])
def test_unbounded_codes(executor: Executor, trellis: bool) -> None:
    random = np.random.default_rng(3)
    codes = np.round(random.laplace(size=(ROWS, COLUMNS)) * 2).astype(np.int32)
    # Chunks of all three widths of integers.
    codes[300:560] *= 40
    codes[2000, 7] = 1_000_000
    unbounded = Unbounded(
        codes=torch.from_numpy(codes),
        step=torch.tensor(1.0, dtype=torch.float16),
        exponent=0,
        shape=codes.shape,
        trellis=trellis,
        axis=(0,),
        dtype="F32",
    )
    source = make_source(unbounded)
    pool, _ = fit_pool([source])
    payload = streams_of(source, pool)
    about = (source.shape, pool.levels[0], pool.tables, trellis, executor)
    found = np.zeros_like(codes)
    for rows, columns, tile in stream_tiles(in_memory(payload), *about):
        found[rows, columns] = tile
    assert np.array_equal(found, codes)
    with pytest.raises(ValueError, match=r"raw bits|end where|no code needs"):
        list(stream_tiles(in_memory(payload + b"\1"), *about))


def test_packed_codes(executor: Executor) -> None:
    codes = np.random.default_rng(4).binomial(7, 0.3, (ROWS, COLUMNS)).astype(np.uint8)
    packed = pack(codes, 3)
    assert packed.shape == (ROWS, row_bytes(COLUMNS, 3))
    payload = encode_ans(packed, 3, COLUMNS, fit_table(count_codes(packed, 3, COLUMNS)))
    assert np.array_equal(decode_payload(payload, "ans", 3, ROWS, COLUMNS, executor), packed)


_INHERITED: list[bool] = []


def _inherited() -> list[bool]:
    return _INHERITED


def _process(_: int) -> int:
    return os.getpid()


def _end(_: int) -> None:
    os._exit(1)


def test_a_process_that_dies_is_an_error_of_the_machine() -> None:
    with (
        ProcessPoolExecutor(1, get_context("spawn")) as mortal,
        pytest.raises(ResourceError, match="--threads 1"),
    ):
        list(run_jobs(_end, [1], 2 * JOB_CHUNKS, mortal))


@pytest.mark.slow
def test_a_matrix_of_few_chunks_stays_in_this_process(executor: Executor) -> None:
    assert list(run_jobs(_process, [1, 2], 2 * JOB_CHUNKS - 1, executor)) == [os.getpid()] * 2
    assert os.getpid() not in list(run_jobs(_process, [1, 2], 2 * JOB_CHUNKS, executor))


@pytest.mark.slow
def test_processes_are_started_anew_where_they_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forked ones would inherit locks that torch's threads hold."""
    monkeypatch.setattr(Compiler, "pays", lambda *_: False)
    with decoding_processes(jobs.LEAST_CODES, 2) as executor:
        assert executor is not None
        _INHERITED.append(True)
        assert executor.submit(_inherited).result() == []
        _INHERITED.clear()


def test_threads_share_the_work_of_compiled_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Compiler, "pays", lambda *_: True)
    monkeypatch.setattr(Compiler, "of", lambda _, kernel: None)
    codes = np.random.default_rng(4).binomial(7, 0.3, (2 * JOB_CHUNKS, CHUNK_CODES)).astype(np.uint8)
    packed = pack(codes, 3)
    payload = encode_ans(packed, 3, CHUNK_CODES, fit_table(count_codes(packed, 3, CHUNK_CODES)))
    with decoding_processes(jobs.LEAST_CODES, 2) as executor:
        assert isinstance(executor, ThreadPoolExecutor)
        assert np.array_equal(decode_payload(payload, "ans", 3, *codes.shape, executor), packed)


def test_no_processes_where_they_do_not_pay() -> None:
    with decoding_processes(jobs.LEAST_CODES, 1) as one, decoding_processes(jobs.LEAST_CODES - 1, 8) as few:
        assert one is None
        assert few is None


@pytest.mark.slow
def test_artifacts_are_read_the_same_with_and_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"wide.weight": torch.randn(ROWS, COLUMNS, generator=torch.manual_seed(0))}, tmp_path / "m.safetensors")
    assert run(["quantize", str(tmp_path / "m.safetensors"), "--bits", "3", "--coding", "ans"]) == 0
    artifact = tmp_path / "m-w3.safetensors"
    alone = load_state_dict(artifact)
    assert run(["export", str(artifact), "--to", "safetensors", "-o", str(tmp_path / "alone.safetensors")]) == 0
    monkeypatch.setattr(jobs, "LEAST_CODES", 0)
    with read_artifact(artifact).decoding_with(2) as shared:
        assert shared.files[0].executor is not None
    together = load_state_dict(artifact, workers=2)
    assert together.keys() == alone.keys()
    assert torch.equal(together["wide.weight"], alone["wide.weight"])
    assert run(["verify", str(artifact), "--threads", "2"]) == 0
    words = ["export", str(artifact), "--to", "safetensors", "--threads", "2"]
    assert run([*words, "-o", str(tmp_path / "together.safetensors")]) == 0
    assert (tmp_path / "alone.safetensors").read_bytes() == (tmp_path / "together.safetensors").read_bytes()
