"""The demo trains a small network on scikit-learn's digits, then compresses it with the real commands."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qcompress.checkpoint.checkpoint import write_checkpoint
from qcompress.compress.load import load_into
from qcompress.errors import InputError, OutputError, UsageError
from qcompress.report.render import render_view
from qcompress.report.table import Column, Table, View
from qcompress.report.words import size_words

TRAIN_SAMPLES = 1297
EPOCHS = 12
BATCH = 64

MIXED_RECIPE = """\
# First and last layer at 8 bits, all others at 2: qcompress quantize model.safetensors -r mixed.yaml
version: 1
rules:
  - {match: "conv1.weight", squant: {bits: 8}}
  - {match: "linear.weight", mse: {bits: 8}}
  - {match: "*.weight", squant: {bits: 2}}
gates: {max_bpw: 3}
"""

NAIVE_RECIPE = """\
# What a naive tool does: round to nearest on the whole range of each tensor, at 2 bits.
version: 1
rules:
  - {match: "*.weight", rtn: {bits: 2, granularity: tensor}}
"""

LSQ_RECIPE = """\
# Weights and inputs at 2 bits, trained on their grids: qcompress quantize model.safetensors -r lsq.yaml
version: 1
model: {factory: qcompress.demo:DigitsNet}
data:
  train: {npz: train.npz, batch_size: 32}
  eval: {npz: test.npz}
task: classification
rules:
  - {match: "*.weight", lsq: {bits: 2}}
activations: {bits: 2}
finetune:
  epochs: 6
  optimizer: {sgd: {lr: 0.01, momentum: 0.9, nesterov: true}}
  schedule: cosine
  distil: {}
  norm_batches: 16
  log_steps: 1000
"""

RECIPES = {"mixed.yaml": MIXED_RECIPE, "naive.yaml": NAIVE_RECIPE, "lsq.yaml": LSQ_RECIPE}

COMMANDS = (
    "quantize model.safetensors -r naive.yaml -q",
    "quantize model.safetensors --bits 4 -q",
    "quantize model.safetensors --bits 3 -q",
    "quantize model.safetensors --bits 2",
    "quantize model.safetensors -r mixed.yaml -q",
    "quantize model.safetensors -r lsq.yaml -q",
    "verify model-w2.safetensors",
    "export model-w2.safetensors --to safetensors",
)
ARTIFACTS = ("naive", "w4", "w3", "w2", "mixed", "lsq")


class DigitsNet(nn.Module):
    """Three convolutions with batch norm and a classifier, for images [N, 1, 8, 8]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(32)
        self.conv2 = nn.Conv2d(32, 64, 3, padding=1, stride=2, bias=False)
        self.bn2 = nn.BatchNorm2d(64)
        self.conv3 = nn.Conv2d(64, 128, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(128)
        self.linear = nn.Linear(128, 10)

    def forward(self, images: Tensor) -> Tensor:
        hidden = F.relu(self.bn1(self.conv1(images)))
        hidden = F.relu(self.bn2(self.conv2(hidden)))
        hidden = F.relu(self.bn3(self.conv3(hidden)))
        logits: Tensor = self.linear(hidden.mean(dim=(2, 3)))
        return logits


@dataclass(frozen=True)
class Digits:
    """images float32 [N, 1, 8, 8] in [0, 1]; labels int64 [N]."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def run_demo(folder: Path, say: Callable[[str], None], *, force: bool = False) -> None:
    """Fill `folder` with a trained network, recipes, artifacts and reports; `say` gets what there is to read.

    raises  UsageError where scikit-learn is missing; OutputError where the folder is not empty and `force` not given
    """
    if folder.exists() and any(folder.iterdir()) and not force:
        raise OutputError(str(folder), "is not empty", "name another folder, or use --force")
    digits = _load_digits()
    folder.mkdir(parents=True, exist_ok=True)
    say("Training a small convolutional network on 1,297 images of digits ...")
    torch.set_num_threads(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = _train(digits)
    write_checkpoint(net.state_dict(), folder / "model.safetensors")
    np.savez(folder / "train.npz", x=digits.train_images.numpy(), y=digits.train_labels.numpy())
    np.savez(folder / "test.npz", x=digits.test_images.numpy(), y=digits.test_labels.numpy())
    for name, text in RECIPES.items():
        (folder / name).write_text(text, encoding="utf-8")
    say(f"Wrote model.safetensors, the digits and {', '.join(RECIPES)} to {folder}")
    for command in COMMANDS:
        _run(command, folder, say, force)
    say(f"\n{render_view(_results(folder, net, digits))}")


def _load_digits() -> Digits:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        hint = "install it: pip install 'qcompress[demo]'"
        raise UsageError("qcompress demo", "scikit-learn, which brings the digits, is missing", hint) from None
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(data.target, dtype=torch.int64)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, test = order[:TRAIN_SAMPLES], order[TRAIN_SAMPLES:]
    return Digits(images[train], labels[train], images[test], labels[test])


def _train(digits: Digits) -> DigitsNet:
    net = DigitsNet()
    steps = EPOCHS * -(-TRAIN_SAMPLES // BATCH)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    net.train()
    for _ in range(EPOCHS):
        order = torch.randperm(TRAIN_SAMPLES)
        for start in range(0, TRAIN_SAMPLES, BATCH):
            batch = order[start : start + BATCH]
            loss = F.cross_entropy(net(digits.train_images[batch]), digits.train_labels[batch])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    return net.eval()


def _run(command: str, folder: Path, say: Callable[[str], None], force: bool) -> None:
    """Run one command as a user would, and show it as typed with what it printed."""
    words = shlex.split(command)
    if force and words[0] in ("quantize", "export"):
        words.append("--force")
    say(f"\n$ qcompress {shlex.join(words)}")
    done = subprocess.run(
        [sys.executable, "-m", "qcompress", *words], cwd=folder, capture_output=True, text=True, check=False
    )
    say((done.stdout + done.stderr).rstrip())
    if done.returncode:
        raise InputError(f"qcompress {command}", f"exit code {done.returncode}", "read the lines above")


def _accuracy(net: DigitsNet, digits: Digits) -> float:
    with torch.inference_mode():
        right = net(digits.test_images).argmax(dim=1) == digits.test_labels
    return float(right.float().mean())


def _results(folder: Path, net: DigitsNet, digits: Digits) -> View:
    original = (folder / "model.safetensors").stat().st_size
    baseline = _accuracy(net, digits)
    rows = [("model.safetensors", size_words(original), "1.0x", f"{baseline:.1%}", "")]
    for name in ARTIFACTS:
        path = folder / f"model-{name}.safetensors"
        compressed = DigitsNet().eval()
        load_into(compressed, path, activations=True)
        size, accuracy = path.stat().st_size, _accuracy(compressed, digits)
        change = f"{100 * (accuracy - baseline):+.1f}"
        rows.append((path.name, size_words(size), f"{original / size:.1f}x", f"{accuracy:.1%}", change))
    titles = ("file", "size", "smaller", "accuracy", "change, points")
    columns = tuple(Column(title, right=title != "file") for title in titles)
    facts = (("images", f"{len(digits.test_labels)} that the network has not seen"),)
    return View(f"accuracy and size in {folder}", facts, (Table(columns, tuple(rows)),), ())
