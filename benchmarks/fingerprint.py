"""What decides the bytes of a run on this machine, and a hash of the weights in an artifact or a checkpoint, as JSON.

    python benchmarks/fingerprint.py [FILE]

A process of its own, so that whoever asks stays small: the largest size of a process counts that of its parent.
"""

from __future__ import annotations

import hashlib
import json
import platform
import sys
from pathlib import Path

import numpy
import torch

from qcompress.checkpoint.checkpoint import read_checkpoint
from qcompress.compress.evaluate import is_artifact
from qcompress.compress.load import checkpoint_state, load_state_dict


def weights_sha256(path: Path) -> str:
    """Of name, shape, dtype and bytes of every tensor that an artifact or a checkpoint holds, in order of names."""
    state = load_state_dict(path) if is_artifact(path) else checkpoint_state(read_checkpoint(path))
    found = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        found.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def main() -> None:
    versions = {"python": platform.python_version(), "numpy": numpy.__version__, "torch": torch.__version__}
    machine = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    weights = weights_sha256(Path(sys.argv[1])) if len(sys.argv) > 1 else None
    print(json.dumps({"machine": machine, "versions": versions, "weights_sha256": weights}))


if __name__ == "__main__":
    main()
