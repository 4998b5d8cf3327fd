"""An artifact becomes a folder that mlx-lm loads: affine grids of Apple's MLX.

A weight X.weight becomes words of 32 bits with codes, least significant first, and X.scales and X.biases, one a group:
weight = scale * code + bias. config.json names group size and bits, for all and for modules that differ.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qcompress.artifact.layout import plain_name
from qcompress.artifact.reader import Artifact
from qcompress.artifact.writer import CONFIG_NAME, QUANTIZATION, find_companions
from qcompress.errors import ArtifactError, raise_all
from qcompress.exporters.matrices import (
    WEIGHT,
    config_text,
    float_bytes,
    packed_words,
    read_config,
    refuse_matrix,
    stored_dtype,
    word_bytes,
)
from qcompress.exporters.sources import (
    Source,
    activation_notes,
    find_sources,
    safetensors_file,
    safetensors_index,
)
from qcompress.types.export import ExportOptions, ExportPlan, Target
from qcompress.types.plan import DTYPE_BITS

WIDTHS = (2, 3, 4, 5, 6, 8)
GROUPS = (128, 64, 32)
HEAD, TIED = "lm_head.weight", "tie_word_embeddings"


def export(artifact: Artifact, options: ExportOptions) -> ExportPlan:
    """The folder; tied copies are left out, for mlx-lm ties them again.

    raises  Refusals of what the format cannot hold; ArtifactError without a config.json
    """
    found = find_sources(artifact)
    config = read_config(artifact, "mlx")
    errors: list[ArtifactError] = []
    schemes: dict[str, tuple[int, int]] = {}
    dense: list[str] = []
    for _, sources in found:
        for source in sources:
            if source.entry is None or source.is_copy:
                continue
            why = _refuse(source)
            if why is None:
                schemes[source.name] = _scheme(source)
            elif options.keep_unfit:
                dense.append(source.name)
            else:
                errors.append(source.refused(*why))
    raise_all(errors)
    files = [
        safetensors_file(
            plain_name(file.path.name),
            [t for source in sources if not source.is_copy for t in _targets(source, schemes.get(source.name))],
            {"format": "mlx"},
        )
        for file, sources in found
    ]
    config.pop(QUANTIZATION, None)
    if any(source.name == HEAD and not source.is_copy for _, sources in found for source in sources):
        # Where config.json does not say, transformers takes a head for its own, and mlx-lm for the embedding.
        config.setdefault(TIED, False)
    if schemes:
        config["quantization"] = config[QUANTIZATION] = _quantization(schemes)
    notes = activation_notes(artifact)
    if dense:
        notes.append(f"{len(dense)} compressed tensors that the format cannot hold are dense, first {dense[0]!r}")
    return ExportPlan(
        True,
        tuple(files),
        texts={CONFIG_NAME: config_text(config), **safetensors_index(files)},
        copied=[path for path in find_companions(artifact.path) if path.name != CONFIG_NAME],
        notes=notes,
    )


def _refuse(source: Source) -> tuple[str, str] | None:
    """Why codes cannot be held: what, and a hint."""
    why = refuse_matrix(source)
    if why is None and not _groups(source):
        what = f"has rows of {source.info.shape[1]} in groups of {source.group}, and MLX has groups of 32, 64 and 128"
        return what, "quantize --for mlx, or write it dense with --keep-unfit"
    return why


def _groups(source: Source) -> list[int]:
    """The groups of MLX that divide those of a weight and its rows, the largest first."""
    entry = source.entry
    assert entry is not None
    return [size for size in GROUPS if entry.columns % size == 0 and source.group % size == 0]


def _scheme(source: Source) -> tuple[int, int]:
    """Group size and bits of the weight in MLX: codes may take more bits than they need."""
    entry = source.entry
    assert entry is not None
    return _groups(source)[0], next(width for width in WIDTHS if width >= entry.bits)


def _targets(source: Source, scheme: tuple[int, int] | None) -> list[Target]:
    """What a tensor of the checkpoint becomes."""
    if scheme is None:
        return [source.dense_target()]
    entry = source.entry
    assert entry is not None
    (rows, columns), (group, bits) = entry.shape, scheme
    base, held = source.name.removesuffix(WEIGHT), f"{bits} bits, groups of {group}"
    groups, words = columns // group, word_bytes(columns, bits)
    dtype = stored_dtype(entry.dtype, *_scales_and_biases(source, group))

    def target(name: str, dtype: str, shape: tuple[int, ...], pieces: Callable[[], Iterator[Any]]) -> Target:
        n_bytes, weights = math.prod(shape) * DTYPE_BITS[dtype] // 8, entry.numel if name == source.name else 0
        return Target(name, dtype, shape, n_bytes, source.name, held, weights, pieces)

    def floats(which: int) -> Iterator[bytes]:
        yield float_bytes(_scales_and_biases(source, group)[which], dtype)

    return [
        target(source.name, "U32", (rows, words // 4), lambda: packed_words(source, bits)),
        target(f"{base}.scales", dtype, (rows, groups), lambda: floats(0)),
        target(f"{base}.biases", dtype, (rows, groups), lambda: floats(1)),
    ]


def _scales_and_biases(source: Source, group: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Of each group of MLX, of which one of the artifact may be several: weight = scale * code + bias."""
    grid, groups = source.grid, source.info.shape[1] // group
    bias = -grid.zero * grid.scale if grid.offset is None else grid.offset
    times = source.group // group
    return np.repeat(grid.scale, times, axis=1)[:, :groups], np.repeat(bias, times, axis=1)[:, :groups]


def _quantization(schemes: dict[str, tuple[int, int]]) -> dict[str, Any]:
    """The section of config.json: what most modules have, and those that differ."""
    (group, bits), _ = Counter(schemes.values()).most_common(1)[0]
    differing = {
        name.removesuffix(WEIGHT): {"group_size": scheme[0], "bits": scheme[1]}
        for name, scheme in schemes.items()
        if scheme != (group, bits)
    }
    return {"group_size": group, "bits": bits, "mode": "affine", **differing}
