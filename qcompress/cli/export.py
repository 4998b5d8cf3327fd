"""`qcompress export` writes an artifact in the format of another tool."""

from __future__ import annotations

from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qcompress.cli import options as opt
from qcompress.cli.output import (
    Streams,
    json_document,
    print_note,
    print_result,
    progress,
    refuse_harm,
    refuse_mixed,
    write_text,
)
from qcompress.cli.panels import OUTPUT, RUNNING
from qcompress.errors import GateFailed, UsageError, raise_all
from qcompress.registry import EXPORTERS

if TYPE_CHECKING:
    from qcompress.compress.check_export import Checked
    from qcompress.registry import Exporter
    from qcompress.types.export import ExportOptions, ExportPlan
    from qcompress.types.run import Json, ModelRun

FLAGS = {
    "keep_unfit": "--keep-unfit",
    "mixed": "--mixed",
    "pad_hidden": "--pad-hidden",
    "round_scales": "--round-scales",
}
"""Field of ExportOptions -> its flag."""


def _complete_exporter(incomplete: str) -> list[str]:
    return [name for name in EXPORTERS if name.startswith(incomplete)]


def export(
    artifact: opt.Artifact,
    *,
    to: Annotated[
        str,
        typer.Option(
            "--to",
            metavar="|".join(EXPORTERS),
            autocompletion=_complete_exporter,
            help="Format to write. safetensors is an ordinary checkpoint again; docs/deploy.md tells of the others.",
            rich_help_panel=OUTPUT,
        ),
    ],
    output: opt.Output = None,
    force: opt.Force = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            "-n",
            help="Print what would be written and its exact size, or why it cannot be, and stop. Reads headers and "
            "grids, writes nothing.",
            rich_help_panel=RUNNING,
        ),
    ] = False,
    keep_unfit: Annotated[
        bool,
        typer.Option(
            "--keep-unfit",
            help="Write what the format cannot hold dense, in its own dtype, in place of refusing it.",
            rich_help_panel=OUTPUT,
        ),
    ] = False,
    mixed: Annotated[
        bool,
        typer.Option(
            "--mixed",
            help="compressed-tensors: let q, k and v, or gate and up, of one block have different grids. transformers "
            "loads that, vLLM does not.",
            rich_help_panel=OUTPUT,
        ),
    ] = False,
    pad_hidden: Annotated[
        bool,
        typer.Option(
            "--pad-hidden",
            help="gguf: fill the hidden size of feed-forward layers up with zeros to a multiple of 32.",
            rich_help_panel=OUTPUT,
        ),
    ] = False,
    round_scales: Annotated[
        bool,
        typer.Option(
            "--round-scales",
            help="gguf: round scales and offsets that are no float16 numbers, and say by how much the largest changes.",
            rich_help_panel=OUTPUT,
        ),
    ] = False,
    check: Annotated[
        bool,
        typer.Option(
            "--check",
            help="Load the export with what it is for, where that is installed, and hold its weights against those of "
            "the artifact; with a recipe, also what the network computes from the first batch of data.eval. Exit 4 "
            "where they differ.",
            rich_help_panel=RUNNING,
        ),
    ] = False,
    recipe: opt.RecipeFile = None,
    overrides: opt.Overrides = None,
    allow_code: opt.AllowCode = False,
    threads: opt.Threads = None,
    max_memory: opt.MaxMemory = None,
    streams: Streams,
) -> None:
    """Write an artifact in another tool's format.

    qcompress export model-w2.safetensors --to safetensors

    qcompress export llama-w4 --to compressed-tensors --dry-run

    qcompress export llama-w4 --to gguf --check
    """
    from qcompress.artifact.reader import read_artifact
    from qcompress.checkpoint.outputs import Write
    from qcompress.checkpoint.pipeline import is_pipeline
    from qcompress.compress.check_export import check_export
    from qcompress.compress.export import plan_export
    from qcompress.exporters.write_export import write_export
    from qcompress.report.document_json import report_path
    from qcompress.types.export import ExportOptions

    refuse_mixed(streams.json_to, streams.quiet)
    exporter = _find_exporter(to)
    options = ExportOptions(keep_unfit=keep_unfit, mixed=mixed, pad_hidden=pad_hidden, round_scales=round_scales)
    _refuse_options(exporter, options)
    model_run = _prepare_check(to, check, dry_run, recipe, overrides, allow_code, streams)
    limit = opt.max_memory_bytes(max_memory)
    folder = artifact.is_dir() if exporter.writes == "same" else exporter.writes == "folder"
    target = output or _beside(artifact, exporter, folder)
    reads = {"the artifact": artifact, "its report": report_path(artifact), "the recipe": recipe}
    writes = [] if dry_run else [Write(target, "-o", folder=folder)]
    refuse_harm(reads, writes, streams.json_to, force=force)
    if is_pipeline(artifact):
        if dry_run or streams.json_to is not None or exporter.writes != "same":
            flag = "--dry-run" if dry_run else "--json" if streams.json_to is not None else f"--to {to}"
            raise UsageError(flag, "is for one artifact, and a pipeline has several", "name the folder of a component")
        written = _export_pipeline(artifact, target, to, limit, force=force)
        print_result(str(target) if streams.quiet else f"{target}: {written:,} bytes")
        return
    found = read_artifact(artifact, limit)
    with found.decoding_with(1 if dry_run else threads or opt.default_threads()) as shared:
        plan = plan_export(shared, to, options)
        for note in () if streams.quiet else plan.notes:
            print_note(f"note: {note}")
        if not dry_run:
            with progress(plan.data_bytes, streams) as advance:
                write_export(plan, shared, target, force=force, advance=advance)
    checked = check_export(found, target, to, options, model_run) if check else None
    if streams.json_to is not None:
        write_text(json_document(_as_json(plan, to, target, dry_run, checked)), streams.json_to)
    if streams.json_to != "-":
        print_result(str(target) if streams.quiet else _words(plan, target, dry_run, checked))
    if checked is not None and not checked.holds:
        what = f"{checked.consumer} has other weights: {_differences(checked)}"
        raise GateFailed(str(target), what, "do not use this file, and report it with the artifact")


def _export_pipeline(artifact: Path, target: Path, to: str, limit: int | None, *, force: bool) -> int:
    """Write every component of a pipeline, and copy all else; the bytes of the components."""
    from qcompress.artifact.reader import read_artifact
    from qcompress.checkpoint.pipeline import read_pipeline
    from qcompress.cli.pipeline import write_pipeline
    from qcompress.compress.export import plan_export
    from qcompress.exporters.write_export import write_export
    from qcompress.types.export import ExportOptions

    found = {part.name: read_artifact(part, limit) for part in read_pipeline(artifact)}

    def make(part: str, place: Path) -> int:
        write_export(plan_export(found[part], to, ExportOptions()), found[part], place, force=False)
        return sum(file.stat().st_size for file in place.iterdir())

    return sum(write_pipeline(artifact, target, found, make, force=force).values())


def _find_exporter(to: str) -> Exporter:
    from qcompress.types.words import suggest

    exporter = EXPORTERS.get(to)
    if exporter is None:
        raise UsageError(f"--to {to}", "unknown format", suggest(to, EXPORTERS))
    if exporter.target is None:
        built = ", ".join(name for name, one in EXPORTERS.items() if one.target is not None)
        raise UsageError(f"--to {to}", "not available in this version", f"use {built}")
    return exporter


def _prepare_check(
    to: str,
    check: bool,
    dry_run: bool,
    recipe: Path | None,
    overrides: list[str] | None,
    allow_code: bool,
    streams: Streams,
) -> ModelRun | None:
    """Refuse what a check lacks before anything is written; where the recipe's network runs, if there is one."""
    if dry_run and check:
        raise UsageError("--dry-run --check", "there is nothing to check yet", "leave one of them out")
    if recipe is None or not check:
        if recipe is not None or overrides:
            raise UsageError("--recipe", "only tells outputs to --check", "give both, or neither")
        if not check:
            return None
    from qcompress.cli.recipe import read_given
    from qcompress.cli.run import make_model_run
    from qcompress.compress.check_export import refuse_check
    from qcompress.recipe import refuse_missing

    refuse_check(to)
    if recipe is None:
        return None
    asked = read_given(recipe, overrides)
    raise_all(refuse_missing(asked, measures=True))
    return make_model_run(asked, opt.Device.cpu, allow_code, streams)


def _refuse_options(exporter: Exporter, options: ExportOptions) -> None:
    for field in fields(options):
        if getattr(options, field.name) and field.name not in exporter.takes:
            able = ", ".join(one.name for one in EXPORTERS.values() if field.name in one.takes)
            raise UsageError(FLAGS[field.name], f"means nothing to --to {exporter.name}", f"it is for {able}")


def _beside(artifact: Path, exporter: Exporter, folder: bool) -> Path:
    """Where the export lies without -o: beside the artifact, named for it and the format."""
    stem = artifact.name.removesuffix(".safetensors")
    if folder:
        return artifact.with_name(f"{stem}-{exporter.name}")
    return artifact.with_name(f"{stem}{'-dense' if exporter.suffix == '.safetensors' else ''}{exporter.suffix}")


def _as_json(plan: ExportPlan, to: str, target: Path, dry_run: bool, checked: Checked | None) -> dict[str, Json]:
    return {
        "schema": "qcompress.export/1",
        "to": to,
        "output": target.name,
        "written": not dry_run,
        "bytes": plan.n_bytes,
        "files": {name or target.name: n_bytes for name, n_bytes in plan.sizes.items()},
        "formats": [asdict(held) for held in plan.held],
        "notes": list(plan.notes),
        **({} if checked is None else {"check": {**asdict(checked), "missing": list(checked.missing)}}),
    }


def _words(plan: ExportPlan, target: Path, dry_run: bool, checked: Checked | None) -> str:
    """The output with its bytes, then what its weights are held as, a line each, and what its consumer made of it."""
    lines = [f"{target}: {plan.n_bytes:,} bytes{' would be written' if dry_run else ''}"]
    for held in plan.held:
        bits = f", {8 * held.n_bytes / held.weights:.3g} bits a weight" if held.weights else ""
        many = f"{held.tensors} tensor{'' if held.tensors == 1 else 's'}"
        lines.append(f"  {held.name}: {many}, {held.weights:,} weights, {held.n_bytes:,} bytes{bits}")
    if checked is not None:
        lines.append(f"  checked with {checked.consumer}: {_differences(checked)}")
    return "\n".join(lines)


def _differences(checked: Checked) -> str:
    """What of an export is equal to the artifact, and the largest difference of what is not."""
    words = f"{checked.tensors} tensors equal"
    if checked.worst is not None:
        words = f"{checked.tensors} tensors differ by at most {checked.difference:.3g}, {checked.worst!r} most"
    if checked.missing:
        words += (
            f"; {len(checked.missing)} not compared, which it holds under other names, first {checked.missing[0]!r}"
        )
    if checked.outputs is not None:
        words += f"; outputs differ by at most {checked.outputs:.3g}"
    return words
