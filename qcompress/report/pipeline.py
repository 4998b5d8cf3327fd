"""The reports of a pipeline's components become the report of the pipeline. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from qcompress.artifact.hashes import artifact_hash
from qcompress.report.document import ArtifactFile, LayerReport, Report
from qcompress.report.size import make_size


def join_reports(name: str, parts: Mapping[str, Report], recipe_hash: str) -> Report:
    """One report of several artifacts: layers by `component/name`, sizes summed.

    parts  component -> its report
    """
    layers = tuple(_named(part, layer) for part, report in parts.items() for layer in report.layers)
    sizes = [report.size for report in parts.values()]
    own = sum(layer.side_information_bytes for layer in layers if layer.compressed)
    size = make_size(
        sum(size.baseline_bytes for size in sizes),
        sum(size.artifact_bytes for size in sizes),
        layers,
        header_bytes=sum(size.parts.header for size in sizes),
        index_bytes=sum(size.parts.index for size in sizes),
        pooled_bytes=sum(size.parts.side_information for size in sizes) - own,
    )
    inputs = {part: report.input_sha256 for part, report in parts.items()}
    known = {part: sha256 for part, sha256 in inputs.items() if sha256 is not None}
    return Report(
        artifact=ArtifactFile(name=name, sha256=join_hashes({p: one.artifact.sha256 for p, one in parts.items()})),
        recipe_hash=recipe_hash,
        input_sha256=join_hashes(known) if len(known) == len(inputs) else None,
        size=size,
        layers=layers,
        warnings=tuple(f"{part}: {line}" for part, report in parts.items() for line in report.warnings),
    )


def join_hashes(parts: Mapping[str, str]) -> str:
    """What a pipeline is named by, from the hashes of its components."""
    return artifact_hash(sorted(parts.items()))


def _named(part: str, layer: LayerReport) -> LayerReport:
    def name(one: str | None) -> str | None:
        return None if one is None else f"{part}/{one}"

    return replace(layer, name=f"{part}/{layer.name}", tied_to=name(layer.tied_to), codebook_in=name(layer.codebook_in))
