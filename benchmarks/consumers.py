"""What other tools compute from our exports, beside what their own quantizers make of the same network.

    python benchmarks/consumers.py FOLDER (--npz FILE | --text FILE) --work DIR [--tools gguf mlx ...] [--json FILE|-]

FOLDER is a Llama in float32 as Hugging Face saves it. Each grid is quantized by `--for` a target with `mse`, which sees
no data, embeddings as all else; exported, and the perplexity taken in the tool itself, on one thread: llama.cpp by the
library that QCOMPRESS_LIBLLAMA names, mlx-lm on the processor, transformers with compressed-tensors. Their quantizers:
llama.cpp's, mlx-lm's, and compressed-tensors' scales from the largest weight, in files of equal bytes.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import libllama
import numpy as np
from timing import render, show

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

Rows = Sequence[Sequence[int]]
WINDOW = 256
GROUP = 32
GRIDS = {
    "gguf": {
        name: (f"gguf-{name.lower()}", bits)
        for name, bits in (("Q4_0", 4), ("Q4_1", 4), ("Q5_0", 5), ("Q5_1", 5), ("Q8_0", 8))
    },
    "mlx": {f"{bits} bits": ("mlx", bits) for bits in (2, 3, 4, 8)},
    "compressed-tensors": {f"{bits} bits": ("compressed-tensors", bits) for bits in (3, 4, 8)},
}
"""Tool -> name of a grid -> target of `--for`, bits."""


def rows_of(options: argparse.Namespace) -> Rows:
    """Rows of tokens: of an array with lengths, or windows of a text by the folder's tokenizer."""
    if options.npz:
        with np.load(options.npz) as data:
            pairs = zip(data["eval_ids"], data["eval_len"], strict=True)
            return [ids[:length].tolist() for ids, length in pairs][: options.rows]
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(options.folder / "tokenizer.json"))
    ids = tokenizer.encode(options.text.read_text(encoding="utf-8"), add_special_tokens=False).ids
    return [ids[at : at + WINDOW] for at in range(0, len(ids) - WINDOW, WINDOW)][: options.rows]


def ours(*words: object) -> None:
    """A command of the program, in this process. Raises RuntimeError with what it says where it fails."""
    from qcompress.cli.app import run

    told = io.StringIO()
    with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
        code = run([*map(str, words), "--force", "-q"])
    if code:
        raise RuntimeError(told.getvalue())


def bytes_of(path: Path) -> int:
    """Of a file, or of the weights of a folder."""
    return path.stat().st_size if path.is_file() else sum(one.stat().st_size for one in path.glob("*.safetensors"))


def in_torch(folder: Path, rows: Rows, change: Callable[[Any], None] = lambda network: None) -> float:
    """The perplexity of a folder in transformers, after a change of its network."""
    import torch

    from qcompress.data.user_code import import_package

    torch.set_num_threads(1)
    library = import_package("transformers")
    with contextlib.redirect_stderr(io.StringIO()):
        network = library.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    change(network)
    with torch.no_grad():
        return libllama.perplexity_of([network(torch.tensor([row])).logits[0].numpy() for row in rows], rows)


def in_mlx(network: Any, rows: Rows) -> float:
    import mlx.core as mx

    return libllama.perplexity_of([np.array(network(mx.array([row]))[0].astype(mx.float32)) for row in rows], rows)


def load_mlx(folder: Path) -> tuple[Any, dict[str, Any]]:
    import mlx.core as mx

    from qcompress.data.user_code import import_package

    mx.set_default_device(mx.cpu)
    found: tuple[Any, dict[str, Any]] = import_package("mlx_lm.utils").load_model(folder)
    return found


class Gguf:
    """llama.cpp, by its library."""

    def __init__(self, folder: Path, work: Path) -> None:
        library = libllama.load()
        if library is None:
            raise SystemExit("QCOMPRESS_LIBLLAMA names no libllama: see libllama.py")
        self.library, self.dense = library, work / "dense.gguf"
        recipe = work / "keep.yaml"
        recipe.write_text('version: 1\nrules: [{match: "*", keep: {}}]\n')
        ours("quantize", folder, "-r", recipe, "-o", work / "kept")
        ours("export", work / "kept", "--to", "gguf", "-o", self.dense)

    def measure(self, output: Path, rows: Rows) -> float:
        return libllama.perplexity(self.library, output, rows)

    def own(self, name: str, bits: int, output: Path, rows: Rows) -> tuple[float, int]:
        target = output.with_suffix(".own.gguf")
        libllama.quantize(self.library, self.dense, target, name, name)
        return libllama.perplexity(self.library, target, rows), bytes_of(target)


class Mlx:
    """mlx-lm on the processor."""

    def __init__(self, folder: Path, work: Path) -> None:
        self.dense = folder

    def measure(self, output: Path, rows: Rows) -> float:
        return in_mlx(load_mlx(output)[0], rows)

    def own(self, name: str, bits: int, output: Path, rows: Rows) -> tuple[float, int]:
        import mlx.core as mx
        from mlx.utils import tree_flatten
        from mlx_lm.utils import quantize_model

        with contextlib.redirect_stdout(sys.stderr):
            network, _ = quantize_model(*load_mlx(self.dense), GROUP, bits)
        target = output.with_suffix(".own.safetensors")
        mx.save_safetensors(str(target), dict(tree_flatten(network.parameters())), {"format": "mlx"})
        return in_mlx(network, rows), bytes_of(target)


class CompressedTensors:
    """transformers with compressed-tensors."""

    def __init__(self, folder: Path, work: Path) -> None:
        self.dense = folder

    def measure(self, output: Path, rows: Rows) -> float:
        return in_torch(output, rows)

    def own(self, name: str, bits: int, output: Path, rows: Rows) -> tuple[float, int]:
        import torch

        from qcompress.data.user_code import import_package

        import_package("compressed_tensors")
        from compressed_tensors.quantization import QuantizationArgs
        from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize
        from compressed_tensors.quantization.utils import calculate_qparams

        arguments = QuantizationArgs(num_bits=bits, symmetric=True, strategy="group", group_size=GROUP)

        def rounded(network: Any) -> None:
            for name, weight in network.named_parameters():
                if name.endswith("_proj.weight"):
                    blocks = weight.detach().reshape(weight.shape[0], -1, GROUP)
                    scale, zero = calculate_qparams(blocks.amin(-1), blocks.amax(-1), arguments)
                    codes = quantize(weight.detach(), scale, zero, arguments, dtype=torch.int8)
                    weight.data.copy_(dequantize(codes, scale, zero, arguments))

        # Its file has the layout of our export, and so the bytes.
        return in_torch(self.dense, rows, rounded), bytes_of(output)


TOOLS = {"gguf": Gguf, "mlx": Mlx, "compressed-tensors": CompressedTensors}


def measure(folder: Path, rows: Rows, work: Path, tools: Sequence[str]) -> list[dict[str, Any]]:
    versions = {package: version(package) for package in ("transformers", "compressed-tensors", "mlx", "mlx-lm")}
    dense = {"name": "dense", "bytes": bytes_of(folder), "perplexity": in_torch(folder, rows), "versions": versions}
    found: list[dict[str, Any]] = [dense]
    for tool in tools:
        consumer = TOOLS[tool](folder, work)
        for grid, (target, bits) in GRIDS[tool].items():
            artifact = work / f"{target}-{bits}"
            output = work / f"{target}-{bits}.export{'.gguf' if tool == 'gguf' else ''}"
            asked = ["--for", target, "--method", "mse", "--bits", bits, "--bits-embedding", bits]
            ours("quantize", folder, *asked, *([] if tool == "gguf" else ["--group-size", GROUP]), "-o", artifact)
            ours("export", artifact, "--to", tool, "-o", output)
            own, own_bytes = consumer.own(grid, bits, output, rows)
            found.append(
                {
                    "name": f"{tool}, {grid}",
                    "artifact": bytes_of(artifact),
                    "bytes": bytes_of(output),
                    "own bytes": own_bytes,
                    "perplexity": consumer.measure(output, rows),
                    "own perplexity": own,
                }
            )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("--npz", type=Path, help="eval_ids and eval_len")
    given.add_argument("--text", type=Path)
    parser.add_argument("--rows", type=int, default=60)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=list(TOOLS))
    parser.add_argument("--json", metavar="FILE|-")
    options = parser.parse_args()
    options.work.mkdir(exist_ok=True, parents=True)
    found = measure(options.folder, rows_of(options), options.work, options.tools)
    show(found, render(found[1:]), options.json)


if __name__ == "__main__":
    main()
