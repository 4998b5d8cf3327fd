"""Images are changed as they are stored, the same ones whoever reads them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qcompress.data.augment import Draw, read_augmented
from qcompress.data.batches import Batch, Batches, Source
from qcompress.data.sources import read_data
from qcompress.errors import DataError
from qcompress.types.settings import ImagesData, Normalize, NpzData

NORMALIZE = Normalize(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
ONE = Draw(0, "a batch")


def batches_of(images: Tensor) -> Batches:
    return Batches(len(images), len(images), lambda indices: Batch((images[list(indices)],)))


def images(count: int = 12) -> Tensor:
    return torch.arange(count * 3 * 8 * 8, dtype=torch.float32).view(count, 3, 8, 8)


def augmented(x: Tensor, augment: Sequence[str], draw: Draw = ONE) -> Tensor:
    return read_augmented(batches_of(x), augment, range(len(x)), draw).args[0]


def test_flip_gives_each_image_or_its_mirror_and_both_occur() -> None:
    before = images(64)
    after = augmented(before, ["flip"])
    same = (after == before).flatten(1).all(1)
    mirrored = (after == before.flip(3)).flatten(1).all(1)
    assert bool((same ^ mirrored).all()) and 10 < int(same.sum()) < 54


def test_crop_gives_windows_of_the_padded_image_and_all_places_occur() -> None:
    count = 600
    before = torch.rand(1, 1, 8, 8).expand(count, 1, 8, 8) + 1
    after = augmented(before, ["crop4"])
    windows = F.unfold(F.pad(before[:1], (4, 4, 4, 4)), 8)[0].T
    where = (after.flatten(1).unsqueeze(1) == windows.unsqueeze(0)).all(2)
    assert bool((where.sum(1) == 1).all())
    assert len(where.nonzero()[:, 1].unique()) == 81


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_draw_together_what_one_process_draws(size: int) -> None:
    whole = augmented(images(12), ["flip", "crop4"])
    for rank in range(size):
        found = augmented(images(12), ["flip", "crop4"], Draw(0, "a batch", rank, size))
        assert torch.equal(found, whole[rank::size])


def test_another_seed_or_another_batch_draws_anew() -> None:
    one, again, *others = (
        augmented(images(), ["crop4"], Draw(*each)) for each in ((0, "a"), (0, "a"), (1, "a"), (0, "b"))
    )
    assert torch.equal(one, again) and not any(torch.equal(one, other) for other in others)


def test_inputs_by_name_are_augmented_too_and_text_is_refused() -> None:
    def read(indices: Sequence[int]) -> Batch:
        return Batch(kwargs={"pixels": images()[list(indices)], "more": torch.zeros(len(indices))})

    found = read_augmented(Batches(12, 12, read), ["flip"], range(12), ONE)
    assert torch.equal(found.kwargs["pixels"], augmented(images(), ["flip"]))
    assert torch.equal(found.kwargs["more"], torch.zeros(12))
    with pytest.raises(DataError, match="augment") as caught:
        read_augmented(batches_of(torch.zeros(3, 7)), ["flip"], range(3), Draw(0, ""), "recipe.yaml:5: data.train")
    assert caught.value.where == "recipe.yaml:5: data.train"


def npz(folder: Path, pixels: np.ndarray, **options: float) -> Batches:
    np.savez(folder / "data.npz", x=pixels)
    return read_data(NpzData(npz="data.npz", **options), Source(folder, "data.train", NORMALIZE), 0)


def folder_of_images(folder: Path, pixels: np.ndarray) -> Batches:
    image = pytest.importorskip("PIL.Image")
    for index, each in enumerate(pixels):
        image.fromarray(each).save(folder / f"{index:03}.png")
    return read_data(ImagesData(images=".", crop=8), Source(folder, "data.train", NORMALIZE), 0)


@pytest.mark.parametrize("kind", ["bytes", "scaled", "floats", "folder"])
def test_padding_is_black_whatever_the_data_are_scaled_to(kind: str, tmp_path: Path) -> None:
    """White images: all that is not white is the standardized value of 0 as stored."""
    white = np.full((40, 8, 8, 3), 255, np.uint8)
    match kind:
        case "bytes":
            batches, black, bright = npz(tmp_path, white), 0.0, 1.0
        case "scaled":
            batches, black, bright = npz(tmp_path, white, scale=0.01, zero_point=128), -1.28, 1.27
        case "floats":
            batches, black, bright = npz(tmp_path, np.ones((40, 3, 8, 8), np.float32)), 0.0, 1.0
        case _:
            batches, black, bright = folder_of_images(tmp_path, white), 0.0, 1.0
    found = read_augmented(batches, ["flip", "crop4"], range(40), ONE).args[0]
    for channel, (mean, std) in enumerate(zip(NORMALIZE.mean, NORMALIZE.std, strict=True)):
        values = sorted(found[:, channel].unique().tolist())
        assert values == pytest.approx([(black - mean) / std, (bright - mean) / std], abs=1e-6)
    # A plain reading has no padding.
    assert len(batches.read(range(40)).args[0][:, 0].unique()) == 1


def test_augmented_bytes_are_then_finished_as_all_images_are(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(256, size=(12, 8, 8, 3), dtype=np.uint8)
    batches = npz(tmp_path, pixels)
    found = read_augmented(batches, ["flip", "crop4"], range(12), Draw(3, "a batch")).args[0]
    changed = augmented(torch.from_numpy(pixels).permute(0, 3, 1, 2), ["flip", "crop4"], Draw(3, "a batch"))
    again = npz(tmp_path, changed.permute(0, 2, 3, 1).numpy())
    assert torch.equal(found, again.read(range(12)).args[0]) and found.is_contiguous()
    assert torch.equal(read_augmented(batches, [], range(12), Draw(3, "")).args[0], batches.read(range(12)).args[0])
