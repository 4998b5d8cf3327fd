"""`qcompress report CHECKPOINT --sensitivity` shows what each layer costs, measured now or before."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qcompress.cli import options as opt
from qcompress.cli.output import Streams, print_rendered, write_text
from qcompress.cli.recipe import read_given
from qcompress.errors import RecipeError, UsageError, raise_all

if TYPE_CHECKING:
    from qcompress.plan.sensitivity import Sensitivity
    from qcompress.report.render import Terminal


@dataclass(frozen=True)
class SensitivityFlags:
    """Whether sensitivities are to be measured, on what, and where they are kept."""

    sensitivity: Annotated[
        bool, typer.Option("--sensitivity", help="Measure what each layer of a CHECKPOINT alone costs at each width.")
    ] = False
    recipe: opt.RecipeFile = None
    overrides: opt.Overrides = None
    samples: Annotated[
        int | None, typer.Option("--samples", metavar="N", min=1, help="With --sensitivity: samples; 256 if absent.")
    ] = None
    widths: Annotated[
        str | None, typer.Option("--widths", metavar="LIST", help="With --sensitivity: which, as 2,3,4; else all.")
    ] = None
    cache: Annotated[
        Path | None,
        typer.Option("--cache", metavar="FILE", help="Where sensitivities are kept; beside the checkpoint if absent."),
    ] = None
    device: opt.DeviceOption = opt.Device.auto
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


def find_sensitivity(checkpoint: Path, flags: SensitivityFlags, force: bool, streams: Streams) -> Sensitivity:
    """What the cache holds of just this, else what is measured now, and cached. Raises UsageError, InputError.

    force  replaces a cache of something else
    """
    from qcompress.budget.sensitivity import SAMPLES
    from qcompress.checkpoint.checkpoint import read_checkpoint
    from qcompress.cli.run import make_model_run
    from qcompress.compress.evaluate import read_or_measure
    from qcompress.plan.sensitivity import sensitivity_path
    from qcompress.recipe import refuse_missing

    if flags.recipe is None:
        hint = "add -r RECIPE with model, data and rules"
        raise UsageError("--sensitivity", "takes a recipe to run the network by", hint)
    recipe = read_given(flags.recipe, flags.overrides)
    raise_all(refuse_missing(recipe))
    if recipe.model is None:
        raise RecipeError(recipe.source, "names no model", "add `model`, and `data.calibration` or `data.eval`")
    source = read_checkpoint(checkpoint)
    widths = None if flags.widths is None else parse_widths(flags.widths)
    model_run = make_model_run(recipe, flags.device, flags.allow_code, streams)
    cache = flags.cache or sensitivity_path(checkpoint)
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
    from qcompress.report.html.render_html import render_sensitivity_html
    from qcompress.report.render import render_sensitivity
    from qcompress.report.view_sensitivity import sensitivity_text

    def rendered(terminal: Terminal | None) -> str:
        if form == opt.Format.html:
            return render_sensitivity_html(found)
        return render_sensitivity(found, opt.TEXT_FORMATS[form], terminal)

    if streams.json_to is not None:
        write_text(sensitivity_text(found), streams.json_to)
    print_rendered(rendered, output, streams)
