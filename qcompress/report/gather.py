"""The report of an artifact: the one beside it, what its own bytes tell, or its errors against the original.

Imports torch only where a baseline is given.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcompress.artifact.layout import INDEX_NAME
from qcompress.artifact.manifest import Entry, input_hash
from qcompress.artifact.reader import Artifact, ArtifactFile, read_artifact
from qcompress.checkpoint import Checkpoint
from qcompress.coding.packing import count_codes
from qcompress.errors import ReportError
from qcompress.report import document
from qcompress.report.document import KEPT, LayerFigures, LayerReport, Report, make_size
from qcompress.report.document_json import read_report
from qcompress.types import TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

BLOCK_WEIGHTS = 1 << 18


def report_path(output: Path) -> Path:
    """Where the report of an artifact lies: `model-w2.report.json` beside `model-w2.safetensors` or `model-w2/`."""
    return output.with_name(f"{output.name.removesuffix('.safetensors')}.report.json")


def gather_report(path: Path, baseline: Checkpoint | None = None) -> Report:
    """The report of the artifact, or in the report file, at `path`.

    baseline  the checkpoint it was made from: errors are then measured anew
    raises    ArtifactError, ReportError; ReportError too where the baseline is another checkpoint
    """
    if path.suffix == ".json":
        if baseline is not None:
            raise ReportError(str(path), "is a report, and --baseline needs the weights", "name the artifact itself")
        return read_report(path)
    artifact = read_artifact(path)
    if baseline is not None:
        return _measure_report(artifact, baseline)
    beside = report_path(path)
    if not beside.is_file():
        return _stored_report(artifact)
    found = read_report(beside)
    if found.artifact.sha256 == artifact.sha256:
        return found
    warning = f"{beside.name} belongs to another artifact; figures are read from the artifact's own bytes"
    return replace(_stored_report(artifact), warnings=(warning,))


def _stored_report(artifact: Artifact) -> Report:
    """What the artifact's own bytes tell: sizes, and the entropy of its codes."""
    from qcompress.report.counts import measure_counts

    layers = []
    for file in artifact.files:
        for name, entry in file.manifest.tensors.items():
            counts = count_codes(file.packed_codes(name), entry.bits, entry.columns)
            layers.append(_layer(file, name, entry, measure_counts(counts)))
        layers += _kept_layers(file)
    return _make_report(artifact, layers)


def _measure_report(artifact: Artifact, baseline: Checkpoint) -> Report:
    """Errors of every compressed tensor against the checkpoint that the artifact was made from."""
    from qcompress.checkpoint import tensor_view

    _refuse_other_baseline(artifact, baseline)
    infos = {info.name: info for info in baseline.tensors}
    layers = []
    for file in artifact.files:
        for name, entry in file.manifest.tensors.items():
            weight = tensor_view(baseline.shard_of(name), infos[name])
            layers.append(_layer(file, name, entry, _measure_tensor(file, name, weight)))
        layers += _kept_layers(file)
    return _make_report(artifact, layers)


def _measure_tensor(file: ArtifactFile, name: str, weight: Tensor) -> LayerFigures:
    """The figures of one tensor, block by block."""
    from qcompress.coding.affine import decode_rows, take_rows
    from qcompress.coding.packing import pack
    from qcompress.coding.rows import rows_from_weight
    from qcompress.report.figures import LayerMeter, unclipped_range

    entry, encoded = file.manifest.tensors[name], file.read_encoded(name)
    rows = rows_from_weight(weight, entry.axis)
    meter = LayerMeter(weight.numel(), entry.bits)
    step = max(1, BLOCK_WEIGHTS // entry.columns)
    for start in range(0, entry.rows, step):
        part = take_rows(encoded, start, start + step)
        block = rows[start : start + step].float().reshape(part.shape)
        counts = count_codes(pack(part.codes.numpy(), entry.bits), entry.bits, entry.columns)
        meter.add(block, decode_rows(part), counts, within=unclipped_range(part))
    return meter.result()


def _refuse_other_baseline(artifact: Artifact, baseline: Checkpoint) -> None:
    wanted = {file.path.name: file.manifest.input_sha256 for file in artifact.files}
    for index, shard in enumerate(baseline.shards):
        crcs = {info.name: zlib.crc32(shard.bytes_of(info.name)) for info in shard.tensors}
        # A single file may have any name; shards keep theirs.
        key = shard.path.name if len(wanted) > 1 else next(iter(wanted))
        if index >= len(wanted) or wanted.get(key) != input_hash(shard.tensors, crcs):
            what = f"is not the checkpoint that {artifact.path} was made from (its hash differs)"
            raise ReportError(str(shard.path), what, "give the original checkpoint to --baseline")


def _layer(file: ArtifactFile, name: str, entry: Entry, figures: LayerFigures) -> LayerReport:
    parts = {part: info.n_bytes for part, info in file.parts_of(name).items()}
    grids, groups = file.parts_of(name)["scale"].shape
    method, options = _rule_of(name, file.manifest.recipe)
    grouped = groups > 1 or (options.get("granularity") == "group")
    granularity = "group" if grouped else "tensor" if grids == 1 < entry.rows else "channel"
    return LayerReport(
        name=name,
        shape=entry.shape,
        dtype=entry.dtype,
        bytes=sum(parts.values()),
        baseline_bytes=TensorInfo(name, entry.shape, entry.dtype).n_bytes,
        reason="read from the artifact",
        method=method,
        bits=entry.bits,
        granularity=granularity,
        group_size=entry.columns // groups if grouped else None,
        form=entry.grid if entry.grid in ("zero-point", "offset") else "symmetric",
        coding=entry.coding,
        side_information_bytes=sum(parts.values()) - parts["codes"],
        figures=figures,
    )


def _rule_of(name: str, recipe: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """The method that the manifest's recipe gave a tensor, and its options."""
    for rule in recipe.get("rules", ()):
        if isinstance(rule, dict) and fnmatchcase(name, str(rule.get("match"))):
            for method, options in rule.items():
                if method != "match" and isinstance(options, dict):
                    return method, options
    return "unknown", {}


def _kept_layers(file: ArtifactFile) -> list[LayerReport]:
    return [
        LayerReport(
            name=info.name,
            shape=info.shape,
            dtype=info.dtype,
            bytes=info.n_bytes,
            baseline_bytes=info.n_bytes,
            reason="read from the artifact",
            method=KEPT,
        )
        for info in file.kept
    ]


def _make_report(artifact: Artifact, layers: list[LayerReport]) -> Report:
    index = artifact.path / INDEX_NAME
    index_bytes = index.stat().st_size if artifact.path.is_dir() and index.is_file() else 0
    size = make_size(
        sum(file.manifest.input_bytes for file in artifact.files),
        artifact.file_bytes + index_bytes,
        layers,
        header_bytes=sum(file.container.data_start for file in artifact.files),
        index_bytes=index_bytes,
    )
    return Report(
        artifact=document.ArtifactFile(name=artifact.path.name, sha256=artifact.sha256),
        recipe_hash=artifact.files[0].manifest.recipe_sha256,
        size=size,
        layers=tuple(sorted(layers, key=lambda layer: layer.name)),
    )
