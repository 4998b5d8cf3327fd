"""`qcompress report`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from qcompress.cli import options as opt
from qcompress.errors import GateFailed, UsageError

FORMATS: dict[opt.Format, Literal["table", "json", "markdown", "csv"]] = {
    opt.Format.table: "table",
    opt.Format.json: "json",
    opt.Format.markdown: "markdown",
    opt.Format.csv: "csv",
}


def report(
    artifacts: opt.Artifacts,
    baseline: Annotated[
        Path | None, typer.Option("--baseline", metavar="CHECKPOINT", help="Measure errors against the original.")
    ] = None,
    form: opt.FormatOption = opt.Format.table,
    json_to: opt.Json = None,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
    no_color: opt.NoColor = False,
    max_size: opt.MaxSize = None,
    max_bpw: opt.MaxBpw = None,
    min_sqnr: opt.MinSqnr = None,
    min_metric: opt.MinMetric = None,
    max_drop: opt.MaxDrop = None,
) -> None:
    """Say how small an artifact is and what that cost; compare several.

    qcompress report model-w2.safetensors

    qcompress report model-w2.safetensors model-w3.safetensors --format markdown
    """
    from dataclasses import replace

    from qcompress.checkpoint import read_checkpoint
    from qcompress.cli.gates import make_gates
    from qcompress.cli.streams import print_note, print_result, refuse_mixed, terminal_of, write_text
    from qcompress.report.gates import check_gates, gate_error
    from qcompress.report.gather import gather_report
    from qcompress.report.render import render
    from qcompress.types import Gates

    refuse_mixed(json_to, quiet)
    if form is opt.Format.html:
        raise UsageError("--format html", "not available in this version", "use table, json, markdown or csv")
    if json_to == "-" and form not in (opt.Format.table, opt.Format.json):
        raise UsageError(f"--json - --format {form}", "both say what stdout holds", "give one of them, or --json FILE")
    gates = make_gates(Gates(), max_size, max_bpw, min_sqnr, min_metric or [], max_drop or [])
    original = read_checkpoint(baseline) if baseline is not None else None
    reports = [gather_report(path, original) for path in artifacts]
    if gates != Gates():
        reports = [replace(found, gates=check_gates(gates, found)) for found in reports]
    for found in reports:
        for warning in found.warnings:
            print_note(f"warning: {warning}")
    if json_to is not None:
        write_text(render(reports, "json"), json_to)
    if json_to != "-" and not quiet:
        print_result(render(reports, FORMATS[form], **terminal_of(sys.stdout, no_color)))
    checked = reports if gates != Gates() else []
    errors = {path: gate_error(found.gates) for path, found in zip(artifacts, checked, strict=False)}
    failed = {path: error for path, error in errors.items() if error is not None}
    if failed:
        what = "; ".join(f"{path}: {error.where} {error.what}" for path, error in failed.items())
        first = next(iter(failed.values()))
        raise first if len(reports) == 1 else GateFailed("gates", what, first.mend)
