"""`qcompress report` says how small artifacts are and what that cost, compares them, and holds gates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qcompress.cli import options as opt
from qcompress.cli.gate_options import GateFlags, make_gates
from qcompress.cli.output import (
    Streams,
    print_note,
    print_rendered,
    print_result,
    refuse_harm,
    refuse_mixed,
    write_text,
)
from qcompress.cli.panels import GATES, INPUT, OUTPUT
from qcompress.cli.sensitivity import SensitivityFlags, find_sensitivity, print_sensitivity
from qcompress.errors import Refusals, ReportError, Subject, UnmeasuredError, UsageError, raise_all
from qcompress.types.plan import Gates
from qcompress.types.ranks import join_world

if TYPE_CHECKING:
    from qcompress.checkpoint.checkpoint import Checkpoint
    from qcompress.checkpoint.outputs import Write
    from qcompress.report.document import Report
    from qcompress.report.gates import BaselineGates
    from qcompress.report.render import Terminal


@dataclass(frozen=True)
class ReportFlags:
    """How a report is written, and where."""

    form: opt.FormatOption = opt.Format.table
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="Write the report to FILE instead of printing it.",
            rich_help_panel=OUTPUT,
        ),
    ] = None
    force: opt.Force = False
    json_to: opt.Json = None
    junit: Annotated[
        Path | None,
        typer.Option(
            "--junit",
            metavar="FILE",
            help="Write the gates as JUnit XML to FILE, a case for each: those given here, else those of the report.",
            rich_help_panel=OUTPUT,
        ),
    ] = None


@dataclass(frozen=True)
class BaselineFlags:
    """An earlier report, and what may have changed since."""

    baseline_report: Annotated[
        Path | None,
        typer.Option(
            "--baseline-report",
            metavar="FILE",
            help="An earlier report of the same checkpoint, which --max-drop and --max-growth compare with.",
            rich_help_panel=GATES,
        ),
    ] = None
    max_growth: Annotated[
        str | None,
        typer.Option(
            "--max-growth",
            metavar="X%",
            help="Fail if the artifact has grown by more than X % since --baseline-report.",
            rich_help_panel=GATES,
        ),
    ] = None


def _explain(word: str | None) -> None:
    """Print a figure's definition and leave; no artifact is needed."""
    if word is None:
        return
    from qcompress.report.glossary import explain, find_term, nearest_terms

    name = find_term(word)
    if name is None:
        near = " or ".join(f"`{one}`" for one in nearest_terms(word))
        hint = f"did you mean {near}?" if near else "docs/glossary.md lists all, such as `ratio`, `sqnr` and `drop`"
        raise UsageError(f"--explain {word}", "no figure has this name", hint)
    print_result(explain(name))
    raise typer.Exit


def _complete_term(incomplete: str) -> list[str]:
    from qcompress.report.glossary import FIGURES

    return [name for name in FIGURES if name.startswith(incomplete)]


def report(
    artifacts: opt.Artifacts,
    *,
    baseline: Annotated[
        Path | None,
        typer.Option(
            "--baseline",
            metavar="CHECKPOINT",
            help="The checkpoint that the artifact was made from: measure errors against it.",
            rich_help_panel=INPUT,
        ),
    ] = None,
    files: ReportFlags,
    explain: Annotated[
        str | None,
        typer.Option(
            "--explain",
            metavar="NAME",
            callback=_explain,
            is_eager=True,
            autocompletion=_complete_term,
            help="Print what a figure of the report means, as sqnr, and stop. Needs no artifact.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    measuring: SensitivityFlags,
    strip_prefix: opt.StripPrefix = None,
    max_memory: opt.MaxMemory = None,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
    no_color: opt.NoColor = False,
    gates: GateFlags,
    since: BaselineFlags,
) -> None:
    """Say how small an artifact is and what that cost; compare several.

    qcompress report model-w2.safetensors

    qcompress report model-w2.safetensors model-w3.safetensors --format html -o report.html

    qcompress report model-w2.safetensors --baseline-report main.report.json --max-growth 2%

    qcompress report model.safetensors --sensitivity -r recipe.yaml

    torchrun --nproc-per-node 2 -m qcompress report model.safetensors --sensitivity -r recipe.yaml
    """
    from qcompress.checkpoint.checkpoint import read_checkpoint
    from qcompress.report.document_json import report_path

    inputs = [*artifacts, baseline, since.baseline_report, measuring.recipe]
    if baseline is None and not measuring.sensitivity:
        inputs += [report_path(path) for path in artifacts if path.suffix != ".json"]
    writes = _refuse_outputs(files, inputs, quiet)
    streams = Streams(files.json_to, quiet, verbose, no_color)
    if not measuring.sensitivity:
        _refuse_given(measuring.only_with_it, "takes --sensitivity", "add it, or leave this out")
        if baseline is None:
            _refuse_given({"--strip-prefix": strip_prefix}, "takes --baseline or --sensitivity", "leave it out")
        original = None if baseline is None else read_checkpoint(baseline, strip_prefix)
        _report_artifacts(artifacts, original, files, gates, since, streams, opt.max_memory_bytes(max_memory))
        return
    others: dict[str, object] = {
        "--baseline": baseline,
        "--junit": files.junit,
        "--baseline-report": since.baseline_report,
    }
    others |= {f"--{name.replace('_', '-')}": value for name, value in asdict(gates).items()}
    others["--max-growth"] = since.max_growth
    _refuse_given(others, "goes with artifacts, not with --sensitivity", "leave it out")
    if len(artifacts) != 1:
        raise UsageError("--sensitivity", f"takes one checkpoint, not {len(artifacts)}", "name one")
    from qcompress.cli.run import find_device

    with join_world(find_device(measuring.device, live=True)) as world:
        heard = streams if world.is_first else replace(streams, quiet=True)
        found = find_sensitivity(artifacts[0], measuring, writes, files.force, heard, strip_prefix, world)
        if world.is_first:
            print_sensitivity(found, files.form, files.output, streams)


def _refuse_outputs(files: ReportFlags, inputs: Sequence[Path | None], quiet: bool) -> list[Write]:
    """What is written, but --json. Raises OutputError where it is read too or exists, UsageError for places of weights.

    UsageError too where two results claim stdout.
    """
    output, json_to = files.output, files.json_to
    refuse_mixed(json_to, quiet)
    if json_to == "-" and files.form not in (opt.Format.table, opt.Format.json) and output is None:
        what = "both say what stdout holds"
        raise UsageError(f"--json - --format {files.form}", what, "give one of them, --json FILE or -o FILE")
    named = {"-o": output, "--junit": files.junit, "--json": Path(json_to) if json_to not in (None, "-") else None}
    targets = {flag: path for flag, path in named.items() if path is not None}
    for flag, path in targets.items():
        if path.suffix == ".safetensors":
            raise UsageError(f"{flag} {path}", "is a place for weights", "name another file")
    from qcompress.checkpoint.outputs import Write

    own = {"--junit": _is_own_junit}
    writes = [Write(path, flag, is_own=own.get(flag)) for flag, path in targets.items() if flag != "--json"]
    refuse_harm({f"the input {path}": path for path in inputs}, writes, json_to, force=files.force)
    return writes


def _is_own_junit(path: Path) -> bool:
    """Whether a file is JUnit XML that this tool wrote."""
    from qcompress.report.render import JUNIT_START

    with path.open("rb") as file:
        return file.read(len(JUNIT_START)) == JUNIT_START.encode()


def _refuse_given(flags: Mapping[str, object], what: str, hint: str) -> None:
    """Raise UsageError for the first of these that was given."""
    for flag, value in flags.items():
        if value not in (None, []):
            raise UsageError(flag, what, hint)


def _report_artifacts(
    artifacts: Sequence[Path],
    original: Checkpoint | None,
    files: ReportFlags,
    gates: GateFlags,
    baseline_flags: BaselineFlags,
    streams: Streams,
    max_memory: int | None,
) -> None:
    """Gather the reports, hold the gates, write everything that was asked for. Raises GateFailed.

    original  the checkpoint that errors are measured against
    """
    from qcompress.report.gates import gate_errors
    from qcompress.report.gather import gather_report
    from qcompress.report.html.render_html import render_html
    from qcompress.report.render import render

    against_checkpoint = gates if baseline_flags.baseline_report is None else replace(gates, max_drop=None)
    limits, since = make_gates(Gates(), against_checkpoint), _baseline_gates(baseline_flags, gates.max_drop)
    reports = [gather_report(path, original, max_memory) for path in artifacts]
    # Of several artifacts errors name each.
    names = [str(path) if len(artifacts) > 1 else None for path in artifacts]
    checked = limits != Gates() or since is not None
    if checked:
        reports = _with_gates(names, reports, limits, since)
    for found in reports:
        for warning in found.warnings:
            print_note(f"warning: {warning}")

    def rendered(terminal: Terminal | None) -> str:
        if files.form == opt.Format.html:
            return render_html(reports)
        return render(reports, opt.TEXT_FORMATS[files.form], terminal)

    if files.junit is not None:
        _write_junit(reports, files.junit)
    if files.json_to is not None:
        write_text(render(reports, "json"), files.json_to)
    print_rendered(rendered, files.output, streams)
    if checked:
        held = zip(names, reports, strict=True)
        raise_all([error for name, found in held for error in gate_errors(found.gates, name)])


def _with_gates(
    names: Sequence[str | None], reports: Sequence[Report], limits: Gates, since: BaselineGates | None
) -> list[Report]:
    """The reports with the gates' results. Raises UnmeasuredError, Refusals where several, and ReportError."""
    from qcompress.report.gates import check_gates

    held, unmeasured = [], []
    for name, found in zip(names, reports, strict=True):
        try:
            held.append(replace(found, gates=check_gates(limits, found, since)))
        except (UnmeasuredError, Refusals) as caught:
            subject = None if name is None else Subject(name, kind="artifact")
            errors = caught.errors if isinstance(caught, Refusals) else (caught,)
            unmeasured += [UnmeasuredError(error.where, error.what, error.hint, subject) for error in errors]
    raise_all(unmeasured)
    return held


def _baseline_gates(since: BaselineFlags, max_drop: list[str] | None) -> BaselineGates | None:
    """What is held against an earlier report. Raises UsageError where nothing is, or where there is none."""
    from qcompress.report.document_json import read_report
    from qcompress.report.gates import BaselineGates

    path = since.baseline_report
    growth = None if since.max_growth is None else _parse_growth(since.max_growth)
    if path is None:
        if growth is not None:
            raise UsageError(f"--max-growth {since.max_growth}", "since what?", "add --baseline-report FILE")
        return None
    drops = make_gates(Gates(), GateFlags(max_drop=max_drop)).max_drop
    if growth is None and not drops:
        hint = "add --max-growth 2% or --max-drop top1=0.005"
        raise UsageError(f"--baseline-report {path}", "nothing is held against it", hint)
    try:
        earlier = read_report(path)
    except ReportError as error:
        hint = "write the baseline with `qcompress report ARTIFACT --json FILE`, with this version"
        raise ReportError(error.where, error.what, hint) from error
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


def _write_junit(reports: Sequence[Report], path: Path) -> None:
    """The gates that were held now, else those that the reports hold. Raises UsageError where there are none."""
    from qcompress.checkpoint.staging import write_whole
    from qcompress.report.render import render_junit

    if not any(found.gates for found in reports):
        raise UsageError(f"--junit {path}", "there is no gate to tell of", "add one, such as --max-size 2MB")
    write_whole(render_junit(reports), path)
