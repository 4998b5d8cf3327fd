"""Images of four colours in noise, which a tiny network learns to tell apart in a second: where live runs start."""

from __future__ import annotations

from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from qcompress.data.user_code import find_callable

Samples: TypeAlias = tuple[Tensor, Tensor]

TRAINED_RECIPE = """
version: 1
model: {factory: net.py:net, args: {norm: true}}
data:
  train: {npz: data.npz, batch_size: 16, augment: [flip]}
  eval: {npz: data.npz}
  normalize: {mean: [0.5], std: [0.25]}
task: classification
"""
"""How a recipe that trains the network of `net.py` on the images begins."""


def write_colours(folder: Path, count: int = 192) -> Samples:
    """The images as a network is fed them, float32 [count, 3, 8, 8], and their labels; both are in `data.npz`.

    A recipe normalizes them with mean 0.5 and deviation 0.25.
    """
    random = np.random.default_rng(0)
    labels = random.integers(4, size=count)
    pixels = random.integers(0, 160, size=(count, 8, 8, 3))
    pixels[..., 0] += 60 * (labels % 2)[:, None, None]
    pixels[..., 1] += 60 * (labels // 2)[:, None, None]
    np.savez(folder / "data.npz", x=pixels.astype(np.uint8), y=labels)
    images = (torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.25
    return images, torch.from_numpy(labels)


def make_network(folder: Path, factory: str = "net.py:net", **arguments: object) -> nn.Module:
    """The network of the folder's Python file, always with the same random weights."""
    torch.manual_seed(0)
    module: nn.Module = find_callable(factory, folder, True, "test")(**arguments)
    return module


def trainer(module: nn.Module, samples: Samples, steps: int) -> nn.Module:
    """The module, trained on all samples at once in every step."""
    inputs, labels = samples
    optimizer = torch.optim.Adam(module.parameters(), 1e-2)
    for _ in range(steps):
        loss = nn.functional.cross_entropy(module(inputs), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return module


def write_learned(
    folder: Path, samples: Samples, steps: int, factory: str = "net.py:net", *, name: str = "m", **arguments: object
) -> Path:
    """`m.safetensors`: the folder's network after some steps of `learn`."""
    path = folder / f"{name}.safetensors"
    save_file(trainer(make_network(folder, factory, **arguments), samples, steps).state_dict(), path)
    return path


def anchored(recipe: str, folder: Path) -> str:
    """A recipe's text that finds network and data in this folder, wherever it is written to."""
    return recipe.replace("net.py", str(folder / "net.py")).replace("data.npz", str(folder / "data.npz"))
