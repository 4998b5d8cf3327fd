"""`qcompress verify`."""

from __future__ import annotations

from qcompress.cli import options as opt


def verify(
    artifact: opt.Artifact,
    threads: opt.Threads = None,
    json_to: opt.Json = None,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> None:
    """Check every byte of an artifact: header, manifest, checksums, and that all codes decode."""
    from qcompress.artifact.reader import read_artifact
    from qcompress.cli.machine import default_threads
    from qcompress.cli.streams import print_result, refuse_mixed, write_json

    refuse_mixed(json_to, quiet)
    found = read_artifact(artifact)
    with found.decoding_with(threads or default_threads()) as shared:
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
        write_json(document, json_to)
    if json_to != "-":
        summary = f"{artifact}: sound, {len(checked)} compressed and {document['kept_tensors']} kept tensors"
        print_result(str(artifact) if quiet else summary)
