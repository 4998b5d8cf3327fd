"""The Gram of a layer whose inputs lie on several ranks: every rank adds up its own, and all get the sum of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qcompress.model.layers import MatrixLayer, measure_gram, needed_places, shapes_of
from qcompress.types.ranks import World
from qcompress.types.run import Gram


def joint_gram(
    layer: MatrixLayer,
    noisy: Sequence[Tensor],
    clean: Sequence[Tensor] | None,
    generator: torch.Generator,
    world: World,
) -> Gram | None:
    """The Gram of all ranks' inputs, of which each has every `size`-th; None where none has any.

    Places are those that one process would draw for the batches in their order, as far as each gives one input.
    """
    told = world.tell([[*map(list, shapes_of(noisy))], clean is not None])
    order = [(index, rank) for rank, (shapes, _) in enumerate(told) for index in range(len(shapes))]
    if not order:
        return None
    shapes = [(rank, told[rank][0][index]) for index, rank in sorted(order)]
    if not all(paired for own, paired in told if own):
        clean = None
    width = _blank_columns(layer, shapes[0][1], 1, generator).shape[-1]
    places = needed_places(width, sum(shape[0] for _, shape in shapes))
    draws = []
    for rank, shape in shapes:
        if rank == world.rank:
            draws.append(generator.get_state())
        _blank_columns(layer, shape, places, generator)
    end = generator.get_state()
    own = measure_gram(layer, noisy, clean, generator, places, draws) if noisy else None
    generator.set_state(end)
    return _added(own, world, generator.device)


def _blank_columns(layer: MatrixLayer, shape: Sequence[int], places: int, generator: torch.Generator) -> Tensor:
    """The columns of one sample of an input of this shape, which draws what those of the input would."""
    return layer.columns(torch.zeros(1, *shape[1:], device=generator.device), places, generator)


def _added(own: Gram | None, world: World, device: torch.device) -> Gram:
    """The Gram of all positions, of the means over each rank's own; None is no position at all."""
    told = world.tell(None if own is None else [own.count, [*own.hessian.shape], own.cross is not None])
    known = [one for one in told if one is not None]
    count, (_, shape, crossed) = sum(one[0] for one in known), known[0]

    share = 0 if own is None else own.count

    def summed(part: Tensor | None, size: Sequence[int]) -> Tensor:
        value = torch.zeros(*size, dtype=torch.float64, device=device) if part is None else part * share
        total: Tensor = world.sum(value) / count
        return total

    hessian = summed(None if own is None else own.hessian, shape)
    mean = summed(None if own is None else own.mean, shape[:2])
    if not crossed:
        return Gram(hessian, None, mean, mean, count)
    cross = summed(None if own is None else own.cross, shape)
    return Gram(hessian, cross, mean, summed(None if own is None else own.clean_mean, shape[:2]), count)
