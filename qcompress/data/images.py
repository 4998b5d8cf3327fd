"""The samples of a folder of images are decoded when they are asked for."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qcompress.data.batches import Batch, Cut, CutReader, Reader, Source
from qcompress.data.foreign import parse_label, reading, refuse_irregular
from qcompress.data.user_code import import_package
from qcompress.errors import DataError
from qcompress.types.data_settings import ImagesData

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".gif", ".tif", ".tiff"}
METADATA = "metadata.csv"
MOST_PIXELS = 100_000_000


def read_images(settings: ImagesData, source: Source) -> tuple[int, Reader, CutReader]:
    """How many images there are, and how to read some: their centres or parts, uint8 [samples, 3, height, width].

    raises  DataError
    """
    folder = source.find(settings.images)
    if not folder.is_dir():
        raise DataError(str(folder), "is no folder", "name a folder of images")
    listed = _listed(folder)
    image = import_package("PIL.Image")
    labelled = all(label is not None for _, label in listed)

    def read(indices: Sequence[int], cut: Cut | None = None) -> Batch:
        parts = []
        for place, index in enumerate(indices):
            path = listed[index][0]
            whole = _pixels(image, path, settings.resize)
            parts.append(_centre(whole, settings.crop, path) if cut is None else cut(whole, place))
        labels = torch.tensor([listed[index][1] for index in indices]) if labelled else None
        return Batch((torch.stack(parts),), labels=labels)

    return len(listed), read, read


def finish_images(batch: Batch, source: Source) -> Batch:
    """Images in bytes become numbers from 0 to 1, standardized: float32 [samples, 3, height, width]."""
    return replace(batch, args=(source.standardized(batch.args[0].float() / 255).contiguous(),))


def _listed(folder: Path) -> list[tuple[Path, int | None]]:
    """Every image with its label, in the order of metadata.csv, or of the names of classes and files."""
    if (folder / METADATA).is_file():
        return _from_metadata(folder / METADATA)
    classes = sorted(path for path in folder.iterdir() if path.is_dir())
    if not classes:
        return [(path, None) for path in _images(folder)]
    return [(path, label) for label, each in enumerate(classes) for path in _images(each)]


def _images(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)


def _from_metadata(path: Path) -> list[tuple[Path, int | None]]:
    with (
        path.open(newline="", encoding="utf-8") as lines,
        reading(path, "is no table in UTF-8", "write it anew, with columns file_name and label"),
    ):
        rows = csv.DictReader(lines)
        missing = {"file_name", "label"} - set(rows.fieldnames or ())
        if missing:
            raise DataError(str(path), f"has no column {sorted(missing)[0]!r}", "give columns file_name and label")
        listed: list[tuple[Path, int | None]] = []
        folder = Path(os.path.normpath(path.parent.absolute()))
        for line, row in enumerate(rows, start=2):
            where, name = f"{path}:{line}", row["file_name"] or ""
            if not name or not Path(os.path.normpath(folder / name)).is_relative_to(folder):
                raise DataError(where, f"names {name[:80]!r}, outside its folder", "name files below the folder")
            listed.append((path.parent / name, parse_label(row["label"], where)))
    absent = next((file for file, _ in listed if not file.is_file()), None)
    if absent is not None:
        raise DataError(str(path), f"names {absent.name!r}, which is not there", "add the file or take out its line")
    return listed


def _refuse_many(size: Sequence[int], path: Path) -> None:
    """Raise DataError for an image of more pixels than any photo has: a small file can declare as many as it likes."""
    if size[0] * size[1] > MOST_PIXELS:
        what = f"would have {size[0]:,} x {size[1]:,} pixels, more than {MOST_PIXELS:,}"
        raise DataError(str(path), what, "remove it, or make it smaller")


def _pixels(image: Any, path: Path, resize: int | None) -> Tensor:
    """uint8 [3, height, width]: the image, its shorter side resized where that is asked for. Raises DataError."""
    refuse_irregular(path, "the folder of images")
    # From memory: of a file, the library asks for as many bytes as a part of it declares to have.
    with (
        reading(path, "is no image that can be read", "remove or replace it"),
        image.open(io.BytesIO(path.read_bytes())) as opened,
    ):
        _refuse_many(opened.size, path)
        found = opened.convert("RGB")
    if resize is not None:
        share = resize / min(found.size)
        size = [max(round(side * share), resize) for side in found.size]
        _refuse_many(size, path)
        found = found.resize(size, image.BILINEAR)
    return torch.from_numpy(np.asarray(found).copy()).permute(2, 0, 1)


def _centre(whole: Tensor, crop: int, path: Path) -> Tensor:
    height, width = whole.shape[1:]
    if min(width, height) < crop:
        what = f"is {width} x {height}, smaller than the crop of {crop}"
        raise DataError(str(path), what, "add `resize`, or choose a smaller `crop`")
    left, top = (width - crop) // 2, (height - crop) // 2
    return whole[:, top : top + crop, left : left + crop]
