"""A layer is a matrix product here: its inputs are rows of a matrix, whatever it slides or scatters."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qcompress.model.anew import Anew
from qcompress.types.ranks import ALONE, World
from qcompress.types.run import Gram

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

GRAM_ROWS = 1 << 15
GRAM_ROWS_A_COLUMN = 64
"""Positions that a Gram is measured from at most: more of them add hardly anything to it but time."""
CACHED_VALUES = 1 << 15
"""Numbers that are added at a time, so that their float64 form stays in the cache."""

GATHERED_VALUES = 1 << 18
"""Numbers that are gathered at a time, for the same reason."""

Choice: TypeAlias = Callable[[tuple[int, ...], torch.device], tuple[Tensor, ...]]
"""Sizes of the output -> one index tensor for each of its dimensions: the places that are looked at."""


@dataclass(frozen=True)
class MatrixLayer:
    """A layer whose output is weight rows times input columns: for group g, out[g] = inputs[g] @ rows[g].T + bias.

    groups  how many independent products: of a depthwise convolution, one a channel
    joined  whether the groups lie side by side in the weight's rows, as those of a transposed convolution do: a row is
            then a sum of one product a group, each with outputs of its own
    """

    module: nn.Module
    groups: int
    joined: bool = False

    def columns(self, x: Tensor, places: int | None = None, generator: torch.Generator | None = None) -> Tensor:
        """The inputs float32 [groups, positions, columns] of x, positions in the order of samples, then places.

        places  how many are drawn of each sample's, with `generator`, the same for all samples; all where absent
        """
        module: Any = self.module
        if isinstance(module, CONVOLUTIONS):
            padded, windows = _windows(module, _batched(x, len(module.kernel_size)))
            return _as_columns(padded, windows, module.groups, _chosen(places, generator))
        if isinstance(module, TRANSPOSED):
            x = _batched(x, len(module.kernel_size))
            return _as_columns(x, _spread_windows(module, x), module.groups, _chosen(places, generator))
        rows = x.reshape(len(x), -1, x.shape[-1])
        (chosen,) = _chosen(places, generator)((rows.shape[1],), rows.device)
        return rows[:, chosen].reshape(1, -1, x.shape[-1])

    def picked(self, y: Tensor, places: int | None, generator: torch.Generator | None) -> Tensor:
        """The layer's output y as [groups, positions, channels of a group] at the places that `columns` would draw."""
        if not isinstance(self.module, (*CONVOLUTIONS, *TRANSPOSED)):
            rows = y.reshape(len(y), -1, y.shape[-1])
            (chosen,) = _chosen(places, generator)((rows.shape[1],), rows.device)
            return rows[:, chosen].reshape(1, -1, y.shape[-1])
        index: Any = (slice(None), slice(None), *_chosen(places, generator)(tuple(y.shape[2:]), y.device))
        values = y[index].movedim(1, 2).reshape(-1, self.groups, y.shape[1] // self.groups)
        return values.movedim(1, 0)

    def outputs(self, y: Tensor) -> Tensor:
        """The layer's output y as [positions, channels], positions as in `columns`."""
        if isinstance(self.module, (*CONVOLUTIONS, *TRANSPOSED)):
            return y.movedim(1, -1).reshape(-1, y.shape[1])
        return y.reshape(-1, y.shape[-1])


def matrix_layer(module: nn.Module) -> MatrixLayer | None:
    """The module as a matrix product, or None for one that is none, or that computes more than its class."""
    if isinstance(module, CONVOLUTIONS):
        plain = type(module).forward in {kind.forward for kind in CONVOLUTIONS}
        return MatrixLayer(module, module.groups) if plain else None
    if isinstance(module, TRANSPOSED):
        plain = type(module).forward in {kind.forward for kind in TRANSPOSED}
        joined = module.groups > 1 and not has_channels_of_its_own(module)
        return MatrixLayer(module, module.groups, joined) if plain else None
    if isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward:
        return MatrixLayer(module, 1)
    # transformers' Conv1D: a linear layer whose weight lies transposed.
    if type(module).__name__ == "Conv1D" and type(module).__module__.startswith("transformers."):
        return MatrixLayer(module, 1)
    return None


def has_channels_of_its_own(module: Any) -> bool:
    """Whether each input channel of a transposed convolution makes outputs that no other has a part in."""
    return bool(1 < module.groups == module.in_channels)


@dataclass(frozen=True)
class InnerProduct:
    """A product that a module computes inside itself, or one for each part of a weight's rows.

    rows  of the weight
    """

    rows: int


Parts: TypeAlias = Mapping[tuple[int, int], Tensor]
"""What flows into an inner product: rows of the weight [from, to) -> their inputs [positions, columns]."""

Inputs: TypeAlias = "Tensor | Parts"
"""What a call gives a product: a layer's input as it comes, or that of an inner product in parts."""


class InputsAnew(Anew[Tensor]):
    """What flows into a layer, one tensor a call, computed anew whenever it is asked for.

    compute  gives that of a call
    shapes   of the tensors
    source   what they are computed of: of the same source they are the same
    """

    def __init__(self, compute: Callable[[int], Tensor], shapes: Sequence[tuple[int, ...]], source: object) -> None:
        self._compute = compute
        self.shapes = [*shapes]
        self.source = source

    def __len__(self) -> int:
        return len(self.shapes)

    def make(self, index: int) -> Tensor:
        return self._compute(index)


def shapes_of(inputs: Sequence[Tensor]) -> list[tuple[int, ...]]:
    """Of the tensors, none of which is computed for it."""
    return inputs.shapes if isinstance(inputs, InputsAnew) else [tuple(x.shape) for x in inputs]


MeasureGram: TypeAlias = Callable[
    [MatrixLayer, Sequence[Tensor], "Sequence[Tensor] | None", torch.Generator], "Gram | None"
]
"""As `measure_gram`; None where there are no inputs."""


def drawn_places(layer: MatrixLayer, inputs: Sequence[Tensor], generator: torch.Generator) -> int:
    """How many places of each sample a Gram is measured at."""
    samples = sum(shape[0] for shape in shapes_of(inputs))
    width = layer.columns(inputs[0][:1], 1, generator).shape[-1]
    return needed_places(width, samples)


def needed_places(width: int, samples: int) -> int:
    """How many places of each of so many samples are enough for a Gram of so many columns."""
    return -(-max(GRAM_ROWS, GRAM_ROWS_A_COLUMN * width) // samples)


def are_all_looked_at(layer: MatrixLayer, inputs: Sequence[Tensor], places: int) -> bool:
    """Whether so many places of each sample are all that a layer has which does not slide."""
    if isinstance(layer.module, (*CONVOLUTIONS, *TRANSPOSED)):
        return False
    return all(math.prod(shape) <= places * shape[0] * shape[-1] for shape in shapes_of(inputs))


def measure_gram(
    layer: MatrixLayer,
    noisy: Sequence[Tensor],
    clean: Sequence[Tensor] | None,
    generator: torch.Generator,
    places: int | None = None,
    draws: Sequence[Tensor] | None = None,
) -> Gram:
    """The Gram of a layer from its inputs, batch by batch; `clean` None where there is only one network.

    From each sample places are drawn with `generator`, where there are more than enough. Sums run in float32 within a
    batch and in float64 over batches.

    places  how many of each sample, where `drawn_places` has told it already
    draws   states of the generator before each batch, where they are not one after another
    """
    places = drawn_places(layer, noisy, generator) if places is None else places
    sums: dict[str, Tensor] = {}
    count = 0
    for index, x in enumerate(noisy):
        if draws is not None:
            generator.set_state(draws[index])
        state = generator.get_state()
        columns = layer.columns(x.float(), places, generator)
        count += columns.shape[1]
        _add(sums, "hessian", torch.matmul(columns.transpose(1, 2), columns))
        _add(sums, "mean", columns.sum(1, dtype=torch.float64))
        if clean is not None:
            generator.set_state(state)
            other = layer.columns(clean[index].float(), places, generator)
            _add(sums, "cross", torch.matmul(other.transpose(1, 2), columns))
            _add(sums, "clean_mean", other.sum(1, dtype=torch.float64))
    means = {name: _joined(layer, total.div_(count)) for name, total in sums.items()}
    hessian, mean = means["hessian"], means["mean"]
    return Gram(hessian, means.get("cross"), mean, means.get("clean_mean", mean), count)


def _add(sums: dict[str, Tensor], name: str, part: Tensor) -> None:
    """Add to a sum in float64, a few rows of one batch's part at a time: adding two dtypes is slow."""
    if name not in sums:
        sums[name] = part.double()
        return
    total = sums[name].view(-1, part.shape[-1])
    few = max(1, CACHED_VALUES // part.shape[-1])
    rows = part.reshape(total.shape)
    for start in range(0, len(rows), few):
        total[start : start + few].add_(rows[start : start + few].double())


def _joined(layer: MatrixLayer, total: Tensor) -> Tensor:
    """Sums a group, of which those of one weight row lie along a diagonal where groups are joined."""
    if not layer.joined:
        return total
    if total.ndim == 2:
        return total.reshape(1, -1)
    diagonal: Tensor = torch.block_diag(*total)  # type: ignore[no-untyped-call]
    return diagonal.unsqueeze(0)


def measure_inner_gram(
    layer: InnerProduct,
    columns: int,
    noisy: Sequence[Parts],
    clean: Sequence[Parts] | None,
    generator: torch.Generator,
    world: World = ALONE,
    measure: MeasureGram | None = None,
) -> tuple[Gram, int]:
    """The Gram of an inner product, and how many of its rows no input reaches: theirs is that of plain rounding.

    world, measure  the ranks that have inputs, and what gives the Gram of all of theirs
    """
    own = sorted({span for parts in noisy for span in parts})
    spans = sorted({(low, high) for told in world.tell(own) for low, high in told})
    size = math.gcd(layer.rows, *(end for span in spans for end in span))
    plain, found = MatrixLayer(nn.Identity(), 1), {}
    for span in spans:
        both = [
            (parts[span], None if clean is None else clean[i][span]) for i, parts in enumerate(noisy) if span in parts
        ]
        xs = [x.unsqueeze(0) for x, _ in both if x.numel()]
        others = [x.unsqueeze(0) for _, x in both if x is not None and x.numel()]
        if measure is not None:
            gram_of_all = measure(plain, xs, others or None, generator)
            if gram_of_all is not None:
                found[span] = gram_of_all
        elif xs:
            found[span] = measure_gram(plain, xs, others or None, generator)
    starts = range(0, layer.rows, size)
    reached = {start: gram for (low, high), gram in found.items() for start in range(low, high, size)}
    typical = (
        float(torch.stack([g.hessian.diagonal(dim1=1, dim2=2).mean() for g in found.values()]).mean()) if found else 1.0
    )
    blank = blank_gram(1, columns, generator.device, typical)
    grams = [reached.get(start, blank) for start in starts]
    crossed = any(gram.cross is not None for gram in grams)
    gram = Gram(
        torch.cat([gram.hessian for gram in grams]),
        torch.cat([gram.hessian if gram.cross is None else gram.cross for gram in grams]) if crossed else None,
        torch.cat([gram.mean for gram in grams]),
        torch.cat([gram.clean_mean for gram in grams]),
        sum(gram.count for gram in found.values()),
    )
    return gram, layer.rows - size * len(reached)


def blank_gram(groups: int, columns: int, device: torch.device, energy: float = 1.0) -> Gram:
    """The Gram under which a weight is rounded to nearest: of inputs that are all alike and have nothing in common."""
    hessian = energy * torch.eye(columns, dtype=torch.float64, device=device).repeat(groups, 1, 1)
    mean = hessian.new_zeros(groups, columns)
    return Gram(hessian, None, mean, mean, 0)


def _chosen(places: int | None, generator: torch.Generator | None) -> Choice:
    """Some places at random without repetition, in order; all of them where there are no more."""

    def choose(sizes: tuple[int, ...], device: torch.device) -> tuple[Tensor, ...]:
        total = math.prod(sizes)
        if places is None or places >= total:
            flat = torch.arange(total, device=device)
        else:
            flat = torch.randperm(total, generator=generator, device=device)[:places].sort().values
        return torch.unravel_index(flat, sizes)

    return choose


@dataclass(frozen=True)
class _Window:
    """What a place of the output sees along one dimension: taps at place * step + tap * spacing - before, in units of
    1 / `spread` of an input place; what lies between places, or beyond the first or the last one, is zero.

    places  of the output
    """

    places: int
    taps: int
    step: int
    spacing: int
    before: int
    spread: int = 1

    def seen(self, chosen: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """For chosen places int64 [n] what of an input of so many places each tap sees, int64 [n, taps], and whether
        there is any."""
        taps = torch.arange(self.taps, device=chosen.device)
        units = chosen.unsqueeze(1) * self.step + taps * self.spacing - self.before
        there = (units >= 0) & (units <= (size - 1) * self.spread) & (units % self.spread == 0)
        return torch.where(there, units.div(self.spread, rounding_mode="floor"), 0), there


def _windows(module: Any, x: Tensor) -> tuple[Tensor, list[_Window]]:
    """The input of a convolution, padded unless by zeros, and what its places see of it along each dimension."""
    padding = module._reversed_padding_repeated_twice
    if any(padding) and module.padding_mode != "zeros":
        x = F.pad(x, padding, mode=module.padding_mode)
        padding = [0] * len(padding)
    windows = []
    for axis, (taps, step, spacing) in enumerate(zip(module.kernel_size, module.stride, module.dilation, strict=True)):
        # Paddings are listed from the last dimension to the first.
        before, behind = padding[len(padding) - 2 * axis - 2 :][:2]
        places = (x.shape[2 + axis] + before + behind - spacing * (taps - 1) - 1) // step + 1
        windows.append(_Window(places, taps, step, spacing, before))
    return x, windows


def _spread_windows(module: Any, x: Tensor) -> list[_Window]:
    """A transposed convolution is a convolution with the mirrored kernel over inputs spread by its stride."""
    windows = []
    sides = zip(x.shape[2:], module.kernel_size, module.stride, module.dilation, module.padding, strict=True)
    for (size, taps, spread, spacing, padding), more in zip(sides, module.output_padding, strict=True):
        places = (size - 1) * spread - 2 * padding + spacing * (taps - 1) + more + 1
        # Its first tap is the last one of the mirrored kernel.
        windows.append(_Window(places, taps, 1, -spacing, -padding, spread))
    return windows


def _batched(x: Tensor, dimensions: int) -> Tensor:
    return x if x.ndim == dimensions + 2 else x.unsqueeze(0)


def _as_columns(x: Tensor, windows: Sequence[_Window], groups: int, choose: Choice) -> Tensor:
    """What chosen places see of x [samples, channels, *sizes], [groups, samples * chosen, channels / groups * taps].

    Only that is read, and a few samples at a time, so that what is gathered stays in the cache.
    """
    samples, channels = x.shape[:2]
    chosen = choose(tuple(window.places for window in windows), x.device)
    index = torch.zeros(len(chosen[0]), 1, dtype=torch.int64, device=x.device)
    there = torch.ones_like(index, dtype=torch.bool)
    for window, at, size in zip(windows, chosen, x.shape[2:], strict=True):
        seen, inside = window.seen(at, size)
        index = (index.unsqueeze(2) * size + seen.unsqueeze(1)).flatten(1)
        there = (there.unsqueeze(2) & inside.unsqueeze(1)).flatten(1)
    count, taps = index.shape
    index, absent = index.flatten(), ~there.flatten()
    any_absent = bool(absent.any())
    columns = x.new_empty(groups, samples, count, channels // groups, taps)
    few = max(1, GATHERED_VALUES // (channels * max(len(index), 1)))
    for start in range(0, samples, few):
        part = _take(x[start : start + few].flatten(2), index)
        if any_absent:
            part.masked_fill_(absent, 0.0)
        part = part.view(len(part), groups, channels // groups, count, taps)
        columns[:, start : start + few].copy_(part.permute(1, 0, 3, 2, 4))
    return columns.view(groups, samples * count, -1)


def _take(values: Tensor, index: Tensor) -> Tensor:
    """values[..., index]; on the CPU numpy reads single numbers several times as fast as torch."""
    if values.device.type != "cpu":
        return values[..., index]
    return torch.from_numpy(values.detach().numpy().take(index.numpy(), axis=-1, mode="clip"))
