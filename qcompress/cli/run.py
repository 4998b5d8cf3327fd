"""`quantize` and `cluster` run here: a recipe and a checkpoint become an artifact, its report and gates, or a plan."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from qcompress.checkpoint.checkpoint import Checkpoint, read_checkpoint
from qcompress.checkpoint.hub import hub_name, is_hub, local_path
from qcompress.checkpoint.outputs import Write, is_own_json
from qcompress.checkpoint.pipeline import is_pipeline
from qcompress.checkpoint.side_files import representatives_path
from qcompress.cli import options as opt
from qcompress.cli.gate_options import GateFlags, make_gates, unmeasurable
from qcompress.cli.options import OutputFlags, RunFlags
from qcompress.cli.output import (
    Streams,
    json_document,
    print_output,
    print_report,
    progress,
    refuse_harm,
    sample_progress,
)
from qcompress.cli.pipeline import (
    component_recipes,
    join_plans,
    read_components,
    refuse_for_pipeline,
    telling_share,
    with_shares,
    write_pipeline,
)
from qcompress.cli.recipe import find_representatives
from qcompress.compress.plan_checkpoint import plan_checkpoint
from qcompress.errors import CheckpointError, ResourceError, UsageError, printable, raise_all
from qcompress.plan.allocate import allocate, read_costs
from qcompress.plan.axes import stored_roles
from qcompress.plan.plan_json import PlanJson, TargetJson, TensorJson, plan_json
from qcompress.plan.sensitivity import sensitivity_file
from qcompress.plan.targets import target_figures
from qcompress.recipe import recipe_hash, refuse_from_scratch, refuse_missing, trains
from qcompress.report.document import Report
from qcompress.report.document_json import report_path, write_report
from qcompress.report.gates import check_gates, raise_failed
from qcompress.report.pipeline import join_reports
from qcompress.report.table import Column, Table, View
from qcompress.report.training_report import training_path
from qcompress.report.words import count_words, shape_words, size_words
from qcompress.types.config import CodingChoice
from qcompress.types.plan import ROLE_MARK, Plan, Recipe, Rule
from qcompress.types.ranks import ALONE, World, join_world, launched_rank
from qcompress.types.run import ModelRun, Options, start_clock

COLUMNS = (
    Column("tensor", right=False),
    Column("shape", right=False, spare=2),
    Column("dtype", right=False, spare=3),
    Column("role", right=False, spare=4),
    Column("method", right=False),
    Column("bits"),
    Column("grid", right=False),
    Column("axis", right=False, spare=1),
    Column("bytes"),
    Column("why", right=False),
)


@dataclass(frozen=True, kw_only=True)
class Request:
    """One run as the command line asks for it; `suffix` names the output where no recipe file does.

    checkpoint      None where the network is trained from scratch
    table_rules     go before the recipe's, where the checkpoint has embeddings or heads
    bits_embedding  as the command line has it, which then must have something to decide
    lossless        whether every value is to be stored as the checkpoint has it
    """

    checkpoint: Path | None
    recipe: Recipe
    recipe_file: Path | None
    suffix: str
    writing: OutputFlags
    running: RunFlags
    gates: GateFlags
    allow_code: bool
    table_rules: tuple[Rule, ...] = ()
    bits_embedding: int | None = None
    statistics: Path | None = None
    sensitivity: Path | None = None
    representatives: Path | None = None
    save_statistics: Path | None = None
    world: World = ALONE
    lossless: bool = False


def run(request: Request, streams: Streams) -> None:
    """Make the artifact, or print its plan. Raises GateFailed once artifact and report are written.

    Of the ranks that torchrun started the first speaks, and plans alone.
    """
    if not request.writing.dry_run:
        device = find_device(request.running.device, live=request.recipe.model is not None)
        with join_world(device) as world:
            _run_checkpoint(replace(request, world=world), replace(streams, quiet=streams.quiet or not world.is_first))
    elif launched_rank() == 0:
        _run_checkpoint(request, streams)


def _run_checkpoint(request: Request, streams: Streams) -> None:
    if request.checkpoint is not None and is_hub(request.checkpoint):
        named = request.writing.output or default_output(request.checkpoint, request.recipe_file, request.suffix)
        request = replace(
            request, checkpoint=local_path(request.checkpoint), writing=replace(request.writing, output=named)
        )
    request = _checked(request)
    if request.recipe.model is not None:
        _refuse_weights_only(request)
    if request.checkpoint is not None and is_pipeline(request.checkpoint):
        _run_pipeline(request, request.checkpoint, streams)
        return
    if request.checkpoint is not None:
        source = read_checkpoint(request.checkpoint, request.running.strip_prefix)
        _run(_with_table_rules(request, source), source, streams)
        return
    from qcompress.compress.untrained import untrained_checkpoint

    model_run = make_model_run(request.recipe, opt.Device.cpu, request.allow_code, streams, request.running.threads)
    with untrained_checkpoint(model_run) as source:
        _run(request, source, streams)


def _with_table_rules(request: Request, source: Checkpoint) -> Request:
    """The request with its rules for those of embeddings and heads that the checkpoint stores. Raises UsageError."""
    if not request.table_rules:
        return request
    matches = {f"{ROLE_MARK}{role}" for role in stored_roles(source.tensors, source.config)}
    ahead = tuple(rule for rule in request.table_rules if rule.match in matches)
    if not ahead and request.bits_embedding is not None:
        where = f"--bits-embedding {request.bits_embedding}"
        raise UsageError(where, "the checkpoint has no embedding and no head", "leave it out")
    return replace(request, recipe=replace(request.recipe, rules=(*ahead, *request.recipe.rules)))


def refuse_no_checkpoint(command: str, checkpoint: Path | None, recipe: Path | None) -> None:
    """Raise UsageError where there is neither a checkpoint nor a recipe that might do without."""
    if checkpoint is None and recipe is None:
        raise UsageError(command, "no checkpoint is given", "name a .safetensors file or a folder")


def _run_pipeline(request: Request, folder: Path, streams: Streams) -> None:
    """Each component of a pipeline in turn, into one folder with one report; or their plans."""
    given = {
        "--sensitivity": request.sensitivity,
        "--statistics": request.statistics,
        "--representatives": request.representatives,
        "--resume": request.running.resume,
    }
    refuse_for_pipeline(request.recipe, given)
    target = request.writing.output or default_output(folder, request.recipe_file, request.suffix)
    coding: CodingChoice = request.writing.coding.value
    parts = read_components(folder, request.running.strip_prefix)
    _refuse_dequantized(request, parts.values())
    recipes = component_recipes(request.recipe, request.table_rules, request.bits_embedding, parts)

    def planned(part: str) -> Plan:
        return _make_plan(parts[part], replace(request, recipe=recipes[part]), None)[0]

    if request.recipe.budget is not None and request.recipe.budget.size is not None:
        recipes = with_shares(recipes, parts, {part: planned(part) for part in parts}, coding)
    if request.writing.dry_run:
        found = {}
        for part, source in parts.items():
            with telling_share(part, recipes[part]):
                plan = _dry_plan(source, replace(request, recipe=recipes[part]), streams)
            found[part] = plan_json(source, plan, target / part, coding)
        document = join_plans(folder, target, found, recipe_hash(request.recipe))
        print_output(target, lambda: json_document(document), _view(document), streams)
        return
    _refuse_harm(request, target, streams.json_to)
    plans = {part: planned(part) for part in parts}
    options = _make_options(request, target, coding, streams)

    def make(part: str, place: Path) -> Report:
        streams.say(part)
        with telling_share(part, recipes[part]):
            return _compress(parts[part], plans[part], replace(options, output=place, force=False), request, streams)

    from qcompress.report.figures import run_figures

    clock = start_clock()
    reports = write_pipeline(folder, target, parts, make, force=request.writing.force, world=request.world)
    report = join_reports(target.name, reports, recipe_hash(request.recipe))
    _finish(replace(report, run=run_figures(clock, options.device)), request, target, streams)


def _refuse_dequantized(request: Request, sources: Iterable[Checkpoint]) -> None:
    """Raise CheckpointError where values are to be stored as a checkpoint has them, and it is read as another."""
    for source in sources if request.lossless else ():
        if source.is_dequantized:
            what = "holds fp8 or MXFP4 weights, which are read as dense ones: larger, and not what the file holds"
            raise CheckpointError(str(source.path), what, "leave --lossless out, and give --bits N")


def _run(request: Request, source: Checkpoint, streams: Streams) -> None:
    recipe = request.recipe
    _refuse_dequantized(request, [source])
    target = request.writing.output or default_output(request.checkpoint, request.recipe_file, request.suffix)
    coding: CodingChoice = request.writing.coding.value
    if request.writing.dry_run:
        plan = _dry_plan(source, request, streams)
        if request.sensitivity is not None:
            costs = read_costs(source, plan, request.sensitivity)
            # What entropy coding leaves is seen once weights are read.
            plan = allocate(source, plan, coding, costs) if coding == "packed" else plan
        print_plan(source, plan, target, coding, streams)
        return
    _refuse_harm(request, target, streams.json_to)
    options = _make_options(request, target, coding, streams)
    model_run = None
    if recipe.model is not None:
        # Threads encode tensors beside one another; only training has steps that are worth several.
        threads = request.running.threads if trains(recipe) else None
        model_run = make_model_run(recipe, request.running.device, request.allow_code, streams, threads)
        # What trains divides the samples of its steps, and the first rank does all else.
        model_run = replace(model_run, world=ALONE if trains(recipe) else request.world)
    plan, learned = _make_plan(source, request, model_run)
    options = replace(options, representatives=learned)
    figures = target_figures(plan)
    for line in [] if figures is None else target_notes(figures.kept):
        streams.say(line)
    if model_run is None:
        report: Report | None = _compress(source, plan, options, request, streams)
    else:
        report = _compress_live(source, plan, options, model_run, request, streams)
    _finish(report, request, target, streams)


def _checked(request: Request) -> Request:
    """The request with every gate and file of sensitivities in its place, from flags or from the recipe.

    raises  UsageError, UnmeasuredError and RecipeError (Refusals where several) for what cannot be run
    """
    recipe = request.recipe
    recipe = replace(recipe, gates=make_gates(recipe.gates, request.gates))
    if request.checkpoint is None:
        raise_all(refuse_from_scratch(recipe))
    raise_all(refuse_missing(recipe, statistics=request.statistics is not None))
    if recipe.model is None:
        raise_all(unmeasurable(recipe.gates))
        if request.save_statistics is not None:
            hint = "add -r RECIPE with model and data"
            raise UsageError("--save-statistics", "there is no model to gather from", hint)
    if request.writing.compact and request.checkpoint is not None and request.checkpoint.is_dir():
        raise UsageError("--compact", "the checkpoint is a folder, and only single files are compact", "leave it out")
    if request.sensitivity is not None and recipe.budget is None:
        where = f"--sensitivity {request.sensitivity}"
        raise UsageError(where, "there is no budget to spend by it", "add --bpw X or --target-size SIZE")
    sensitivity = request.sensitivity
    if sensitivity is None and recipe.budget is not None:
        sensitivity = sensitivity_file(recipe)
    return replace(request, recipe=recipe, sensitivity=sensitivity)


def _refuse_harm(request: Request, target: Path, json_to: str | None) -> None:
    """Raise OutputError where the run would replace what it reads, or what is not its own."""
    force = request.writing.force
    writes = [
        Write(target, "-o", folder=request.checkpoint is not None and request.checkpoint.is_dir()),
        Write(report_path(target), "the report", is_own=is_own_json),
    ]
    if request.save_statistics is not None:
        writes.append(Write(request.save_statistics, "--save-statistics"))
    if trains(request.recipe):
        log = training_path(target, "log.jsonl")
        writes.append(Write(log, "the training log", is_own=lambda _: request.running.resume))
    beside = representatives_path(request.checkpoint) if request.checkpoint is not None else None
    reads = {
        "the checkpoint": request.checkpoint,
        "the recipe": request.recipe_file,
        "the statistics": request.statistics,
        "the file of sensitivities": request.sensitivity,
        "the learned representatives": request.representatives or beside,
    }
    refuse_harm(reads, writes, json_to, recipe=request.recipe, force=force)


def _refuse_weights_only(request: Request) -> None:
    """Raise UsageError for a flag that stands in for the model that the recipe names."""
    # Codebooks that tensors have of their weights alone are weighed by statistics, live model or not.
    stands_in = request.statistics is not None and request.recipe.family != "cluster"
    if request.running.skip_nonfinite or stands_in:
        flag = "--skip-nonfinite" if request.running.skip_nonfinite else "--statistics"
        where = f"-r {request.recipe_file} {flag}"
        raise UsageError(where, "the recipe names a live model", "leave one of them out")


def default_output(checkpoint: Path | None, recipe: Path | None, suffix: str) -> Path:
    """Beside the input: `model-w2.safetensors`, or `model-RECIPE.safetensors`; a folder gives a folder.

    Without a checkpoint here, by the recipe's name alone; of hf://org/name here, by its name.
    """
    if checkpoint is None:
        return Path(f"{'trained' if recipe is None or str(recipe) == '-' else recipe.stem}.safetensors")
    if recipe is not None:
        suffix = "recipe" if str(recipe) == "-" else recipe.stem
    if is_hub(checkpoint):
        return Path(f"{hub_name(checkpoint)}-{suffix}")
    real = checkpoint.resolve() if checkpoint.name in ("", ".", "..") else checkpoint
    if checkpoint.is_dir():
        return real.with_name(f"{real.name}-{suffix}")
    return real.with_name(f"{real.name.removesuffix('.safetensors')}-{suffix}.safetensors")


def _make_options(request: Request, target: Path, coding: CodingChoice, streams: Streams) -> Options:
    running = request.running
    return Options(
        target,
        choice=coding,
        force=request.writing.force,
        threads=running.threads or opt.default_threads(),
        device=find_device(running.device, live=False) if request.recipe.model is None else "cpu",
        max_memory=opt.max_memory_bytes(running.max_memory),
        resume=running.resume,
        statistics=request.statistics,
        say=streams.say,
        world=request.world,
    )


def make_model_run(
    recipe: Recipe, device: opt.Device, allow_code: bool, streams: Streams, threads: int | None = None
) -> ModelRun:
    """Where a recipe's live parts run, on one thread unless told otherwise.

    raises  UsageError for code without consent, ResourceError for no such device
    """
    import torch

    from qcompress.compress.check import refuse_code

    refuse_code(recipe, allow_code)
    torch.set_num_threads(threads or 1)
    return ModelRun(recipe, torch.device(find_device(device, live=True)), allow_code, sample_progress(streams))


def find_device(asked: opt.Device, *, live: bool) -> str:
    """ "cpu" or "cuda"; auto is CUDA for a live model where there is one. Raises ResourceError where there is none.

    Methods that need only weights wait for memory, not for arithmetic: for them auto is the CPU.
    """
    if asked is opt.Device.cpu or (asked is opt.Device.auto and not live):
        return "cpu"
    import torch

    if torch.cuda.is_available():
        return "cuda"
    if asked is opt.Device.cuda:
        raise ResourceError("--device cuda", "this machine or this torch has no CUDA device", "use --device cpu")
    return "cpu"


def _make_plan(source: Checkpoint, request: Request, model_run: ModelRun | None) -> tuple[Plan, Path | None]:
    """The plan, and the file of learned representatives where a method takes it up.

    raises  Refusals, and what building a model and reading the file raise
    """
    learned = find_representatives(request.recipe, request.checkpoint, request.representatives)
    skip, compact = request.running.skip_nonfinite, request.writing.compact
    plan = plan_checkpoint(source, request.recipe, model_run, learned, skip_nonfinite=skip, compact=compact)
    return plan, learned


def _dry_plan(source: Checkpoint, request: Request, streams: Streams) -> Plan:
    """The plan, once all else was checked that a run would need. Raises Refusals, UsageErrors."""
    from qcompress.compress.check import check_recipe, plan_checked

    recipe, statistics = request.recipe, request.statistics is not None
    found = check_recipe(recipe, source, allow_code=request.allow_code, statistics=statistics)
    for line in found.unchecked:
        streams.say(f"not checked: {line}")
    learned = find_representatives(recipe, request.checkpoint, request.representatives)
    return plan_checked(found, source, recipe, learned, request.writing.compact)


def _compress(source: Checkpoint, plan: Plan, options: Options, request: Request, streams: Streams) -> Report:
    from qcompress.compress.compress import compress

    with progress(sum(tensor.n_bytes for tensor in source.tensors), streams) as advance:
        options = replace(options, progress=advance)
        if plan.recipe.budget is None:
            return compress(source, plan, options)
        from qcompress.compress.compress import compress_within

        return compress_within(source, plan, options, request.sensitivity, streams.say)


def _compress_live(
    source: Checkpoint, plan: Plan, options: Options, model_run: ModelRun, request: Request, streams: Streams
) -> Report | None:
    from qcompress.compress.compress_model import LiveOptions, compress_live

    how = LiveOptions(request.save_statistics, request.sensitivity, streams.say)
    return compress_live(source, plan, options, model_run, how)


def _finish(report: Report | None, request: Request, target: Path, streams: Streams) -> None:
    """Hold the gates, write the report beside the artifact, and print it: the first rank does. Raises GateFailed."""
    from qcompress.report.figures import add_up_ranks, run_figures

    took = None if report is None else report.run
    took = add_up_ranks(took or run_figures(start_clock(), "cpu"), request.world)
    if report is None or not request.world.is_first:
        return
    report = replace(report, run=took)
    try:
        report = replace(report, gates=check_gates(request.recipe.gates, report))
    finally:
        write_report(report, report_path(target))
    print_report(report, target, streams)
    raise_failed(report.gates)


def print_plan(source: Checkpoint, plan: Plan, target: Path, choice: CodingChoice, streams: Streams) -> None:
    """The plan as a table or as JSON; with -q the output's path."""
    document = plan_json(source, plan, target, choice)
    print_output(target, lambda: json_document(document), _view(document), streams)


def _view(document: PlanJson) -> View:
    baseline, size = document["baseline_bytes"], document["artifact_bytes"]
    bound = "" if document["exact"] else "at most "
    if size is None:
        size, bound = document["least_bytes"] or 0, "at least "
    facts = [("size", f"{size_words(baseline)} -> {bound}{size_words(size)}, {size:,} bytes")]
    if "budget" in document:
        facts.append(("budget", _budget_words(document)))
    notes: tuple[str, ...] = ()
    if "target" in document:
        facts.append(("for", _target_words(document["target"], least=document["artifact_bytes"] is None)))
        notes = tuple(target_notes(document["target"]["kept"]))
    rows = tuple(map(_cells, document["tensors"]))
    kept = frozenset(index for index, row in enumerate(document["tensors"]) if row["method"] == "kept")
    return View(f"plan of {document['output']}", tuple(facts), (Table(COLUMNS, rows, kept),), notes)


def _target_words(target: TargetJson, *, least: bool) -> str:
    weights, tensors = f"{target['weights']:,} weights", count_words(target["tensors"], "tensor")
    bits = f"{'at least ' if least else ''}{target['bits_per_weight']:.4g}"
    return (
        f"{target['name']}: {bits} bits a weight in its own file, {weights} of {tensors} in {target['bytes']:,} bytes"
    )


def target_notes(kept: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """Why tensors are kept for a target, a line for each reason."""
    for reason, names in kept.items():
        first = f"first {printable(names[0])}" if len(names) > 1 else printable(names[0])
        yield f"{count_words(len(names), 'tensor')} kept for {reason} ({first})"


def _budget_words(document: PlanJson) -> str:
    name, limit = next((name, limit) for name, limit in document["budget"].items() if name != "sensitivity")
    match name:
        case "bpw":
            words = f"{limit:g} bits per compressed weight"
        case "size":
            words = f"{limit:,} bytes"
        case _:
            words = "the smallest artifact that holds the gates"
    return words if document["artifact_bytes"] is not None else f"{words}; widths are chosen once weights are read"


def _cells(row: TensorJson) -> tuple[str, ...]:
    grid = row.get("granularity", "")
    if row.get("group_size"):
        grid = f"{grid} {row['group_size']}"
    axis = ",".join(map(str, row.get("axis", [])))
    name, shape, size = printable(row["name"]), shape_words(tuple(row["shape"])), f"{row['bytes']:,}"
    bits = str(row.get("bits") or "")
    if "widths" in row:
        bits, size = f"{row['widths'][0]}-{row['widths'][-1]}", f"{size}+"
    return (name, shape, row["dtype"], row["role"], row["method"], bits, grid, axis, size, row["reason"])
