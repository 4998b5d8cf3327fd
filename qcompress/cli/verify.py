"""`qcompress verify` checks every byte of an artifact."""

from __future__ import annotations

from qcompress.cli import options as opt
from qcompress.cli.output import json_document, print_result, refuse_harm, refuse_mixed, write_text
from qcompress.errors import InputError, QcompressError, raise_all


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
    from qcompress.checkpoint.pipeline import is_pipeline, read_pipeline
    from qcompress.report.document_json import report_path
    from qcompress.report.pipeline import join_hashes

    refuse_mixed(json_to, quiet)
    limit = opt.max_memory_bytes(max_memory)
    refuse_harm({"the artifact": artifact, "its report": report_path(artifact)}, [], json_to, force=force)
    parts = read_pipeline(artifact) if is_pipeline(artifact) else [artifact]
    found = {part.name: read_artifact(part, limit) for part in parts}
    checked, errors = 0, list[QcompressError]()
    for one in found.values():
        with one.decoding_with(threads or opt.default_threads()) as shared:
            try:
                checked += sum(1 for _ in shared.verify())
            except InputError as error:
                errors.append(error)
    raise_all(errors)
    document = {
        "schema": "qcompress.verify/1",
        "artifact": str(artifact),
        "bytes": sum(one.file_bytes for one in found.values()),
        "sha256": join_hashes({name: one.sha256 for name, one in found.items()}),
        "compressed_tensors": checked,
        "kept_tensors": sum(len(file.kept) for one in found.values() for file in one.files),
    }
    if json_to is not None:
        write_text(json_document(document), json_to)
    if json_to != "-":
        summary = f"{artifact}: sound, {checked} compressed and {document['kept_tensors']} kept tensors"
        print_result(str(artifact) if quiet else summary)
