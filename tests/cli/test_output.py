"""What goes to stdout, what to stderr, and what a terminal gets."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
from pathlib import Path

import pytest
from conftest import Run, process_environment, program, small_tensors, write_checkpoint

from qcompress.cli.output import _PlainProgress

ESCAPE = "\x1b"


@pytest.fixture
def artifact(run: Run, checkpoint: Path) -> Path:
    assert run("quantize", checkpoint, "--bits", 2).code == 0
    return checkpoint.with_name("model-w2.safetensors")


def on_terminal(*arguments: object, **env: str) -> str:
    """What a command writes to a terminal that holds its stdout and its stderr."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(program(*arguments), stdout=theirs, stderr=theirs, env=process_environment(**env))
    os.close(theirs)
    pieces = []
    try:
        while piece := os.read(ours, 1 << 16):
            pieces.append(piece)
    except OSError:
        pass  # Linux says so where another system reads an empty piece: the other end is closed.
    finally:
        os.close(ours)
    assert process.wait(60) == 0
    return b"".join(pieces).decode()


def test_the_table_is_on_stdout_and_nothing_else_is_anywhere(run: Run, checkpoint: Path) -> None:
    ran = run("quantize", checkpoint, "--bits", 2)
    assert ran.code == 0
    assert ran.out.startswith("model-w2.safetensors\n")
    assert "layer.weight" in ran.out
    assert ran.err == ""


def test_quiet_prints_the_path_alone(run: Run, checkpoint: Path) -> None:
    output = checkpoint.with_name("model-w2.safetensors")
    assert run("quantize", checkpoint, "--bits", 2, "-q") == (ran := run("quantize", checkpoint, "-b", 2, "-qf"))
    assert ran.out == f"{output}\n"
    assert ran.err == ""


def test_quiet_suits_a_shell_variable(shell: Run, checkpoint: Path) -> None:
    ran = shell(
        "set -e; OUT=$(qcompress quantize model.safetensors --bits 2 -q); test -f $OUT; echo $OUT", checkpoint.parent
    )
    assert (ran.code, ran.out, ran.err) == (0, "model-w2.safetensors\n", "")


@pytest.mark.parametrize(
    ("arguments", "schema"),
    [
        (["quantize", "CHECKPOINT", "--bits", 3], "qcompress.report/1"),
        (["quantize", "CHECKPOINT", "--bits", 3, "--dry-run"], "qcompress.plan/1"),
        (["report", "ARTIFACT"], "qcompress.report/1"),
        (["report", "ARTIFACT", "--format", "json"], "qcompress.report/1"),
        (["report", "ARTIFACT", "ARTIFACT"], "qcompress.comparison/1"),
        (["verify", "ARTIFACT"], "qcompress.verify/1"),
        (["recipe", "show", "RECIPE"], None),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else None,
)
def test_json_is_one_document_alone(
    run: Run, artifact: Path, checkpoint: Path, tmp_path: Path, arguments: list[object], schema: str | None
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text('version: 1\nrules: [{match: "*", rtn: {bits: 4}}]\n')
    places = {"CHECKPOINT": checkpoint, "ARTIFACT": artifact, "RECIPE": recipe}
    ran = run(*(places.get(str(argument), argument) for argument in arguments), "--json", "-")
    assert (ran.code, ran.err) == (0, "")
    document = json.loads(ran.out)
    assert isinstance(document, dict)
    assert document.get("schema") == schema


def test_json_to_a_file_leaves_the_table_on_stdout(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    ran = run("quantize", checkpoint, "--bits", 2, "--json", tmp_path / "out.json")
    assert ran.out.startswith("model-w2.safetensors\n")
    written = json.loads((tmp_path / "out.json").read_text())
    assert written == json.loads((tmp_path / "model-w2.report.json").read_text())


@pytest.mark.parametrize("command", [["quantize", "--bits", 2], ["report"], ["verify"]], ids=lambda words: words[0])
def test_json_on_stdout_and_quiet_refuse_each_other(run: Run, artifact: Path, command: list[object]) -> None:
    ran = run(*command, artifact, "--json", "-", "-q")
    assert (ran.code, ran.out) == (2, "")
    assert ran.err == "error: --json - --quiet: both say what stdout holds; give one of them, or --json FILE\n"


def test_json_on_stdout_refuses_another_format(run: Run, artifact: Path) -> None:
    ran = run("report", artifact, "--json", "-", "--format", "csv")
    assert (ran.code, ran.out, len(ran.error_lines)) == (2, "", 1)


def test_a_terminal_gets_colour(artifact: Path) -> None:
    assert ESCAPE in on_terminal("report", artifact, TERM="xterm")


@pytest.mark.parametrize(
    ("flags", "env"),
    [([], {"NO_COLOR": "1", "TERM": "xterm"}), ([], {"TERM": "dumb"}), (["--no-color"], {"TERM": "xterm"})],
    ids=["NO_COLOR", "dumb", "--no-color"],
)
@pytest.mark.parametrize("command", ["report", "help"])
def test_no_escape_codes_where_they_are_unwanted(
    artifact: Path, command: str, flags: list[str], env: dict[str, str]
) -> None:
    arguments = ["report", artifact] if command == "report" else ["report", "--help"]
    text = on_terminal(*arguments, *flags, **env)
    assert ("worst layer" if command == "report" else "Usage") in text
    assert ESCAPE not in text


@pytest.mark.slow
def test_progress_is_drawn_on_a_terminal_unless_unwanted(checkpoint: Path) -> None:
    wanted = on_terminal("quantize", checkpoint, "--bits", 2, TERM="xterm")
    assert "100%" in wanted
    unwanted = on_terminal("quantize", checkpoint, "--bits", 2, "-f", TERM="xterm", NO_COLOR="1")
    assert ESCAPE not in unwanted
    assert "100%" not in unwanted


@pytest.mark.slow
def test_progress_on_a_terminal_never_reaches_stdout(checkpoint: Path) -> None:
    ours, theirs = pty.openpty()
    environment = process_environment(TERM="xterm")
    done = subprocess.run(
        program("quantize", checkpoint, "--bits", 2, "--json", "-"),
        stdout=subprocess.PIPE,
        stderr=theirs,
        env=environment,
        timeout=60,
        check=True,
    )
    os.close(theirs)
    drawn = os.read(ours, 1 << 16).decode()
    os.close(ours)
    assert ESCAPE in drawn
    assert json.loads(done.stdout)["artifact"]["name"] == "model-w2.safetensors"


def test_a_log_gets_a_plain_line_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr("qcompress.cli.output.time.monotonic", lambda: clock[0])
    progress = _PlainProgress(1000, 10.0)
    for step in range(1, 11):
        clock[0] = 3.0 * step
        progress.advance(f"layer{step}", 100)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == ["40% after layer4, about 18 s left", "80% after layer8, about 6 s left"]


def test_what_is_done_again_starts_at_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr("qcompress.cli.output.time.monotonic", lambda: clock[0])
    progress = _PlainProgress(1000, 0.0)
    for step in range(1, 31):
        clock[0] = 3.0 * step
        progress.advance("layer", 100)
    shares = [int(line.partition("%")[0]) for line in capsys.readouterr().err.splitlines()]
    assert shares == [*range(10, 101, 10)] * 3


def test_warnings_go_to_stderr(run: Run, artifact: Path) -> None:
    report = artifact.with_name("model-w2.report.json")
    report.write_text(re.sub(r'("sha256": ")[0-9a-f]{4}', r"\g<1>0000", report.read_text()))
    ran = run("report", artifact, "--json", "-")
    assert ran.code == 0
    assert ran.err.startswith("warning: model-w2.report.json belongs to another artifact")
    assert json.loads(ran.out)["artifact"]["name"] == artifact.name


def test_a_closed_stdout_or_stderr_is_no_bug(shell: Run, artifact: Path) -> None:
    ran = shell("qcompress report model-w2.safetensors >&-; echo $?", artifact.parent)
    assert (ran.out, ran.err) == ("0\n", "")
    ran = shell("qcompress report missing.safetensors 2>&-; echo $?", artifact.parent)
    assert (ran.out, ran.err) == ("3\n", "")


def test_a_name_cannot_write_escape_codes(run: Run, tmp_path: Path) -> None:
    tensors = {f"{ESCAPE}[31m{name}": tensor for name, tensor in small_tensors().items()}
    checkpoint = write_checkpoint(tmp_path / "model.safetensors", tensors)
    for extra in (["--dry-run"], []):
        ran = run("quantize", checkpoint, "--bits", 2, *extra)
        assert ran.code == 0
        assert ESCAPE not in ran.out
    ran = run("cluster", checkpoint, "--bits", 2, "--granularity", "group", "--group-size", 7, "-f")
    assert ran.code == 3
    assert ESCAPE not in ran.err


def test_verbose_names_each_tensor_on_stderr(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    quiet = run("quantize", checkpoint, "--bits", 2, "-q", "-o", tmp_path / "a.safetensors")
    verbose = run("quantize", checkpoint, "--bits", 2, "-q", "-v", "-o", tmp_path / "b.safetensors")
    assert quiet.err == ""
    assert verbose.out == f"{tmp_path / 'b.safetensors'}\n"
    assert [line.split(" after ")[1].split(",")[0] for line in verbose.err.splitlines()] != []
    for name in small_tensors():
        assert f" after {name}," in verbose.err


def test_a_stdout_in_ascii_gets_escapes_and_sound_json(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "m.safetensors", {"größe.😀.weight": small_tensors()["layer.weight"]})
    env = process_environment(PYTHONIOENCODING="ascii")
    words = program("quantize", checkpoint, "--bits", 2, "-o", tmp_path / "ä.safetensors", "-f")
    plain = subprocess.run(words, env=env, capture_output=True, check=False)
    assert plain.returncode == 0 and plain.stdout.isascii()
    assert b"gr\\xf6\\xdfe" in plain.stdout
    found = subprocess.run([*words, "--json", "-"], env=env, capture_output=True, check=False)
    assert found.returncode == 0 and found.stdout.isascii()
    assert [layer["name"] for layer in json.loads(found.stdout)["layers"]] == ["größe.😀.weight"]


@pytest.mark.parametrize(
    ("words", "code"), [(["--bits", 2, "-v"], 0), (["--bits", 9], 2), (["--bits", 2, "-r", "x"], 2)]
)
def test_a_full_stderr_changes_no_exit_code(checkpoint: Path, words: list[object], code: int) -> None:
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            program("quantize", checkpoint, *words, "-f"),
            env=process_environment(),
            stdout=subprocess.PIPE,
            stderr=full,
            check=False,
        )
    assert done.returncode == code
    assert bool(done.stdout) == (code == 0)
