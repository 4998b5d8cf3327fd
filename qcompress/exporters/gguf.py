"""An artifact becomes one file of GGUF, which llama.cpp and what is built on it load.

Codes go into ggml's blocks as they are, so that llama.cpp decodes the very weights that the artifact stands for; names,
metadata and tokenizer are those of its conversion script.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qcompress.artifact.reader import Artifact
from qcompress.errors import ArtifactError, raise_all
from qcompress.exporters.gguf_blocks import Blocks, find_type
from qcompress.exporters.gguf_file import BLOCK, TYPES, gguf_file
from qcompress.exporters.gguf_networks import NETWORKS, Network, describe, place, rope_factors
from qcompress.exporters.gguf_tokenizer import describe_tokenizer
from qcompress.exporters.matrices import read_config
from qcompress.exporters.sources import Source, activation_notes, find_sources
from qcompress.types.export import ExportOptions, ExportPlan, Target
from qcompress.types.plan import DTYPE_BITS

FIT = "quantize --for gguf-q4_0, or write it dense with --keep-unfit"


@dataclass(frozen=True)
class Placed:
    """A tensor of the checkpoint in its place.

    name      llama.cpp's
    heads     of which the rows are pairs of halves that are to be neighbours; 0 where they stay
    turned    whether columns become rows
    plus_one  whether it is one less than llama.cpp has it
    rows, columns   zeros to be added at their end
    """

    source: Source
    name: str
    heads: int = 0
    turned: bool = False
    plus_one: bool = False
    rows: int = 0
    columns: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """As llama.cpp has it."""
        shape = self.source.info.shape
        shape = shape[::-1] if self.turned else shape
        if len(shape) == 2:
            return (shape[0] + self.rows, shape[1] + self.columns)
        return tuple(size + self.rows for size in shape)

    def order(self, rows: int) -> NDArray[np.int64]:
        """The row that comes at each place among some rows of whole heads."""
        heads = rows * self.heads // (self.shape[0] - self.rows)
        return np.arange(rows).reshape(heads, 2, -1).transpose(0, 2, 1).reshape(-1)


def export(artifact: Artifact, options: ExportOptions) -> ExportPlan:
    """The file; tied copies are left out, for llama.cpp ties them again.

    raises  Refusals of what the format cannot hold; ArtifactError without a config.json of a network that it knows
    """
    found = find_sources(artifact)
    config = read_config(artifact, "gguf")
    network = NETWORKS.get(str(config.get("model_type")))
    if network is None:
        what = f"is of the model_type {config.get('model_type')!r}, which is not written as GGUF yet"
        raise ArtifactError(str(artifact.path), what, f"these are: {', '.join(NETWORKS)}")
    sources = [source for _, some in found for source in some]
    placed, hidden = _place_all(sources, network, config, options)
    try:
        metadata = describe(network, config, hidden)
        factors = rope_factors(config)
    except (KeyError, ValueError, TypeError) as error:
        what = f"config.json has no {error}" if isinstance(error, KeyError) else str(error)
        raise ArtifactError(str(artifact.path), what, "complete config.json, or export to another format") from None
    targets, notes = _targets(placed, options)
    if factors:
        data = np.array(factors, "<f4").tobytes()
        shape = (len(factors),)
        targets.append(Target("rope_freqs.weight", "F32", shape, len(data), "", "F32", 0, lambda: iter([data])))
    rows = next((one.shape[0] for one in placed if one.name == "token_embd.weight"), 0)
    tokenizer, about = describe_tokenizer(artifact.path, config, network, rows)
    metadata |= {"general.file_type": _filetype(targets), **tokenizer}
    return ExportPlan(False, (gguf_file(metadata, targets),), notes=[*activation_notes(artifact), *about, *notes])


def _filetype(targets: list[Target]) -> int:
    """llama.cpp's number of what most bytes are."""
    total = {target.dtype: 0 for target in targets}
    for target in targets:
        total[target.dtype] += target.n_bytes
    return TYPES[max(total, key=lambda name: total[name])].filetype if total else 0


def _place_all(
    sources: list[Source], network: Network, config: dict[str, Any], options: ExportOptions
) -> tuple[list[Placed], int]:
    """Every tensor in its place, and the hidden size of feed-forward layers. Raises Refusals."""
    tied = bool(config.get("tie_word_embeddings", network.architecture in ("gemma", "gemma2", "gemma3")))
    placed, errors = list[Placed](), list[ArtifactError]()
    for source in sources:
        name = place(network, source.name)
        if name is None:
            what = f"has no place among the tensors that llama.cpp knows of {network.architecture}"
            errors.append(source.refused(what, "export to another format"))
        elif name and not (name == "output.weight" and (tied or source.is_copy)):
            module = name.split(".")[-2]
            heads = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}.get(module, "")
            placed.append(
                Placed(
                    source,
                    name,
                    heads=int(config.get(heads) or config["num_attention_heads"]) if heads and network.permuted else 0,
                    turned=network.turned and len(source.info.shape) == 2 and name.startswith("blk."),
                    plus_one=network.plus_one and module.endswith("norm"),
                )
            )
    raise_all(errors)
    up, down = network.hidden
    hidden = next((one.shape[1] for one in placed if one.name.endswith(tuple(f".{d}.weight" for d in down))), 0)
    hidden = hidden or int(config.get("intermediate_size") or config.get("n_inner") or 4 * config.get("n_embd", 0))
    missing = -hidden % BLOCK if options.pad_hidden and down else 0

    def padded(one: Placed) -> Placed:
        module = one.name.split(".")[-2]
        columns = missing if module in down and len(one.shape) == 2 else 0
        return replace(one, rows=missing if module in up else 0, columns=columns)

    return sorted(map(padded, placed), key=lambda one: one.name), hidden + missing


def _targets(placed: list[Placed], options: ExportOptions) -> tuple[list[Target], list[str]]:
    """What is written, and what a user should know of it. Raises Refusals."""
    targets, notes, errors = list[Target](), list[str](), list[ArtifactError]()
    dense, most = list[str](), 0.0
    for one in placed:
        entry = one.source.entry
        why = None if entry is None or entry.form == "constant" else _refuse(one)
        if entry is not None and entry.form != "constant" and why is None:
            blocks = _blocks(one)
            change = blocks.inexact()
            if change == 0 or (options.round_scales and np.isfinite(change)):
                most = max(most, change)
                targets.append(_block_target(one, blocks))
                continue
            why = "has scales or offsets that are no float16 numbers", f"round them with --round-scales, or {FIT}"
        if why is not None and not options.keep_unfit:
            errors.append(one.source.refused(*why))
        elif _dense_type(one) is None:
            what = f"is {one.source.info.dtype}, which llama.cpp computes nothing with"
            errors.append(one.source.refused(what, "convert the checkpoint to float32 first"))
        else:
            targets.append(_dense_target(one))
            dense += [one.source.name] if why is not None else []
    raise_all(errors)
    if dense:
        notes.append(f"{len(dense)} compressed tensors that the format cannot hold are dense, first {dense[0]!r}")
    if most:
        notes.append(f"scales and offsets are rounded to float16: at most {most:.2g} of one is lost")
    if any(one.plus_one for one in placed):
        notes.append("norms are stored with one added, as llama.cpp has them, in float32")
    if any(one.rows for one in placed):
        count = next(one.rows for one in placed if one.rows)
        notes.append(f"hidden sizes of feed-forward layers have {count} zeros more")
    return targets, notes


def _refuse(one: Placed) -> tuple[str, str] | None:
    """Why codes cannot be held: what, and a hint."""
    source, entry = one.source, one.source.entry
    assert entry is not None
    if find_type(entry) is None:
        form = f"a grid with {entry.grid}" if entry.form == "affine" else f"the form {entry.form}"
        return f"has {form} at {entry.bits} bits, which no type of blocks holds", FIT
    if len(entry.shape) != 2 or entry.axis != ((1,) if one.turned else (0,)):
        return "is no matrix of a scale a row or a group of a row, and blocks are such", FIT
    if one.shape[1] % BLOCK:
        how = "fill it up with --pad-hidden, " if one.name.split(".")[-2] == "ffn_down" else ""
        hint = f"{how}or write it dense with --keep-unfit" if how else "write it dense with --keep-unfit"
        return f"has rows of {one.shape[1]}, no multiple of {BLOCK}", hint
    if source.group < entry.columns and source.group % BLOCK:
        return f"has groups of {source.group}, no multiple of {BLOCK}", FIT
    return None


def _blocks(one: Placed) -> Blocks:
    entry = one.source.entry
    assert entry is not None
    kind = find_type(entry)
    assert kind is not None
    return Blocks(one.source, kind, one.shape[1])


def _block_target(one: Placed, blocks: Blocks) -> Target:
    shape, numel = one.shape, one.source.info.numel
    n_bytes = shape[0] * blocks.row_bytes

    def pieces() -> Iterator[Any]:
        yield from _in_order(one, blocks.rows())
        if one.rows:
            yield blocks.zero_rows(one.rows)

    return Target(one.name, blocks.type.name, shape, n_bytes, one.source.name, blocks.type.name, numel, pieces)


def _in_order(one: Placed, some: Iterator[NDArray[Any]]) -> Iterator[NDArray[Any]]:
    """Rows as they come, or whole heads of them with their halves as neighbours."""
    if not one.heads:
        yield from some
        return
    tall = (one.shape[0] - one.rows) // one.heads
    waiting: list[NDArray[Any]] = []
    for rows in some:
        waiting.append(rows)
        ready = sum(map(len, waiting)) // tall * tall
        if ready:
            joined = np.concatenate(waiting)
            yield joined[:ready][one.order(ready)]
            waiting = [joined[ready:]]


def _dense_type(one: Placed) -> str | None:
    """How a tensor is held that is no block: a vector in float32, a matrix in its own dtype."""
    dtype = one.source.info.dtype
    if dtype not in ("F32", "F16", "BF16"):
        return None
    return "F32" if len(one.shape) < 2 else dtype


def _dense_target(one: Placed) -> Target:
    kind = _dense_type(one)
    assert kind is not None
    n_bytes = int(np.prod(one.shape, dtype=np.int64)) * DTYPE_BITS[kind] // 8
    info = one.source.info
    plain = kind == info.dtype and not (one.heads or one.turned or one.plus_one or one.rows or one.columns)
    pieces: Callable[[], Iterator[Any]] = one.source.dense if plain else partial(_dense_pieces, one, kind)
    return Target(one.name, kind, one.shape, n_bytes, info.name, kind, info.numel, pieces)


def _dense_pieces(one: Placed, kind: str) -> Iterator[NDArray[Any]]:
    """The whole tensor as llama.cpp has it. Raises ArtifactError; ResourceError where it does not fit."""
    source, info = one.source, one.source.info
    source.file.refuse_memory(source.stored, 3 * info.n_bytes, "turning and filling it")
    data = np.frombuffer(b"".join(source.dense()), f"<u{DTYPE_BITS[info.dtype] // 8}").reshape(info.shape)
    if kind != info.dtype:
        data = _floats(data, info.dtype).view("<u4")
    if one.plus_one:
        data = (data.view("<f4") + np.float32(1)).view("<u4")
    data = data.T if one.turned else data
    if one.heads:
        data = data[one.order(len(data))]
    filled = np.pad(data, [(0, one.rows), (0, one.columns)][: data.ndim])
    yield np.ascontiguousarray(filled)


def _floats(data: NDArray[Any], dtype: str) -> NDArray[np.float32]:
    """Numbers of F16 or BF16, given as their bits, in float32."""
    if dtype == "BF16":
        return (data.astype("<u4") << 16).view("<f4")
    return data.view("<f2").astype("<f4")
