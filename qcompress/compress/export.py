"""An artifact is written in another tool's format: planned whole, then streamed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from qcompress.artifact.reader import Artifact
from qcompress.exporters.write_export import write_export
from qcompress.registry import EXPORTERS
from qcompress.types.export import ExportOptions, ExportPlan


def plan_export(artifact: Artifact, to: str, options: ExportOptions | None = None) -> ExportPlan:
    """What `to`, an exporter of the registry, makes of an artifact, before a byte is written.

    raises  ArtifactError (Refusals where several) for what the format cannot hold
    """
    return EXPORTERS[to].load()(artifact, options or ExportOptions())


def export(
    artifact: Artifact,
    output: Path,
    to: str = "safetensors",
    options: ExportOptions | None = None,
    *,
    force: bool = False,
    advance: Callable[[str, int], None] = lambda name, n_bytes: None,
) -> ExportPlan:
    """Write an artifact in the format of `to`, whole or not at all; what was planned and written.

    advance  is told of a tensor's name and its bytes whenever some are written
    raises   as `plan_export` before anything is written; as `write_export`
    """
    plan = plan_export(artifact, to, options)
    write_export(plan, artifact, output, force=force, advance=advance)
    return plan
