"""Completion in a shell: commands, options, methods and formats."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import Run

from qcompress.registry import EXPORTERS, METHODS

METHOD_FLAG = "qcompress quantize m.safetensors --method "


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("qcompress ", {"quantize", "cluster", "finetune-reg", "eval", "report", "verify", "export", "demo", "recipe"}),
        ("qcompress qu", {"quantize"}),
        ("qcompress recipe ", {"check", "show", "schema"}),
        (METHOD_FLAG, {name for name, method in METHODS.items() if method.family == "quantize"}),
        (f"{METHOD_FLAG}sq", {"squant"}),
        ("qcompress export a.safetensors --to ", set(EXPORTERS)),
        ("qcompress quantize m.safetensors --coding ", {"auto", "packed", "zstd", "ans"}),
        ("qcompress quantize m.safetensors --max-", {"--max-size", "--max-bpw", "--max-drop", "--max-memory"}),
    ],
)
def test_bash_is_offered(run_process: Run, line: str, offered: set[str]) -> None:
    words = line.split()
    position = len(words) if line.endswith(" ") else len(words) - 1
    ran = run_process(
        env={"_QCOMPRESS_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(position)},
    )
    assert set(ran.out.split()) == offered
    assert ran.err == ""


def test_the_script_for_bash_completes_methods(shell: Run, tmp_path: Path) -> None:
    script = (
        "qcompress --show-completion > complete.sh; source complete.sh;"
        "COMP_WORDS=(qcompress quantize m --method h); COMP_CWORD=4;"
        "$(complete -p qcompress | sed 's/.*-F \\([^ ]*\\).*/\\1/') qcompress; echo ${COMPREPLY[@]}"
    )
    ran = shell(script, tmp_path)
    assert (ran.out, ran.err) == ("hqq\n", "")
