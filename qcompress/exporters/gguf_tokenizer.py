"""The tokenizer of a folder as GGUF's metadata: its tokens, their kinds, and merges or scores.

tokenizer.model (sentencepiece) is read where there is one, else tokenizer.json. Kinds of tokens are sentencepiece's.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qcompress.exporters.gguf_file import Value
from qcompress.exporters.gguf_networks import Network

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
SPECIAL = (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
NONE: dict[str, Value] = {"tokenizer.ggml.model": "none"}


def describe_tokenizer(
    folder: Path, config: Mapping[str, Any], network: Network, rows: int
) -> tuple[dict[str, Value], list[str]]:
    """The metadata of a folder's tokenizer, and what a user should know of it.

    rows  tokens that the embedding has; what the tokenizer lacks of them are unused ones
    """
    document = _read_json(folder / "tokenizer.json")
    try:
        pieces = read_sentencepiece((folder / "tokenizer.model").read_bytes())
    except (OSError, ValueError, IndexError, struct.error):
        pieces = []
    model = document.get("model") if isinstance(document.get("model"), dict) else {}
    notes: list[str] = []
    if pieces:
        found = _of_pieces(pieces, document, rows)
    elif model and model.get("type", "BPE") == "BPE" and isinstance(model.get("vocab"), dict):
        found, notes = _of_merges(document, model, network, rows)
    else:
        why = "has no tokenizer.model and no tokenizer.json of byte pairs"
        return NONE | _special(folder, config, [], rows), [
            f"the folder {why}: the file has no tokenizer, and takes and gives numbers of tokens"
        ]
    texts = found["tokenizer.ggml.tokens"]
    return found | _special(folder, config, texts, rows), notes


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """The fields of a message of protocol buffers: number, and an integer or bytes. Raises IndexError, ValueError."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(data):
        key = varint()
        size = {1: 8, 5: 4}.get(key & 7)
        if key & 7 == 0:
            yield key >> 3, varint()
            continue
        if size is None:
            if key & 7 != 2:
                raise ValueError("no field of protocol buffers")
            size = varint()
        yield key >> 3, data[at : at + size]
        at += size


def read_sentencepiece(data: bytes) -> list[tuple[str, float, int]]:
    """The pieces of a sentencepiece model: text, score, kind. Raises ValueError, IndexError, struct.error."""
    found = []
    for number, message in _fields(data):
        if number == 1 and isinstance(message, bytes):
            text, score, kind = "", 0.0, NORMAL
            for part, value in _fields(message):
                if part == 1:
                    text = value.decode("utf-8")
                elif part == 2:
                    score = struct.unpack("<f", value)[0]
                elif part == 3:
                    kind = value
            found.append((text, score, kind))
    return found


def _added(document: Mapping[str, Any]) -> dict[int, tuple[str, int]]:
    """Number -> text and kind of tokens that were added to a tokenizer."""
    added = document.get("added_tokens") or []
    return {one["id"]: (one["content"], CONTROL if one.get("special") else USER) for one in added}


def _filled(tokens: dict[int, tuple[str, int]], rows: int) -> tuple[list[str], list[int]]:
    """Texts and kinds of all tokens up to the embedding's rows, and not beyond."""
    found = [tokens.get(number, (f"[PAD{number}]", UNUSED)) for number in range(rows)]
    return [text for text, _ in found], [kind for _, kind in found]


def _of_pieces(pieces: list[tuple[str, float, int]], document: Mapping[str, Any], rows: int) -> dict[str, Value]:
    tokens = {number: (text, kind) for number, (text, _, kind) in enumerate(pieces)}
    tokens |= {number: one for number, one in _added(document).items() if number >= len(pieces)}
    texts, kinds = _filled(tokens, rows)
    scores = [pieces[number][1] if number < len(pieces) else -1000.0 for number in range(rows)]
    return _like_llama(texts, scores, kinds)


def _like_llama(texts: list[str], scores: list[float], kinds: list[int]) -> dict[str, Value]:
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": texts,
        "tokenizer.ggml.scores": [float(score) for score in scores],
        "tokenizer.ggml.token_type": kinds,
    }


def _of_merges(
    document: Mapping[str, Any], model: Mapping[str, Any], network: Network, rows: int
) -> tuple[dict[str, Value], list[str]]:
    added = _added(document)
    tokens = {number: (text, NORMAL) for text, number in model["vocab"].items()} | added
    merges = [one.split(" ", 1) if isinstance(one, str) else one for one in model.get("merges") or []]
    if model.get("byte_fallback"):
        # A sentencepiece model in other words: the earlier a merge, the higher its score.
        ranks = {"".join(pair): -float(rank) for rank, pair in enumerate(merges)}
        for number, (text, kind) in tokens.items():
            if re.fullmatch(r"<0x[0-9A-F]{2}>", text):
                tokens[number] = (text, BYTE)
            elif text == model.get("unk_token") and kind != USER:
                tokens[number] = (text, UNKNOWN)
        texts, kinds = _filled(tokens, rows)
        return _like_llama(texts, [ranks.get(text, 0.0) for text in texts], kinds), []
    texts, kinds = _filled(tokens, rows)
    pre, mark = network.pre
    notes = []
    if not pre or mark not in json.dumps(document.get("pre_tokenizer"), ensure_ascii=False).replace("\\\\", "\\"):
        pre = "default"
        notes.append("the pre-tokenizer is none that this tool knows: llama.cpp's default may cut some texts otherwise")
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": texts,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": [" ".join(pair) for pair in merges],
    }, notes


def _special(folder: Path, config: Mapping[str, Any], texts: Value, rows: int) -> dict[str, Value]:
    """Numbers of special tokens, what is added to a text, and how a conversation is written."""
    own = _read_json(folder / "tokenizer_config.json")
    special: dict[str, Value] = {}
    for key, name in SPECIAL:
        number = config.get(f"{key}_token_id")
        number = number[0] if isinstance(number, list) and number else number
        text = own.get(f"{key}_token")
        text = text.get("content") if isinstance(text, dict) else text
        if number is None and isinstance(text, str) and isinstance(texts, list) and text in texts:
            number = texts.index(text)
        if isinstance(number, int) and 0 <= number < rows:
            special[f"tokenizer.ggml.{name}_token_id"] = number
    for key in ("add_bos_token", "add_eos_token"):
        if isinstance(own.get(key), bool):
            special[f"tokenizer.ggml.{key}"] = own[key]
    template = own.get("chat_template")
    if not isinstance(template, str):
        try:
            template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
        except (OSError, ValueError):
            return special
    return special | {"tokenizer.chat_template": template}
