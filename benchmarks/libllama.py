"""llama.cpp's library, as far as figures need it: the perplexity of a GGUF file, and its own quantizer.

The variable QCOMPRESS_LIBLLAMA names libllama.so. Registries have no build of it, but the source distribution of
llama-cpp-python holds all of llama.cpp:

    pip download --no-deps --no-binary :all: llama-cpp-python, then in its folder
    cmake -S vendor/llama.cpp -B build -DLLAMA_BUILD_COMMON=OFF -DLLAMA_BUILD_TOOLS=OFF -DLLAMA_BUILD_TESTS=OFF
    -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_SERVER=OFF && cmake --build build --target llama
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

TYPES = {"Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "IQ4_NL": 25}
"""llama.cpp's name of a kind of file -> its number."""
IDENTIFIERS = {"F32": 0, "Q4_0": 2, "Q4_1": 3, "Q5_0": 6, "Q5_1": 7, "Q8_0": 8, "IQ4_NL": 20}
"""ggml's name of a type of tensor -> its number."""
CONTEXT = 512
"""Tokens of a row at most."""
_QUIET = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda level, text, data: None)


class Opaque(ctypes.Structure):
    """Options, which the library gives and takes by value: larger than any version's, and known by few offsets."""

    _fields_ = (("words", ctypes.c_int32 * 256),)


class Batch(ctypes.Structure):
    _fields_ = (
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.POINTER(ctypes.c_float)),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    )


def load() -> ctypes.CDLL | None:
    """The library that QCOMPRESS_LIBLLAMA names; None where it names none."""
    named = os.environ.get("QCOMPRESS_LIBLLAMA")
    if not named:
        return None
    library, pointer = ctypes.CDLL(named), ctypes.c_void_p
    for name, gives, takes in (
        ("llama_log_set", None, (type(_QUIET), pointer)),
        ("llama_model_default_params", Opaque, ()),
        ("llama_context_default_params", Opaque, ()),
        ("llama_model_quantize_default_params", Opaque, ()),
        ("llama_model_load_from_file", pointer, (ctypes.c_char_p, Opaque)),
        ("llama_init_from_model", pointer, (pointer, Opaque)),
        ("llama_set_n_threads", None, (pointer, ctypes.c_int32, ctypes.c_int32)),
        ("llama_model_get_vocab", pointer, (pointer,)),
        ("llama_vocab_n_tokens", ctypes.c_int32, (pointer,)),
        ("llama_get_memory", pointer, (pointer,)),
        ("llama_memory_clear", None, (pointer, ctypes.c_bool)),
        ("llama_batch_init", Batch, (ctypes.c_int32, ctypes.c_int32, ctypes.c_int32)),
        ("llama_batch_free", None, (Batch,)),
        ("llama_decode", ctypes.c_int32, (pointer, Batch)),
        ("llama_get_logits", ctypes.POINTER(ctypes.c_float), (pointer,)),
        ("llama_free", None, (pointer,)),
        ("llama_model_free", None, (pointer,)),
        ("llama_model_quantize", ctypes.c_uint32, (ctypes.c_char_p, ctypes.c_char_p, ctypes.POINTER(Opaque))),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = gives, takes
    library.llama_log_set(_QUIET, None)
    library.llama_backend_init()
    return library


def logits_of(library: ctypes.CDLL, path: Path, rows: Sequence[Sequence[int]]) -> list[np.ndarray]:
    """What the network of a GGUF file gives for each row of tokens: float32 [tokens, vocabulary]; on one thread.

    raises  OSError where llama.cpp does not load the file or does not compute
    """
    model = library.llama_model_load_from_file(str(path).encode(), library.llama_model_default_params())
    if not model:
        raise OSError(f"{path}: llama.cpp does not load it")
    options = library.llama_context_default_params()
    # The first three are what a context, a batch and a part of a batch hold.
    options.words[0:3] = (CONTEXT, CONTEXT, CONTEXT)
    context = library.llama_init_from_model(model, options)
    library.llama_set_n_threads(context, 1, 1)
    vocabulary = library.llama_vocab_n_tokens(library.llama_model_get_vocab(model))
    found = []
    for row in rows:
        library.llama_memory_clear(library.llama_get_memory(context), True)
        batch = library.llama_batch_init(len(row), 0, 1)
        batch.n_tokens = len(row)
        for place, token in enumerate(row):
            batch.token[place], batch.pos[place], batch.logits[place] = int(token), place, 1
            batch.n_seq_id[place], batch.seq_id[place][0] = 1, 0
        failed = library.llama_decode(context, batch)
        library.llama_batch_free(batch)
        if failed:
            raise OSError(f"{path}: llama.cpp does not compute: {failed}")
        found.append(np.ctypeslib.as_array(library.llama_get_logits(context), (len(row), vocabulary)).copy())
    library.llama_free(context)
    library.llama_model_free(model)
    return found


def perplexity_of(logits: Sequence[np.ndarray], rows: Sequence[Sequence[int]]) -> float:
    """Of every token but the first of each row."""
    total, count = 0.0, 0
    for given, row in zip(logits, rows, strict=True):
        values = given[:-1].astype(np.float64)
        values -= values.max(1, keepdims=True)
        chosen = values[np.arange(len(row) - 1), np.asarray(row[1:])]
        total += float((np.log(np.exp(values).sum(1)) - chosen).sum())
        count += len(row) - 1
    return float(np.exp(total / count))


def perplexity(library: ctypes.CDLL, path: Path, rows: Sequence[Sequence[int]]) -> float:
    """Of the network of a GGUF file. Raises as `logits_of`."""
    return perplexity_of(logits_of(library, path, rows), rows)


def quantize(library: ctypes.CDLL, source: Path, target: Path, kind: str, embedding: str | None = None) -> None:
    """llama.cpp's own quantizer: matrices of a dense GGUF file as `kind`, embeddings as `embedding`.

    raises  OSError where it fails
    """
    options = library.llama_model_quantize_default_params()
    given = {1: TYPES[kind]}
    if embedding is not None:
        given |= {2: IDENTIFIERS[embedding], 3: IDENTIFIERS[embedding]}
    options.words[0] = 1
    for place, value in given.items():
        options.words[place] = value
    if library.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(options)):
        raise OSError(f"{source}: llama.cpp does not quantize it to {kind}")
