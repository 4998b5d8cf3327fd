"""What `quantize` and `cluster` do alike: a recipe, a plan, an artifact, its report and gates."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcompress.cli import options as opt
from qcompress.cli.machine import default_threads
from qcompress.errors import GateFailed, UsageError

if TYPE_CHECKING:
    from qcompress.checkpoint import Checkpoint
    from qcompress.cli.groups import GateFlags, OutputFlags, RunFlags
    from qcompress.cli.streams import Streams
    from qcompress.coding.payload import CodingChoice
    from qcompress.evaluate import Setting
    from qcompress.recipe import BudgetFlag
    from qcompress.report.document import Report
    from qcompress.types import Family, Plan, Recipe


@dataclass(frozen=True, kw_only=True)
class Request:
    """One run as the command line asks for it; `suffix` names the output where no recipe file does."""

    checkpoint: Path
    recipe: Recipe
    recipe_file: Path | None
    suffix: str
    writing: OutputFlags
    running: RunFlags
    gates: GateFlags
    allow_code: bool
    statistics: Path | None = None
    sensitivity: Path | None = None
    representatives: Path | None = None
    save_statistics: Path | None = None


def run(request: Request, streams: Streams) -> None:
    """Make the artifact, or print its plan."""
    from qcompress.checkpoint import read_checkpoint
    from qcompress.cli.gates import make_gates, refuse_unmeasurable
    from qcompress.cli.live import make_setting
    from qcompress.errors import raise_all
    from qcompress.recipe import refuse_missing, trains
    from qcompress.representatives import representatives_path, with_representatives

    training = trains(request.recipe)
    if os.environ.get("WORLD_SIZE", "1") not in ("", "0", "1") and not training:
        raise UsageError(
            "torchrun", "splitting tensors over ranks is not available in this version", "run qcompress by itself"
        )
    asked = replace(request.recipe, gates=make_gates(request.recipe.gates, request.gates))
    raise_all(refuse_missing(asked, statistics=request.statistics is not None))
    if asked.model is None:
        refuse_unmeasurable(asked.gates)
        if request.save_statistics is not None:
            raise UsageError(
                "--save-statistics", "there is no model to gather from", "add -r RECIPE with model and data"
            )
    request = replace(request, sensitivity=_sensitivity(request, asked))
    source = read_checkpoint(request.checkpoint)
    target = request.writing.output or default_output(request.checkpoint, request.recipe_file, request.suffix)
    coding: CodingChoice = request.writing.coding.value
    learned = request.representatives or representatives_path(request.checkpoint)
    if request.writing.dry_run:
        from qcompress.allocate import allocate, read_costs
        from qcompress.cli.plan import print_plan

        plan = with_representatives(_make_plan(source, asked), learned)
        if request.sensitivity is not None:
            plan = allocate(source, plan, coding, read_costs(source, plan, request.sensitivity))
        print_plan(source, plan, target, coding, streams)
        return
    options: dict[str, Any] = {
        "choice": coding,
        "force": request.writing.force,
        "resume": request.running.resume,
        "threads": request.running.threads or default_threads(),
        "max_memory": _parse_size("--max-memory", request.running.max_memory),
        "representatives": learned,
    }
    if asked.model is None:
        options |= {"device": _device(request.running.device), "statistics": request.statistics}
        plan = with_representatives(_make_plan(source, asked), learned)
        _compress(source, plan, target, options, request, streams)
        return
    options["statistics"] = request.statistics
    # Codebooks that tensors have of their weights alone are weighed by statistics, live model or not.
    stands_in = request.statistics is not None and asked.family != "cluster"
    if request.running.skip_nonfinite or stands_in:
        flag = "--skip-nonfinite" if request.running.skip_nonfinite else "--statistics"
        where = f"-r {request.recipe_file} {flag}"
        raise UsageError(where, "the recipe names a live model", "leave one of them out")
    # Threads encode tensors beside one another; only training has steps that are worth several.
    setting = make_setting(
        asked, request.running.device, request.allow_code, streams, request.running.threads if training else None
    )
    _compress_live(source, setting, target, options, request, streams)


def _sensitivity(request: Request, recipe: Recipe) -> Path | None:
    """The file of sensitivities, of the command line or of the recipe. Raises UsageError where nothing spends by it."""
    from qcompress.allocate import sensitivity_file

    if request.sensitivity is not None and recipe.budget is None:
        where = f"--sensitivity {request.sensitivity}"
        raise UsageError(where, "there is no budget to spend by it", "add --bpw X or --target-size SIZE")
    return request.sensitivity or sensitivity_file(recipe)


def make_recipe(
    recipe: Path | None,
    method: str | None,
    flags: dict[str, Any],
    overrides: list[str],
    seed: int | None,
    family: Family | None = None,
    budget: BudgetFlag | None = None,
    keep_dtype: str | None = None,
) -> Recipe:
    """The one visible recipe: from the file, or of one rule from the flags. Raises UsageError, RecipeError.

    family  that its methods must be of; None: any
    budget  in place of the recipe's
    """
    from qcompress.cli.streams import read_stdin
    from qcompress.recipe import read_recipe, recipe_from_flags

    given = [f"--{name.replace('_', '-')}" for name, value in {"method": method, **flags}.items() if value is not None]
    if recipe is None:
        if overrides:
            raise UsageError(f"--set {overrides[0]}", "there is no recipe to change", "add -r RECIPE")
        if not given and budget is None:
            raise UsageError(f"qcompress {family}", "nothing says how", "add --bits N, or -r RECIPE")
        made = recipe_from_flags(method, flags, family or "quantize", budget)
    else:
        if given:
            key = given[0].removeprefix("--").replace("-", "_")
            mend = f"say it in the recipe, or with --set rules.0.METHOD.{key}=VALUE"
            raise UsageError(f"-r {recipe} {given[0]}", "the recipe decides this", mend)
        text = read_stdin() if str(recipe) == "-" else None
        path, kind = None if text is not None else recipe, family or "quantize"
        made = read_recipe(path, overrides, text=text, family=kind, budget=budget)
        if family is not None and made.family != family:
            raise UsageError(
                f"-r {recipe}", f"its methods are of family {made.family}", f"use `qcompress {made.family}`"
            )
    if keep_dtype not in (None, "f16"):
        raise UsageError(f"--keep-dtype {keep_dtype}", "not a dtype to keep tensors in", "use --keep-dtype f16")
    if keep_dtype is not None:
        made = replace(made, keep_dtype="f16")
    if seed is not None:
        made = replace(made, seed=seed)
    return made


def _make_plan(source: Checkpoint, recipe: Recipe) -> Plan:
    from qcompress.plan import make_plan

    return make_plan(recipe, source.tensors, source.tied, source.axes)


def default_output(checkpoint: Path, recipe: Path | None, suffix: str) -> Path:
    """Beside the input: `model-w2.safetensors`, or `model-RECIPE.safetensors`; a folder gives a folder."""
    if recipe is not None:
        suffix = "recipe" if str(recipe) == "-" else recipe.stem
    real = checkpoint.resolve() if checkpoint.name in ("", ".", "..") else checkpoint
    if checkpoint.is_dir():
        return real.with_name(f"{real.name}-{suffix}")
    return real.with_name(f"{real.name.removesuffix('.safetensors')}-{suffix}.safetensors")


def _device(device: opt.Device) -> str:
    """auto is the CPU: methods that need only weights wait for memory, not for arithmetic."""
    if device is not opt.Device.cuda:
        return "cpu"
    import torch

    if not torch.cuda.is_available():
        from qcompress.errors import ResourceError

        raise ResourceError("--device cuda", "this machine or this torch has no CUDA device", "use --device cpu")
    return "cuda"


def _parse_size(flag: str, text: str | None) -> int | None:
    from qcompress.recipe import parse_size

    if text is None:
        return None
    try:
        return parse_size(text)
    except ValueError as error:
        raise UsageError(f"{flag} {text}", str(error), "write it like 2MB or 4GiB") from None


def _compress(
    source: Checkpoint,
    plan: Plan,
    target: Path,
    run: dict[str, Any],
    request: Request,
    streams: Streams,
) -> None:
    from qcompress.cli.live import say
    from qcompress.cli.streams import progress
    from qcompress.compress import compress
    from qcompress.options import Options
    from qcompress.preflight import keep_nonfinite

    if request.running.skip_nonfinite:
        plan = keep_nonfinite(source, plan)
    with progress(sum(tensor.n_bytes for tensor in source.tensors), streams) as advance:
        options = Options(target, progress=advance, **run)
        if plan.recipe.budget is None:
            report = compress(source, plan, options)
        else:
            from qcompress.minimize import compress_within

            report = compress_within(source, plan, options, request.sensitivity, lambda text: say(streams, text))
    _finish(report, plan, target, streams)


def _compress_live(
    source: Checkpoint,
    setting: Setting,
    target: Path,
    run: dict[str, Any],
    request: Request,
    streams: Streams,
) -> None:
    from qcompress.calibrate import LiveOptions, compress_live, plan_live
    from qcompress.cli.live import say
    from qcompress.options import Options
    from qcompress.representatives import with_representatives
    from qcompress.training.parallel import join_world, launched_rank

    streams = replace(streams, quiet=streams.quiet or launched_rank() > 0)
    plan = with_representatives(plan_live(source, setting.recipe, setting), run["representatives"])
    with join_world(setting.device) as world:
        how = LiveOptions(request.save_statistics, request.sensitivity, lambda text: say(streams, text), world)
        report = compress_live(source, plan, Options(target, **run), setting, how)
    if report is not None:
        _finish(report, plan, target, streams)


def _finish(report: Report, plan: Plan, target: Path, streams: Streams) -> None:
    """Hold the gates, write the report beside the artifact, and print it. Raises GateFailed."""
    from qcompress.cli.streams import print_report
    from qcompress.report.document_json import write_report
    from qcompress.report.gates import check_gates, gate_error
    from qcompress.report.gather import report_path

    try:
        report = replace(report, gates=check_gates(plan.recipe.gates, report))
    finally:
        write_report(report, report_path(target))
    print_report(report, target, streams)
    failed: GateFailed | None = gate_error(report.gates)
    if failed is not None:
        raise failed
