"""`qcompress export` writes an artifact in the format of another tool."""

from __future__ import annotations

from typing import Annotated

import typer

from qcompress.cli import options as opt
from qcompress.cli.output import print_result, refuse_harm
from qcompress.cli.panels import OUTPUT
from qcompress.errors import UsageError
from qcompress.registry import EXPORTERS


def _complete_exporter(incomplete: str) -> list[str]:
    return [name for name in EXPORTERS if name.startswith(incomplete)]


def export(
    artifact: opt.Artifact,
    to: Annotated[
        str,
        typer.Option(
            "--to",
            metavar="|".join(EXPORTERS),
            autocompletion=_complete_exporter,
            help="Format to write. safetensors is an ordinary checkpoint again; the others are not available yet.",
            rich_help_panel=OUTPUT,
        ),
    ],
    output: opt.Output = None,
    force: opt.Force = False,
    threads: opt.Threads = None,
    max_memory: opt.MaxMemory = None,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> None:
    """Write an artifact in another tool's format.

    qcompress export model-w2.safetensors --to safetensors
    """
    from qcompress.artifact.reader import read_artifact
    from qcompress.checkpoint.outputs import Write
    from qcompress.report.document_json import report_path
    from qcompress.types.words import suggest

    exporter = EXPORTERS.get(to)
    if exporter is None:
        raise UsageError(f"--to {to}", "unknown format", suggest(to, EXPORTERS))
    if exporter.target is None:
        built = ", ".join(name for name, one in EXPORTERS.items() if one.target is not None)
        raise UsageError(f"--to {to}", "not available in this version", f"use {built}")
    limit = opt.max_memory_bytes(max_memory)
    stem = artifact.name.removesuffix(".safetensors")
    target = output or artifact.with_name(f"{stem}-{to}" if artifact.is_dir() else f"{stem}-dense{exporter.suffix}")
    reads = {"the artifact": artifact, "its report": report_path(artifact)}
    refuse_harm(reads, [Write(target, "-o", folder=artifact.is_dir())], force=force)
    found = read_artifact(artifact, limit)
    with found.decoding_with(threads or opt.default_threads()) as shared:
        written = exporter.load()(shared, target, force=force)
    print_result(str(target) if quiet else f"{target}: {written:,} bytes")
