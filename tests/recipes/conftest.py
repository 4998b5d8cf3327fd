"""A little of all data that the ready recipes name, so that each can be planned and run where none of it is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image


@pytest.fixture(scope="session")
def small_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for QCOMPRESS_DATA."""
    folder = tmp_path_factory.mktemp("data")
    pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    (folder / "cifar10").mkdir()
    for part in ("train20k", "test5000"):
        np.savez(folder / "cifar10" / f"{part}.npz", x=pixels, y=np.arange(2))
    for part in ("train", "val", "calib256", "val400"):
        for label, image in zip("ab", pixels, strict=True):
            (folder / "imagenet" / part / label).mkdir(parents=True)
            Image.fromarray(image).resize((256, 256)).save(folder / "imagenet" / part / label / "0.png")
    _write_stories(folder)
    _write_question_pairs(folder)
    _write_sentences(folder)
    return folder


def _write_stories(folder: Path) -> None:
    """Four rows of tokens to calibrate on, and as many to measure, of another length each."""
    random, parts = np.random.default_rng(1), {}
    for part in ("calib", "eval"):
        parts |= {f"{part}_ids": random.integers(3, 512, (4, 24)), f"{part}_len": np.array([24, 9, 17, 20])}
    (folder / "stories").mkdir()
    np.savez(folder / "stories" / "stories.npz", **parts)


def _write_question_pairs(folder: Path) -> None:
    """Tokenized pairs like those of QNLI, 48 of them, whose first token tells the class; they serve for SST-2 too."""
    random = np.random.default_rng(0)
    ids = random.integers(5, 50, (48, 12))
    ids[:, 0] = 1 + np.arange(48) % 2
    kinds = (np.arange(12) >= 5).astype(np.int64) * np.ones((48, 1), np.int64)
    (folder / "text").mkdir(exist_ok=True)
    for name in ("qnli_train", "qnli_val", "sst2_train", "sst2_dev"):
        file = folder / "text" / f"{name}.npz"
        mask = np.ones_like(ids)
        np.savez(file, input_ids=ids, token_type_ids=kinds, attention_mask=mask, y=np.arange(48) % 2)


def _write_sentences(folder: Path) -> None:
    """Sentences in two languages, a line each, and a tokenizer of them."""
    text = folder / "text"
    for part in ("train", "val", "test_2016_flickr"):
        for language, line in (("de", "ein Hund läuft über die Wiese\n"), ("en", "a dog runs across the meadow\n")):
            (text / f"multi30k_{part}.{language}.txt").write_text(line * 4, encoding="utf-8")
    make = [sys.executable, str(ROOT / "benchmarks" / "make_tokenizer.py"), str(folder / "tokenizer.json")]
    files = [str(text / f"multi30k_train.{language}.txt") for language in ("de", "en")]
    subprocess.run([*make, *files, "--vocabulary", "300"], check=True, capture_output=True)
