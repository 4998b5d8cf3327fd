"""Every regularizer is a Penalty: it gives its value on a weight, and gradients without autograd, piece by piece.

A training loop adds the gradient straight into the weight's own, so a penalty costs no memory that grows with the
weight; `as_loss` makes it a differentiable loss for whoever wants that.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar, cast

import torch
from torch import Tensor

from qcompress.coding.rows import tiles
from qcompress.registry import load
from qcompress.registry.regularizers import REGULARIZERS, Reduction, RegularizerConfig

TILE_VALUES = 1 << 16
"""Weights that are worked on at once: few enough to stay in the cache."""

ConfigT_co = TypeVar("ConfigT_co", bound=RegularizerConfig, covariant=True)


@dataclass(frozen=True)
class Evaluated:
    """A penalty at one weight.

    value   float64 scalar
    terms   gradient of what is learned, by name, shaped like it
    counts  weights of each representative, float64 [levels]
    """

    value: Tensor
    terms: Mapping[str, Tensor] = field(default_factory=dict)
    counts: Tensor | None = None


class Penalty(Generic[ConfigT_co]):
    """One regularizer of one weight, which is contiguous, its channels first; a member overrides what it needs.

    terms  what it learns, by the names under which it is saved: alpha, representatives, margin
    ends   the range that `begin` fixed; None where it fixes none
    """

    ends: tuple[float, float] | None = None

    def __init__(self, config: ConfigT_co, weight: Tensor) -> None:
        self.config = config
        self.terms: dict[str, Tensor] = {}

    def accumulate(self, weight: Tensor, gradient: Tensor | None, factor: float) -> Evaluated:
        """The penalty; factor times its gradient is added to `gradient`, shaped like the weight, unless that is None.

        The value and the gradients of terms are without the factor.
        """
        raise NotImplementedError

    def shrink(self, weight: Tensor, rate: float) -> None:
        """The proximal step of `rate` times the penalty, in place; of those alone whose config `has_proximal`."""
        raise NotImplementedError

    def begin(self, weight: Tensor) -> None:
        """Take from the weight what is fixed from here on: ranges, first representatives. Called when it first acts."""

    def settle(self, weight: Tensor, found: Evaluated) -> None:
        """After an optimizer step: bring what is learned back to where it may be."""

    def saved(self, weight: Tensor) -> dict[str, Tensor]:
        """What goes beside the checkpoint, by name: alpha, representatives, margin."""
        return {}

    def state(self) -> Mapping[str, Tensor]:
        """The tensors that a resumed run gets back, by name; written to in place."""
        return self.terms

    @property
    def shared(self) -> object:
        """What the penalties of several weights may hold together; the penalty itself where it holds nothing so."""
        return self


def make_penalty(name: str, config: RegularizerConfig, weight: Tensor) -> Penalty[RegularizerConfig]:
    """The regularizer of that name for one weight. Raises ModelError where the weight cannot follow the config."""
    kind = cast("type[Penalty[RegularizerConfig]]", load(REGULARIZERS[name].target))
    return kind(config, weight)


def matrix_of(weight: Tensor) -> Tensor:
    """A view [channels, rest] of a contiguous weight whose channels come first; a vector is one row."""
    return weight.view(1, -1) if weight.ndim < 2 else weight.flatten(1)


def tiles_of(matrix: Tensor) -> Iterator[tuple[slice, slice]]:
    """Row and column slices of pieces of a matrix that fit in cache."""
    return tiles(matrix.shape[0], matrix.shape[1], TILE_VALUES)


@dataclass(frozen=True)
class Groups:
    """A matrix [rows, columns] in groups that have a value each: every row, or all of it.

    per_row  whether rows are groups
    """

    matrix: Tensor
    per_row: bool

    @property
    def number(self) -> int:
        return self.matrix.shape[0] if self.per_row else 1

    @property
    def size(self) -> int:
        """Weights of a group."""
        return self.matrix.numel() // self.number

    def zeros(self) -> Tensor:
        """float64 [groups, 1], to be filled by `add`."""
        return torch.zeros(self.number, 1, dtype=torch.float64, device=self.matrix.device)

    def ends(self) -> tuple[Tensor, Tensor]:
        """The least and the largest weight of every group, [groups, 1] of the matrix's dtype."""
        if self.per_row:
            # Along a dimension aminmax takes ten times as long as both of these.
            return self.matrix.amin(1, keepdim=True), self.matrix.amax(1, keepdim=True)
        low, high = torch.aminmax(self.matrix)
        return low.view(1, 1), high.view(1, 1)

    def add(self, total: Tensor, rows: slice, part: Tensor) -> None:
        """Add the sums over a tile to its groups."""
        if self.per_row:
            total[rows] += part.sum(1, keepdim=True)
        else:
            total += part.sum()

    def of(self, values: Tensor, rows: slice) -> Tensor:
        """The groups' values [groups, 1] at a tile's rows."""
        return values[rows] if self.per_row else values

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean and population variance of every group, float64 [groups, 1]."""
        total, squares = self.zeros(), self.zeros()
        # Sums around a weight of the group keep their digits.
        origin = self.matrix[:, :1] if self.per_row else self.matrix[:1, :1]
        for rows, columns in tiles_of(self.matrix):
            part = self.matrix[rows, columns] - self.of(origin, rows)
            self.add(total, rows, part)
            self.add(squares, rows, part.mul_(part))
        mean = total / self.size
        return mean + origin.double(), (squares / self.size - mean.square()).clamp_min(0)


def groups_of(weight: Tensor, granularity: Literal["tensor", "channel"]) -> Groups:
    """A weight in groups: its channels, or all of it."""
    return Groups(matrix_of(weight), granularity == "channel")


def spread(weight: Tensor, kind: Literal["none", "std", "var"]) -> float:
    """What a penalty is divided by: 1, the standard deviation or the variance of the weight."""
    if kind == "none":
        return 1.0
    variance = float(groups_of(weight, "tensor").moments()[1]) or 1.0
    return variance if kind == "var" else variance**0.5


def scale_of(weight: Tensor, kind: Literal["none", "std", "var"], reduction: Reduction, parts: int) -> float:
    """What a sum over so many parts of a penalty is multiplied by: 1 / spread, for a mean also 1 / parts."""
    scale = 1 / spread(weight, kind)
    return scale / parts if reduction == "mean" else scale


class _AsLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, penalty: Penalty[RegularizerConfig], weight: Tensor, *terms: Tensor) -> Tensor:
        gradient = torch.zeros_like(weight)
        found = penalty.accumulate(weight.detach(), gradient, 1.0)
        ctx.save_for_backward(gradient, *found.terms.values())
        ctx.names = list(found.terms)
        ctx.learned = list(penalty.terms)
        return found.value.to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        (upstream,) = outputs
        gradient, *terms = ctx.saved_tensors
        by_name = dict(zip(ctx.names, terms, strict=True))
        learned = [upstream * by_name[name] if name in by_name else None for name in ctx.learned]
        return (None, upstream * gradient, *learned)


def as_loss(penalty: Penalty[RegularizerConfig], weight: Tensor) -> Tensor:
    """The penalty as a differentiable scalar of the weight's dtype, for any autograd loss.

    Differentiable once, in the weight and in what the penalty learns; keeps one number a weight for the backward pass.
    """
    loss: Tensor = _AsLoss.apply(penalty, weight, *penalty.terms.values())  # type: ignore[no-untyped-call]
    return loss
