"""`qcompress report CHECKPOINT --sensitivity`: measure what each layer costs, or draw what was measured already."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from qcompress.cli import options as opt
from qcompress.errors import ReportError, UsageError

if TYPE_CHECKING:
    from qcompress.cli.streams import Streams
    from qcompress.report.sensitivity import Sensitivity

REPLACE = "measure anew with --force, or keep both with --cache FILE"


@dataclass(frozen=True, kw_only=True)
class SensitivityRequest:
    """What is to be measured, and where it is kept; `form` and `output` say how it is shown."""

    checkpoint: Path
    recipe_file: Path | None
    overrides: list[str]
    samples: int
    widths: str | None
    cache: Path | None
    device: opt.Device
    allow_code: bool
    form: Literal["table", "json", "markdown", "csv", "html"]
    output: Path | None
    force: bool


def report_sensitivity(request: SensitivityRequest, streams: Streams) -> None:
    """Print the sensitivities, measured now unless the cache holds them."""
    from qcompress.cli.streams import print_result, terminal_of, write_text
    from qcompress.report.document_json import write_whole
    from qcompress.report.render import render_sensitivity
    from qcompress.report.sensitivity import sensitivity_text

    found = _measured(request, streams)
    if streams.json_to is not None:
        write_text(sensitivity_text(found), streams.json_to)
    if request.output is not None:
        text = render_sensitivity(found, request.form)
        write_whole(text, request.output)
        if streams.json_to != "-":
            size = f"{request.output}: {len(text.encode()):,} bytes"
            print_result(str(request.output) if streams.quiet else size)
    elif streams.json_to != "-" and not streams.quiet:
        print_result(render_sensitivity(found, request.form, **terminal_of(sys.stdout, streams.no_color)))


def _measured(request: SensitivityRequest, streams: Streams) -> Sensitivity:
    """What the cache holds of this checkpoint, recipe, samples and widths; else measured, and cached.

    raises  ReportError where the cache holds something else and is not to be replaced
    """
    from qcompress.calibrate import plan_live
    from qcompress.checkpoint import read_checkpoint
    from qcompress.cli.live import make_setting, say
    from qcompress.cli.run import make_recipe
    from qcompress.errors import raise_all
    from qcompress.evaluate import open_live
    from qcompress.recipe import refuse_missing
    from qcompress.report.document_json import write_whole
    from qcompress.report.sensitivity import checkpoint_sha256, sensitivity_path, sensitivity_text
    from qcompress.sensitivity import ALL_WIDTHS, measure_sensitivity, measured_sha256, open_widths

    if request.recipe_file is None:
        mend = "add -r RECIPE with model, data and rules"
        raise UsageError("--sensitivity", "takes a recipe to run the network by", mend)
    recipe = make_recipe(request.recipe_file, None, {}, request.overrides, None)
    raise_all(refuse_missing(recipe))
    if recipe.model is None:
        from qcompress.errors import RecipeError

        raise RecipeError(recipe.source, "names no model", "add `model`, and `data.calibration` or `data.eval`")
    source = read_checkpoint(request.checkpoint)
    widths = ALL_WIDTHS if request.widths is None else parse_widths(request.widths)
    setting = make_setting(recipe, request.device, request.allow_code, streams)
    plan = open_widths(plan_live(source, recipe, setting), widths)
    cache = request.cache or sensitivity_path(request.checkpoint)
    if cache.exists():
        kept = _cached(cache, checkpoint_sha256(source), measured_sha256(plan, request.samples), request.force)
        if kept is not None:
            say(streams, f"read from {cache}")
            return kept
    live = open_live(source, plan, setting)
    found = measure_sensitivity(live, source, plan, setting, request.samples, lambda text: say(streams, text))
    write_whole(sensitivity_text(found), cache)
    return found


def _cached(cache: Path, input_sha256: str, measured_sha256: str, force: bool) -> Sensitivity | None:
    """What a file holds of just this; None where it holds something else and is to be replaced.

    raises  ReportError where it is not to be replaced
    """
    from qcompress.report.sensitivity import read_sensitivity

    try:
        kept = read_sensitivity(cache)
        if kept.input_sha256 != input_sha256:
            raise ReportError(str(cache), "was measured on another checkpoint", REPLACE)
        if kept.measured_sha256 != measured_sha256:
            raise ReportError(str(cache), "was measured with another recipe, other samples or other widths", REPLACE)
    except ReportError as error:
        if force:
            return None
        raise ReportError(error.where, error.what, REPLACE) from None
    return kept


def parse_widths(text: str) -> list[int]:
    """Widths from "2,3,4". Raises UsageError."""
    parts = text.split(",")
    if not all(part.strip().isdecimal() and 1 <= int(part) <= 8 for part in parts):
        raise UsageError(f"--widths {text}", "is no list of widths from 1 to 8", "write it like 2,3,4")
    return sorted({int(part) for part in parts})
