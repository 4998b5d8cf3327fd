"""Data that a recipe names: what comes out of each source, and what is refused."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch

from qcompress.data.batches import Batch, Batches, Source
from qcompress.data.sources import read_data
from qcompress.errors import DataError, UsageError
from qcompress.types.data_settings import FactoryData, ImagesData, Normalize, NpzData, TextData

PIXELS = np.arange(6 * 4 * 5 * 3, dtype=np.uint8).reshape(6, 4, 5, 3)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    np.savez(tmp_path / "images.npz", x=PIXELS, y=np.arange(6))
    np.savez(tmp_path / "ids.npz", ids=np.arange(12).reshape(3, 4), lengths=np.array([4, 2, 3]))
    np.savez(tmp_path / "signal.npz", x=np.array([[1, 2], [3, 4]], dtype=np.int8), y=np.array([0, 1]))
    np.savez(tmp_path / "broken.npz", x=np.array([[0.0], [np.nan]]), y=np.array([0, 1]))
    np.savez(tmp_path / "uneven.npz", x=np.zeros((3, 2)), y=np.zeros(2))
    np.savez(tmp_path / "objects.npz", x=np.array([None, {}], dtype=object))
    (tmp_path / "text.npz").write_text("not a zip")
    return tmp_path


def read(folder: Path, settings: object, normalize: Normalize | None = None, **options: object) -> Batches:
    return read_data(settings, Source(folder, "r.yaml:5: data.eval", normalize, **options), 0)  # type: ignore[arg-type]


def test_images_become_channels_first_between_0_and_1(folder: Path) -> None:
    batches = read(folder, NpzData(npz="images.npz", batch_size=4))
    found = list(batches)
    assert [batch.size for batch in found] == [4, 2] and len(batches) == 2
    x = torch.cat([batch.args[0] for batch in found])
    torch.testing.assert_close(x, torch.from_numpy(PIXELS).permute(0, 3, 1, 2) / 255)
    assert torch.cat([batch.labels for batch in found]).tolist() == list(range(6))
    again = [batch.args[0] for batch in batches]
    assert all(torch.equal(one, batch.args[0]) for one, batch in zip(again, found, strict=True))


def test_normalization_is_by_channel(folder: Path) -> None:
    normalize = Normalize(mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    (plain,), (normal,) = (read(folder, NpzData(npz="images.npz"), one) for one in (None, normalize))
    for channel, (mean, std) in enumerate(zip(normalize.mean, normalize.std, strict=True)):
        torch.testing.assert_close(normal.args[0][:, channel], (plain.args[0][:, channel] - mean) / std)
    with pytest.raises(DataError, match="names 2 channels, and the data have 3"):
        list(read(folder, NpzData(npz="images.npz"), Normalize(mean=(0.1, 0.2), std=(1.0, 1.0))))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("order", ["C", "F"])
def test_rows_of_large_arrays_are_those_that_a_held_one_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, save: Callable[..., None], order: str
) -> None:
    x = np.random.default_rng(0).standard_normal((50, 7, 3)).astype(np.float32)
    save(tmp_path / "x.npz", other=np.zeros(3), x=np.asarray(x, order=order), y=np.arange(50))
    monkeypatch.setattr("qcompress.data.npz.HELD_BYTES", 0)
    monkeypatch.setattr("qcompress.data.npz.CHECKED_BYTES", 200)
    batches = read(tmp_path, NpzData(npz="x.npz", batch_size=16))
    assert torch.equal(torch.cat([batch.args[0] for batch in batches]), torch.from_numpy(x))
    for batch in read(tmp_path, NpzData(npz="x.npz", batch_size=16, samples=30, shuffle=True)):
        assert torch.equal(batch.args[0], torch.from_numpy(x[batch.labels.numpy()]))


def test_a_large_array_is_read_in_little_memory_and_its_last_rows_are_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qcompress.data.npz.HELD_BYTES", 1 << 20)
    x = np.zeros((2000, 5000), np.float32)
    np.savez(tmp_path / "large.npz", x=x)
    tracemalloc.start()
    try:
        batches = read(tmp_path, NpzData(npz="large.npz", batch_size=10))
        first = next(iter(batches))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert first.args[0].shape == (10, 5000) and peak < x.nbytes // 4
    x[-1, -1] = np.inf
    np.savez(tmp_path / "large.npz", x=x)
    with pytest.raises(DataError, match="holds NaN or Inf, first in sample 1999"):
        read(tmp_path, NpzData(npz="large.npz"))


def test_integers_are_scaled_or_stay_ids(folder: Path) -> None:
    (signal,) = read(folder, NpzData(npz="signal.npz", scale=0.5, zero_point=1))
    assert signal.args[0].tolist() == [[0.0, 0.5], [1.0, 1.5]]
    (ids,) = read(folder, NpzData(npz="ids.npz", inputs={"input_ids": "ids"}, lengths="lengths"))
    assert ids.kwargs["input_ids"].dtype == torch.int64 and ids.args == ()
    assert ids.lengths.tolist() == [4, 2, 3] and ids.labels is None


def test_samples_are_the_first_or_drawn_by_the_seed(folder: Path) -> None:
    first = read(folder, NpzData(npz="images.npz", samples=3))
    assert [batch.labels.tolist() for batch in first] == [[0, 1, 2]]
    settings = NpzData(npz="images.npz", samples=4, shuffle=True)
    drawn = [[label for batch in read(folder, settings) for label in batch.labels.tolist()] for _ in range(2)]
    assert drawn[0] == drawn[1] == sorted(set(drawn[0])) and len(drawn[0]) == 4


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        (NpzData(npz="absent.npz"), "'absent.npz' is not in the recipe's folder"),
        (NpzData(npz="text.npz"), "is no npz file"),
        (NpzData(npz="images.npz", inputs="z"), "has no array 'z'; did you mean"),
        (NpzData(npz="images.npz", labels="why"), "has no array 'why'"),
        (NpzData(npz="images.npz", samples=7), "7 samples are asked for and there are 6"),
        (NpzData(npz="broken.npz"), "array 'x' holds NaN or Inf, first in sample 1"),
        (NpzData(npz="uneven.npz"), r"array 'y' has the shape \[2\], and 'x' has 3 samples"),
        (NpzData(npz="objects.npz"), r"array 'x' cannot be read \(ValueError: it holds Python objects\)"),
    ],
)
def test_what_is_wrong_with_arrays_is_said(folder: Path, settings: NpzData, error: str) -> None:
    with pytest.raises(DataError, match=error) as caught:
        read(folder, settings)
    assert "\n" not in str(caught.value)


def test_paths_are_looked_up_in_the_data_folder_too(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QCOMPRESS_DATA", str(folder))
    elsewhere = tmp_path_factory.mktemp("recipes")
    assert read(elsewhere, NpzData(npz="images.npz")).samples == 6
    with pytest.raises(DataError, match="nor in QCOMPRESS_DATA"):
        read(elsewhere, NpzData(npz="absent.npz"))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    image = pytest.importorskip("PIL.Image")
    for number, (name, size) in enumerate((("b/1.png", (9, 7)), ("a/1.png", (8, 8)), ("a/2.png", (12, 8)))):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        image.new("RGB", size, (10 * number, 0, 0)).save(tmp_path / name)
    return tmp_path


def test_class_folders_are_labels_in_the_order_of_their_names(photos: Path) -> None:
    (batch,) = read(photos.parent, ImagesData(images=photos.name, crop=6))
    assert batch.args[0].shape == (3, 3, 6, 6)
    assert batch.labels.tolist() == [0, 0, 1]
    assert (batch.args[0][:, 0, 0, 0] * 255).round().tolist() == [10, 20, 0]


def test_metadata_gives_files_and_labels(photos: Path) -> None:
    (photos / "metadata.csv").write_text("file_name,label\nb/1.png,7\na/1.png,3\n")
    (batch,) = read(photos.parent, ImagesData(images=photos.name, crop=4, resize=5))
    assert batch.labels.tolist() == [7, 3]
    for text, error in (
        ("file_name,label\nx.png,1\n", "names 'x.png', which is not there"),
        ("file_name,label\nb/1.png,one\n", "metadata.csv:2: has a label 'one'"),
        ("file,label\nb/1.png,1\n", "has no column 'file_name'"),
    ):
        (photos / "metadata.csv").write_text(text)
        with pytest.raises(DataError, match=error):
            read(photos.parent, ImagesData(images=photos.name))


def test_images_that_are_too_small_or_broken_are_named(photos: Path) -> None:
    with pytest.raises(DataError, match=r"1\.png: is 9 x 7, smaller than the crop of 8"):
        list(read(photos.parent, ImagesData(images=photos.name, crop=8)))
    (photos / "a/1.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"1\.png: is no image"):
        list(read(photos.parent, ImagesData(images=photos.name, crop=4)))
    with pytest.raises(DataError, match="there are no samples"):
        (photos / "empty").mkdir()
        read(photos, ImagesData(images="empty"))


def test_a_dataset_from_code(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import torch\n"
        "def pairs(n): return [(torch.full((2,), float(i)), i) for i in range(n)]\n"
        "def named(n): return [{'ids': torch.tensor([i]), 'label': i} for i in range(n)]\n"
        "def broken(n): raise RuntimeError('no disk')\n"
    )
    (batch,) = read(tmp_path, FactoryData(factory="mine.py:pairs", args={"n": 3}), allow_code=True)
    assert batch.args[0].tolist() == [[0, 0], [1, 1], [2, 2]] and batch.labels.tolist() == [0, 1, 2]
    (batch,) = read(tmp_path, FactoryData(factory="mine.py:named", args={"n": 2}), allow_code=True)
    assert batch.kwargs["ids"].tolist() == [[0], [1]] and batch.labels.tolist() == [0, 1]
    with pytest.raises(UsageError, match="--allow-code"):
        read(tmp_path, FactoryData(factory="mine.py:pairs", args={"n": 3}))
    with pytest.raises(DataError, match="fails: RuntimeError: no disk"):
        read(tmp_path, FactoryData(factory="mine.py:broken", args={"n": 3}), allow_code=True)


@pytest.fixture
def words(tmp_path: Path) -> Path:
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {word: number for number, word in enumerate(["?", "a", "b", "c", "d"])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="?"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "text.txt").write_text("a b c\nd a\nb\n")
    (tmp_path / "labels.txt").write_text("0\n1\n0\n")
    (tmp_path / "target.txt").write_text("one\ntwo\nthree\n")
    return tmp_path


def test_running_text_comes_in_windows(words: Path) -> None:
    (batch,) = read(words, TextData(text="text.txt", tokenizer="tokenizer.json", length=2))
    assert batch.args[0].tolist() == [[1, 2], [3, 4], [1, 2]]
    with pytest.raises(DataError, match="gives 6 tokens, fewer than one window of 7"):
        read(words, TextData(text="text.txt", tokenizer="tokenizer.json", length=7))


def test_sentences_are_padded_and_masked(words: Path) -> None:
    settings = TextData(text="text.txt", tokenizer="tokenizer.json", labels="labels.txt", target="target.txt", length=2)
    (batch,) = read(words, settings)
    assert batch.kwargs["input_ids"].tolist() == [[1, 2], [4, 1], [2, 0]]
    assert batch.kwargs["attention_mask"].tolist() == [[1, 1], [1, 1], [1, 0]]
    assert batch.labels.tolist() == [0, 1, 0] and batch.texts == ("one", "two", "three")
    (words / "labels.txt").write_text("0\nx\n0\n")
    with pytest.raises(DataError, match=r"labels\.txt:2: has a label 'x' that is no number of a class"):
        read(words, settings)
    (words / "labels.txt").write_text("0\n")
    with pytest.raises(DataError, match=r"has 1 lines, and text\.txt has 3"):
        read(words, settings)
    (words / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="is no tokenizer"):
        read(words, settings)


def test_a_dataset_on_disk(tmp_path: Path, words: Path) -> None:
    datasets = pytest.importorskip("datasets")
    from qcompress.types.data_settings import HubData

    made = datasets.Dataset.from_dict(
        {"text": ["a b", "c"], "more": ["d", "a"], "label": [1, 0], "ids": [[1, 2], [3, 4]]}
    )
    datasets.DatasetDict({"test": made}).save_to_disk(str(tmp_path / "set"))
    (batch,) = read(tmp_path, HubData(dataset="set", split="test", inputs=("ids",)))
    assert batch.kwargs["ids"].tolist() == [[1, 2], [3, 4]] and batch.labels.tolist() == [1, 0]
    (batch,) = read(tmp_path, HubData(dataset="set", split="test", inputs=("text",), tokenizer="tokenizer.json"))
    assert batch.kwargs["input_ids"].tolist() == [[1, 2], [3, 0]]
    for settings, error in (
        (HubData(dataset="set", split="train", inputs=("ids",)), "has no split 'train'; choose one of test"),
        (HubData(dataset="set", split="test", inputs=("id",)), "has no column 'id'"),
        (HubData(dataset="text.txt", inputs=("id",)), "is no dataset on disk"),
    ):
        with pytest.raises(DataError, match=error):
            read(tmp_path, settings)


def test_epochs_are_shuffled_by_their_seed_and_shared_out() -> None:
    batches = Batches(10, 2, lambda chosen: Batch((torch.tensor(list(chosen)),)))

    def epoch(seed: int, world: int = 1, skip: int = 0) -> list[int]:
        return [*chain(*batches.shuffled(torch.Generator().manual_seed(seed), world, skip=skip))]

    assert epoch(0) == epoch(0) != epoch(1)
    assert sorted(epoch(0)) == list(range(10))
    # Two ranks take four samples a step: the same ones in the same order, and two are left over.
    assert epoch(0, 2) == epoch(0)[:8] and epoch(0, 2, skip=1) == epoch(0, 2)[4:]
