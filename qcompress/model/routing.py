"""A network that decides by values, such as which expert a token goes to, decides once for both of its copies.

A tape keeps what a part of the full-precision network decided for a batch; the quantized copy then decides alike, so
that every layer of both sees the same tokens, one by one, and sums over pairs of inputs pair what belongs together.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten

CHOSEN = {
    aten.topk.default, aten.sort.default, aten.sort.stable, aten.max.dim, aten.min.dim, aten.kthvalue.default,
}  # fmt: skip
"""What gives values along a dimension, and where they stood."""
NUMBERED = {
    aten.argmax.default, aten.argmin.default, aten.nonzero.default, aten.bucketize.Tensor, aten.searchsorted.Tensor,
    aten._to_copy.default,
}  # fmt: skip
"""What may make integers of reals."""
MASKED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten.masked_select.default}
"""What may pick by a mask, which values may have made."""
READ = aten._local_scalar_dense.default
"""A value that Python reads, by which it may branch."""


class Tape(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """What was decided while some code first ran within it, as a context; run within it again, it decides alike.

    Where the code then asks for other decisions than the tape has, it decides for itself from there on.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.outcomes: list[tuple[Any, Any]] = []
        self._next: int | None = None

    @property
    def decides(self) -> bool:
        """Whether anything but what Python reads was decided."""
        return any(func is not READ for func, _ in self.outcomes)

    def __exit__(self, *given: Any) -> None:
        super().__exit__(*given)  # type: ignore[no-untyped-call]
        self._next = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in MASKED and (masks := _masks(args[1])):
            picked = self._settled(func, masks)
            where = picked[0] if isinstance(args[1], Tensor) else _with_masks(args[1], picked)
            return func(args[0], where, *args[2:], **kwargs)
        if func in CHOSEN and args[0].is_floating_point():
            values, places = func(*args, **kwargs)
            settled = self._settled(func, places)
            if settled is not places:
                values = _gathered(args[0], _dimension(func, args[1:], kwargs), settled)
            return values, settled
        if func in NUMBERED and isinstance(args[0], Tensor) and args[0].is_floating_point():
            found = func(*args, **kwargs)
            return found if found.is_floating_point() else self._settled(func, found)
        found = func(*args, **kwargs)
        if func is READ and isinstance(found, bool):
            return self._settled(func, found)
        return found

    def _settled(self, func: Any, own: Any) -> Any:
        """What the tape has in place of one's own outcome, which it keeps while it is written."""
        if self._next is None:
            self.outcomes.append((func, own))
            return own
        kept = self.outcomes[self._next : self._next + 1]
        if not kept or kept[0][0] is not func or not _is_like(func, kept[0][1], own):
            self._next = len(self.outcomes)
            return own
        self._next += 1
        return kept[0][1]


def _is_like(func: Any, kept: Any, own: Any) -> bool:
    """Whether one outcome can stand for another: of the same shape, but of places that are no zeros."""
    if func in MASKED:
        return [one.shape for one in kept] == [one.shape for one in own]
    return func is aten.nonzero.default or not isinstance(own, Tensor) or kept.shape == own.shape


def _masks(where: Any) -> list[Tensor]:
    given = [where] if isinstance(where, Tensor) else where
    return [one for one in given if isinstance(one, Tensor) and one.dtype == torch.bool]


def _with_masks(where: Any, masks: list[Tensor]) -> list[Any]:
    waiting = iter(masks)
    return [next(waiting) if isinstance(one, Tensor) and one.dtype == torch.bool else one for one in where]


def _dimension(func: Any, rest: tuple[Any, ...], options: Any) -> int:
    """The dimension that an operation of CHOSEN works on, from its arguments behind the first."""
    at = 1 if func in (aten.topk.default, aten.kthvalue.default) else 0
    given = rest[at] if len(rest) > at else -1
    return int(options.get("dim", given))


def _gathered(x: Tensor, dim: int, places: Tensor) -> Tensor:
    """The values of x at places along a dimension, which may be gone from them."""
    if places.ndim == x.ndim:
        return x.gather(dim, places)
    return x.gather(dim, places.unsqueeze(dim)).squeeze(dim)
