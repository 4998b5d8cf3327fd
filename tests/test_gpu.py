"""The script that holds a GPU against the CPU runs through on the CPU, which is equal to itself."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from qcompress.registry import METHODS


@pytest.mark.slow
def test_the_script_for_a_gpu_runs_through_on_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers", exc_type=ModuleNotFoundError)
    spec = importlib.util.spec_from_file_location("gpu", ROOT / "benchmarks" / "gpu.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu", script)
    spec.loader.exec_module(script)
    page = tmp_path / "gpu.md"
    words = ["gpu.py", str(page), "--device", "cpu", "--small", "--methods", "gptq", "--networks", "Llama"]
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(SystemExit) as ended:
        script.main()
    assert ended.value.code == 0
    rows = [line.strip("| ").split(" | ") for line in page.read_text().splitlines() if line.startswith("| ")]
    (equal,) = [row for row in rows if row[0] == "gptq"]
    assert equal[1] == equal[2] and equal[3:] == ["1", "True"]
    assert [row[2] for row in rows if row[0] == "Llama"] == ["rd", "gptq", "adaround", "lsq"]


def test_every_method_has_a_case() -> None:
    """So that a new one is not forgotten; `learned` takes up what another command has trained."""
    text = (ROOT / "benchmarks" / "gpu.py").read_text()

    assert all(f'    "{name}": Case(' in text for name in METHODS if not METHODS[name].representatives)
