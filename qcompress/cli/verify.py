"""`qcompress verify` checks every byte of an artifact."""

from __future__ import annotations

from qcompress.cli import options as opt
from qcompress.cli.output import json_document, print_result, refuse_harm, refuse_mixed, write_text


def verify(
    artifact: opt.Artifact,
    threads: opt.Threads = None,
    max_memory: opt.MaxMemory = None,
    json_to: opt.Json = None,
    force: opt.Force = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> None:
    """Check every byte of an artifact: header, manifest, checksums, and that all codes decode."""
    from qcompress.artifact.reader import read_artifact
    from qcompress.report.document_json import report_path

    refuse_mixed(json_to, quiet)
    limit = opt.max_memory_bytes(max_memory)
    refuse_harm({"the artifact": artifact, "its report": report_path(artifact)}, [], json_to, force=force)
    found = read_artifact(artifact, limit)
    with found.decoding_with(threads or opt.default_threads()) as shared:
        checked = [name for name, _ in shared.verify()]
    document = {
        "schema": "qcompress.verify/1",
        "artifact": str(artifact),
        "bytes": found.file_bytes,
        "sha256": found.sha256,
        "compressed_tensors": len(checked),
        "kept_tensors": sum(len(file.kept) for file in found.files),
    }
    if json_to is not None:
        write_text(json_document(document), json_to)
    if json_to != "-":
        summary = f"{artifact}: sound, {len(checked)} compressed and {document['kept_tensors']} kept tensors"
        print_result(str(artifact) if quiet else summary)
