"""Memory held and processor time a token of a language model that computes from codes, beside the dense one.

    python benchmarks/held.py FOLDER --work DIR [--group 64] [--turns 9] [--json FILE|-]

FOLDER is a Llama as Hugging Face saves it. Linear layers have symmetric grids of 4 bits, embeddings of 8, by `rtn`. A
token is one pass of batch 1 without a cache, on one thread; ways take turns, so that a busy machine slows all alike,
and ratios are medians over turns to the dense network of the same dtype.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from timing import render, show

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

WAYS: dict[str, dict[str, Any]] = {
    "float32, dense": {},
    "float32, decode": {"packed": True},
    "float32, compiled decode": {"packed": True, "compiled": True},
    "bfloat16, dense": {"dtype": "bfloat16"},
    "bfloat16, decode": {"dtype": "bfloat16", "packed": True},
    "bfloat16, compiled decode": {"dtype": "bfloat16", "packed": True, "compiled": True},
    "bfloat16, kernel": {"dtype": "bfloat16", "packed": True, "kernel": "auto"},
}


def make_artifact(folder: Path, output: Path, group: int) -> Path:
    import io
    from contextlib import redirect_stderr, redirect_stdout

    from qcompress.cli.app import run

    asked = ["--bits", "4", "--method", "rtn", "--symmetric", "--group-size", str(group)]
    told = io.StringIO()
    with redirect_stdout(told), redirect_stderr(told):
        code = run(["quantize", str(folder), *asked, "--force", "-q", "-o", str(output)])
    if code:
        raise RuntimeError(told.getvalue())
    return output


def make_network(
    folder: Path,
    artifact: Path,
    dtype: str = "float32",
    packed: bool = False,
    compiled: bool = False,
    kernel: str = "decode",
) -> tuple[Callable[[Any], Any], int]:
    """What computes a network from an artifact, and the bytes that it holds."""
    import torch

    import qcompress
    from qcompress.data.user_code import import_package
    from qcompress.runtime.load_packed import held_bytes

    library = import_package("transformers")
    config = library.LlamaConfig(**json.loads((folder / "config.json").read_text()) | {"use_cache": False})
    network = library.LlamaForCausalLM(config).to(getattr(torch, dtype)).eval()
    qcompress.load_into(network, artifact, packed=packed, **({"kernel": kernel} if packed else {}))
    return torch.compile(network, fullgraph=True) if compiled else network, held_bytes(network)


def measure(folder: Path, artifact: Path, turns: int) -> list[dict[str, Any]]:
    import torch

    torch.set_num_threads(1)
    token = torch.tensor([[7]])
    made = {way: make_network(folder, artifact, **options) for way, options in WAYS.items()}
    seconds: dict[str, list[float]] = {way: [] for way in made}
    with torch.no_grad():
        for network, _ in made.values():
            network(token)
        for _ in range(turns):
            for way, (network, _) in made.items():
                begun = time.process_time()
                network(token)
                seconds[way].append(time.process_time() - begun)
    rows = []
    for way, (_, n_bytes) in made.items():
        dense = f"{way.partition(',')[0]}, dense"
        ratios = [own / plain for own, plain in zip(seconds[way], seconds[dense], strict=True)]
        rows.append(
            {
                "name": way,
                "MB": n_bytes / 1e6,
                "times smaller": made[dense][1] / n_bytes,
                "ms": 1000 * statistics.median(seconds[way]),
                "ratio": statistics.median(ratios),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--json", metavar="FILE|-")
    options = parser.parse_args()
    options.work.mkdir(exist_ok=True, parents=True)
    artifact = make_artifact(options.folder, options.work / f"{options.folder.name}-held", options.group)
    rows = measure(options.folder, artifact, options.turns)
    show(rows, render(rows), options.json)


if __name__ == "__main__":
    main()
