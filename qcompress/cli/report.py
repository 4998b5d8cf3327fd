"""`qcompress report`."""

from __future__ import annotations

import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from qcompress.cli import options as opt
from qcompress.cli.groups import GateFlags
from qcompress.errors import GateFailed, OutputError, ReportError, UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from qcompress.report.document import Report
    from qcompress.report.gates import BaselineGates
    from qcompress.types import Gates

FORMATS: dict[opt.Format, Literal["table", "json", "markdown", "csv", "html"]] = {
    opt.Format.table: "table",
    opt.Format.json: "json",
    opt.Format.markdown: "markdown",
    opt.Format.csv: "csv",
    opt.Format.html: "html",
}


def _explain(word: str | None) -> None:
    """Print a figure's definition and leave; no artifact is needed."""
    if word is None:
        return
    from qcompress.cli.streams import print_result
    from qcompress.report.glossary import explain, find_term, nearest_terms

    name = find_term(word)
    if name is None:
        near = " or ".join(f"`{one}`" for one in nearest_terms(word))
        mend = f"did you mean {near}?" if near else "docs/glossary.md lists all, such as `ratio`, `sqnr` and `drop`"
        raise UsageError(f"--explain {word}", "no figure has this name", mend)
    print_result(explain(name))
    raise typer.Exit


def _complete_term(incomplete: str) -> list[str]:
    from qcompress.report.glossary import GLOSSARY

    return [name for name in GLOSSARY if name.startswith(incomplete)]


def report(
    artifacts: opt.Artifacts,
    *,
    baseline: Annotated[
        Path | None, typer.Option("--baseline", metavar="CHECKPOINT", help="Measure errors against the original.")
    ] = None,
    form: opt.FormatOption = opt.Format.table,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write it there instead of to stdout.")
    ] = None,
    force: opt.Force = False,
    json_to: opt.Json = None,
    junit: Annotated[
        Path | None, typer.Option("--junit", metavar="FILE", help="Write the gates as JUnit XML, a case for each.")
    ] = None,
    explain: Annotated[
        str | None,
        typer.Option(
            "--explain",
            metavar="NAME",
            callback=_explain,
            is_eager=True,
            autocompletion=_complete_term,
            help="Say what a figure means, and leave.",
        ),
    ] = None,
    sensitivity: Annotated[
        bool, typer.Option("--sensitivity", help="Measure what each layer of a CHECKPOINT alone costs at each width.")
    ] = False,
    recipe: opt.RecipeFile = None,
    overrides: opt.Overrides = None,
    samples: Annotated[
        int | None, typer.Option("--samples", metavar="N", min=1, help="With --sensitivity: samples; 256 if absent.")
    ] = None,
    widths: Annotated[
        str | None, typer.Option("--widths", metavar="LIST", help="With --sensitivity: which, as 2,3,4; else all.")
    ] = None,
    cache: Annotated[
        Path | None,
        typer.Option("--cache", metavar="FILE", help="Where sensitivities are kept; beside the checkpoint if absent."),
    ] = None,
    device: opt.DeviceOption = opt.Device.auto,
    allow_code: opt.AllowCode = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
    no_color: opt.NoColor = False,
    gates: GateFlags,
    baseline_report: Annotated[
        Path | None,
        typer.Option("--baseline-report", metavar="FILE", help="An earlier report: --max-drop is held against it."),
    ] = None,
    max_growth: Annotated[
        str | None,
        typer.Option("--max-growth", metavar="X%", help="Gate: growth of the size since --baseline-report: 2%."),
    ] = None,
) -> None:
    """Say how small an artifact is and what that cost; compare several.

    qcompress report model-w2.safetensors

    qcompress report model-w2.safetensors model-w3.safetensors --format html -o report.html

    qcompress report model-w2.safetensors --baseline-report main.report.json --max-growth 2%

    qcompress report model.safetensors --sensitivity -r recipe.yaml
    """
    from qcompress.checkpoint import read_checkpoint
    from qcompress.cli.gates import make_gates
    from qcompress.cli.sensitivity import SensitivityRequest, report_sensitivity
    from qcompress.cli.streams import Streams, print_note, print_result, refuse_mixed, terminal_of
    from qcompress.report.gather import gather_report
    from qcompress.report.render import render
    from qcompress.types import Gates

    refuse_mixed(json_to, quiet)
    if json_to == "-" and form not in (opt.Format.table, opt.Format.json) and output is None:
        raise UsageError(
            f"--json - --format {form}", "both say what stdout holds", "give one of them, --json FILE or -o FILE"
        )
    _refuse_outputs(output, junit, json_to, [*artifacts, baseline, baseline_report, recipe, cache], force)
    measuring: dict[str, object] = {
        "-r": recipe,
        "--set": overrides,
        "--samples": samples,
        "--widths": widths,
        "--cache": cache,
    }
    if not sensitivity:
        _refuse_given(measuring, "takes --sensitivity", "add it, or leave this out")
    else:
        others: dict[str, object] = {"--baseline": baseline, "--junit": junit, "--baseline-report": baseline_report}
        others |= {f"--{name.replace('_', '-')}": value for name, value in asdict(gates).items()}
        others["--max-growth"] = max_growth
        _refuse_given(others, "goes with artifacts, not with --sensitivity", "leave it out")
        if len(artifacts) != 1:
            raise UsageError("--sensitivity", f"takes one checkpoint, not {len(artifacts)}", "name one")
        how = SensitivityRequest(
            checkpoint=artifacts[0],
            recipe_file=recipe,
            overrides=overrides or [],
            samples=samples or 256,
            widths=widths,
            cache=cache,
            device=device,
            allow_code=allow_code,
            form=FORMATS[form],
            output=output,
            force=force,
        )
        report_sensitivity(how, Streams(json_to, quiet, verbose, no_color))
        return
    limits = make_gates(Gates(), gates if baseline_report is None else replace(gates, max_drop=None))
    since = _baseline_gates(baseline_report, max_growth, gates)
    original = read_checkpoint(baseline) if baseline is not None else None
    reports = [gather_report(path, original) for path in artifacts]
    checked = limits != Gates() or since is not None
    if checked:
        reports = _hold_gates(reports, limits, since)
    for found in reports:
        for warning in found.warnings:
            print_note(f"warning: {warning}")
    _write_files(reports, json_to, junit)
    if output is not None:
        _write_output(reports, form, output, words=json_to != "-", quiet=quiet)
    elif json_to != "-" and not quiet:
        print_result(render(reports, FORMATS[form], **terminal_of(sys.stdout, no_color)))
    if checked:
        _fail(dict(zip(artifacts, reports, strict=False)))


def _refuse_given(flags: Mapping[str, object], what: str, mend: str) -> None:
    """Raise UsageError for the first of these that was given."""
    for flag, value in flags.items():
        if value not in (None, []):
            raise UsageError(flag, what, mend)


def _refuse_outputs(
    output: Path | None, junit: Path | None, json_to: str | None, inputs: Sequence[Path | None], force: bool
) -> None:
    """Raise OutputError where a file to write is read too or exists, UsageError where it is a place for weights."""
    named = {"-o": output, "--junit": junit, "--json": Path(json_to) if json_to not in (None, "-") else None}
    targets = {flag: path for flag, path in named.items() if path is not None}
    read = [path.resolve() for path in inputs if path is not None]
    for flag, path in targets.items():
        if path.suffix == ".safetensors":
            raise UsageError(f"{flag} {path}", "is a place for weights", "name another file")
        if path.resolve() in read:
            raise OutputError(str(path), f"{flag} would replace what is read", "name another file")
    if len({path.resolve() for path in targets.values()}) < len(targets):
        raise UsageError(" ".join(targets), "name the same file twice", "name different files")
    if output is not None and output.exists() and not force:
        raise OutputError(str(output), "exists", "name another file, or replace it with --force")


def _baseline_gates(path: Path | None, max_growth: str | None, gates: GateFlags) -> BaselineGates | None:
    """What is held against an earlier report. Raises UsageError where nothing is, or where there is none."""
    from qcompress.cli.gates import make_gates
    from qcompress.report.document_json import read_report
    from qcompress.report.gates import BaselineGates
    from qcompress.types import Gates

    growth = None if max_growth is None else _parse_growth(max_growth)
    if path is None:
        if growth is not None:
            raise UsageError(f"--max-growth {max_growth}", "since what?", "add --baseline-report FILE")
        return None
    drops = make_gates(Gates(), GateFlags(max_drop=gates.max_drop)).max_drop
    if growth is None and not drops:
        mend = "add --max-growth 2% or --max-drop top1=0.005"
        raise UsageError(f"--baseline-report {path}", "nothing is held against it", mend)
    try:
        earlier = read_report(path)
    except ReportError as error:
        mend = "write the baseline with `qcompress report ARTIFACT --json FILE`, with this version"
        raise ReportError(error.where, error.what, mend) from error
    return BaselineGates(report=earlier, where=str(path), max_growth=growth, max_drop=drops)


def _parse_growth(text: str) -> float:
    """A share from per cent: 0.02 of "2%". Raises UsageError."""
    try:
        # Shifting the decimal point in the text gives the float nearest to the share.
        share = float(f"{text.removesuffix('%')}e-2") if text.endswith("%") else float("nan")
    except ValueError:
        share = float("nan")
    if not abs(share) < float("inf"):
        raise UsageError(f"--max-growth {text}", "is not a number of per cent", "write it like 2% or 0.5%")
    return share


def _hold_gates(reports: Sequence[Report], gates: Gates, since: BaselineGates | None) -> list[Report]:
    from qcompress.report.gates import check_gates

    return [replace(found, gates=check_gates(gates, found, since)) for found in reports]


def _write_files(reports: Sequence[Report], json_to: str | None, junit: Path | None) -> None:
    """--json and --junit; JUnit tells of the gates that were held now, else of those that the reports hold."""
    from qcompress.cli.streams import write_text
    from qcompress.report.document_json import write_whole
    from qcompress.report.render import render
    from qcompress.report.render_junit import render_junit

    if junit is not None:
        if not any(found.gates for found in reports):
            raise UsageError(f"--junit {junit}", "there is no gate to tell of", "add one, such as --max-size 2MB")
        write_whole(render_junit(reports), junit)
    if json_to is not None:
        write_text(render(reports, "json"), json_to)


def _write_output(reports: Sequence[Report], form: opt.Format, output: Path, *, words: bool, quiet: bool) -> None:
    """The report in a file; with `words`, stdout says which and how large, quietly its path alone."""
    from qcompress.cli.streams import print_result
    from qcompress.report.document_json import write_whole
    from qcompress.report.render import render

    text = render(reports, FORMATS[form])
    write_whole(text, output)
    if words:
        print_result(str(output) if quiet else f"{output}: {len(text.encode()):,} bytes")


def _fail(reports: Mapping[Path, Report]) -> None:
    """Raise GateFailed where a gate of a report did not hold; of several it names each artifact."""
    from qcompress.report.gates import gate_error

    errors = {path: gate_error(found.gates) for path, found in reports.items()}
    failed = {path: error for path, error in errors.items() if error is not None}
    if failed:
        first = next(iter(failed.values()))
        what = "; ".join(f"{path}: {error.where} {error.what}" for path, error in failed.items())
        raise first if len(reports) == 1 else GateFailed("gates", what, first.mend)
