"""The options that several commands share, each with its help and its environment variable."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from qcompress.registry import METHODS
from qcompress.types import Family

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


class Effort(StrEnum):
    fast = "fast"
    normal = "normal"
    high = "high"


class Minimize(StrEnum):
    size = "size"


DeviceOption = Annotated[Device, typer.Option("--device", envvar="QCOMPRESS_DEVICE", help="Where methods compute.")]
CodingOption = Annotated[
    Coding, typer.Option("--coding", envvar="QCOMPRESS_CODING", help="How codes are stored; auto takes the smallest.")
]
EffortOption = Annotated[Effort | None, typer.Option("--effort", help="How long methods may search.")]
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


def method_option(family: Family) -> Any:
    """--method, which takes and completes the names of one family's methods."""
    names = [name for name, method in METHODS.items() if method.family == family]

    def complete(incomplete: str) -> list[str]:
        return [name for name in names if name.startswith(incomplete)]

    return typer.Option("--method", "-m", metavar="|".join(names), autocompletion=complete, help="With --bits.")


KeepDtype = Annotated[
    str | None,
    typer.Option("--keep-dtype", metavar="f16", help="Store what is not compressed in 16 bits, where it bears that."),
]

MaxSize = Annotated[str | None, typer.Option("--max-size", metavar="SIZE", help="Gate: the artifact's size: 2MB.")]
MaxBpw = Annotated[float | None, typer.Option("--max-bpw", metavar="X", help="Gate: bits per compressed weight.")]
MinSqnr = Annotated[float | None, typer.Option("--min-sqnr", metavar="DB", help="Gate: the worst tensor's SQNR.")]
MinMetric = Annotated[list[str] | None, typer.Option("--min-metric", metavar="NAME=X", help="Gate: top1=0.70.")]
MaxDrop = Annotated[list[str] | None, typer.Option("--max-drop", metavar="NAME=X", help="Gate: top1=0.01.")]
