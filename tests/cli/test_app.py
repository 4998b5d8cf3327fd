"""Each kind of error has its exit code, and each thing that is wrong has one line."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
from pathlib import Path

import pytest
from conftest import Run, process_environment, program, refused

import qcompress
from qcompress.cli.app import run as run_arguments
from qcompress.errors import CheckpointError, RecipeError, Refusals


def raise_bug(*_: object, **__: object) -> None:
    raise ZeroDivisionError("made by the test")


def test_version(run: Run) -> None:
    assert run("--version").out == f"qcompress {qcompress.__version__}\n"


COMMAND_LINE = {
    "unknown command": (["qunatize"], "No such command 'qunatize'"),
    "unknown option": (["quantize", "M", "--bist", "2"], "No such option: --bist"),
    "no value": (["quantize", "M", "--bits"], "requires an argument"),
    "no checkpoint": (["quantize", "--bits", "2"], "no checkpoint is given"),
    "no artifact": (["report"], "Missing argument 'ARTIFACT...'"),
    "surplus argument": (["verify", "M", "N"], "unexpected extra argument"),
    "bits as text": (["quantize", "M", "--bits", "two"], "--bits"),
    "bits 0": (["quantize", "M", "--bits", "0"], "--bits 0: 0 is out of range; must be between 1 and 8"),
    "bits 9": (["quantize", "M", "--bits", "9"], "--bits 9: 9 is out of range; must be between 1 and 8"),
    "bits -1": (["quantize", "M", "--bits", "-1"], "--bits -1"),
    "unknown method": (["quantize", "M", "-b", "2", "--method", "squantt"], "did you mean `squant`"),
    "method without bits": (["quantize", "M", "--method", "rtn"], "bits"),
    "unknown granularity": (["quantize", "M", "-b", "2", "--granularity", "chanel"], "channel"),
    "group size of a channel grid": (
        ["quantize", "M", "-b", "2", "--granularity", "channel", "--group-size", "8"],
        "group",
    ),
    "symmetric hqq": (["quantize", "M", "-b", "4", "-m", "hqq", "--symmetric"], "symmetric"),
    "nothing says how": (["quantize", "M"], "add --bits N, or -r RECIPE"),
    "set without recipe": (["quantize", "M", "-b", "2", "--set", "seed=1"], "add -r RECIPE"),
    "threads 0": (["quantize", "M", "-b", "2", "--threads", "0"], "--threads"),
    "size without unit": (["quantize", "M", "-b", "2", "--max-size", "2XB"], "--max-size 2XB"),
    "memory without unit": (["quantize", "M", "-b", "2", "--max-memory", "much"], "--max-memory much"),
    "metric without value": (["quantize", "M", "-b", "2", "--min-metric", "top1"], "top1=0.7"),
    "metric that is no number": (["report", "M", "--max-drop", "top1=nan"], "top1=0.7"),
    "unknown coding": (["quantize", "M", "-b", "2", "--coding", "rar"], "--coding"),
    "unknown device": (["quantize", "M", "-b", "2", "--device", "tpu"], "--device"),
    "HTML and JSON on stdout": (["report", "M", "--format", "html", "--json", "-"], "both say what stdout holds"),
    "JSON over the checkpoint": (["quantize", "M", "-b", "2", "--json", "M"], "is a place for weights"),
    "JSON over an artifact": (["report", "M", "--json", "M"], "is a place for weights"),
    "a recipe's JSON over a checkpoint": (["recipe", "show", "r.yaml", "--json", "M"], "is a place for weights"),
    "unknown format": (["report", "M", "--format", "xml"], "--format"),
    "export without format": (["export", "M"], "--to"),
    "unknown export": (["export", "M", "--to", "safetensor"], "did you mean `safetensors`"),
}


@pytest.mark.parametrize(("arguments", "words"), COMMAND_LINE.values(), ids=COMMAND_LINE)
def test_a_wrong_command_line_is_2_and_one_line(run: Run, checkpoint: Path, arguments: list[str], words: str) -> None:
    given = [str(checkpoint) if argument == "M" else argument for argument in arguments]
    assert words in refused(run, checkpoint.parent, *given, code=2)


def test_no_command_prints_the_help_and_is_2(run: Run) -> None:
    ran = run()
    assert ran.code == 2
    assert "quantize" in ran.out + ran.err


def test_every_wrong_thing_has_a_line_of_its_own(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "wrong.yaml"
    recipe.write_text('version: 1\nrules:\n  - {match: "*", squant: {bit: 2}}\n  - {match: "a", nothing: {}}\n')
    ran = run("quantize", checkpoint, "-r", recipe)
    assert (ran.code, ran.out) == (3, "")
    assert len(ran.err.splitlines()) == len(ran.error_lines) >= 2
    assert "did you mean `bits`" in ran.err
    assert "wrong.yaml:3" in ran.err


def test_a_plan_says_all_its_reasons_at_once(run: Run, checkpoint: Path) -> None:
    ran = run("cluster", checkpoint, "--bits", 2, "--group-size", 48)
    assert (ran.code, ran.out) == (3, "")
    assert [line for line in ran.error_lines if "does not divide" in line] == ran.err.splitlines()
    assert {name for name in ("conv1.weight", "layer.weight", "fc.weight") if name in ran.err} == {
        "conv1.weight",
        "layer.weight",
        "fc.weight",
    }


@pytest.mark.parametrize("method", ["rtn", "mse", "squant", "hqq"])
@pytest.mark.parametrize("coding", ["packed", "ans"])
def test_groups_that_do_not_divide_a_channel_go_all_the_way(
    run: Run, checkpoint: Path, tmp_path: Path, method: str, coding: str
) -> None:
    """27 values a channel of the convolution are less than one group of 64, and 256 are four of 60 and one of 16."""
    for size in (64, 60):
        output = tmp_path / f"{size}.safetensors"
        words = ["--method", method, "--bits", 4, "--group-size", size, "--coding", coding, "-o", output, "--json", "-"]
        ran = run("quantize", checkpoint, *words)
        assert ran.code == 0, ran.err
        for layer in json.loads(ran.out)["layers"]:
            if layer["bits"]:
                groups = layer["shape"][0] * math.ceil(math.prod(layer["shape"][1:]) / size)
                side = {"rtn": 3, "mse": 4, "squant": 4, "hqq": 4}[method]
                assert layer["side_information_bytes"] == groups * side
                assert layer["figures"]["sqnr_db"] > 18
        assert run("verify", output).code == 0
        assert run("export", output, "--to", "safetensors", "-o", tmp_path / f"{size}.dense.safetensors").code == 0


def test_a_bug_is_1_and_one_line(run: Run, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qcompress.cli.run.plan_checkpoint", raise_bug)
    ran = run("quantize", checkpoint, "--bits", 2)
    assert (ran.code, ran.out) == (1, "")
    assert ran.err.count("\n") == 1
    assert ran.err.startswith("bug: ZeroDivisionError: made by the test; run again with -v")


def test_a_bug_shows_its_trace_with_v_only(run: Run, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qcompress.cli.run.plan_checkpoint", raise_bug)
    ran = run("quantize", checkpoint, "--bits", 2, "-v")
    assert ran.code == 1
    assert "Traceback" in ran.err
    assert "raise_bug" in ran.err


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (MemoryError(), 5, "error: memory"),
        (RuntimeError("CUDA out of memory. Tried"), 5, "error: memory"),
        (OSError(28, "No space left on device", "out"), 5, "error: out: No space left on device"),
        (CheckpointError("a", "b", "c"), 3, "error: a: b; c\n"),
        (Refusals([RecipeError("a", "b", "c"), RecipeError("d", "e", "f")]), 3, "error: a: b; c\nerror: d: e; f\n"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_what_is_raised_becomes_its_code(
    run: Run, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, words: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("qcompress.cli.run.plan_checkpoint", fail)
    ran = run("quantize", checkpoint, "--bits", 2)
    assert (ran.code, ran.out) == (code, "")
    assert words in ran.err
    assert "Traceback" not in ran.err


def test_a_command_out_of_memory_names_only_options_that_it_has(
    run: Run, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = checkpoint.with_name("model-w2.safetensors")
    assert run("quantize", checkpoint, "--bits", 2).code == 0

    def fail(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr("qcompress.artifact.reader.read_artifact", fail)
    monkeypatch.setattr("qcompress.cli.run.plan_checkpoint", fail)
    monkeypatch.setattr("qcompress.report.gather.gather_report", fail)
    commands = {"quantize": [checkpoint, "--bits", 2, "-f"], "verify": [artifact], "report": [artifact]}
    for name, words in commands.items():
        (line,) = run(name, *words).error_lines
        known = run(name, "--help").out
        flags = re.findall(r"--[a-z-]+", line)
        assert all(re.search(rf"{flag}\b", known) for flag in flags), line
        assert "--max-memory" in flags


def test_cuda_on_a_machine_without_is_5(run: Run, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    ran = run("quantize", checkpoint, "--bits", 2, "--device", "cuda")
    assert (ran.code, ran.out, len(ran.error_lines)) == (5, "", 1)


@pytest.mark.parametrize("unbuffered", ["", "1"], ids=["buffered", "unbuffered"])
@pytest.mark.parametrize("command", ["report", "help"])
def test_a_closed_pipe_is_141_and_silent(run: Run, checkpoint: Path, command: str, unbuffered: str) -> None:
    assert run("quantize", checkpoint, "--bits", 2).code == 0
    arguments = ["report", checkpoint.with_name("model-w2.safetensors")] if command == "report" else ["--help"]
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        program(*arguments),
        stdout=writer,
        stderr=subprocess.PIPE,
        env=process_environment(PYTHONUNBUFFERED=unbuffered),
        timeout=60,
        check=False,
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


def test_head_of_a_report(shell: Run, run: Run, checkpoint: Path) -> None:
    assert run("quantize", checkpoint, "--bits", 2).code == 0
    ran = shell("qcompress report model-w2.safetensors --format csv | head -1", checkpoint.parent)
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.startswith("artifact,name,shape")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("extra", [[], ["--json", "-"], ["--format", "csv"]], ids=" ".join)
def test_a_full_stdout_is_5(run: Run, run_process: Run, checkpoint: Path, extra: list[str]) -> None:
    assert run("quantize", checkpoint, "--bits", 2).code == 0
    with Path("/dev/full").open("w") as full:
        ran = run_process("report", checkpoint.with_name("model-w2.safetensors"), *extra, stdout=full)
    assert ran.code == 5
    assert len(ran.error_lines) == ran.err.count("\n") == 1
    assert "No space left" in ran.err


def test_the_process_exits_with_the_code(run_process: Run, tmp_path: Path) -> None:
    ran = run_process("verify", tmp_path / "missing.safetensors")
    assert (ran.code, ran.out) == (3, "")
    assert ran.err == f"error: {tmp_path}/missing.safetensors: no such file; check the path\n"


def test_run_leaves_this_process_as_it_was(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (dict(os.environ), Path.cwd())
    assert run_arguments(["quantize", str(checkpoint), "--bits", "2", "--no-color", "-q"]) == 0
    assert (dict(os.environ), Path.cwd()) == before
    assert capsys.readouterr().err == ""
