"""Training images that no calibration sees, for choices of defaults: never chosen on test images.

Calibration takes the first of the 20,000 training images, and these are the last.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import TensorDataset

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def cifar(samples: int = 2500) -> TensorDataset:
    """The last so many of cifar10/train20k.npz as the networks take them, float32 [N, 3, 32, 32], with labels."""
    with np.load(Path(os.environ["QCOMPRESS_DATA"]) / "cifar10/train20k.npz") as data:
        pixels, labels = data["x"][-samples:], data["y"][-samples:]
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    x = (x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    return TensorDataset(x.contiguous(), torch.from_numpy(labels.astype(np.int64)))
