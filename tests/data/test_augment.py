"""Images are changed as they are stored, the same ones whoever reads them."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qcompress.data.augment import Draw, load_augmentations, read_augmented
from qcompress.data.batches import Batch, Batches, Source, unchanged
from qcompress.data.sources import read_data
from qcompress.data.user_code import import_package
from qcompress.errors import DataError, UsageError
from qcompress.types.data_settings import (
    AUGMENTATIONS,
    Augmentation,
    ColorJitter,
    Crop4,
    CutMix,
    Flip,
    ImagesData,
    MixUp,
    Normalize,
    NpzData,
    RandAugment,
    RandomResizedCrop,
)
from qcompress.types.run import forked_seed

NORMALIZE = Normalize(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
ONE = Draw(0, "an epoch", "a batch")


def batches_of(images: Tensor) -> Batches:
    return Batches(len(images), len(images), lambda indices: Batch((images[list(indices)],)))


def images(count: int = 12) -> Tensor:
    return torch.arange(count * 3 * 8 * 8, dtype=torch.float32).view(count, 3, 8, 8)


def augmented(x: Tensor, augment: Sequence[Augmentation], draw: Draw = ONE) -> Tensor:
    return read_augmented(batches_of(x), augment, range(len(x)), draw).args[0]


def test_flip_gives_each_image_or_its_mirror_and_both_occur() -> None:
    before = images(64)
    after = augmented(before, [Flip()])
    same = (after == before).flatten(1).all(1)
    mirrored = (after == before.flip(3)).flatten(1).all(1)
    assert bool((same ^ mirrored).all()) and 10 < int(same.sum()) < 54


def test_crop_gives_windows_of_the_padded_image_and_all_places_occur() -> None:
    count = 600
    before = torch.rand(1, 1, 8, 8).expand(count, 1, 8, 8) + 1
    after = augmented(before, [Crop4()])
    windows = F.unfold(F.pad(before[:1], (4, 4, 4, 4)), 8)[0].T
    where = (after.flatten(1).unsqueeze(1) == windows.unsqueeze(0)).all(2)
    assert bool((where.sum(1) == 1).all())
    assert len(where.nonzero()[:, 1].unique()) == 81


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_draw_together_what_one_process_draws(size: int) -> None:
    whole = augmented(images(12), [Flip(), Crop4()])
    for rank in range(size):
        found = augmented(images(12), [Flip(), Crop4()], Draw(0, "an epoch", "a batch", rank, size))
        assert torch.equal(found, whole[rank::size])


def test_another_seed_or_another_batch_draws_anew() -> None:
    one, again, *others = (
        augmented(images(), [Crop4()], Draw(*each)) for each in zip((0, 0, 1, 0, 0), "aaaba", "ccccd", strict=True)
    )
    assert torch.equal(one, again) and not any(torch.equal(one, other) for other in others)


def test_inputs_by_name_are_augmented_too_and_text_is_refused() -> None:
    def read(indices: Sequence[int]) -> Batch:
        return Batch(kwargs={"pixels": images()[list(indices)], "more": torch.zeros(len(indices))})

    found = read_augmented(Batches(12, 12, read), [Flip()], range(12), ONE)
    assert torch.equal(found.kwargs["pixels"], augmented(images(), [Flip()]))
    assert torch.equal(found.kwargs["more"], torch.zeros(12))
    with pytest.raises(DataError, match="augment") as caught:
        read_augmented(batches_of(torch.zeros(3, 7)), [Flip()], range(3), ONE, "recipe.yaml:5: data.train")
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
    found = read_augmented(batches, [Flip(), Crop4()], range(40), ONE).args[0]
    for channel, (mean, std) in enumerate(zip(NORMALIZE.mean, NORMALIZE.std, strict=True)):
        values = sorted(found[:, channel].unique().tolist())
        assert values == pytest.approx([(black - mean) / std, (bright - mean) / std], abs=1e-6)
    # A plain reading has no padding.
    assert len(batches.read(range(40)).args[0][:, 0].unique()) == 1


def test_augmented_bytes_are_then_finished_as_all_images_are(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(256, size=(12, 8, 8, 3), dtype=np.uint8)
    batches = npz(tmp_path, pixels)
    found = read_augmented(batches, [Flip(), Crop4()], range(12), Draw(3, "an epoch", "a batch")).args[0]
    changed = augmented(torch.from_numpy(pixels).permute(0, 3, 1, 2), [Flip(), Crop4()], Draw(3, "an epoch", "a batch"))
    again = npz(tmp_path, changed.permute(0, 2, 3, 1).numpy())
    assert torch.equal(found, again.read(range(12)).args[0]) and found.is_contiguous()
    assert torch.equal(read_augmented(batches, [], range(12), ONE).args[0], batches.read(range(12)).args[0])


# --- torchvision's

vision = pytest.mark.skipif(importlib.util.find_spec("torchvision") is None, reason="torchvision is not installed")

EACH: dict[str, Augmentation] = {
    "flip": Flip(),
    "crop4": Crop4(),
    "random_resized_crop": RandomResizedCrop(size=8, scale=(0.2, 0.9)),
    "color_jitter": ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1),
    "rand_augment": RandAugment(),
    "mixup": MixUp(),
    "cutmix": CutMix(),
}


def pixels(count: int = 12, side: int = 8) -> np.ndarray:
    return np.random.default_rng(1).integers(256, size=(count, side, side, 3), dtype=np.uint8)


@pytest.fixture
def twelve(tmp_path: Path) -> Batches:
    np.savez(tmp_path / "twelve.npz", x=pixels(), y=np.arange(12) % 5)
    return read_data(NpzData(npz="twelve.npz"), Source(tmp_path, "data.train", NORMALIZE), 0)


def seen(
    batches: Batches, augment: Sequence[Augmentation], samples: Sequence[int] = range(12), draw: Draw = ONE
) -> Batch:
    return read_augmented(batches, augment, samples, draw)


def test_every_augmentation_has_its_row() -> None:
    assert {name: type(step) for name, step in EACH.items()} == dict(AUGMENTATIONS)


@vision
@pytest.mark.parametrize("name", EACH)
def test_an_augmentation_changes_images_by_seed_and_epoch_and_leaves_other_random_numbers_alone(
    name: str, twelve: Batches
) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one, again, plain = (seen(twelve, steps).args[0] for steps in ([EACH[name]], [EACH[name]], []))
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(one, again) and not torch.equal(one, plain)
    assert one.shape == plain.shape and one.dtype == torch.float32 and one.is_contiguous()
    for draw in (Draw(1, ONE.epoch, ONE.batch), Draw(0, "another epoch", ONE.batch)):
        assert not torch.equal(seen(twelve, [EACH[name]], draw=draw).args[0], one)


@vision
@pytest.mark.parametrize("name", EACH)
@pytest.mark.parametrize("size", [2, 3])
def test_ranks_see_together_what_one_process_sees(name: str, size: int, twelve: Batches) -> None:
    """Mixing too, though the image that one is mixed with is another rank's."""
    samples = [7, 3, 11, 0, 5, 2, 9, 1, 8, 4, 6, 10]
    whole = seen(twelve, [Flip(), EACH[name]] if name != "random_resized_crop" else [EACH[name], Flip()], samples)
    for rank in range(size):
        steps = [Flip(), EACH[name]] if name != "random_resized_crop" else [EACH[name], Flip()]
        part = seen(twelve, steps, samples, Draw(0, ONE.epoch, ONE.batch, rank, size))
        assert torch.equal(part.args[0], whole.args[0][rank::size])
        assert part.labels is not None and whole.labels is not None
        wanted = whole.labels[rank::size]
        assert torch.equal(part.labels, wanted[:, : part.labels.shape[1]] if wanted.ndim == 2 else wanted)


@vision
@pytest.mark.parametrize("name", ["random_resized_crop", "color_jitter", "rand_augment"])
def test_an_image_is_changed_alike_in_whatever_batch_it_comes(name: str, twelve: Batches) -> None:
    whole = seen(twelve, [EACH[name]]).args[0]
    for samples in ([4], [9, 4, 2]):
        other = seen(twelve, [EACH[name]], samples, Draw(0, ONE.epoch, "another batch")).args[0]
        assert torch.equal(other, whole[samples])


@vision
@pytest.mark.parametrize("name", ["random_resized_crop", "color_jitter", "rand_augment"])
def test_it_is_what_torchvision_gives_from_the_forked_state(name: str, twelve: Batches) -> None:
    transforms = import_package("torchvision.transforms.v2")
    transform = {
        "random_resized_crop": transforms.RandomResizedCrop(8, scale=(0.2, 0.9)),
        "color_jitter": transforms.ColorJitter(0.4, 0.4, 0.4, 0.1),
        "rand_augment": transforms.RandAugment(2, 9),
    }[name]
    expected = []
    for index, image in enumerate(torch.from_numpy(pixels()).permute(0, 3, 1, 2)):
        torch.manual_seed(forked_seed(0, f"{name} of {index}, an epoch"))
        expected.append(transform(image))
    raw = replace(twelve, finish=unchanged)
    assert torch.equal(seen(raw, [EACH[name]]).args[0], torch.stack(expected))


@vision
@pytest.mark.parametrize("name", ["mixup", "cutmix"])
def test_mixing_takes_as_much_of_an_image_as_of_its_label(name: str) -> None:
    """Sample i is i + 1 everywhere and of class i: the mean of a mixed image tells the shares."""
    count = 6
    ones = torch.ones(count, 1, 32, 32) * torch.arange(1, count + 1).view(-1, 1, 1, 1)
    batches = Batches(count, count, lambda indices: Batch((ones[list(indices)],), labels=torch.tensor(list(indices))))
    found = seen(batches, [EACH[name]], range(count))
    assert found.labels is not None and found.labels.shape == (count, count)
    torch.testing.assert_close(found.labels.sum(1), torch.ones(count))
    before = torch.arange(count).roll(1)
    own, other = found.labels[range(count), range(count)], found.labels[range(count), before]
    torch.testing.assert_close(own + other, torch.ones(count))
    assert 0 < float(own[0]) < 1 and len(own.unique()) == 1
    torch.testing.assert_close(found.args[0].mean((1, 2, 3)), own * torch.arange(1, count + 1) + other * (before + 1))


@vision
def test_of_several_ways_of_mixing_each_batch_takes_one(twelve: Batches) -> None:
    draws = [Draw(0, ONE.epoch, str(index)) for index in range(30)]
    alone = {name: [seen(twelve, [EACH[name]], draw=draw).args[0] for draw in draws] for name in ("mixup", "cutmix")}
    both = [seen(twelve, [MixUp(), CutMix()], draw=draw).args[0] for draw in draws]
    plain = twelve.read(range(12)).args[0]
    # Of cutmix every pixel is one of the plain images'; of mixup none is.
    cut = [bool(((image == plain) | (image == plain.roll(1, 0))).all()) for image in both]
    assert 5 < sum(cut) < 25 and all(alone.values())


@vision
def test_a_random_cut_of_a_folder_sees_the_whole_image(tmp_path: Path) -> None:
    """Red grows from left to right over 64 pixels: the centre of 8 has none of the ends."""
    image = pytest.importorskip("PIL.Image")
    wide = np.zeros((16, 64, 3), np.uint8)
    wide[..., 0] = np.arange(64) * 4
    for index in range(40):
        image.fromarray(wide).save(tmp_path / f"{index:02}.png")
    batches = read_data(ImagesData(images=".", crop=8), Source(tmp_path, "data.train"), 0)
    centre = batches.read(range(40)).args[0]
    assert (
        float(centre.min(2).values.max(0).values[0].min() * 255) >= 28 * 4 - 1 and float(centre.max()) * 255 <= 36 * 4
    )
    found = seen(batches, [RandomResizedCrop(size=10, scale=(0.05, 0.3)), Flip()], range(40)).args[0] * 255
    assert found.shape == (40, 3, 10, 10)
    assert float(found[:, 0].min()) < 20 and float(found[:, 0].max()) > 230
    # The same image is cut otherwise in each sample, and alike when it is drawn again.
    assert len(found[:, 0, 0, 0].unique()) > 20
    chosen = seen(batches, [RandomResizedCrop(size=10, scale=(0.05, 0.3))], [5, 30]).args[0] * 255
    again = seen(batches, [RandomResizedCrop(size=10, scale=(0.05, 0.3))], range(40)).args[0] * 255
    assert torch.equal(chosen, again[[5, 30]])


@vision
def test_samples_drawn_by_the_seed_are_cut_from_their_own_images(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    for index in range(6):
        image.new("RGB", (9, 9), (40 * index, 0, 0)).save(tmp_path / f"{index}.png")
    settings = ImagesData(images=".", crop=8, samples=3, shuffle=True)
    batches = read_data(settings, Source(tmp_path, "data.train"), 1)
    cut = seen(batches, [RandomResizedCrop(size=4)], range(3)).args[0]
    assert torch.equal(cut[:, :, 0, 0], batches.read(range(3)).args[0][:, :, 0, 0])


@vision
@pytest.mark.parametrize(
    ("name", "x", "message"),
    [
        (
            "color_jitter",
            np.zeros((12, 3, 8, 8), np.float32),
            r"color_jitter is for images in bytes .* 3 channels of float32",
        ),
        (
            "rand_augment",
            np.zeros((12, 8, 8, 2), np.uint8),
            r"rand_augment is for images in bytes .* 2 channels of uint8",
        ),
        ("random_resized_crop", np.zeros((12, 8), np.float32), r"`augment` is for images, .* \[12, 8\]"),
    ],
)
def test_images_that_a_step_does_not_take_are_refused(name: str, x: np.ndarray, message: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", x=x, y=np.arange(12))
    batches = read_data(NpzData(npz="data.npz"), Source(tmp_path, "data.train"), 0)
    with pytest.raises(DataError, match=message):
        seen(batches, [EACH[name]])


@vision
@pytest.mark.parametrize(
    "labels", [None, torch.rand(12), -torch.ones(12, dtype=torch.int64), torch.zeros(12, 2).long()]
)
def test_mixing_without_classes_is_refused(labels: Tensor | None) -> None:
    batches = Batches(12, 12, lambda indices: Batch((images()[list(indices)],), labels=labels))
    with pytest.raises(DataError, match="has no labels" if labels is None else "has labels that are no classes"):
        seen(batches, [MixUp()])


def test_a_missing_extra_is_named_before_anything_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    import qcompress.data.augment as module

    def missing(name: str) -> None:
        raise UsageError(name, "the package torchvision is not installed", "pip install 'qcompress[vision]'")

    module._transform.cache_clear()
    monkeypatch.setattr(module, "import_package", missing)
    load_augmentations([Flip(), Crop4()])
    with pytest.raises(UsageError, match="torchvision is not installed"):
        load_augmentations([Flip(), MixUp()])


@vision
def test_the_number_of_threads_changes_nothing() -> None:
    large = torch.from_numpy(pixels(8, 96)).permute(0, 3, 1, 2)
    batches = Batches(8, 8, lambda indices: Batch((large[list(indices)],), labels=torch.tensor(list(indices))))
    steps = [RandomResizedCrop(size=80), Flip(), Crop4(), EACH["color_jitter"], EACH["rand_augment"]]
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(seen(batches, steps, range(8)).args[0])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)
