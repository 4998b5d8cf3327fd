"""What `offload: blocks` takes for Llamas of several depths, and whether killed runs end in the same bytes.

    python benchmarks/offload.py --work DIR [--layers 4 8] [--hidden 1024 --inner 2816] [--kills 2]
    python benchmarks/offload.py --work DIR --layers 22 --hidden 2048 --inner 5632 --max-memory 3GB
    python benchmarks/offload.py --work DIR --method rd --hidden 256 --inner 704 --vocabulary 4096

Each is quantized by gptq, or by rd to 3 bits a weight, from 8 random texts of 256 tokens, in a process of its own; the
last one again, killed some times with SIGKILL once more blocks are done, and resumed. The second line is a Llama of
1.2e9 weights. Prints a table; exit 1 where bytes differ.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from make_llama import RANDOM, random, write
from torch import bfloat16

TEXTS, TOKENS = 8, 256
RECIPE = """\
version: 1
model: {{factory: "transformers:LlamaForCausalLM", args: {args}, offload: blocks}}
data:
  calibration: {{npz: texts.npz, inputs: {{input_ids: ids}}, samples: {texts}, batch_size: 1}}
  eval: {{npz: texts.npz, inputs: {{input_ids: ids}}, samples: 2, batch_size: 1}}
task: causal-lm
{rules}
"""
RULES = {
    "gptq": """\
rules:
  - {match: "@embedding", mse: {bits: 8}}
  - {match: "*_proj.weight", gptq: {bits: 4, preset: paper}}""",
    "rd": """\
budget: {bpw: 3}
rules:
  - {match: "*_proj.weight", rd: {}}
  - {match: "@embedding", rd: {}}""",
}
POLL_SECONDS = 0.2


def make(folder: Path, method: str, layers: int, hidden: int, inner: int, vocabulary: int) -> Path:
    """A random Llama in a folder, beside its texts and its recipe."""
    heads = hidden // 64
    config = RANDOM | {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers}
    config |= {"vocab_size": vocabulary, "num_attention_heads": heads, "num_key_value_heads": heads}
    folder.mkdir(parents=True, exist_ok=True)
    args = {key: value for key, value in config.items() if key not in ("architectures", "model_type")}
    recipe = RECIPE.format(args=json.dumps(args), texts=TEXTS, rules=RULES[method])
    (folder / "recipe.yaml").write_text(recipe, encoding="utf-8")
    ids = np.random.default_rng(0).integers(0, vocabulary, (TEXTS, TOKENS))
    np.savez(folder / "texts.npz", ids=ids)
    if not (folder / "m" / "model.safetensors").is_file():
        write(folder / "m", config | {"dtype": "bfloat16"}, random(bfloat16, config))
    return folder


def command(folder: Path, output: str, memory: str) -> list[str]:
    words = ["quantize", folder / "m", "-r", folder / "recipe.yaml", "-o", folder / output, "--force", "--resume"]
    if "\nbudget:" not in (folder / "recipe.yaml").read_text(encoding="utf-8"):
        words += ["--coding", "packed"]
    return [sys.executable, "-m", "qcompress", *map(str, words), "--max-memory", memory]


def finished_blocks(folder: Path, output: str) -> int:
    return len([*(folder / f".{output}.partial" / f"{output}.blocks").glob("*.json")])


def killed(folder: Path, output: str, memory: str, blocks: int) -> int:
    """How many blocks are done when a run is killed, which is as soon as that many are."""
    with subprocess.Popen(command(folder, output, memory), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as run:
        while run.poll() is None and finished_blocks(folder, output) < blocks:
            time.sleep(POLL_SECONDS)
        run.kill()
    return finished_blocks(folder, output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--method", choices=[*RULES], default="gptq")
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--inner", type=int, default=2816)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--max-memory", default="3GB")
    parser.add_argument("--kills", type=int, default=2)
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    memory = options.max_memory
    print("layers  weights  network twice  peak memory  processor seconds")
    for layers in options.layers:
        sizes = (layers, options.hidden, options.inner, options.vocabulary)
        folder = make(options.work / f"{layers}", options.method, *sizes)
        subprocess.run(command(folder, "o", memory), check=True, stdout=subprocess.DEVNULL)
        report = json.loads((folder / "o.report.json").read_text(encoding="utf-8"))
        weights = (folder / "m" / "model.safetensors").stat().st_size // 2
        run = report["run"]
        peak, seconds = run["peak_memory_bytes"] / 1e6, run["cpu_seconds"]
        print(
            f"{layers:6} {weights / 1e6:6.1f} M {8 * weights / 1e6:11.0f} MB {peak:9.0f} MB {seconds:12.0f}", flush=True
        )
    stops = [
        killed(folder, "k", memory, 1 + (layers + 1) * (turn + 1) // (options.kills + 1))
        for turn in range(options.kills)
    ]
    subprocess.run(command(folder, "k", memory), check=True, stdout=subprocess.DEVNULL)
    name = "model.qcompress.safetensors"
    same = (folder / "k" / name).read_bytes() == (folder / "o" / name).read_bytes()
    print(f"killed after {' and '.join(map(str, stops))} of {layers + 2} stages: {'equal' if same else 'OTHER'} bytes")
    sys.exit(0 if same else 1)


if __name__ == "__main__":
    main()
