"""Min-squared and exponential share this: they penalize the distance to the nearest of a few representatives.

Representatives are sorted first, so that a search over the midpoints assigns a weight in O(log levels); that gives the
values and gradients of the form that compares every weight with every representative.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

from qcompress.errors import ModelError
from qcompress.registry.regularizers import RepresentativesConfig
from qcompress.regularizers.penalty import Evaluated, Penalty, matrix_of, scale_of, tiles_of
from qcompress.regularizers.periodic import SAMPLED, find_range, minima_of

LLOYD_STEPS = 50
COMPARED = 8
"""Representatives up to which comparing a weight with all of them takes less time than a search."""

RepresentativesT_co = TypeVar("RepresentativesT_co", bound=RepresentativesConfig, covariant=True)


class _Searched:
    """The cell of every weight, found by binary search: for many cells.

    weights  any shape
    borders  [cells - 1], sorted; a weight on one belongs below it
    """

    def __init__(self, weights: Tensor, borders: Tensor) -> None:
        self._cells = torch.bucketize(weights, borders)
        self._number = len(borders) + 1

    def take(self, values: Tensor) -> Tensor:
        """The value of each weight's cell."""
        return values.take(self._cells)

    def counts(self) -> Tensor:
        """Weights of each cell."""
        return torch.bincount(self._cells.flatten(), minlength=self._number)

    def sums(self, values: Tensor) -> Tensor:
        """Of one value a weight, over each cell."""
        return torch.bincount(self._cells.flatten(), weights=values.flatten(), minlength=self._number)


class _Compared:
    """As _Searched, by comparing every weight with every border: for few cells.

    Arithmetic takes a fraction of what masks and indices take: 1 above a border and 0 elsewhere, as numbers.
    """

    def __init__(self, weights: Tensor, borders: Tensor) -> None:
        self._above = [(weights - border).sign_().clamp_min_(0) for border in borders]
        self._number = weights.numel()

    def take(self, values: Tensor) -> Tensor:
        first, *others = values
        found = torch.full_like(self._above[0], float(first))
        for above, value in zip(self._above, others, strict=True):
            # With 0 and 1 both ends of the interpolation are exact.
            found.lerp_(value, above)
        return found

    def counts(self) -> Tensor:
        # Exact: a tile has fewer weights than float32 has whole numbers.
        above = torch.stack([one.sum() for one in self._above]).double()
        return _between(above.new_tensor([self._number]), above)

    def sums(self, values: Tensor) -> Tensor:
        flat = values.flatten()
        above = torch.stack([one.flatten().dot(flat) for one in self._above]).double()
        return _between(flat.sum().double().view(1), above)


def _between(whole: Tensor, above: Tensor) -> Tensor:
    """Of each cell, from the whole and from what lies above each border."""
    return -torch.cat((whole, above, torch.zeros_like(whole))).diff()


class Representatives:
    """The representatives of one weight, or of several that share them.

    values  [levels], in no order
    dead    how many no weight was nearest to when the penalty was last taken
    """

    def __init__(self, config: RepresentativesConfig, weight: Tensor) -> None:
        self.config = config
        kind = torch.promote_types(weight.dtype, torch.float32)
        self.values = torch.zeros(config.levels, dtype=kind, device=weight.device)
        self.values.requires_grad_(config.learnable)
        self.dead = 0

    def begin(self, weights: Tensor) -> None:
        """Put them where the config's `init` says.

        weights  any shape: those of all layers that share them
        raises   ModelError for fewer distinct weights than representatives
        """
        config = self.config
        flat = weights.detach().flatten().to(self.values.dtype)
        kept = flat[:: -(-len(flat) // SAMPLED)].sort().values
        distinct = 1 + int((kept[1:] > kept[:-1]).sum())
        if distinct < config.levels:
            what = f"{config.levels} representatives for {distinct} distinct weights"
            raise ModelError("regularizer", what, "ask for fewer levels, or leave the tensor out of the rule's match")
        if config.init == "linear":
            start = minima_of(*find_range(config.range, flat), config.levels, inside=False)
        else:
            start = _quantiles(kept.double(), config.levels)
            if config.init == "kmeans":
                start = _lloyd(kept.double(), start)
        with torch.no_grad():
            self.values.copy_(start)

    def reseed(self, counts: Tensor) -> None:
        """Move each representative that no weight is nearest to into the most populous cell.

        counts  [levels]
        """
        left = counts.detach().clone()
        dead = (left == 0).nonzero().flatten().tolist()
        self.dead = len(dead)
        if not (dead and self.config.learnable and self.config.reseed):
            return
        with torch.no_grad():
            for index in dead:
                full = int(left.argmax())
                others = self.values[self.values != self.values[full]]
                gap = (others - self.values[full]).abs().min() if len(others) else self.values[full].abs()
                self.values[index] = self.values[full] + gap / 4
                left[full] /= 2
                left[index] = left[full]


class ToRepresentatives(Penalty[RepresentativesT_co]):
    """terms: `representatives`, [levels], where they are learned."""

    def __init__(self, config: RepresentativesT_co, weight: Tensor) -> None:
        super().__init__(config, weight)
        self.share(Representatives(config, weight))
        self.begin(weight)

    def share(self, representatives: Representatives) -> None:
        """Use these, which other weights may use too."""
        self.representatives = representatives
        self.terms = {"representatives": representatives.values} if self.config.learnable else {}

    @property
    def shared(self) -> Representatives:
        return self.representatives

    def bend(self, distance: Tensor) -> tuple[Tensor, Tensor]:
        """Distances -> (penalties, their slopes); may work in place."""
        raise NotImplementedError

    def accumulate(self, weight: Tensor, gradient: Tensor | None, factor: float) -> Evaluated:
        """As every penalty; counts are the weights of each representative."""
        config, values = self.config, self.representatives.values
        centres, order = values.detach().sort()
        centres = centres.to(weight.dtype)
        borders = (centres[1:] + centres[:-1]) / 2
        matrix = matrix_of(weight)
        into = None if gradient is None else matrix_of(gradient)
        scale = scale_of(weight, config.normalize, config.reduction, weight.numel())
        cells_of = _Compared if len(centres) <= COMPARED else _Searched
        total = torch.zeros((), dtype=torch.float64, device=weight.device)
        pulls = torch.zeros(len(centres), dtype=torch.float64, device=weight.device)
        counts = torch.zeros(len(centres), dtype=torch.float64, device=weight.device)
        for rows, columns in tiles_of(matrix):
            part = matrix[rows, columns]
            cells = cells_of(part, borders)
            height, slope = self.bend(part - cells.take(centres))
            total += height.sum()
            if into is not None:
                into[rows, columns].add_(slope, alpha=factor * scale)
            counts += cells.counts()
            if config.learnable:
                pulls += cells.sums(slope)
        self.representatives.dead = int((counts == 0).sum())
        slopes, members = torch.empty_like(pulls), torch.empty_like(counts)
        slopes[order] = -scale * pulls
        members[order] = counts
        terms = {"representatives": slopes.to(values.dtype)} if config.learnable else {}
        return Evaluated(total * scale, terms, members)

    def begin(self, weight: Tensor) -> None:
        self.representatives.begin(weight)

    def settle(self, weight: Tensor, found: Evaluated) -> None:
        """Dead representatives get a new place."""
        if found.counts is not None:
            self.representatives.reseed(found.counts)

    def saved(self, weight: Tensor) -> dict[str, Tensor]:
        """representatives, float32 [levels], sorted."""
        return {"representatives": self.representatives.values.detach().float().sort().values.cpu()}

    def state(self) -> dict[str, Tensor]:
        """The representatives, which are taken from the weights once, learned or not."""
        return {"representatives": self.representatives.values}


def nearest_of(weight: Tensor, representatives: Tensor) -> Tensor:
    """The nearest representative of every weight, shaped like it."""
    centres = representatives.detach().sort().values.to(weight.dtype)
    return centres[torch.bucketize(weight, (centres[1:] + centres[:-1]) / 2)]


def _quantiles(kept: Tensor, levels: int) -> Tensor:
    """The quantiles (j + 1/2) / levels of sorted values."""
    places = (torch.arange(levels, dtype=torch.float64, device=kept.device) + 0.5) / levels * (len(kept) - 1)
    return kept[places.round().long()]


def _lloyd(kept: Tensor, centres: Tensor) -> Tensor:
    """Lloyd's iterations on sorted values, by prefix sums; empty cells keep their centre."""
    sums = torch.cat((kept.new_zeros(1), kept.cumsum(0)))
    for _ in range(LLOYD_STEPS):
        borders = torch.searchsorted(kept, (centres[1:] + centres[:-1]) / 2)
        ends = torch.cat((borders.new_zeros(1), borders, borders.new_tensor([len(kept)])))
        members = ends.diff()
        means = (sums[ends[1:]] - sums[ends[:-1]]) / members.clamp_min(1)
        moved = torch.where(members > 0, means, centres).sort().values
        if torch.equal(moved, centres):
            break
        centres = moved
    return centres
