"""`qcompress verify`."""

from __future__ import annotations

import json
from pathlib import Path

from conftest import Run


def test_it_says_what_it_checked(run: Run, checkpoint: Path) -> None:
    assert run("quantize", checkpoint, "--bits", 3).code == 0
    artifact = checkpoint.with_name("model-w3.safetensors")
    ran = run("verify", artifact)
    assert (ran.code, ran.out) == (0, f"{artifact}: sound, 3 compressed and 3 kept tensors\n")
    assert run("verify", artifact, "-q").out == f"{artifact}\n"
    document = json.loads(run("verify", artifact, "--json", "-").out)
    assert document["bytes"] == artifact.stat().st_size
    assert (document["compressed_tensors"], document["kept_tensors"]) == (3, 3)
