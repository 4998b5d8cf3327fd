"""`qcompress report CHECKPOINT --sensitivity` shows what each layer costs, measured now or before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qcompress.cli import options as opt
from qcompress.cli.output import Streams, print_rendered, refuse_harm, write_text
from qcompress.cli.recipe import read_given
from qcompress.errors import RecipeError, UsageError, raise_all
from qcompress.types.ranks import ALONE, World

if TYPE_CHECKING:
    from qcompress.checkpoint.outputs import Write
    from qcompress.plan.sensitivity import Sensitivity
    from qcompress.report.render import Terminal


SENSITIVITY = "Sensitivity of layers"


@dataclass(frozen=True)
class SensitivityFlags:
    """Whether sensitivities are to be measured, on what, and where they are kept."""

    sensitivity: Annotated[
        bool,
        typer.Option(
            "--sensitivity",
            help="Measure what quantizing each layer alone costs at each width. The argument is a checkpoint then.",
            rich_help_panel=SENSITIVITY,
        ),
    ] = False
    recipe: Annotated[
        Path | None,
        typer.Option(
            "--recipe",
            "-r",
            metavar="FILE",
            help="The recipe with model, data and rules; its widths do not count. - reads it from standard input.",
            rich_help_panel=SENSITIVITY,
        ),
    ] = None
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY.PATH=VALUE",
            help="Change one value of the recipe. May be given several times.",
            rich_help_panel=SENSITIVITY,
        ),
    ] = None
    samples: Annotated[
        int | None,
        typer.Option(
            "--samples",
            metavar="N",
            min=1,
            help="Number of samples of the data to measure on. Without it 256.",
            rich_help_panel=SENSITIVITY,
        ),
    ] = None
    widths: Annotated[
        str | None,
        typer.Option(
            "--widths",
            metavar="LIST",
            help="Bit widths to measure, as 2,3,4. Without it all that the methods have.",
            rich_help_panel=SENSITIVITY,
        ),
    ] = None
    cache: Annotated[
        Path | None,
        typer.Option(
            "--cache",
            metavar="FILE",
            help="File that keeps what was measured and is read again. Without it CHECKPOINT.sensitivity.json. Figures "
            "of something else are refused, or with --force replaced.",
            rich_help_panel=SENSITIVITY,
        ),
    ] = None
    device: Annotated[
        opt.Device,
        typer.Option(
            "--device",
            envvar="QCOMPRESS_DEVICE",
            help="Where the network runs; auto uses CUDA where there is one, else the CPU.",
            rich_help_panel=SENSITIVITY,
        ),
    ] = opt.Device.auto
    allow_code: opt.AllowCode = False

    @property
    def only_with_it(self) -> Mapping[str, object]:
        """The flags that mean nothing without --sensitivity, and their values."""
        return {
            "-r": self.recipe,
            "--set": self.overrides,
            "--samples": self.samples,
            "--widths": self.widths,
            "--cache": self.cache,
        }


def find_sensitivity(
    checkpoint: Path,
    flags: SensitivityFlags,
    writes: Sequence[Write],
    force: bool,
    streams: Streams,
    strip_prefix: str | None = None,
    world: World = ALONE,
) -> Sensitivity:
    """What the cache holds of just this, else what is measured now, and cached. Raises UsageError, InputError.

    writes        what the command writes, but --json and the cache
    force         replaces a cache of something else
    strip_prefix  see read_checkpoint
    world         the ranks that divide the layers
    """
    from qcompress.budget.sensitivity import SAMPLES
    from qcompress.checkpoint.checkpoint import read_checkpoint
    from qcompress.checkpoint.outputs import Write
    from qcompress.cli.run import make_model_run
    from qcompress.compress.evaluate import read_or_measure
    from qcompress.plan.sensitivity import sensitivity_path
    from qcompress.recipe import refuse_missing

    if flags.recipe is None:
        hint = "add -r RECIPE with model, data and rules"
        raise UsageError("--sensitivity", "takes a recipe to run the network by", hint)
    recipe = read_given(flags.recipe, flags.overrides)
    raise_all(refuse_missing(recipe, statistics=None))
    if recipe.model is None:
        raise RecipeError(recipe.source, "names no model", "add `model`, and `data.calibration` or `data.eval`")
    cache = flags.cache or sensitivity_path(checkpoint)
    # What else lies in the place of the cache is refused once it has been looked at.
    writes = [Write(cache, "--cache", is_own=lambda _: True), *writes]
    reads = {"the checkpoint": checkpoint, "the recipe": flags.recipe}
    refuse_harm(reads, writes, streams.json_to, recipe=recipe, force=force)
    source = read_checkpoint(checkpoint, strip_prefix)
    widths = None if flags.widths is None else parse_widths(flags.widths)
    model_run = replace(make_model_run(recipe, flags.device, flags.allow_code, streams), world=world)
    samples = flags.samples or SAMPLES
    return read_or_measure(source, model_run, cache, samples, widths, force=force, say=streams.say)


def parse_widths(text: str) -> list[int]:
    """Widths from "2,3,4". Raises UsageError."""
    parts = text.split(",")
    if not all(part.strip().isdecimal() and 1 <= int(part) <= 8 for part in parts):
        raise UsageError(f"--widths {text}", "is no list of widths from 1 to 8", "write it like 2,3,4")
    return sorted({int(part) for part in parts})


def print_sensitivity(found: Sensitivity, form: opt.Format, output: Path | None, streams: Streams) -> None:
    """The sensitivities as JSON where it was asked for, and in their format on stdout or in a file."""
    from qcompress.plan.sensitivity import SENSITIVITY
    from qcompress.report.html.render_html import render_sensitivity_html
    from qcompress.report.render import render_sensitivity

    def rendered(terminal: Terminal | None) -> str:
        if form == opt.Format.html:
            return render_sensitivity_html(found)
        return render_sensitivity(found, opt.TEXT_FORMATS[form], terminal)

    if streams.json_to is not None:
        write_text(SENSITIVITY.text(found), streams.json_to)
    print_rendered(rendered, output, streams)
