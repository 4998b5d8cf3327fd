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

from qcompress.cli.panels import BUDGET, INPUT, METHOD, MODEL, OUTPUT, RUNNING
from qcompress.errors import UsageError
from qcompress.registry import METHODS
from qcompress.registry.targets import TARGETS
from qcompress.types.plan import Family
from qcompress.types.ranks import launched_here

if TYPE_CHECKING:
    pass

MOST_THREADS = 8
"""Worker threads where nobody says how many."""


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


Checkpoint = Annotated[
    Path,
    typer.Argument(
        metavar="CHECKPOINT",
        help="A .safetensors file, a sharded folder, a Hugging Face folder, a diffusers pipeline, or hf://org/name@revision.",
        rich_help_panel=INPUT,
    ),
]
TrainedCheckpoint = Annotated[
    Path | None,
    typer.Argument(
        metavar="[CHECKPOINT]",
        help="A .safetensors file, a sharded folder, a Hugging Face folder, or hf://org/name@revision. A recipe whose "
        "method trains the network can do without: it is then trained from scratch.",
        show_default=False,
        rich_help_panel=INPUT,
    ),
]
Artifacts = Annotated[
    list[Path],
    typer.Argument(
        metavar="ARTIFACT...", help="Artifacts that qcompress wrote, or their report files.", rich_help_panel=INPUT
    ),
]
Artifact = Annotated[
    Path, typer.Argument(metavar="ARTIFACT", help="An artifact that qcompress wrote: a file or a folder.")
]
RecipeFile = Annotated[
    Path | None,
    typer.Option(
        "--recipe",
        "-r",
        metavar="FILE",
        help="The recipe, a YAML file; - reads it from standard input.",
        rich_help_panel=INPUT,
    ),
]
TargetOption = Annotated[
    str | None,
    typer.Option(
        "--for",
        metavar="TARGET",
        help="Quantize to grids that this format of another tool holds exactly, for `qcompress export`: "
        f"{', '.join(TARGETS)}. It decides what other options leave open, and tensors that it cannot hold are kept.",
        rich_help_panel=METHOD,
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY.PATH=VALUE",
        help="Change one value of the recipe, as rules.0.rtn.bits=3. May be given several times.",
        rich_help_panel=INPUT,
    ),
]
Output = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        metavar="PATH",
        help="Where to write. Without it the output lies beside the input.",
        rich_help_panel=OUTPUT,
    ),
]
Force = Annotated[
    bool, typer.Option("--force", "-f", help="Replace files that are there already.", rich_help_panel=OUTPUT)
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        "-n",
        help="Print what would happen to each tensor and the exact size, and stop. Reads headers only, writes nothing.",
        rich_help_panel=RUNNING,
    ),
]
Json = Annotated[
    str | None,
    typer.Option(
        "--json",
        metavar="FILE|-",
        help="Write the result as JSON to FILE too; - prints it in place of the table.",
        rich_help_panel=OUTPUT,
    ),
]
Quiet = Annotated[
    bool,
    typer.Option(
        "--quiet", "-q", help="Print no progress, and of the result only the output's path.", rich_help_panel=OUTPUT
    ),
]
Verbose = Annotated[
    bool,
    typer.Option(
        "--verbose", "-v", help="Print more progress, and the trace if qcompress has a bug.", rich_help_panel=OUTPUT
    ),
]
NoColor = Annotated[
    bool,
    typer.Option("--no-color", help="Print without colour and animation, as NO_COLOR does.", rich_help_panel=OUTPUT),
]
DeviceOption = Annotated[
    Device,
    typer.Option(
        "--device",
        envvar="QCOMPRESS_DEVICE",
        help="Where to compute; auto uses CUDA for a model where there is one, else the CPU.",
        rich_help_panel=RUNNING,
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(
        "--threads",
        metavar="N",
        min=1,
        envvar="QCOMPRESS_THREADS",
        help="Number of threads. Without it all cores up to 8; one for training and measuring.",
        rich_help_panel=RUNNING,
    ),
]
MaxMemory = Annotated[
    str | None,
    typer.Option(
        "--max-memory",
        metavar="SIZE",
        envvar="QCOMPRESS_MAX_MEMORY",
        help="Bound on the memory for weights and codes, besides what the program itself takes, as 4GB.",
        rich_help_panel=RUNNING,
    ),
]
Seed = Annotated[
    int | None,
    typer.Option(
        "--seed",
        metavar="N",
        min=0,
        envvar="QCOMPRESS_SEED",
        help="Seed of all random numbers, in place of the recipe's.",
        rich_help_panel=RUNNING,
    ),
]
StripPrefix = Annotated[
    str | None,
    typer.Option(
        "--strip-prefix",
        metavar="TEXT",
        help="Take this off the names of tensors that begin so, as DataParallel's module. is, for all that is written.",
        rich_help_panel=INPUT,
    ),
]
SkipNonfinite = Annotated[
    bool,
    typer.Option(
        "--skip-nonfinite",
        help="Keep tensors that hold NaN or Inf as they are, instead of refusing the checkpoint.",
        rich_help_panel=RUNNING,
    ),
]
Resume = Annotated[
    bool,
    typer.Option(
        "--resume",
        help="Resume an interrupted run: keep finished work if this run is killed or fails, and continue from there "
        "when the same command runs again. The bytes are those of an unbroken run.",
        rich_help_panel=RUNNING,
    ),
]
AllowCode = Annotated[
    bool,
    typer.Option(
        "--allow-code",
        envvar="QCOMPRESS_ALLOW_CODE",
        help="Run the code that the recipe names: Python files, and callables other than the networks that "
        "torchvision, timm and transformers list. Only for recipes that you trust.",
        rich_help_panel=MODEL,
    ),
]
CodingOption = Annotated[
    Coding,
    typer.Option(
        "--coding",
        envvar="QCOMPRESS_CODING",
        help="How codes are stored: bit-packed, compressed by zstd, or entropy coded by ANS. auto takes the smallest "
        "where that saves 2 % over packed.",
        rich_help_panel=OUTPUT,
    ),
]
CompactOption = Annotated[
    bool | None,
    typer.Option(
        "--compact/--plain",
        help="Store names, manifest, side information and kept tensors of a single file together, at no more than 24 "
        "bytes a tensor, or each as a tensor of its own, which takes some 200 more (plain, without this option and "
        "--target-size or --minimize).",
        show_default=False,
        rich_help_panel=OUTPUT,
    ),
]
EffortOption = Annotated[
    Effort | None,
    typer.Option(
        "--effort",
        help="How long methods that search may take, such as mse and rd.",
        rich_help_panel=METHOD,
    ),
]
KeepDtype = Annotated[
    str | None,
    typer.Option(
        "--keep-dtype",
        metavar="f16",
        help="Store tensors that are not compressed as float16, where their values change by less than 0.2 %. They "
        "load in their own dtype.",
        rich_help_panel=OUTPUT,
    ),
]
KeepCoding = Annotated[
    str | None,
    typer.Option(
        "--keep-coding",
        metavar="auto|zstd|ans",
        help="Store tensors that are not compressed entropy coded, where they take fewer bytes then: by zstd or ans, "
        "whichever is smaller (auto), or by the one that is named. They load bit for bit.",
        rich_help_panel=OUTPUT,
    ),
]
Lossless = Annotated[
    bool,
    typer.Option(
        "--lossless",
        help="Compress no weight: store every tensor entropy coded, from which it loads bit for bit.",
        rich_help_panel=METHOD,
    ),
]
Statistics = Annotated[
    Path | None,
    typer.Option(
        "--statistics",
        metavar="FILE",
        help="Input statistics of the layers, from --save-statistics, in place of a model and calibration data.",
        rich_help_panel=MODEL,
    ),
]
Sensitivity = Annotated[
    Path | None,
    typer.Option(
        "--sensitivity",
        metavar="FILE",
        help="What each layer costs at each width, from `qcompress report --sensitivity`, to spend the budget by.",
        rich_help_panel=BUDGET,
    ),
]
Representatives = Annotated[
    Path | None,
    typer.Option(
        "--representatives",
        metavar="FILE",
        help="Representatives that finetune-reg has learned, for the method learned. Without it "
        "CHECKPOINT.reg.safetensors.",
        rich_help_panel=MODEL,
    ),
]
SaveStatistics = Annotated[
    Path | None,
    typer.Option(
        "--save-statistics",
        metavar="FILE",
        help="Write the input statistics of every layer to FILE, so that later runs need neither model nor data.",
        rich_help_panel=MODEL,
    ),
]
FormatOption = Annotated[
    Format,
    typer.Option(
        "--format",
        help="Format of the report; html is one page that needs no other file and no network.",
        rich_help_panel=OUTPUT,
    ),
]


@dataclass(frozen=True)
class OutputFlags:
    """What a command that makes an artifact writes, and where."""

    coding: CodingOption = Coding.auto
    compact: CompactOption = None
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
    strip_prefix: StripPrefix = None
    resume: Resume = False


def method_option(family: Family) -> Any:
    """--method, which takes and completes the names of one family's methods."""
    names = [name for name, method in METHODS.items() if method.family == family]

    def complete(incomplete: str) -> list[str]:
        return [name for name in names if name.startswith(incomplete)]

    usual = "Quantization method. Without it squant, under a budget rd. The methods after hqq need more than weights: "
    needs = "gptq and adaround --statistics or a recipe with model and data, the others such a recipe; rd a budget."
    texts: dict[Family, str] = {
        "quantize": usual + needs,
        "cluster": "Clustering method. Without it kmeans. learned uses what finetune-reg has learned; dkm trains, and "
        "needs a recipe with model and data.",
    }
    return typer.Option(
        *("--method", "-m"),
        metavar="|".join(names),
        autocompletion=complete,
        help=texts[family],
        rich_help_panel=METHOD,
    )


BitsEmbedding = Annotated[
    int | None,
    typer.Option(
        "--bits-embedding",
        metavar="N",
        help="Bits per weight of embeddings and heads (outputs over a vocabulary). Without it those of --bits, "
        "and at least 8.",
        rich_help_panel=METHOD,
    ),
]


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
    """The processors that this process may use, up to a few; those that torchrun started here share them."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(usable // launched_here(), MOST_THREADS))


def parse_size_flag(flag: str, text: str, example: str = "2MB") -> int:
    """Bytes from "2MB" or "4GiB". Raises UsageError."""
    from qcompress.types.words import parse_size

    try:
        return parse_size(text)
    except ValueError as error:
        raise UsageError(f"{flag} {text}", str(error), f"write it like {example} or 4GiB") from None


def max_memory_bytes(text: str | None) -> int | None:
    """What --max-memory allows. Raises UsageError."""
    return None if text is None else parse_size_flag("--max-memory", text)
