"""Options that several commands share are defined here, each with its help and its environment variable."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from enum import StrEnum
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

import typer

from qcompress.errors import UnmeasuredError, UsageError, raise_all
from qcompress.registry import METHODS
from qcompress.types.plan import Family, Gates

if TYPE_CHECKING:
    from qcompress.recipe import BudgetFlag

MOST_THREADS = 8
"""Worker threads where nobody says how many."""

NO_METRIC_HINT = "use --max-size, --max-bpw or --min-sqnr"


class Device(StrEnum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Coding(StrEnum):
    auto = "auto"
    packed = "packed"
    zstd = "zstd"
    ans = "ans"


class Format(StrEnum):
    table = "table"
    json = "json"
    markdown = "markdown"
    csv = "csv"
    html = "html"


TEXT_FORMATS: dict[Format, Literal["table", "json", "markdown", "csv"]] = {
    Format.table: "table",
    Format.json: "json",
    Format.markdown: "markdown",
    Format.csv: "csv",
}
"""Every format but pages."""


class Effort(StrEnum):
    fast = "fast"
    normal = "normal"
    high = "high"


class Minimize(StrEnum):
    size = "size"


Checkpoint = Annotated[
    Path, typer.Argument(metavar="CHECKPOINT", help="A .safetensors file, a sharded folder, or a Hugging Face folder.")
]
Artifacts = Annotated[list[Path], typer.Argument(metavar="ARTIFACT...", help="Artifacts, or reports of them.")]
Artifact = Annotated[Path, typer.Argument(metavar="ARTIFACT", help="What qcompress wrote: a file or a folder.")]
RecipeFile = Annotated[
    Path | None,
    typer.Option("--recipe", "-r", metavar="FILE", help="A recipe; - reads standard input."),
]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY.PATH=VALUE", help="Change one value of the recipe.")
]
Output = Annotated[
    Path | None, typer.Option("--output", "-o", metavar="PATH", help="Where to write; beside the input if absent.")
]
Force = Annotated[bool, typer.Option("--force", "-f", help="Replace an existing output.")]
DryRun = Annotated[bool, typer.Option("--dry-run", "-n", help="Print the plan and the exact size; read headers only.")]
Json = Annotated[str | None, typer.Option("--json", metavar="FILE|-", help="Write the result as JSON; - is stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but the output's path.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Say more; show the trace of a bug.")]
NoColor = Annotated[bool, typer.Option("--no-color", help="No colour and no animation, as NO_COLOR does.")]
DeviceOption = Annotated[Device, typer.Option("--device", envvar="QCOMPRESS_DEVICE", help="Where methods compute.")]
Threads = Annotated[
    int | None,
    typer.Option(
        "--threads", metavar="N", min=1, envvar="QCOMPRESS_THREADS", help="Worker threads; all cores if absent."
    ),
]
MaxMemory = Annotated[
    str | None,
    typer.Option("--max-memory", metavar="SIZE", envvar="QCOMPRESS_MAX_MEMORY", help="Bound on working memory: 4GB."),
]
Seed = Annotated[
    int | None,
    typer.Option("--seed", metavar="N", min=0, envvar="QCOMPRESS_SEED", help="Instead of the recipe's seed."),
]
SkipNonfinite = Annotated[
    bool, typer.Option("--skip-nonfinite", help="Keep tensors that hold NaN or Inf instead of refusing them.")
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on where a killed run with --resume stopped.")]
AllowCode = Annotated[
    bool, typer.Option("--allow-code", help="Run the Python files that the recipe names: trust it first.")
]
CodingOption = Annotated[
    Coding, typer.Option("--coding", envvar="QCOMPRESS_CODING", help="How codes are stored; auto takes the smallest.")
]
EffortOption = Annotated[Effort | None, typer.Option("--effort", help="How long methods may search.")]
KeepDtype = Annotated[
    str | None,
    typer.Option("--keep-dtype", metavar="f16", help="Store what is not compressed in 16 bits, where it bears that."),
]
Statistics = Annotated[
    Path | None,
    typer.Option("--statistics", metavar="FILE", help="Input statistics, in place of model and calibration data."),
]
Sensitivity = Annotated[
    Path | None,
    typer.Option("--sensitivity", metavar="FILE", help="What each layer costs, from report --sensitivity."),
]
SaveStatistics = Annotated[
    Path | None, typer.Option("--save-statistics", metavar="FILE", help="Write the layers' input statistics there.")
]
Bpw = Annotated[
    float | None, typer.Option("--bpw", metavar="X", help="Budget: bits per compressed weight, all its bytes counted.")
]
TargetSize = Annotated[
    str | None, typer.Option("--target-size", metavar="SIZE", help="Budget: bytes of the whole artifact: 1.2MB.")
]
MinimizeOption = Annotated[
    Minimize | None, typer.Option("--minimize", help="Search the smallest artifact that holds --max-drop.")
]
FormatOption = Annotated[Format, typer.Option("--format", help="How to print the report.")]
MaxSize = Annotated[str | None, typer.Option("--max-size", metavar="SIZE", help="Gate: the artifact's size: 2MB.")]
MaxBpw = Annotated[float | None, typer.Option("--max-bpw", metavar="X", help="Gate: bits per compressed weight.")]
MinSqnr = Annotated[float | None, typer.Option("--min-sqnr", metavar="DB", help="Gate: the worst tensor's SQNR.")]
MinMetric = Annotated[list[str] | None, typer.Option("--min-metric", metavar="NAME=X", help="Gate: top1=0.70.")]
MaxDrop = Annotated[list[str] | None, typer.Option("--max-drop", metavar="NAME=X", help="Gate: top1=0.01.")]


@dataclass(frozen=True)
class OutputFlags:
    """What a command that makes an artifact writes, and where."""

    coding: CodingOption = Coding.auto
    output: Output = None
    force: Force = False
    dry_run: DryRun = False


@dataclass(frozen=True)
class RunFlags:
    """How a command that makes an artifact computes."""

    device: DeviceOption = Device.auto
    threads: Threads = None
    max_memory: MaxMemory = None
    seed: Seed = None
    skip_nonfinite: SkipNonfinite = False
    resume: Resume = False


@dataclass(frozen=True)
class GateFlags:
    """The gates of the command line."""

    max_size: MaxSize = None
    max_bpw: MaxBpw = None
    min_sqnr: MinSqnr = None
    min_metric: MinMetric = None
    max_drop: MaxDrop = None


def method_option(family: Family) -> Any:
    """--method, which takes and completes the names of one family's methods."""
    names = [name for name, method in METHODS.items() if method.family == family]

    def complete(incomplete: str) -> list[str]:
        return [name for name in names if name.startswith(incomplete)]

    return typer.Option("--method", "-m", metavar="|".join(names), autocompletion=complete, help="With --bits.")


def spread(command: Callable[..., None]) -> Callable[..., None]:
    """The command as the parser is to see it: the options of each group stand where the group's parameter does.

    A group is a dataclass whose every field is an option with a default; the command is handed it whole.
    """
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {name: kind for name, kind in hints.items() if is_dataclass(kind)}

    def parameters() -> Iterator[inspect.Parameter]:
        for parameter in inspect.signature(command).parameters.values():
            if parameter.name in groups:
                yield from _options_of(groups[parameter.name])
            else:
                yield parameter.replace(annotation=hints[parameter.name])

    @wraps(command)
    def call(**values: Any) -> None:
        for name, kind in groups.items():
            values[name] = kind(**{field.name: values.pop(field.name) for field in fields(kind)})
        command(**values)

    signature = inspect.Signature(list(parameters()))
    call.__signature__ = signature  # type: ignore[attr-defined]
    call.__annotations__ = {name: parameter.annotation for name, parameter in signature.parameters.items()}
    return call


def _options_of(group: Any) -> Iterator[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    for field in fields(group):
        yield inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=hints[field.name]
        )


def default_threads() -> int:
    """The processors that this process may use, up to a few."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(usable, MOST_THREADS)


def make_gates(base: Gates, flags: GateFlags) -> Gates:
    """The recipe's gates with those of the command line in their place. Raises UsageError."""
    return Gates(
        max_size=base.max_size if flags.max_size is None else parse_size_flag("--max-size", flags.max_size),
        max_bpw=base.max_bpw if flags.max_bpw is None else flags.max_bpw,
        min_sqnr=base.min_sqnr if flags.min_sqnr is None else flags.min_sqnr,
        min_metric={**base.min_metric, **dict(_named("--min-metric", text) for text in flags.min_metric or [])},
        max_drop={**base.max_drop, **dict(_named("--max-drop", text) for text in flags.max_drop or [])},
    )


def _named(flag: str, text: str) -> tuple[str, float]:
    name, equals, value = text.partition("=")
    try:
        number = float(value)
    except ValueError:
        number = float("nan")
    if not (name and equals) or number != number:
        raise UsageError(f"{flag} {text}", "is not NAME=NUMBER", f"write it like {flag} top1=0.7")
    return name, number


def parse_size_flag(flag: str, text: str, example: str = "2MB") -> int:
    """Bytes from "2MB" or "4GiB". Raises UsageError."""
    from qcompress.recipe import parse_size

    try:
        return parse_size(text)
    except ValueError as error:
        raise UsageError(f"{flag} {text}", str(error), f"write it like {example} or 4GiB") from None


def refuse_unmeasurable(gates: Gates) -> None:
    """Raise UnmeasuredError (Refusals where several) for gates on metrics, which a run from weights alone never has."""
    raise_all(
        [
            UnmeasuredError(
                f"gate {kind} {metric}", "this run measures no metric: it has weights, but no data", NO_METRIC_HINT
            )
            for kind, limits in (("min-metric", gates.min_metric), ("max-drop", gates.max_drop))
            for metric in limits
        ]
    )


def make_budget_flag(bpw: float | None, target_size: str | None, minimize: Minimize | None) -> BudgetFlag | None:
    """The one budget that was given, or None. Raises UsageError for two, and for one that no file can have."""
    from qcompress.recipe import BudgetFlag

    found = []
    if bpw is not None:
        found.append(BudgetFlag(f"--bpw {bpw}", "bpw", bpw))
        if not 0 < bpw < float("inf"):
            raise UsageError(f"--bpw {bpw}", "is no number of bits", "give one above 0, as 2.5")
    if target_size is not None:
        found.append(BudgetFlag(f"--target-size {target_size}", "size", target_size))
        parse_size_flag("--target-size", target_size, "1.2MB")
    if minimize is not None:
        found.append(BudgetFlag(f"--minimize {minimize.value}", "minimize", minimize.value))
    if len(found) > 1:
        raise UsageError(" ".join(flag.text for flag in found), "are several budgets", "keep one of them")
    return found[0] if found else None


def budget_suffix(flag: BudgetFlag) -> str:
    """What a budget adds to the output's name: "2.0bpw", "1.2MB", "smallest"."""
    if flag.key == "bpw":
        return f"{flag.value}bpw"
    if flag.key == "minimize":
        return "smallest"
    size = "".join(str(flag.value).split())
    return f"{size}B" if size[-1].isdigit() else size
