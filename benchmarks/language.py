"""GPTQ of a Llama by calibration texts: weights a core-second and output error, ours beside llm-compressor's.

    python benchmarks/language.py --llmcompressor PYTHON [--hidden 512] [--inner 1536] [--layers 4] [--json FILE|-]

Random weights and tokens; 4 bits in groups of 128 inputs, embeddings and head left alone. Each tool runs in a process
of its own with one thread. Core-seconds are what the methods take, from a network in memory to one in memory; those of
qcompress's whole command, which also plans, writes, checks and reports, hold its imports too. The error is that of the
logits over their squares, on texts that neither has seen. PYTHON has llmcompressor 0.14.0.1 and torch 2.13.0.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

from timing import render, show

TEXTS, HELD, TOKENS, GROUP = 16, 4, 256, 128
RULE = f"bits: 4, granularity: group, group_size: {GROUP}"
OURS = {
    "`gptq`, `preset: paper, range: mse`": "preset: paper, range: mse",
    "`gptq`, `preset: paper`": "preset: paper",
    "`gptq`": "",
}
PEER = "llm-compressor"
RECIPE = """\
version: 1
model: {{factory: "transformers:LlamaForCausalLM", args: {args}}}
data:
  calibration: {{npz: texts.npz, inputs: {{input_ids: ids}}, samples: {texts}, batch_size: 1}}
rules:
  - {{match: "@embedding", keep: {{}}}}
  - {{match: "*_proj.weight", gptq: {{{rule}}}}}
"""


def make(folder: Path, config: dict[str, Any]) -> None:
    """The model, and texts: those to calibrate by, and those that are held out."""
    import numpy as np
    import torch
    from make_llama import random, write

    write(folder / "m", config | {"dtype": "float32"}, random(torch.float32, config))
    ids = np.random.default_rng(0).integers(0, config["vocab_size"], (TEXTS + HELD, TOKENS))
    np.savez(folder / "texts.npz", ids=ids[:TEXTS])
    np.save(folder / "held.npy", ids[TEXTS:])


def network(folder: Path) -> Any:
    import torch
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(folder / "m", dtype=torch.float32).eval()


def error(folder: Path, module: Any) -> float:
    """Squared error of the held-out texts' logits over their squares."""
    import numpy as np
    import torch

    ids = torch.from_numpy(np.load(folder / "held.npy"))
    with torch.no_grad():
        wanted, found = network(folder)(ids).logits, module(ids).logits
    return float((found - wanted).square().sum() / wanted.square().sum())


def run_ours(folder: Path, options: str) -> dict[str, float]:
    import transformers  # noqa: F401

    import qcompress
    from qcompress.cli import main
    from qcompress.compress import compress_model
    from qcompress.registry import METHODS

    METHODS["gptq"].load_fit()
    fit, spent = compress_model.fit, []

    def timed(*given: Any) -> Any:
        started = time.process_time()
        fitted = fit(*given)
        spent.append(time.process_time() - started)
        return fitted

    compress_model.fit = timed
    args = {k: v for k, v in json.loads((folder / "config.json").read_text()).items() if k != "model_type"}
    rule = ", ".join(filter(None, (RULE, options)))
    (folder / "r.yaml").write_text(RECIPE.format(args=json.dumps(args), texts=TEXTS, rule=rule), encoding="utf-8")
    words = ["quantize", folder / "m", "-r", folder / "r.yaml", "-o", folder / "o", "--force", "--quiet"]
    sys.argv = ["qcompress", *map(str, words), "--threads", "1"]
    started = time.process_time()
    try:
        main()
    except SystemExit as ended:
        if ended.code:
            raise
    whole = time.process_time() - started
    module = network(folder)
    qcompress.load_into(module, folder / "o")
    return {"cpu": spent[0], "whole": whole, "error": error(folder, module)}


def run_peer(folder: Path, _: str) -> dict[str, float]:
    import numpy as np
    import torch

    library = torch.library.Library("torchvision", "DEF")
    # A torchvision that is made for another torch lacks these two, and cannot be imported without their names.
    library.define("nms(Tensor a, Tensor b, float c) -> Tensor")
    library.define("qnms(Tensor a, Tensor b, float c) -> Tensor")
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    torch.set_num_threads(1)
    module = network(folder)
    ids = np.load(folder / "texts.npz")["ids"]
    texts = Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": np.ones_like(ids).tolist()})
    tokenizer = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    weights = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=GROUP)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    started = time.process_time()
    oneshot(
        model=module,
        processor=PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="a"),
        dataset=texts,
        recipe=GPTQModifier(config_groups={"own": scheme}, ignore=["lm_head"]),
        num_calibration_samples=TEXTS,
        max_seq_length=TOKENS,
    )
    return {"cpu": time.process_time() - started, "error": error(folder, module)}


def measured(tool: str, folder: Path, python: str) -> dict[str, float]:
    """What a process of its own prints last."""
    command = [python, __file__, "--child", tool, "--folder", str(folder)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llmcompressor", metavar="PYTHON")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--inner", type=int, default=1536)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--json", metavar="FILE|-")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        run = run_peer if options.child == PEER else run_ours
        print(json.dumps(run(options.folder, OURS.get(options.child, ""))))
        return
    from make_llama import RANDOM

    heads = options.hidden // 64
    config = RANDOM | {"hidden_size": options.hidden, "intermediate_size": options.inner, "vocab_size": 2048}
    config |= {"num_hidden_layers": options.layers, "num_attention_heads": heads, "num_key_value_heads": heads}
    weights = options.layers * (4 * options.hidden**2 + 3 * options.hidden * options.inner)
    tools = dict.fromkeys(OURS, sys.executable) | ({PEER: options.llmcompressor} if options.llmcompressor else {})
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        with contextlib.redirect_stdout(sys.stderr):
            make(folder, config)
        (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "architectures"}))
        found = {tool: measured(tool, folder, python) for tool, python in tools.items()}
    rows = [
        {
            "tool": tool,
            "M weights/core-s": weights / one["cpu"] / 1e6,
            "times the peer": found[PEER]["cpu"] / one["cpu"] if PEER in found else None,
            "whole command, core-s": one.get("whole"),
            "core-s": one["cpu"],
            "output error": one["error"],
        }
        for tool, one in found.items()
    ]
    show({row["tool"]: row for row in rows}, render(rows), options.json)


if __name__ == "__main__":
    main()
