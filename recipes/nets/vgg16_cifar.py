"""VGG-16 (Simonyan and Zisserman 2015, arXiv 1409.1556) for 32x32 images: dense layers of 512 on the last pixel."""

from __future__ import annotations

from torch import Tensor, nn

STAGES = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))
"""Channels and convolutions before each pooling."""


class Vgg16(nn.Module):
    """Takes [samples, 3, 32, 32]; `width` scales every channel and the two hidden dense layers."""

    def __init__(self, classes: int, width: float, batch_norm: bool, dropout: float) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs = 3
        for channels, depth in STAGES:
            outputs = max(1, round(channels * width))
            for _ in range(depth):
                layers.append(nn.Conv2d(inputs, outputs, 3, 1, 1, bias=not batch_norm))
                layers += [nn.BatchNorm2d(outputs)] * batch_norm
                layers.append(nn.ReLU())
                inputs = outputs
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        hidden = max(1, round(512 * width))
        self.classifier = nn.Sequential(
            *(nn.Dropout(dropout), nn.Linear(inputs, hidden), nn.ReLU()),
            *(nn.Dropout(dropout), nn.Linear(hidden, hidden), nn.ReLU()),
            nn.Linear(hidden, classes),
        )
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                # Without batch norm, what begins smaller than He et al. 2015 shrinks from layer to layer.
                last = layer is self.classifier[-1]
                nn.init.kaiming_normal_(layer.weight, nonlinearity="linear" if last else "relu")
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).flatten(1))


def vgg16(classes: int = 10, width: float = 1.0, batch_norm: bool = True, dropout: float = 0.5) -> nn.Module:
    return Vgg16(classes, width, batch_norm, dropout)
