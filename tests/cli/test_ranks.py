"""`quantize` and `cluster` under torchrun: real processes that meet by gloo, fail together, and are restarted."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from artifact.examples import gaussian, save
from conftest import Run, files_under, run_ranks

pytestmark = pytest.mark.slow

KILLED_ONCE = """
import os, signal
from qcompress.cli.app import main
from qcompress.encode.journal import Journal

append = Journal.append

def append_and_die(journal, record):
    append(journal, record)
    if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)

Journal.append = append_and_die
main()
"""


def weights(count: int = 6) -> dict[str, torch.Tensor]:
    return {f"layer{index}.weight": gaussian(40 + index, 500, seed=index) for index in range(count)}


def test_three_processes_write_what_one_writes(run: Run, tmp_path: Path) -> None:
    source, output = save(tmp_path / "model.safetensors", weights()), tmp_path / "a.safetensors"
    assert run("quantize", source, "--bits", 3, "-o", output).code == 0
    alone = output.read_bytes()
    output.unlink()
    (tmp_path / "a.report.json").unlink()
    done = run_ranks(3, "quantize", source, "--bits", 3, "-o", output, "-q")
    assert (done.code, done.out) == (0, f"{output}\n"), done.err
    assert output.read_bytes() == alone
    assert set(files_under(tmp_path)) == {"model.safetensors", "a.safetensors", "a.report.json"}


def test_an_error_of_one_process_is_told_once_and_ends_all(tmp_path: Path) -> None:
    broken = {**weights(), "layer3.weight": torch.full((43, 500), torch.nan)}
    source = save(tmp_path / "model.safetensors", broken)
    done = run_ranks(2, "quantize", source, "--bits", 3, "-o", tmp_path / "a.safetensors")
    assert done.code != 0 and done.out == ""
    assert re.findall(r"^(error|bug|terminated).*", done.err, re.MULTILINE) == ["error"]
    assert re.search(r"^error: .*layer3.weight.*NaN", done.err, re.MULTILINE)
    # What torchrun saw: both have left with the exit code of the error.
    assert set(re.findall(r"exitcode +: (-?\d+)", done.err)) == {"3"}
    assert set(files_under(tmp_path)) == {"model.safetensors"}


def test_a_killed_process_is_restarted_and_goes_on_to_the_same_bytes(run: Run, tmp_path: Path) -> None:
    source, output = save(tmp_path / "model.safetensors", weights()), tmp_path / "a.safetensors"
    assert run("cluster", source, "--bits", 3, "-o", output).code == 0
    alone = output.read_bytes()
    script = tmp_path / "killed_once.py"
    script.write_text(KILLED_ONCE)
    words = ["cluster", source, "--bits", 3, "-o", output, "--force", "--resume", "-q"]
    done = run_ranks(2, *words, restarts=1, script=script)
    assert done.code == 0, done.err
    assert output.read_bytes() == alone
    assert "SIGKILL" in done.err or "-9" in done.err, "a process was killed"
