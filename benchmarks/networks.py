"""The measured networks (recipes/nets), their weights and data, and their scores.

`CASES` names them. Files lie under one folder (environment QCOMPRESS_DATA), converted to safetensors and npz.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))

from nets.cifar_resnet import resnet20, resnet32
from nets.ds_cnn import ds_cnn
from nets.mobilenet_v1 import mobilenet_v1
from nets.tiny_llama import stories260k

Batches = list[tuple[Tensor, Tensor]]

IMAGE_MEAN, IMAGE_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def batched(x: Tensor, y: Tensor, size: int) -> Batches:
    return list(zip(x.split(size), y.split(size), strict=True))


def image_batches(pixels: np.ndarray, labels: np.ndarray, mean: Tensor, std: Tensor, size: int) -> Batches:
    """uint8 [images, height, width, 3] as normalized float32 in channels-last memory."""
    x = (torch.from_numpy(pixels).permute(0, 3, 1, 2).float() - mean.view(1, 3, 1, 1)) / std.view(1, 3, 1, 1)
    return batched(x.contiguous(memory_format=torch.channels_last), torch.from_numpy(labels.astype(np.int64)), size)


def cifar_batches(folder: Path, limit: int) -> Batches:
    with np.load(folder / "cifar10/test5000.npz") as data:
        pixels, labels = data["x"][:limit], data["y"][:limit]
    return image_batches(pixels, labels, 255 * torch.tensor(IMAGE_MEAN), 255 * torch.tensor(IMAGE_STD), 250)


def training_images(folder: Path) -> Batches:
    """The last of the training images: calibration takes the first."""
    with np.load(folder / "cifar10/train20k.npz") as data:
        pixels, labels = data["x"][-1000:], data["y"][-1000:]
    return image_batches(pixels, labels, 255 * torch.tensor(IMAGE_MEAN), 255 * torch.tensor(IMAGE_STD), 250)


def training_photos(folder: Path) -> Batches:
    """Photos of 256 x 256, their middle; without labels."""
    from PIL import Image

    paths = sorted((folder / "imagenet/calib256").glob("*.jpg"))
    pixels = np.stack([np.asarray(Image.open(path).convert("RGB")) for path in paths])[:, 16:240, 16:240]
    middle = torch.full((3,), 127.5)
    return image_batches(pixels, np.zeros(len(paths)), middle, middle, 32)


def other_stories(folder: Path) -> Batches:
    """Texts that are neither evaluated nor calibrated on, each to its end."""
    with np.load(folder / "stories/stories.npz") as data:
        tokens = torch.from_numpy(data["valid_ids"].astype(np.int64))
        texts = [text[:length] for text, length in zip(tokens, data["valid_len"].tolist(), strict=True)]
    return [(text[None, :-1], text[None, 1:]) for text in texts]


def photo_batches(folder: Path, limit: int) -> Batches:
    from PIL import Image

    folder = folder / "imagenet/val400"
    with (folder / "metadata.csv").open(newline="") as lines:
        listed = list(csv.DictReader(lines))[:limit]
    pixels = np.stack([np.asarray(Image.open(folder / row["file_name"]).convert("RGB")) for row in listed])
    labels = np.array([int(row["label"]) for row in listed])
    middle = torch.full((3,), 127.5)
    return image_batches(pixels[:, 1:225, 1:225], labels, middle, middle, 20)


def keyword_batches(folder: Path, limit: int) -> Batches:
    with np.load(folder / "kws/kws01_1000.npz") as data:
        x = (data["x"][:limit].astype(np.float32) - float(data["zero_point"])) * float(data["scale"])
        labels = data["y"][:limit].astype(np.int64)
    return batched(torch.from_numpy(x).unsqueeze(1), torch.from_numpy(labels), 250)


def story_batches(folder: Path, limit: int) -> Batches:
    """Tokens, and the tokens that follow them; -100 behind a text's end."""
    with np.load(folder / "stories/stories.npz") as data:
        tokens = torch.from_numpy(data["eval_ids"][:limit].astype(np.int64))
        lengths = torch.from_numpy(data["eval_len"][:limit].astype(np.int64))
    following = tokens[:, 1:].masked_fill(torch.arange(1, tokens.shape[1]) >= lengths.unsqueeze(1), -100)
    return batched(tokens[:, :-1], following, 50)


def top1(network: nn.Module, batches: Batches) -> float:
    with torch.inference_mode():
        hits = sum(int((network(x).argmax(1) == y).sum()) for x, y in batches)
    return hits / sum(len(y) for _, y in batches)


def perplexity(network: nn.Module, batches: Batches) -> float:
    with torch.inference_mode():
        losses = [
            F.cross_entropy(network(x).flatten(0, 1), y.flatten(), ignore_index=-100, reduction="sum").item()
            for x, y in batches
        ]
    return float(np.exp(sum(losses) / sum(int((y != -100).sum()) for _, y in batches)))


@dataclass(frozen=True, slots=True)
class Case:
    """A network with weights and data.

    samples  what the data hold at most
    score    the metric's name: `top1` is better high, `perplexity` low
    fp32     the known score of the uncompressed weights on all samples
    held_out data that are neither test nor calibration data of it, for choices of defaults; where there are any
    """

    build: Callable[[], nn.Module]
    weights: str
    batches: Callable[[Path, int], Batches]
    samples: int
    score: str
    fp32: float
    held_out: Callable[[Path], Batches] | None = None

    def network(self, folder: Path) -> tuple[nn.Module, dict[str, Tensor]]:
        """The network in evaluation mode with its weights loaded, and the weights."""
        state = load_file(folder / self.weights)
        network = self.build().eval()
        missing, unexpected = network.load_state_dict(state, strict=False)
        if unexpected or any(not name.endswith("num_batches_tracked") for name in missing):
            raise SystemExit(f"{self.weights}: does not fit the network: {missing} {unexpected}")
        return network.to(memory_format=torch.channels_last), state

    def measure(self, network: nn.Module, batches: Batches) -> float:
        return {"top1": top1, "perplexity": perplexity}[self.score](network, batches)


CASES = {
    "resnet20": Case(resnet20, "cifar10/resnet20.safetensors", cifar_batches, 5000, "top1", 0.9146, training_images),
    "resnet32": Case(resnet32, "cifar10/resnet32.safetensors", cifar_batches, 5000, "top1", 0.9234, training_images),
    "mobilenet": Case(
        lambda: mobilenet_v1(0.75),
        "imagenet/mobilenet_v1_075_224.safetensors",
        photo_batches,
        400,
        "top1",
        0.7875,
        training_photos,
    ),
    "dscnn": Case(ds_cnn, "kws/dscnn.safetensors", keyword_batches, 1000, "top1", 0.915),
    "stories": Case(
        stories260k, "stories/stories260K.safetensors", story_batches, 300, "perplexity", 5.502, other_stories
    ),
}


def compressible(state: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Every weight of two or more dimensions: all convolutions, linear layers and embeddings."""
    return ((name, weight) for name, weight in state.items() if weight.ndim >= 2)


def measure_networks(
    parser: argparse.ArgumentParser, known: list[str], measure: Callable[[str, argparse.Namespace, Path], Any]
) -> None:
    """Print as JSON what `measure` finds of the networks that --networks names, given the options and the data."""
    parser.add_argument("--networks", type=lambda text: text.split(","), default=known, help=", ".join(known))
    options = parser.parse_args()
    if unknown := sorted(set(options.networks) - set(known)):
        parser.error(f"no network {', '.join(unknown)}; choose from {', '.join(known)}")
    folder = os.environ.get("QCOMPRESS_DATA")
    if not folder:
        sys.exit(f"{Path(sys.argv[0]).name}: QCOMPRESS_DATA is not set")
    torch.set_num_threads(1)
    print(json.dumps({name: measure(name, options, Path(folder)) for name in options.networks}))
