"""Text through a tokenizer as samples: running text in windows, sentences, Hugging Face datasets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qcompress.errors import DataError, QcompressError
from qcompress.model.batches import Batch
from qcompress.model.code import import_package
from qcompress.model.data import Source
from qcompress.settings import HubData, TextData

Reader = Callable[[Sequence[int]], Batch]


def read_text(settings: TextData, source: Source) -> tuple[int, Reader]:
    """Windows of running text where there are neither labels nor targets, else a sentence a line. Raises DataError."""
    path = source.find(settings.text)
    tokenizer = read_tokenizer(source.find(settings.tokenizer))
    text = _read(path)
    if settings.target is None and settings.labels is None:
        return _windows(tokenizer, text, settings.length, path)
    lines = text.splitlines()
    targets = _read(source.find(settings.target)).splitlines() if settings.target is not None else None
    labels = _labels(source.find(settings.labels)) if settings.labels is not None else None
    for name, other in ((settings.target, targets), (settings.labels, labels)):
        if other is not None and len(other) != len(lines):
            what = f"has {len(other)} lines, and {settings.text} has {len(lines)}"
            raise DataError(str(name), what, "give one line for each sentence")

    def read(indices: Sequence[int]) -> Batch:
        ids, mask = tokenizer.encode([lines[index] for index in indices], settings.length)
        texts = tuple(targets[index] for index in indices) if targets is not None else ()
        chosen = torch.tensor([labels[index] for index in indices]) if labels is not None else None
        return Batch(kwargs={"input_ids": ids, "attention_mask": mask}, labels=chosen, texts=texts)

    return len(lines), read


def read_hub(settings: HubData, source: Source) -> tuple[int, Reader]:
    """The rows of a dataset on disk; inputs are columns of numbers, or of text for a tokenizer. Raises DataError."""
    folder = source.find(settings.dataset)
    datasets = import_package("datasets")
    try:
        found = datasets.load_from_disk(str(folder))
    except Exception as error:
        # The library raises many kinds for what it cannot read.
        raise DataError(str(folder), f"is no dataset on disk ({_words(error)})", "save it with save_to_disk") from None
    if isinstance(found, dict):
        if settings.split not in found:
            names = ", ".join(found)
            raise DataError(str(folder), f"has no split {settings.split!r}", f"choose one of {names}")
        found = found[settings.split]
    columns = [*settings.inputs, *([settings.labels] if settings.labels else [])]
    absent = next((name for name in columns if name not in found.column_names), None)
    if absent is not None:
        raise DataError(str(folder), f"has no column {absent!r}", f"it has {', '.join(found.column_names)}")
    tokenizer = read_tokenizer(source.find(settings.tokenizer)) if settings.tokenizer is not None else None

    def read(indices: Sequence[int]) -> Batch:
        rows = found[[*indices]]
        labels = torch.tensor(rows[settings.labels]) if settings.labels else None
        if tokenizer is not None:
            texts = [rows[name] for name in settings.inputs]
            ids, mask = tokenizer.encode([*zip(*texts, strict=True)] if len(texts) > 1 else texts[0], settings.length)
            return Batch(kwargs={"input_ids": ids, "attention_mask": mask}, labels=labels)
        try:
            return Batch(kwargs={name: torch.tensor(rows[name]) for name in settings.inputs}, labels=labels)
        except (TypeError, ValueError):
            what = "columns of the inputs hold no numbers of one shape"
            raise DataError(str(folder), what, "name a `tokenizer`, or pad the columns") from None

    return len(found), read


class Tokenizer:
    """A tokenizer of transformers, or a tokenizer.json: texts -> ids and mask."""

    def __init__(
        self, encode: Callable[[Any, int], tuple[list[list[int]], int]], decode: Callable[[list[int]], str]
    ) -> None:
        self._encode, self.decode = encode, decode

    def encode(self, texts: Sequence[Any], length: int) -> tuple[Tensor, Tensor]:
        """int64 [texts, longest] ids padded at the end, and the mask of what is no padding."""
        rows, padding = self._encode(texts, length)
        longest = max(len(row) for row in rows)
        ids = torch.tensor([row + [padding] * (longest - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
        return ids, mask


def read_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a folder (transformers) or of a tokenizer.json (tokenizers). Raises DataError, UsageError."""
    try:
        return _from_folder(path) if path.is_dir() else _from_file(path)
    except QcompressError:
        raise
    except Exception as error:
        # Both libraries raise many kinds for what they cannot read.
        raise DataError(str(path), f"is no tokenizer ({_words(error)})", "name a folder or a tokenizer.json") from None


def _from_folder(path: Path) -> Tokenizer:
    found = import_package("transformers").AutoTokenizer.from_pretrained(str(path), local_files_only=True)

    def encode(texts: Sequence[Any], length: int) -> tuple[list[list[int]], int]:
        return found([*texts], truncation=True, max_length=length)["input_ids"], found.pad_token_id or 0

    return Tokenizer(encode, lambda ids: str(found.decode(ids, skip_special_tokens=True)))


def _from_file(path: Path) -> Tokenizer:
    found = import_package("tokenizers").Tokenizer.from_file(str(path))
    found.no_padding()

    def encode(texts: Sequence[Any], length: int) -> tuple[list[list[int]], int]:
        return [one.ids[:length] for one in found.encode_batch([*texts])], 0

    return Tokenizer(encode, lambda ids: str(found.decode(ids)))


def _windows(tokenizer: Tokenizer, text: str, length: int, path: Path) -> tuple[int, Reader]:
    ids = tokenizer.encode([text], len(text) + 1)[0][0]
    total = len(ids) // length
    if total == 0:
        raise DataError(
            str(path), f"gives {len(ids)} tokens, fewer than one window of {length}", "choose a smaller length"
        )
    windows = ids[: total * length].view(total, length)
    return total, lambda indices: Batch((windows[[*indices]],))


def _labels(path: Path) -> list[int]:
    labels = []
    for number, line in enumerate(_read(path).splitlines(), start=1):
        try:
            labels.append(int(line))
        except ValueError:
            raise DataError(f"{path}:{number}", f"{line[:40]!r} is no integer", "give a label a line") from None
    return labels


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(str(path), f"is no text in UTF-8 ({_words(error)})", "convert it") from None


def _words(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:120]
