"""What an artifact takes on the disk is summed here, every byte by its owner. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence

from qcompress.report.document import LayerReport, SizeFigures, SizeParts


def make_size(
    baseline_bytes: int,
    artifact_bytes: int,
    layers: Sequence[LayerReport],
    *,
    header_bytes: int,
    index_bytes: int = 0,
    pooled_bytes: int = 0,
) -> SizeFigures:
    """The size figures of an artifact from what its layers and its files hold.

    pooled_bytes  side information that several tensors share and no layer counts
    raises        ValueError where the parts do not sum to artifact_bytes
    """
    compressed = [layer for layer in layers if layer.compressed]
    side_information = sum(layer.side_information_bytes for layer in compressed) + pooled_bytes
    codes = sum(layer.bytes - layer.side_information_bytes for layer in compressed)
    kept = sum(layer.bytes for layer in layers if not layer.compressed)
    weights = sum(layer.weights for layer in layers if layer.tied_to is None)
    compressed_weights = sum(layer.weights for layer in compressed if layer.tied_to is None)
    return SizeFigures(
        baseline_bytes=baseline_bytes,
        artifact_bytes=artifact_bytes,
        ratio=baseline_bytes / artifact_bytes if artifact_bytes else None,
        bits_per_weight=(codes + side_information) * 8 / compressed_weights if compressed_weights else None,
        bits_per_weight_file=artifact_bytes * 8 / weights if weights else None,
        entropy_bound_bytes=entropy_bound(compressed),
        weights=weights,
        compressed_weights=compressed_weights,
        parts=SizeParts(
            codes=codes, side_information=side_information, kept=kept, header=header_bytes, index=index_bytes
        ),
    )


def entropy_bound(compressed: Sequence[LayerReport]) -> int | None:
    """Bytes that the codes would take at the order-0 entropy of each tensor; None where one was not measured."""
    total = 0
    for layer in compressed:
        if layer.tied_to is not None or not layer.weights:
            continue
        if layer.measured.entropy is None:
            return None
        total += math.ceil(layer.weights // layer.dim * layer.measured.entropy / 8)
    return total if compressed else None
