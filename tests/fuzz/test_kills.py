"""Commands that are killed leave what they promise, and the next run ends as if nothing had been."""

from __future__ import annotations

from pathlib import Path

import pytest

from fuzz import kills
from fuzz.kills import kill, prepare, scenarios

SAMPLES = 2
"""Calls that change a file, of each command, which are looked at here; `python -m fuzz.kills` looks at all."""


@pytest.mark.slow
@pytest.mark.parametrize("name", scenarios())
def test_a_killed_command_leaves_old_new_or_nothing(name: str, tmp_path: Path) -> None:
    bench = prepare(name, scenarios()[name], tmp_path)
    assert bench.calls > 5
    found = [*kills.kills(bench, bench.calls // SAMPLES, offset=len(name))]
    assert len(found) >= 2 * SAMPLES
    for one in found:
        assert one.faults == (), f"{one.moment}: {one.faults}"


def test_a_killer_sees_an_output_that_is_written_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command that wrote its report where it lies, and in two parts, would be found out."""
    from qcompress.cli import output as commands

    def write_in_place(text: str, json_to: str) -> None:
        with Path(json_to).open("w") as file:
            file.write(text[:100])
            file.flush()
            Path("between").mkdir(exist_ok=True)
            file.write(text[100:])

    monkeypatch.setattr(commands, "write_text", write_in_place)
    bench = prepare("file", scenarios()["file"], tmp_path)
    faults = [kill(bench, (call, False)).faults for call in range(max(1, bench.calls - 6), bench.calls + 1)]
    assert any("j.json is neither old, new nor absent" in fault for found in faults for fault in found)
