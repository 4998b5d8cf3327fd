"""The measured networks rebuilt in plain torch, their weights and data, and their scores.

`CASES` names them. Files lie under one folder (environment QCOMPRESS_DATA), converted to safetensors and npz.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

Batches = list[tuple[Tensor, Tensor]]

IMAGE_MEAN, IMAGE_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class CifarBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.widens = inputs != outputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.widens:
            quarter = y.shape[1] // 4
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, quarter, quarter))
        return F.relu(x + y)


class CifarResNet(nn.Module):
    """He et al. 2016, arXiv 1512.03385, section 4.2: shortcuts without weights."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1, self.layer2, self.layer3 = (
            nn.Sequential(
                *(
                    CifarBlock(inputs if block == 0 else outputs, outputs, 2 if block == 0 and outputs > 16 else 1)
                    for block in range((depth - 2) // 6)
                )
            )
            for inputs, outputs in ((16, 16), (16, 32), (32, 64))
        )
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        return self.linear(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))


class SeparableBlock(nn.Module):
    """A depthwise and a pointwise convolution, each with batch norm and activation."""

    def __init__(self, inputs: int, outputs: int, stride: int, *, bias: bool, cap: float) -> None:
        super().__init__()
        self.dw = nn.Conv2d(inputs, inputs, 3, stride, 1 if stride == 1 else 0, groups=inputs, bias=bias)
        self.dw_bn = nn.BatchNorm2d(inputs, eps=1e-3)
        self.pw = nn.Conv2d(inputs, outputs, 1, bias=bias)
        self.pw_bn = nn.BatchNorm2d(outputs, eps=1e-3)
        self.stride, self.cap = stride, cap

    def forward(self, x: Tensor) -> Tensor:
        # TensorFlow's SAME padding puts the odd pixel of a stride of 2 behind.
        x = F.pad(x, (0, 1, 0, 1)) if self.stride == 2 else x
        x = self.dw_bn(self.dw(x)).clamp(0, self.cap)
        return self.pw_bn(self.pw(x)).clamp(0, self.cap)


class MobileNetV1(nn.Module):
    """Howard et al. 2017, arXiv 1704.04861, at width 0.75."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 24, 3, 2, bias=False)
        self.bn1 = nn.BatchNorm2d(24, eps=1e-3)
        outputs = (48, 96, 96, 192, 192, *[384] * 6, 768, 768)
        strides = (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1)
        self.blocks = nn.Sequential(
            *(
                SeparableBlock(before, after, stride, bias=False, cap=6.0)
                for before, after, stride in zip((24, *outputs[:-1]), outputs, strides, strict=True)
            )
        )
        self.fc = nn.Linear(768, 1000)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(F.pad(x, (0, 1, 0, 1)))).clamp(0, 6)
        return self.fc(self.blocks(x).mean((2, 3)))


class DsCnn(nn.Module):
    """The keyword-spotting network of MLPerf Tiny (Banbury et al. 2021, arXiv 2106.07597)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 64, (10, 4), 2)
        self.bn1 = nn.BatchNorm2d(64, eps=1e-3)
        self.blocks = nn.Sequential(*(SeparableBlock(64, 64, 1, bias=True, cap=float("inf")) for _ in range(4)))
        self.fc = nn.Linear(64, 12)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(F.pad(x, (1, 1, 4, 5)))))
        return self.fc(F.avg_pool2d(self.blocks(x), (24, 5)).flatten(1))


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, shared_heads: int) -> None:
        super().__init__()
        self.heads, self.shared_heads, self.size = heads, shared_heads, width // heads
        self.wq = nn.Linear(width, width, bias=False)
        self.wk = nn.Linear(width, shared_heads * self.size, bias=False)
        self.wv = nn.Linear(width, shared_heads * self.size, bias=False)
        self.wo = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        query, key, value = (
            layer(x).view(batch, length, -1, self.size).transpose(1, 2) for layer in (self.wq, self.wk, self.wv)
        )
        key, value = (t.repeat_interleave(self.heads // self.shared_heads, 1) for t in (rotate(key), value))
        mixed = F.scaled_dot_product_attention(rotate(query), key, value, is_causal=True)
        return self.wo(mixed.transpose(1, 2).reshape(batch, length, width))


def rotate(x: Tensor) -> Tensor:
    """Rotary positions on interleaved pairs; x [batch, heads, length, size]."""
    length, size = x.shape[-2:]
    angle = torch.outer(torch.arange(length), 10000.0 ** -(torch.arange(0, size, 2) / size))
    even, odd = x[..., ::2], x[..., 1::2]
    return torch.stack((even * angle.cos() - odd * angle.sin(), even * angle.sin() + odd * angle.cos()), -1).flatten(-2)


class FeedForward(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(width, hidden, bias=False)
        self.w2 = nn.Linear(hidden, width, bias=False)
        self.w3 = nn.Linear(width, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class LlamaLayer(nn.Module):
    def __init__(self, width: int, heads: int, shared_heads: int, hidden: int) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(width, eps=1e-5)
        self.attention = Attention(width, heads, shared_heads)
        self.ffn_norm = nn.RMSNorm(width, eps=1e-5)
        self.feed_forward = FeedForward(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.feed_forward(self.ffn_norm(x))


class Stories(nn.Module):
    """The 260K-parameter Llama-2-type model of llama2.c; the embedding is the output layer too."""

    def __init__(self) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(512, 64)
        self.layers = nn.Sequential(*(LlamaLayer(64, 8, 4, 172) for _ in range(5)))
        self.norm = nn.RMSNorm(64, eps=1e-5)

    def forward(self, tokens: Tensor) -> Tensor:
        return F.linear(self.norm(self.layers(self.tok_embeddings(tokens))), self.tok_embeddings.weight)


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
    """

    build: Callable[[], nn.Module]
    weights: str
    batches: Callable[[Path, int], Batches]
    samples: int
    score: str
    fp32: float

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
    "resnet20": Case(lambda: CifarResNet(20), "cifar10/resnet20.safetensors", cifar_batches, 5000, "top1", 0.9146),
    "resnet32": Case(lambda: CifarResNet(32), "cifar10/resnet32.safetensors", cifar_batches, 5000, "top1", 0.9234),
    "mobilenet": Case(MobileNetV1, "imagenet/mobilenet_v1_075_224.safetensors", photo_batches, 400, "top1", 0.7875),
    "dscnn": Case(DsCnn, "kws/dscnn.safetensors", keyword_batches, 1000, "top1", 0.915),
    "stories": Case(Stories, "stories/stories260K.safetensors", story_batches, 300, "perplexity", 5.502),
}


def compressible(state: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Every weight of two or more dimensions: all convolutions, linear layers and embeddings."""
    return ((name, weight) for name, weight in state.items() if weight.ndim >= 2)
