"""An artifact becomes an ordinary checkpoint: every tensor dense, in its original name, shape and dtype, streamed."""

from __future__ import annotations

from qcompress.artifact.layout import plain_name
from qcompress.artifact.reader import Artifact
from qcompress.artifact.writer import CONFIG_NAME, find_companions, plain_config
from qcompress.exporters.sources import activation_notes, find_sources, safetensors_file, safetensors_index
from qcompress.types.export import ExportOptions, ExportPlan


def export(artifact: Artifact, options: ExportOptions) -> ExportPlan:
    """The dense checkpoint, a file for each file of the artifact.

    Tied copies that the checkpoint stored are stored again. Raises ArtifactError where there are caps.
    """
    folder = artifact.path.is_dir()
    files = [
        safetensors_file(
            plain_name(file.path.name) if folder else "",
            [source.dense_target() for source in sources],
            {"format": "pt", **file.manifest.metadata},
        )
        for file, sources in find_sources(artifact)
    ]
    config = plain_config(artifact.path)
    return ExportPlan(
        folder,
        tuple(files),
        texts={**({} if config is None else {CONFIG_NAME: config}), **safetensors_index(files)},
        copied=[path for path in find_companions(artifact.path) if path.name != CONFIG_NAME],
        notes=activation_notes(artifact),
    )
