"""What reports of a network of 1,000 layers take: processor seconds of whole commands, and the size of the page.

python benchmarks/many_layers.py [--layers 1000]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from startup import cpu_seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=1000)
    layers = parser.parse_args().layers
    random = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint, artifact = Path(folder, "m.safetensors"), Path(folder, "a.safetensors")
        page = artifact.with_suffix(".html")
        weights = {f"layers.{i}.weight": random.standard_normal((64, 64)).astype(np.float32) for i in range(layers)}
        save_file(weights, checkpoint)
        call = ["-m", "qcompress"]
        steps = {
            "quantize --bits 3": ["quantize", str(checkpoint), "--bits", "3", "-q", "-o", str(artifact)],
            "quantize --bpw 3.3 --method squant": [
                *("quantize", str(checkpoint), "--bpw", "3.3", "--method", "squant"),
                *("-q", "-f", "-o", str(artifact)),
            ],
            "report, the stored figures": ["report", str(artifact)],
            "report --format html": ["report", str(artifact), "--format", "html", "-o", str(page), "-q"],
        }
        sys.stdout.write(f"{layers} layers of 4,096 weights\n{'command':36}{'cpu s':>8}\n")
        for name, words in steps.items():
            sys.stdout.write(f"{name:36}{cpu_seconds([*call, *words]):8.2f}\n")
        sys.stdout.write(f"the page: {page.stat().st_size / 1e6:.2f} MB\n")


if __name__ == "__main__":
    main()
