"""Write a synthetic, llama-like checkpoint: Gaussian rows of log-normal scale, 0.1 % outliers eight times as large.

python benchmarks/make_checkpoint.py OUT.safetensors --dtype F32 --size 100MB
python benchmarks/make_checkpoint.py OUT.safetensors --dtype BF16 --size 1.9GB
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from qcompress.types.words import parse_size

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
VOCABULARY = 32000


def block_shapes(index: int, width: int) -> dict[str, tuple[int, ...]]:
    """The tensors of one decoder block."""
    hidden = width * 11 // 4
    prefix = f"model.layers.{index}"
    return {
        f"{prefix}.self_attn.q_proj.weight": (width, width),
        f"{prefix}.self_attn.k_proj.weight": (width // 4, width),
        f"{prefix}.self_attn.v_proj.weight": (width // 4, width),
        f"{prefix}.self_attn.o_proj.weight": (width, width),
        f"{prefix}.mlp.gate_proj.weight": (hidden, width),
        f"{prefix}.mlp.up_proj.weight": (hidden, width),
        f"{prefix}.mlp.down_proj.weight": (width, hidden),
        f"{prefix}.input_layernorm.weight": (width,),
        f"{prefix}.post_attention_layernorm.weight": (width,),
    }


def shapes_for(n_weights: int, width: int) -> dict[str, tuple[int, ...]]:
    """Embedding and as many blocks as make about `n_weights` weights."""
    vocabulary = min(VOCABULARY, max(256, n_weights // (4 * width) // 64 * 64))
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, width)}
    block = sum(torch.Size(shape).numel() for shape in block_shapes(0, width).values())
    for index in range(max(1, (n_weights - vocabulary * width) // block)):
        shapes |= block_shapes(index, width)
    return shapes


def resnet50_shapes() -> dict[str, tuple[int, ...]]:
    """The weights of ResNet-50: 25.5 M in 54 tensors."""
    shapes: dict[str, tuple[int, ...]] = {"conv1.weight": (64, 3, 7, 7)}
    inputs = 64
    for stage, (width, depth) in enumerate([(64, 3), (128, 4), (256, 6), (512, 3)], start=1):
        for block in range(depth):
            prefix = f"layer{stage}.{block}"
            shapes[f"{prefix}.conv1.weight"] = (width, inputs, 1, 1)
            shapes[f"{prefix}.conv2.weight"] = (width, width, 3, 3)
            shapes[f"{prefix}.conv3.weight"] = (4 * width, width, 1, 1)
            if block == 0:
                shapes[f"{prefix}.downsample.0.weight"] = (4 * width, inputs, 1, 1)
            inputs = 4 * width
    return shapes | {"fc.weight": (1000, 2048)}


def make_weight(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """One tensor; norms are ones."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=dtype)
    weight = torch.randn(shape, generator=generator)
    scale = 0.02 * torch.exp(0.4 * torch.randn(shape[0], generator=generator))
    weight *= scale.reshape(-1, *[1] * (len(shape) - 1))
    n_outliers = max(1, weight.numel() // 1000)
    where = torch.randint(weight.numel(), (n_outliers,), generator=generator)
    weight.view(-1)[where] *= 8
    return weight.to(dtype)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="F32")
    parser.add_argument("--size", default="100MB")
    parser.add_argument("--width", type=int, default=None)
    parser.add_argument("--resnet50", action="store_true")
    arguments = parser.parse_args()
    dtype = DTYPES[arguments.dtype]
    n_weights = parse_size(arguments.size) // dtype.itemsize
    width = arguments.width or (2048 if n_weights > 2e8 else 512)
    shapes = resnet50_shapes() if arguments.resnet50 else shapes_for(n_weights, width)
    header, position = {}, 0
    for name, shape in shapes.items():
        n_bytes = torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": arguments.dtype, "shape": shape, "data_offsets": [position, position + n_bytes]}
        position += n_bytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    generator = torch.Generator().manual_seed(0)
    with arguments.output.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for shape in shapes.values():
            file.write(make_weight(shape, dtype, generator).view(torch.uint8).numpy().data)
    print(f"{arguments.output}: {position:,} bytes of {arguments.dtype} in {len(shapes)} tensors")


if __name__ == "__main__":
    main()
