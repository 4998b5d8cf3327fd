"""A torch Dataset from code as samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qcompress.errors import DataError, QcompressError
from qcompress.model.batches import Batch
from qcompress.model.code import find_callable
from qcompress.model.data import Source
from qcompress.settings import FactoryData

LABELS = ("labels", "label")


def read_factory(settings: FactoryData, source: Source) -> tuple[int, Callable[[Sequence[int]], Batch]]:
    """The dataset's samples, and how to read some of them. Raises DataError, UsageError."""
    make = find_callable(settings.factory, source.root, source.allow_code, source.place, DataError)
    try:
        dataset = make(**settings.args)
        total = len(dataset)
    except QcompressError:
        raise
    except Exception as error:
        # The factory is anyone's code.
        what = f"{settings.factory} fails: {' '.join(f'{type(error).__name__}: {error}'.split())[:200]}"
        raise DataError(source.place, what, "check its args; it gives a torch Dataset with a length") from None

    def read(indices: Sequence[int]) -> Batch:
        try:
            collated = torch.utils.data.default_collate([dataset[index] for index in indices])
            return _as_batch(collated)
        except QcompressError:
            raise
        except Exception as error:
            what = (
                f"samples {indices[0]} to {indices[-1]}: {' '.join(f'{type(error).__name__}: {error}'.split())[:200]}"
            )
            raise DataError(source.place, what, "give (input, label), (inputs, label) or a mapping") from None

    return total, read


def _as_batch(collated: Any) -> Batch:
    if isinstance(collated, Tensor):
        return Batch((collated,))
    if isinstance(collated, Mapping):
        inputs = dict(collated)
        labels = next((inputs.pop(name) for name in LABELS if name in inputs), None)
        return Batch(kwargs=inputs, labels=labels)
    first, labels = collated
    if isinstance(first, Mapping):
        return Batch(kwargs=dict(first), labels=labels)
    return Batch(tuple(first) if isinstance(first, (list, tuple)) else (first,), labels=labels)
