"""Text becomes samples through a tokenizer: running text in windows, sentences, Hugging Face datasets."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from qcompress.data.batches import Batch, Reader, Source
from qcompress.data.foreign import parse_label, reading
from qcompress.data.user_code import import_package
from qcompress.errors import DataError
from qcompress.types.data_settings import HubData, TextData

Sentence: TypeAlias = str | tuple[str, ...]
"""One text, or two that belong together."""

IGNORED = -100
"""The label of a padded place, which torch's cross entropy leaves out."""


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer of transformers, or a tokenizer.json.

    rows         (texts, length) -> ids of each, special tokens included
    target_rows  the same for translations, without what they begin with: what a decoder predicts
    decode       ids -> text without special tokens
    padding      the id at padded places
    begin, end   the ids around a translation; None where the tokenizer does not say
    path         names the tokenizer in errors
    """

    rows: Callable[[Sequence[Sentence], int], list[list[int]]]
    target_rows: Callable[[Sequence[Sentence], int], list[list[int]]]
    decode: Callable[[list[int]], str]
    padding: int = 0
    begin: int | None = None
    end: int | None = None
    path: Path = Path()

    def encode(self, texts: Sequence[Sentence], length: int) -> tuple[Tensor, Tensor]:
        """int64 [texts, longest] ids padded at the end, and the mask of what is no padding."""
        with reading(self.path, "cannot encode these texts", "check tokenizer and text"):
            rows = self.rows(texts, length)
        return _padded(rows, self.padding), _padded([[1] * len(row) for row in rows], 0)

    def encode_targets(self, texts: Sequence[Sentence], length: int) -> tuple[Tensor, Tensor]:
        """What a decoder is given and what it should answer, both int64 [texts, longest].

        The inputs are the begin token and the answers but the last; answers are IGNORED at padding. What `length` cuts
        off is not answered with an end.
        """
        assert self.begin is not None
        with reading(self.path, "cannot encode these texts", "check tokenizer and text"):
            rows = self.target_rows(texts, length)
        return _padded([[self.begin, *row[:-1]] for row in rows], self.padding), _padded(rows, IGNORED)


def _padded(rows: Sequence[Sequence[int]], filler: int) -> Tensor:
    longest = max(len(row) for row in rows)
    return torch.tensor([[*row, *[filler] * (longest - len(row))] for row in rows], dtype=torch.long)


@dataclass(frozen=True)
class Sentences(Batch):
    """A batch of sentences, and the tokenizer that their ids are from.

    With translations whose begin the tokenizer knows, kwargs hold `decoder_input_ids` and labels the ids that follow
    (see Tokenizer.encode_targets): run_model gives logits [samples, length, vocabulary] for labels [samples, length].
    """

    tokenizer: Tokenizer | None = None


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
        kwargs = {"input_ids": ids, "attention_mask": mask}
        texts = tuple(targets[index] for index in indices) if targets is not None else ()
        chosen = torch.tensor([labels[index] for index in indices]) if labels is not None else None
        if texts and labels is None and tokenizer.begin is not None:
            kwargs["decoder_input_ids"], chosen = tokenizer.encode_targets(texts, settings.length)
        return Sentences(kwargs=kwargs, labels=chosen, texts=texts, tokenizer=tokenizer)

    return len(lines), read


def read_hub(settings: HubData, source: Source) -> tuple[int, Reader]:
    """The rows of a dataset on disk; inputs are columns of numbers, or of text for a tokenizer. Raises DataError."""
    folder = source.find(settings.dataset)
    datasets = import_package("datasets")
    with reading(folder, "is no dataset on disk", "save it with save_to_disk"):
        found = datasets.load_from_disk(str(folder))
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
        with reading(folder, f"rows {indices[0]} to {indices[-1]} cannot be read", "save it again with save_to_disk"):
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


def read_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a folder (transformers) or of a tokenizer.json (tokenizers). Raises DataError, UsageError."""
    with reading(path, "is no tokenizer", "name a folder or a tokenizer.json"):
        found = _from_folder(path) if path.is_dir() else _from_file(path)
    return replace(found, path=path)


def _from_folder(path: Path) -> Tokenizer:
    """Targets as transformers trains on them: the answers shifted right, behind the begin token of config.json."""
    found = import_package("transformers").AutoTokenizer.from_pretrained(
        str(path), local_files_only=True, trust_remote_code=False
    )

    def rows(texts: Sequence[Sentence], length: int) -> list[list[int]]:
        return found([*texts], truncation=True, max_length=length)["input_ids"]  # type: ignore[no-any-return]

    def target_rows(texts: Sequence[Sentence], length: int) -> list[list[int]]:
        return found(text_target=[*texts], truncation=True, max_length=length)["input_ids"]  # type: ignore[no-any-return]

    def decode(ids: list[int]) -> str:
        return str(found.decode(ids, skip_special_tokens=True))

    config = path / "config.json"
    begin = json.loads(config.read_text(encoding="utf-8")).get("decoder_start_token_id") if config.exists() else None
    return Tokenizer(rows, target_rows, decode, found.pad_token_id or 0, begin, found.eos_token_id)


def _from_file(path: Path) -> Tokenizer:
    """What the tokenizer puts around an empty sentence, if two tokens, begins and ends every sentence."""
    found = import_package("tokenizers").Tokenizer.from_file(str(path))
    found.no_padding()

    def rows(texts: Sequence[Sentence], length: int) -> list[list[int]]:
        return [one.ids[:length] for one in found.encode_batch([*texts])]

    def target_rows(texts: Sequence[Sentence], length: int) -> list[list[int]]:
        return [one.ids[1 : length + 1] for one in found.encode_batch([*texts])]

    empty = found.encode("")
    begin, end = empty.ids if empty.special_tokens_mask == [1, 1] else (None, None)
    return Tokenizer(rows, target_rows, lambda ids: str(found.decode(ids)), 0, begin, end)


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
    lines = _read(path).splitlines()
    return [parse_label(line, f"{path}:{number}") for number, line in enumerate(lines, start=1)]


def _read(path: Path) -> str:
    with reading(path, "is no text in UTF-8", "convert it"):
        return path.read_text(encoding="utf-8")
