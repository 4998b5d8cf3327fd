"""The data that a recipe names are opened here as batches of samples; those of a torch Dataset are read here too."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from qcompress.data.batches import Batch, Batches, Cut, CutReader, Reader, Source, unchanged
from qcompress.data.foreign import first_line
from qcompress.data.user_code import find_callable
from qcompress.errors import DataError, QcompressError, RecipeError
from qcompress.types.data_settings import Data, FactoryData, HubData, ImagesData, NpzData, TextData
from qcompress.types.run import ModelRun

LABELS = ("labels", "label")


def open_batches(model_run: ModelRun, part: Literal["calibration", "eval"]) -> Batches:
    """A recipe's `calibration` or `eval` data. Raises DataError, RecipeError, UsageError."""
    recipe = model_run.recipe
    settings = None
    if recipe.data is not None:
        settings = recipe.data.calibration if part == "calibration" else recipe.data.eval
    if recipe.data is None or settings is None:
        raise RecipeError(recipe.source, f"names no data.{part}", f"add `data: {{{part}: ...}}`")
    where = Source(model_run.root, model_run.place(f"data.{part}"), recipe.data.normalize, model_run.allow_code)
    return read_data(settings, where, recipe.seed)


def read_data(settings: Data, source: Source, seed: int) -> Batches:
    """The samples that a recipe's section asks for, checked as far as can be without reading them all.

    raises  DataError for what is missing, damaged or does not fit; UsageError for a missing extra
    """
    finish: Callable[[Batch], Batch] = unchanged
    read_cut: CutReader | None = None
    match settings:
        case NpzData():
            from qcompress.data.npz import finish_npz, read_npz

            total, read = read_npz(settings, source)
            finish = partial(finish_npz, settings=settings, source=source)
        case ImagesData():
            from qcompress.data.images import finish_images, read_images

            total, read, read_cut = read_images(settings, source)
            finish = partial(finish_images, source=source)
        case HubData():
            from qcompress.data.text import read_hub

            total, read = read_hub(settings, source)
        case TextData():
            from qcompress.data.text import read_text

            total, read = read_text(settings, source)
        case FactoryData():
            total, read = read_factory(settings, source)
    wanted = _wanted(settings, total, source.place)
    if not settings.shuffle:
        return Batches(wanted, settings.batch_size, read, finish, read_cut)
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(total, generator=generator)[:wanted].sort().values.tolist()

    def of_chosen(indices: Sequence[int]) -> list[int]:
        return [chosen[index] for index in indices]

    def read_chosen(indices: Sequence[int]) -> Batch:
        return read(of_chosen(indices))

    def cut_chosen(indices: Sequence[int], cut: Cut) -> Batch:
        assert read_cut is not None
        return read_cut(of_chosen(indices), cut)

    return Batches(wanted, settings.batch_size, read_chosen, finish, None if read_cut is None else cut_chosen)


def _wanted(settings: Data, total: int, place: str) -> int:
    """The samples that are asked for, of so many. Raises DataError."""
    wanted = total if settings.samples is None else settings.samples
    if wanted > total:
        hint = f"ask for at most {total}, or leave `samples` out"
        raise DataError(place, f"{wanted} samples are asked for and there are {total}", hint)
    if total == 0:
        raise DataError(place, "there are no samples", "check the folder or the file")
    return wanted


def check_data(settings: Data, source: Source) -> None:
    """What `read_data` raises, as far as it can be told without reading the samples; of a factory all of it."""
    match settings:
        case NpzData():
            from qcompress.data.npz import count_npz

            _wanted(settings, count_npz(settings, source), source.place)
        case TextData() if settings.target is None and settings.labels is None:
            from qcompress.data.text import read_tokenizer

            # Its windows are counted once all of it is tokenized.
            source.find(settings.text)
            read_tokenizer(source.find(settings.tokenizer))
        case _:
            read_data(settings, source, 0)


def read_factory(settings: FactoryData, source: Source) -> tuple[int, Reader]:
    """The dataset's samples, and how to read some of them. Raises DataError, UsageError."""
    make = find_callable(settings.factory, source.root, source.allow_code, source.place, DataError)
    try:
        dataset = make(**settings.args)
        total = len(dataset)
    except QcompressError:
        raise
    except Exception as error:
        # The factory is anyone's code.
        what = f"{settings.factory} fails: {first_line(error)}"
        raise DataError(source.place, what, "check its args; it gives a torch Dataset with a length") from None

    def read(indices: Sequence[int]) -> Batch:
        try:
            return _as_batch(torch.utils.data.default_collate([dataset[index] for index in indices]))
        except QcompressError:
            raise
        except Exception as error:
            what = f"samples {indices[0]} to {indices[-1]}: {first_line(error)}"
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
