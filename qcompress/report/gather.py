"""The report of an artifact is found beside it, read off its own bytes, or measured against the original.

Imports torch only where a baseline is given.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from qcompress.artifact.entry import Entry
from qcompress.artifact.hashes import artifact_hash, input_hash
from qcompress.artifact.layout import INDEX_NAME, plain_name
from qcompress.artifact.reader import Artifact, ArtifactFile, read_artifact
from qcompress.checkpoint.checkpoint import Checkpoint, tensor_view
from qcompress.coding.packing import count_codes
from qcompress.coding.rows import row_slices
from qcompress.errors import ReportError, raise_all
from qcompress.report import document
from qcompress.report.counts import codebook_figures, count_values, measure_counts, stored_codebook_figures
from qcompress.report.document import LayerFigures, LayerReport, Report
from qcompress.report.document_json import read_report, report_path
from qcompress.report.size import make_size
from qcompress.types.plan import TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

    from qcompress.report.figures import LayerMeter

BLOCK_WEIGHTS = 1 << 18
REASON = "read from the artifact"


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
    beside = report_path(artifact.path)
    if not beside.is_file():
        return _stored_report(artifact)
    found = read_report(beside)
    if found.artifact.sha256 == artifact.sha256:
        return replace(found, input_sha256=_input_hash(artifact))
    warning = f"{beside.name} belongs to another artifact; figures are read from the artifact's own bytes"
    return replace(_stored_report(artifact), warnings=(warning,))


def _measure_report(artifact: Artifact, baseline: Checkpoint) -> Report:
    """Errors of every compressed tensor against the checkpoint that the artifact was made from."""
    _refuse_other_baseline(artifact, baseline)
    figures = {}
    for file in artifact.files:
        for name in file.manifest.tensors:
            figures[name] = _measure_tensor(file, name, tensor_view(baseline.shard_of(name), file.original(name)))
    return _make_report(artifact, figures)


def _refuse_other_baseline(artifact: Artifact, baseline: Checkpoint) -> None:
    made_from = f"the checkpoint that {artifact.path} was made from"
    hint = "give the original checkpoint to --baseline"
    wanted = {plain_name(file.path.name): file.manifest.input_sha256 for file in artifact.files}
    if len(baseline.shards) != len(wanted):
        what = f"is not {made_from}: {len(baseline.shards)} files, not {len(wanted)}"
        raise ReportError(str(baseline.path), what, hint)
    for shard in baseline.shards:
        crcs = {info.name: shard.crc32_of(info.name) for info in shard.tensors}
        # A single file may have any name; shards keep theirs.
        key = shard.path.name if len(wanted) > 1 else next(iter(wanted))
        if wanted.get(key) != input_hash(shard.tensors, crcs):
            raise ReportError(str(shard.path), f"is not {made_from} (its hash differs)", hint)


def _measure_tensor(file: ArtifactFile, name: str, weight: Tensor) -> LayerFigures:
    """The figures of one tensor, block by block."""
    import torch

    from qcompress.coding.grids import centroid_values, decode_rows, row_spans, step_value, take_rows
    from qcompress.coding.rows import rows_from_weight
    from qcompress.report.figures import LayerMeter, unclipped_range
    from qcompress.types.encoded import Codebook, Constant, Unbounded

    entry, encoded = file.manifest.tensors[name], file.read_encoded(name)
    rows = rows_from_weight(weight, entry.axis)
    meter = LayerMeter(weight.numel(), entry.bits or None)
    if isinstance(encoded, Constant):
        return _measure_constant(rows, meter, encoded.value)
    whole = count_values(encoded.codes.numpy()) if isinstance(encoded, Unbounded) else None
    for start, stop in row_spans(encoded, BLOCK_WEIGHTS):
        part = take_rows(encoded, start, stop)
        block = rows[start:stop].float().reshape(part.shape)
        counts = torch.bincount(part.codes.reshape(-1), minlength=2**entry.bits).numpy() if whole is None else None
        meter.add(block, decode_rows(part), counts, within=unclipped_range(part))
    figures = meter.result(whole)
    if isinstance(encoded, Unbounded):
        return replace(
            figures, step=step_value(encoded), classes=file.unbounded_tensors.class_uses(name, encoded.codes.numpy())
        )
    if not isinstance(encoded, Codebook):
        return figures
    return replace(figures, **codebook_figures(encoded.codes.numpy(), centroid_values(encoded).numpy()))


def _measure_constant(rows: Tensor, meter: LayerMeter, value: float) -> LayerFigures:
    import torch

    for span in row_slices(len(rows), rows.numel() // len(rows), BLOCK_WEIGHTS):
        flat = rows[span].float().reshape(span.stop - span.start, -1)
        meter.add(flat, torch.full_like(flat, value), None)
    return meter.result(np.array([rows.numel()], np.int64))


def _stored_report(artifact: Artifact) -> Report:
    """What the artifact's own bytes tell: sizes, and the entropy of its codes."""
    figures = {}
    for file in artifact.files:
        raise_all(file.find_damage())
        for name, entry in file.manifest.tensors.items():
            if entry.is_unbounded:
                file.check_compressed(name)
                codes, grid = file.unbounded_tensors.codes(name)
                found = replace(measure_counts(count_values(codes)), step=grid.value)
                figures[name] = replace(found, classes=file.unbounded_tensors.class_uses(name, codes))
                continue
            if entry.form == "constant":
                file.check_codes(name)
                figures[name] = measure_counts(np.array([entry.numel], np.int64))
                continue
            found = measure_counts(count_codes(file.packed_codes(name), entry.bits, entry.columns))
            if entry.form == "codebook":
                about = stored_codebook_figures(file.grids(name)["codebook"].astype("f4"), found.levels_used)
                found = replace(found, **about)
            figures[name] = found
    return _make_report(artifact, figures)


def _make_report(artifact: Artifact, figures: Mapping[str, LayerFigures]) -> Report:
    """The report whose compressed tensors have these figures, its layers by name."""
    layers: list[LayerReport] = []
    for file in artifact.files:
        layers += [_compressed_layer(file, name, entry, figures[name]) for name, entry in file.manifest.tensors.items()]
        layers += [_kept_layer(file.original(info.name), info.n_bytes) for info in file.kept]
        layers += [_kept_layer(info, 0, twin) for info, twin in artifact.copies_of(file).items()]
    index = artifact.path / INDEX_NAME
    index_bytes = index.stat().st_size if artifact.path.is_dir() and index.is_file() else 0
    size = make_size(
        sum(file.manifest.input_bytes for file in artifact.files),
        artifact.file_bytes + index_bytes,
        layers,
        header_bytes=sum(file.overhead_bytes for file in artifact.files),
        index_bytes=index_bytes,
        pooled_bytes=sum(file.pooled_bytes for file in artifact.files),
    )
    return Report(
        artifact=document.ArtifactFile(name=artifact.path.name, sha256=artifact.sha256),
        recipe_hash=artifact.files[0].manifest.recipe_sha256,
        input_sha256=_input_hash(artifact),
        size=size,
        layers=tuple(sorted(layers, key=lambda layer: layer.name)),
    )


def _compressed_layer(file: ArtifactFile, name: str, entry: Entry, figures: LayerFigures) -> LayerReport:
    parts = {part: info.n_bytes for part, info in file.parts_of(name).items()}
    method = _method_of(name, file.manifest.recipe)
    own_side = file.unbounded_tensors.side_bytes(name) if entry.is_unbounded else 0
    return replace(
        _kept_layer(file.original(name), sum(parts.values())),
        method=method,
        bits=entry.bits or None,
        dim=entry.dim,
        granularity="group" if entry.group_size else str(entry.group),
        group_size=entry.group_size,
        form=_form_of(entry),
        coding=entry.coding,
        codebook_in=entry.shared,
        side_information_bytes=sum(parts.values()) - parts["codes"] + own_side,
        figures=figures,
    )


def _form_of(entry: Entry) -> str:
    """The form as configs name it."""
    if entry.form != "affine":
        return entry.form
    return entry.grid if entry.grid in ("zero-point", "offset") else "symmetric"


def _method_of(name: str, recipe: Mapping[str, object]) -> str:
    """The method that the manifest's recipe gave a tensor."""
    rules = recipe.get("rules")
    for rule in rules if isinstance(rules, list) else []:
        if not isinstance(rule, dict):
            continue
        match = rule.get("match")
        globs = match if isinstance(match, list) else [match]
        if any(fnmatchcase(name, glob) for glob in globs if isinstance(glob, str)):
            for method, options in rule.items():
                if method != "match" and isinstance(options, dict):
                    return str(method)
    return "unknown"


def _kept_layer(info: TensorInfo, n_bytes: int, tied_to: str | None = None) -> LayerReport:
    """A tensor that the checkpoint had as `info` says, in so many bytes."""
    return LayerReport(
        name=info.name,
        shape=info.shape,
        dtype=info.dtype,
        bytes=n_bytes,
        baseline_bytes=info.n_bytes,
        tied_to=tied_to,
        reason=REASON,
    )


def _input_hash(artifact: Artifact) -> str:
    """That of the checkpoint's one file; of several, that of their names and hashes."""
    return artifact_hash([(plain_name(file.path.name), file.manifest.input_sha256) for file in artifact.files])
