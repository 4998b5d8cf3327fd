"""A manifest says of an artifact what each compressed tensor is, and ties it to other files by hashes.

It is a text of sorted JSON, all of which the plan knows, and the numbers that are known only once the data are written;
both in one frame of zstd whose checksum covers them. SPEC.md, "The manifest". Imports no torch.
"""

from __future__ import annotations

import json
import struct
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace

import numpy as np

from qcompress.artifact.entry import CODINGS, USUAL, Entry, part_name
from qcompress.checkpoint.safetensors_file import OWN_TENSORS, RESERVED
from qcompress.coding.ans import parse_varint, varint
from qcompress.coding.frames import seal_frame
from qcompress.coding.unbounded.tables import pooled
from qcompress.types.encoded import ActivationGrid
from qcompress.types.plan import TensorInfo

FORMAT = 2
METADATA_KEY = "qcompress"
DATA_NAME, MANIFEST_NAME = OWN_TENSORS
"""The stored tensors that hold all others of a compact file, and the manifest: the last of its file."""
POOL_NAME = f"{RESERVED}side"
"""The side information of all small unbounded tensors of a file: a part of no tensor."""
EVERY = "*"
"""Stands in `halved` for every kept F16 tensor that no other dtype names."""
BLANK_SHA256 = "0" * 64
NUMBERS = ("u1", "u1", "<u4", "u1", "i1", "<u2", "<f8", "<u4")
"""dtypes: SHA-256 of data and of the input, CRC-32 of the header; codings, exponents, entries, constants, CRC-32s."""


class ManifestError(ValueError):
    """What is wrong with a manifest; the reader adds where."""


class NewerFormatError(ManifestError):
    """The manifest is of a format that came after this version."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """Everything that the manifest of one file says.

    recipe        the resolved recipe as JSON data, and its SHA-256
    input         its bytes, and SHA-256 over names, dtypes, shapes and CRC-32s of its tensors
    sha256        of this file's data before the manifest
    header_crc32  of all before the data
    tied          name -> the tensor that stands for it
    metadata      of the input file
    adjusted      kept tensors whose values a method changed
    halved        dtype -> the kept tensors that had it and are stored as F16: their names, or EVERY
    activations   module -> the quantizer at its input
    caps          module -> the largest value that each channel of its output may take
    crc32s        of kept tensors, of tied names, and of what several tensors pool, by name; in a compact file of all
                  kept tensors together, under DATA_NAME
    kept          in a compact file the kept tensors as they are stored, by name; None in others, whose header has them
    coded         kept tensors whose bytes are stored as codes, with the dtype of these bytes, by name
    lengths       in a compact file the bytes of the stored tensors that no field of an entry tells, by name
    """

    tool: str
    recipe: Mapping[str, object]
    recipe_sha256: str
    input_bytes: int
    tensors: Mapping[str, Entry]
    tied: Mapping[str, str] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    adjusted: Sequence[str] = ()
    halved: Mapping[str, Sequence[str] | str] = field(default_factory=dict)
    activations: Mapping[str, ActivationGrid] = field(default_factory=dict)
    caps: Mapping[str, Sequence[float]] = field(default_factory=dict)
    input_sha256: str = BLANK_SHA256
    sha256: str = BLANK_SHA256
    header_crc32: int = 0
    crc32s: Mapping[str, int] = field(default_factory=dict)
    kept: Mapping[str, TensorInfo] | None = None
    coded: Mapping[str, TensorInfo] = field(default_factory=dict)
    lengths: Mapping[str, int] = field(default_factory=dict)

    @property
    def is_compact(self) -> bool:
        return self.kept is not None


def make_halved(kept: Mapping[str, tuple[str, str]]) -> dict[str, Sequence[str] | str]:
    """`halved` of kept tensors: name -> (dtype in the input, dtype as stored)."""
    named: dict[str, list[str]] = {}
    for name, (own, stored) in kept.items():
        if own != stored:
            named.setdefault(own, []).append(name)
    halved: dict[str, Sequence[str] | str] = dict(named)
    if named and not any(own == "F16" for own, _ in kept.values()):
        halved[max(named, key=lambda dtype: len(named[dtype]))] = EVERY
    return halved


def manifest_frame(manifest: Manifest) -> bytes:
    """The manifest as its file holds it; how long it is follows from what the plan knows."""
    return seal_frame(manifest_text(manifest).encode() + b"\n", pack_numbers(manifest))


def manifest_text(manifest: Manifest) -> str:
    """All that the plan knows: sorted JSON without spaces; what most entries share stands once under `defaults`."""
    entries = {name: entry.fields() for name, entry in manifest.tensors.items()}
    defaults = _common(list(entries.values()))
    document: dict[str, object] = {
        "defaults": defaults,
        "format": FORMAT,
        "input_bytes": manifest.input_bytes,
        "recipe": manifest.recipe,
        "recipe_sha256": manifest.recipe_sha256,
        "tensors": {name: _own_json(entry, defaults) for name, entry in entries.items()},
        "tool": manifest.tool,
    }
    if manifest.tied:
        document["tied"] = dict(manifest.tied)
    if manifest.metadata:
        document["metadata"] = dict(manifest.metadata)
    if manifest.adjusted:
        document["adjusted"] = sorted(manifest.adjusted)
    if manifest.halved:
        document["halved"] = {k: v if v == EVERY else sorted(v) for k, v in manifest.halved.items()}
    if manifest.activations:
        document["activations"] = {name: asdict(grid) for name, grid in manifest.activations.items()}
    if manifest.kept is not None:
        document["kept"] = _kept_json(manifest.kept)
    if manifest.coded:
        document["coded"] = _kept_json(manifest.coded)
    if manifest.caps:
        document["caps"] = {name: list(caps) for name, caps in manifest.caps.items()}
    return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def _kept_json(kept: Mapping[str, TensorInfo]) -> dict[str, dict[str, list[int]]]:
    """dtype -> name -> shape."""
    found: dict[str, dict[str, list[int]]] = {}
    for info in kept.values():
        found.setdefault(info.dtype, {})[info.name] = list(info.shape)
    return found


def _own_json(entry: Mapping[str, object], defaults: Mapping[str, object]) -> object:
    """What stands in the manifest of an entry: the fields that differ from the defaults; of a shape alone, that."""
    usual = {**defaults, **USUAL}
    own = {key: value for key, value in entry.items() if key not in usual or value != usual[key]}
    return own["shape"] if set(own) == {"shape"} else own


def _common(entries: Sequence[Mapping[str, object]]) -> dict[str, object]:
    """The most frequent value of each field that all entries of some form have; of equals the first as text."""
    common: dict[str, object] = {}
    for key in sorted({key for entry in entries for key in entry} - set(USUAL) - {"shape"}):
        counts = Counter(json.dumps(entry[key]) for entry in entries if key in entry)
        common[key] = json.loads(min(counts, key=lambda text: (-counts[text], text)))
    return common


# The numbers of a manifest: each kind for all tensors that have one, in the order of their names.


def pack_numbers(manifest: Manifest) -> bytes:
    """What is known of a file only when all else of it is written."""
    entries = [manifest.tensors[name] for name in sorted(manifest.tensors)]
    crc32s = [*(entry.crc32 for entry in entries), *(manifest.crc32s[name] for name in sorted(manifest.crc32s))]
    return b"".join(
        [
            bytes.fromhex(manifest.sha256 + manifest.input_sha256),
            struct.pack("<I", manifest.header_crc32),
            bytes(CODINGS.index(entry.coding) for entry in entries),
            np.array([entry.exponent for entry in entries if entry.has_exponent], "i1").tobytes(),
            np.array([entry.entries for entry in entries if entry.has_entries], "<u2").tobytes(),
            np.array([entry.value for entry in entries if entry.form == "constant"], "<f8").tobytes(),
            np.array(crc32s, "<u4").tobytes(),
            *(varint(manifest.lengths[name]) for name in sorted(manifest.lengths)),
        ]
    )


def unpack_numbers(manifest: Manifest, data: bytes, others: Sequence[str]) -> Manifest:
    """The manifest with the numbers that it ends with.

    others  kept and pooled tensors, which have a CRC-32 too
    raises  ManifestError where there are more or fewer; whether they are in range, others must see
    """
    stored = {*manifest.tensors, *others, *(manifest.kept or {})}
    twice = sorted(stored & set(manifest.tied))
    if twice:
        raise ManifestError(f"tensor {twice[0]!r} is called tied and is stored too")
    beside = sorted({*others, *(manifest.kept or {})} & set(manifest.tensors))
    if beside:
        raise ManifestError(f"tensor {beside[0]!r} stands beside its codes")
    names = sorted(manifest.tensors)
    rest = sorted([*others, *manifest.tied])
    entries = [manifest.tensors[name] for name in names]
    counts = (
        *(32, 32, 1, len(names), sum(entry.has_exponent for entry in entries)),
        *(sum(entry.has_entries for entry in entries), sum(entry.form == "constant" for entry in entries)),
        len(names) + len(rest),
    )
    kinds = [(np.dtype(kind), count) for kind, count in zip(NUMBERS, counts, strict=True)]
    size = sum(kind.itemsize * count for kind, count in kinds)
    if len(data) < size or (len(data) > size and not manifest.is_compact):
        raise ManifestError(f"its manifest has {len(data)} bytes of numbers, not {size}")
    found, at = [], 0
    for kind, count in kinds:
        found.append(np.frombuffer(data, kind, count, at).tolist())
        at += kind.itemsize * count
    sha256, input_sha256, (header_crc32,), codings, *columns, crc32s = found
    exponents, sizes, values = (iter(column) for column in columns)
    if max(codings, default=0) >= len(CODINGS):
        raise ManifestError(f"its manifest has the unknown coding {max(codings)}")
    tensors = {
        name: replace(
            entry,
            coding=CODINGS[coding],
            exponent=next(exponents) if entry.has_exponent else 0,
            entries=next(sizes) if entry.has_entries else 0,
            value=next(values) if entry.form == "constant" else 0.0,
            crc32=crc32,
        )
        for name, entry, coding, crc32 in zip(names, entries, codings, crc32s, strict=False)
    }
    manifest = replace(manifest, tensors=tensors)
    return replace(
        manifest,
        lengths=_unpack_lengths(manifest, memoryview(data)[size:]) if manifest.is_compact else {},
        sha256=bytes(sha256).hex(),
        input_sha256=bytes(input_sha256).hex(),
        header_crc32=header_crc32,
        crc32s=dict(zip(rest, crc32s[len(names) :], strict=True)),
    )


def _unpack_lengths(manifest: Manifest, data: memoryview) -> dict[str, int]:
    """The bytes of each stored tensor of a compact file that no field tells, by name. Raises ManifestError."""
    found, at = {}, 0
    for name in unknown_lengths(manifest):
        try:
            found[name], at = parse_varint(data, at)
        except ValueError:
            raise ManifestError("its manifest lacks the length of a tensor") from None
    if at != len(data):
        raise ManifestError(f"its manifest has {len(data) - at} bytes of numbers too many")
    return found


def unknown_lengths(manifest: Manifest) -> list[str]:
    """The stored tensors whose bytes no field of an entry tells, in the order of their names: codes, and the pool's."""
    coded = (name for name, entry in manifest.tensors.items() if entry.is_unbounded or entry.coding != "packed")
    pool = [POOL_NAME] if pool_names(manifest.tensors) else []
    return sorted([*(part_name(name, "codes") for name in (*coded, *manifest.coded)), *pool])


def pool_names(entries: Mapping[str, Entry]) -> list[str]:
    """The unbounded tensors of a file that share its pool, in the order in which its side information has them."""
    names = sorted(name for name, entry in entries.items() if entry.is_unbounded)
    shared = pooled([entries[name].numel for name in names]) if names else []
    return [name for name, shares in zip(names, shared, strict=True) if shares]
