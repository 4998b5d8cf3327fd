"""The report of an artifact is found beside it, read off its own bytes, or measured against the original.

Imports torch only where a baseline is given.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qcompress.artifact.artifact_file import ArtifactFile
from qcompress.artifact.entry import Entry
from qcompress.artifact.hashes import artifact_hash, input_hash
from qcompress.artifact.layout import INDEX_NAME, plain_name
from qcompress.artifact.reader import Artifact, read_artifact
from qcompress.artifact.stored_tensor import StoredTensor
from qcompress.checkpoint.checkpoint import Checkpoint, StoredRows, tensor_view
from qcompress.checkpoint.pipeline import is_pipeline, read_pipeline
from qcompress.checkpoint.safetensors_file import Container
from qcompress.coding.packing import count_codes
from qcompress.errors import ReportError, raise_all
from qcompress.plan.network import Network
from qcompress.plan.roles import find_roles
from qcompress.plan.rules import find_deciders
from qcompress.report import document
from qcompress.report.counts import (
    Counts,
    ValueCounter,
    entry_uses,
    measure_counts,
    stored_codebook_figures,
    used_codebook_figures,
)
from qcompress.report.document import LayerFigures, LayerReport, Report
from qcompress.report.document_json import read_report, report_path
from qcompress.report.pipeline import join_hashes, join_reports
from qcompress.report.size import make_size
from qcompress.types.plan import Rule, TensorInfo

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

VALUE_BYTES = 64
"""What counting takes for each different code."""
REASON = "read from the artifact"


def gather_report(path: Path, baseline: Checkpoint | None = None, max_memory: int | None = None) -> Report:
    """The report of the artifact, or in the report file, at `path`.

    baseline    the checkpoint it was made from: errors are then measured anew
    max_memory  bytes that reading the artifact's tensors may take; None: all that there is
    raises      ArtifactError, ReportError; ReportError too where the baseline is another checkpoint; ResourceError
    """
    if path.suffix == ".json":
        if baseline is not None:
            raise ReportError(str(path), "is a report, and --baseline needs the weights", "name the artifact itself")
        return read_report(path)
    if is_pipeline(path):
        return _pipeline_report(path, baseline, max_memory)
    artifact = read_artifact(path, max_memory)
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


def _pipeline_report(path: Path, baseline: Checkpoint | None, max_memory: int | None) -> Report:
    """What was stored beside a pipeline, or else what its components say of themselves."""
    if baseline is not None:
        what = "is a pipeline, and a baseline is one checkpoint"
        raise ReportError(str(path), what, "name a component of each: report OUT/unet --baseline IN/unet")
    parts = {part.name: read_artifact(part, max_memory) for part in read_pipeline(path)}
    beside = report_path(path)
    if beside.is_file():
        found = read_report(beside)
        if found.artifact.sha256 == join_hashes({name: one.sha256 for name, one in parts.items()}):
            return found
    stored = {name: _stored_report(one) for name, one in parts.items()}
    return join_reports(path.name, stored, next(iter(stored.values())).recipe_hash)


def _measure_report(artifact: Artifact, baseline: Checkpoint) -> Report:
    """Errors of every compressed tensor against the checkpoint that the artifact was made from."""
    _refuse_other_baseline(artifact, baseline)
    figures = {}
    for file in artifact.files:
        raise_all(file.find_damage())
        for name in file.manifest.tensors:
            figures[name] = _measure_tensor(file, name, baseline.shard_of(name))
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


def _measure_tensor(file: ArtifactFile, name: str, baseline: Container) -> LayerFigures:
    """The figures of one tensor, block by block."""
    import torch

    from qcompress.coding.grids import decode_rows
    from qcompress.report.figures import LayerMeter, unclipped_range
    from qcompress.types.encoded import Constant

    tensor = file.tensor(name)
    entry = tensor.entry
    original, counter = _open_rows(file, name, baseline), _Counter(tensor)
    # Groups of different lengths: what is clipped is not counted.
    ragged = entry.group_size is not None and entry.columns % entry.group_size != 0
    meter = LayerMeter(entry.numel, entry.bits or None)
    for rows, columns, encoded in tensor.blocks():
        if isinstance(encoded, Constant):
            decoded, within = torch.full(encoded.shape, encoded.value), None
        else:
            counter.add(rows, columns, encoded.codes.numpy())
            decoded, within = decode_rows(encoded), None if ragged else unclipped_range(encoded)
        # Whole rows lie one behind another; of a part of some rows each is counted by itself.
        whole = columns.stop - columns.start == entry.columns
        for line in [rows] if whole else [slice(row, row + 1) for row in range(rows.start, rows.stop)]:
            start = line.start * entry.columns + columns.start
            part = decoded[line.start - rows.start : line.stop - rows.start].reshape(-1, 1)
            block = original[start : start + len(part)].float().reshape(-1, 1)
            meter.add(block, part, None, row=start, within=within)
    return counter.complete(meter.result(counter.counts))


def _open_rows(file: ArtifactFile, name: str, baseline: Container) -> StoredRows | Tensor:
    """The weight that a tensor was made from, flat in the order of its rows: read block by block where these lead."""
    from qcompress.coding.rows import rows_from_weight

    entry, original = file.manifest.tensors[name], file.original(name)
    if entry.leads:
        return StoredRows(baseline, original, (original.numel,))
    file.refuse_memory(name, 2 * original.n_bytes, "reading the weight that it was made from")
    return rows_from_weight(tensor_view(baseline, original), entry.axis).reshape(-1)


class _Counter:
    """Counts the codes of one tensor, and what its codebook or its tables are used for, block by block."""

    def __init__(self, tensor: StoredTensor) -> None:
        self._tensor = tensor
        self._entry = entry = tensor.entry
        self._values = ValueCounter()
        self._counts = np.zeros(2**entry.bits, np.int64)
        self._classes = tensor.uses_of_classes() if entry.is_unbounded else None
        self._entries = tensor.infos["codebook"].shape[1] if entry.form == "codebook" else 0
        self._uses = np.zeros(entry.tables * self._entries if self._entries else 0, np.int64)

    def add(self, rows: slice, columns: slice, codes: NDArray[Any]) -> None:
        """Count the codes of a block: some rows and columns of the weight."""
        if self._entry.is_unbounded:
            self._values.add(codes)
            self._tensor.refuse_memory(VALUE_BYTES * len(self._values.counts), "counting its codes")
            if self._classes is not None:
                self._classes.add(rows, columns, codes)
            return
        self._counts += np.bincount(codes.reshape(-1), minlength=len(self._counts))
        if self._entries:
            tall = self._entry.rows // self._entry.tables
            first, last = rows.start // tall, -(-rows.stop // tall)
            uses = entry_uses(codes, last - first, self._entries)
            self._uses[first * self._entries : last * self._entries] += uses

    def add_packed(self, columns: slice, packed: NDArray[np.uint8]) -> None:
        """Count packed codes of some columns, which says nothing of single tables."""
        self._counts += count_codes(packed, self._entry.bits, columns.stop - columns.start)

    @property
    def counts(self) -> Counts:
        """How often each code occurs; of unbounded ones each that does."""
        if self._entry.form == "constant":
            return np.array([self._entry.numel], np.int64)
        return self._values.counts if self._entry.is_unbounded else self._counts

    def complete(self, figures: LayerFigures) -> LayerFigures:
        """The figures of the tensor with those that tell of its codebook, or of its step and scale classes."""
        if self._entry.is_unbounded:
            classes = None if self._classes is None else self._classes.result()
            return replace(figures, step=self._tensor.unbounded.grid.value, classes=classes)
        if not self._entries:
            return figures
        return replace(figures, **used_codebook_figures(self._uses, self._tensor.centroids()))


def _stored_report(artifact: Artifact) -> Report:
    """What the artifact's own bytes tell: sizes, and the entropy of its codes."""
    figures = {}
    for file in artifact.files:
        raise_all(file.find_damage())
        for name in file.manifest.tensors:
            figures[name] = _stored_figures(file.tensor(name))
    return _make_report(artifact, figures)


def _stored_figures(tensor: StoredTensor) -> LayerFigures:
    """What the codes of a tensor tell, piece by piece."""
    entry, counter = tensor.entry, _Counter(tensor)
    if entry.is_unbounded:
        for rows, columns, codes in tensor.unbounded_tiles():
            counter.add(rows, columns, codes)
        return counter.complete(measure_counts(counter.counts))
    if entry.form == "constant":
        tensor.check_constant()
        return measure_counts(counter.counts)
    for _, columns, packed in tensor.packed_tiles():
        counter.add_packed(columns, packed)
    found = measure_counts(counter.counts)
    if entry.form == "codebook":
        found = replace(found, **stored_codebook_figures(tensor.grids()["codebook"].astype("f4"), found.levels_used))
    return found


def _make_report(artifact: Artifact, figures: Mapping[str, LayerFigures]) -> Report:
    """The report whose compressed tensors have these figures, its layers by name."""
    layers: list[LayerReport] = []
    methods = _methods_of(artifact)
    for file in artifact.files:
        tensors = file.manifest.tensors
        layers += [_compressed_layer(file, name, methods[name], figures[name]) for name in tensors]
        layers += [_kept_layer(file.original(info.name), file.kept_bytes(info.name)) for info in file.kept]
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


def _compressed_layer(file: ArtifactFile, name: str, method: str, figures: LayerFigures) -> LayerReport:
    entry = file.manifest.tensors[name]
    parts = {part: info.n_bytes for part, info in file.parts_of(name).items()}
    own_side = file.side_bytes(name) if entry.is_unbounded else 0
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


def _methods_of(artifact: Artifact) -> dict[str, str]:
    """The method that the manifest's recipe gave each compressed tensor."""
    written = artifact.files[0].manifest.recipe.get("rules")
    rules = [
        Rule(match, method, None, "")
        for rule in (written if isinstance(written, list) else [])
        if isinstance(rule, dict)
        for match in _texts(rule.get("match"))
        for method, options in rule.items()
        if method not in ("match", "keep") and isinstance(options, dict)
    ]
    compressed = [file.original(name) for file in artifact.files for name in file.manifest.tensors]
    kept = [file.original(info.name) for file in artifact.files for info in file.kept]
    roles = find_roles(Network([*compressed, *kept])) if any(rule.by_role for rule in rules) else {}
    deciders = find_deciders(rules, {one.name: roles.get(one.name, "matrix") for one in compressed})
    return {name: "unknown" if rule is None else rule.method or "unknown" for name, rule in deciders.items()}


def _texts(value: object) -> list[str]:
    """A text, or those of a list."""
    several = value if isinstance(value, list) else [value]
    return [one for one in several if isinstance(one, str)]


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
