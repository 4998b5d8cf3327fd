"""What formats of Hugging Face folders share: matrices of codes, packed without gaps, beside a config.json."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from qcompress.artifact.reader import Artifact
from qcompress.artifact.writer import plain_config
from qcompress.coding.packing import pack, row_bytes
from qcompress.errors import ArtifactError
from qcompress.exporters.sources import Source
from qcompress.plan.network import Network
from qcompress.plan.roles import find_roles
from qcompress.types.plan import Role

WEIGHT = ".weight"
FloatDtype = Literal["F32", "F16", "BF16"]
TABLES: tuple[Role, ...] = ("embedding", "position")


def read_config(artifact: Artifact, to: str) -> dict[str, Any]:
    """The config.json of an artifact's folder as its checkpoint had it. Raises ArtifactError where there is none."""
    text = plain_config(artifact.path) if artifact.path.is_dir() else None
    try:
        config = None if text is None else json.loads(text)
    except (ValueError, RecursionError):
        config = None
    if not isinstance(config, dict):
        what = f"is no folder with a config.json that can be read, which {to} needs"
        raise ArtifactError(str(artifact.path), what, "compress the Hugging Face folder, not its file alone")
    return config


def config_text(config: dict[str, Any]) -> bytes:
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()


def find_tables(sources: Sequence[Source], config: Mapping[str, Any]) -> frozenset[str]:
    """The names of those whose rows are looked up, by their roles."""
    roles = find_roles(Network([source.info for source in sources], config))
    return frozenset(name for name, role in roles.items() if role in TABLES)


def refuse_matrix(source: Source) -> tuple[str, str] | None:
    """Why codes are not those of a linear layer's weight on an even grid: what, and a hint; None where they are."""
    entry = source.entry
    assert entry is not None
    if entry.form != "affine":
        what = f"is of the form {entry.form}, and the format has grids of evenly spaced values alone"
        return what, "quantize with rtn, mse, squant or hqq"
    if len(entry.shape) != 2 or entry.axis != (0,) or not source.name.endswith(WEIGHT):
        return (
            "is no weight of a linear layer, and the format holds such",
            "keep it: leave it out of the recipe's rules",
        )
    return None


def stored_dtype(dtype: str, *values: NDArray[np.float32]) -> FloatDtype:
    """How scales of a weight of `dtype` are stored: in that dtype where it holds them all, else in float32."""
    if dtype in ("F16", "BF16") and all((rounded(value, dtype) == value).all() for value in values):
        return "F16" if dtype == "F16" else "BF16"
    return "F32"


def rounded(values: NDArray[np.float32], dtype: str) -> NDArray[np.float32]:
    """The nearest numbers of F16 or BF16, those between two with an even mantissa; of any other dtype themselves."""
    if dtype == "F16":
        with np.errstate(over="ignore"):
            return values.astype(np.float16).astype(np.float32)
    if dtype == "BF16":
        bits = values.view(np.uint32)
        nearest: NDArray[np.float32] = (
            ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)
        )
        return nearest
    return values


def float_bytes(values: NDArray[np.float32], dtype: str) -> bytes:
    """The bytes of values that `dtype` holds."""
    if dtype == "F16":
        return values.astype("<f2").tobytes()
    if dtype == "BF16":
        return (values.view(np.uint32) >> 16).astype("<u2").tobytes()
    return values.astype("<f4").tobytes()


def largest_change(values: NDArray[np.float32], dtype: str) -> float:
    """By how much, at most, rounding changes a value, relative to it."""
    with np.errstate(divide="ignore", invalid="ignore"):
        change = np.abs(rounded(values, dtype) / values - 1)
    return float(np.nan_to_num(change, nan=0.0).max(initial=0.0))


def word_bytes(columns: int, bits: int) -> int:
    """Bytes of a row of codes that fills whole words of 32 bits."""
    return -(-row_bytes(columns, bits) // 4) * 4


def packed_words(source: Source, bits: int, add: int = 0) -> Iterator[NDArray[np.uint8]]:
    """The codes, each with `add` more, as dense bits, least significant first, every row padded to 32 bits.

    raises  ArtifactError where a tensor is damaged, or a code goes beyond the bits
    """
    for _, codes in source.code_rows():
        if add and int(codes.max(initial=0)) + add >> bits:
            raise source.refused("holds a code that its grid never uses", "compress it again")
        packed = pack(codes + np.uint8(add) if add else codes, bits)
        missing = word_bytes(codes.shape[1], bits) - packed.shape[1]
        yield np.pad(packed, ((0, 0), (0, missing))) if missing else packed
