"""Networks whose graphs are awkward: what real ones do between a layer and the next, in small."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qcompress.data.batches import Batch
from qcompress.model.live import LiveModel
from qcompress.model.stages import execution_order
from qcompress.registry import METHODS
from qcompress.types.plan import Decision, TensorInfo


class Basic(nn.Module):
    """A residual block with one ReLU for all places and a shortcut of its own, behind a stem with a max-pool."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(6)
        self.relu = nn.ReLU(inplace=True)
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.layer1 = nn.Sequential(BasicBlock(6, 8, 2), BasicBlock(8, 8, 1))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.relu(self.bn1(self.conv1(x))))
        return self.fc(torch.flatten(self.avgpool(self.layer1(x)), 1))


class BasicBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = None
        if inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        y += x if self.downsample is None else self.downsample(x)
        return self.relu(y)


class Inverted(nn.Module):
    """Inverted residual blocks out of Sequentials, as in MobileNetV2, with ReLU6 or ReLU."""

    def __init__(self, activation: type[nn.Module] = nn.ReLU6) -> None:
        super().__init__()
        self.features = nn.Sequential(
            _conv_norm(3, 6, 3, activation=activation, stride=2),
            InvertedBlock(6, 4, 1, activation),
            InvertedBlock(4, 4, 3, activation),
            _conv_norm(4, 10, 1, activation=activation),
        )
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(10, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean([2, 3]))


class InvertedRelu(Inverted):
    def __init__(self) -> None:
        super().__init__(nn.ReLU)


def _conv_norm(
    inputs: int, outputs: int, kernel: int, activation: type[nn.Module], stride: int = 1, groups: int = 1
) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), activation())


class InvertedBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, expansion: int, activation: type[nn.Module]) -> None:
        super().__init__()
        hidden = inputs * expansion
        layers = [] if expansion == 1 else [_conv_norm(inputs, hidden, 1, activation)]
        layers += [_conv_norm(hidden, hidden, 3, activation, groups=hidden)]
        layers += [nn.Conv2d(hidden, outputs, 1, bias=False), nn.BatchNorm2d(outputs)]
        self.conv = nn.Sequential(*layers)
        self.skips = inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.skips else self.conv(x)


class NormAct(nn.BatchNorm2d):
    """A batch norm that is called as a function and holds its activation."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-3)
        self.drop = nn.Identity()
        self.act = nn.ReLU6()

    def forward(self, x: Tensor) -> Tensor:
        x = F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training, self.momentum, self.eps
        )
        return self.act(self.drop(x))


class Functional(nn.Module):
    """Depthwise and pointwise convolutions with such batch norms."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 5, 3, padding=1, bias=False)
        self.bn1 = NormAct(5)
        self.dw = nn.Conv2d(5, 5, 3, padding=1, groups=5, bias=False)
        self.bn2 = NormAct(5)
        self.pw = nn.Conv2d(5, 7, 1, bias=False)
        self.bn3 = NormAct(7)
        self.head = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn3(self.pw(self.bn2(self.dw(self.bn1(self.stem(x))))))
        return self.head(x.mean((-2, -1)))


class Plumbing(nn.Module):
    """All that keeps channels apart between two layers, and layers of every kind, with and without batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.grouped = nn.Conv2d(4, 8, 3, padding=1, groups=2)
        self.grouped_bn = nn.BatchNorm2d(8)
        self.up = nn.ConvTranspose2d(8, 6, 3, 2, 1, bias=False)
        self.up_bn = nn.BatchNorm2d(6)
        self.prelu = nn.PReLU(6)
        self.up_grouped = nn.ConvTranspose2d(6, 8, 2, 1, groups=2)
        self.up_grouped_bn = nn.BatchNorm2d(8)
        self.wide = nn.Conv2d(8, 16, 3, groups=8)
        self.plain = nn.Conv2d(16, 5, 1)
        self.last = nn.Linear(5 * 4, 6)
        self.last_bn = nn.BatchNorm1d(6)
        self.out = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.avg_pool2d(F.leaky_relu(self.grouped_bn(self.grouped(x)), 0.1), 2)
        x = F.pad(self.prelu(self.up_bn(self.up(x))), (1, 1, 0, 1))
        x = F.interpolate(F.relu(self.up_grouped_bn(self.up_grouped(x))), scale_factor=2.0)
        x = F.max_pool2d(self.wide(x[:, :, ::2, 1:]).clamp(min=0), 2)
        x = F.adaptive_avg_pool2d(self.plain(x), 2)
        x = self.last_bn(self.last(x.view(x.size(0), -1)))
        return self.out(F.dropout(x.relu(), 0.5, self.training))


class Forked(nn.Module):
    """Nothing here may be equalized: each layer's output or weight is used twice, or gated, summed, joined or bent."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 4, 1)
        self.b = nn.Conv2d(4, 4, 1)
        self.shared = nn.Conv2d(4, 4, 1)
        self.tied1, self.tied2 = nn.Conv2d(4, 4, 1, bias=False), nn.Conv2d(4, 4, 1, bias=False)
        self.tied2.weight = self.tied1.weight
        self.gate = nn.Conv2d(4, 4, 1)
        self.smooth = nn.Conv2d(8, 4, 1)
        self.bounded = nn.Conv2d(4, 4, 1)
        self.turned = nn.Conv2d(4, 4, 1)
        self.end = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        x = self.b(x) + x
        x = self.shared(self.shared(x).relu())
        x = self.tied2(F.relu(self.tied1(x)))
        x = torch.cat([x, x * torch.sigmoid(self.gate(x))], 1)
        x = self.bounded(F.gelu(self.smooth(x)))
        x = self.turned(x.clamp(-1, 1)).transpose(2, 3)
        return self.end(x.roll(1, 1))


class Unfolded(nn.Module):
    """Batch norms that cannot be folded into a layer of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 1)
        self.common = nn.BatchNorm2d(4)
        self.second = nn.Conv2d(4, 4, 1)
        self.third = nn.Conv2d(4, 4, 1)
        self.bare = nn.BatchNorm2d(4, affine=False)
        self.fourth = nn.Conv2d(4, 4, 1)
        self.batch = nn.BatchNorm2d(4, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.common(self.first(x)))
        x = F.relu(self.common(self.second(x)))
        x = F.relu(self.bare(self.third(x)))
        return self.batch(self.fourth(x))


class Joined(nn.Module):
    """Two branches side by side and a shortcut with more channels of zeros, as in the CIFAR networks."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.left_bn = nn.Conv2d(3, 2, 1, bias=False), nn.BatchNorm2d(2)
        self.right, self.right_bn = nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4)
        self.joint, self.joint_bn = nn.Conv2d(6, 12, 1, bias=False), nn.BatchNorm2d(12)
        self.end = nn.Conv2d(12, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        both = torch.cat([F.relu(self.left_bn(self.left(x))), F.relu6(self.right_bn(self.right(x)))], 1)
        y = self.joint_bn(self.joint(both))
        extra = (y.shape[1] - both.shape[1]) // 2
        short = F.pad(both[:, :, ::1, ::1], (0, 0, 0, 0, extra, extra))
        return self.end(F.relu(short + y))


SHAPES = {
    Basic: (3, 8, 8),
    Inverted: (3, 8, 8),
    InvertedRelu: (3, 8, 8),
    Functional: (3, 6, 6),
    Plumbing: (4, 8, 8),
    Forked: (3, 5, 5),
    Unfolded: (3, 4, 4),
    Joined: (3, 4, 4),
}


def trained(kind: type[nn.Module], seed: int = 0) -> nn.Module:
    """A network in eval mode, float64, whose batch norms have seen data; some of their weights are below 0."""
    torch.manual_seed(seed)
    module = kind().double()
    for one in module.modules():
        if isinstance(one, nn.modules.batchnorm._BatchNorm) and one.affine:
            nn.init.uniform_(one.weight, 0.3, 2.0)
            one.weight.data[::3] *= -1
            nn.init.normal_(one.bias, std=0.5)
            one.momentum = 1.0
    module.train()
    with torch.no_grad():
        module(inputs(kind, 64, seed))
    return module.eval()


def inputs(kind: type[nn.Module], samples: int, seed: int = 1) -> Tensor:
    return torch.randn(samples, *SHAPES[kind], generator=torch.Generator().manual_seed(seed)).double()


def decisions(module: nn.Module, dtype: str = "F32", method: str = "dfq", **options: object) -> list[Decision]:
    """Every weight of a layer with one method."""
    config = METHODS[method].config(**{"bits": 8, **options})
    return [
        Decision(TensorInfo(f"{name}.weight", tuple(layer.weight.shape), dtype), method, config, "test", _axis(layer))
        for name, layer in module.named_modules()
        if isinstance(layer, (nn.Linear, nn.modules.conv._ConvNd))
    ]


def _axis(layer: nn.Module) -> tuple[int, ...]:
    return (1,) if isinstance(layer, nn.ConvTranspose2d) else (0,)


def live_model(module: nn.Module, example: Tensor, calibration: list[Tensor] | None = None) -> LiveModel:
    """A live model of the network as it is, so that float64 stays float64."""
    module.requires_grad_(False)
    for one in module.modules():
        if getattr(one, "inplace", False):
            one.inplace = False
    batch = Batch((example,))
    names = {decision.tensor.name.removesuffix(".weight") for decision in decisions(module)}
    layers = tuple(execution_order(module, names, batch))
    batches = [Batch((x,)) for x in calibration or []]
    live = LiveModel(module, module, layers, batches, batch, torch.device("cpu"))
    assert live.traced
    live.quantized = copy.deepcopy(module)
    return live


def live_of(kind: type[nn.Module], seed: int = 0) -> LiveModel:
    return live_model(trained(kind, seed), inputs(kind, 2))
