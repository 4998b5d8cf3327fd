"""A recipe's network is built, loaded from a checkpoint or an artifact, and measured by the recipe's task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from qcompress.artifact.reader import Artifact, read_artifact
from qcompress.budget.sensitivity import ALL_WIDTHS, SAMPLES, measure_sensitivity, measured_sha256, open_widths
from qcompress.calibration.activations import attach_activations, attach_caps
from qcompress.checkpoint.checkpoint import Checkpoint, read_checkpoint
from qcompress.checkpoint.safetensors_file import read_container, weight_files
from qcompress.checkpoint.staging import write_whole
from qcompress.compress.blueprints import (
    artifact_blueprint,
    artifact_reader,
    checkpoint_blueprint,
    checkpoint_reader,
    choose_blocks,
    refuse_blocks,
)
from qcompress.compress.load import checkpoint_state, hold_packed, read_state
from qcompress.compress.plan_checkpoint import plan_checkpoint
from qcompress.data.batches import Batch, run_model
from qcompress.data.measurement import Measurement
from qcompress.data.sources import open_batches
from qcompress.data.tasks import Run, measure, paired_drop
from qcompress.errors import ArtifactError, CheckpointError, DataError, RecipeError, ReportError
from qcompress.model.build import build_network, example_batch, load_weights, take_shapes
from qcompress.model.live import LiveModel, make_live_model
from qcompress.model.offload import Offloaded, refuse_no_chain, run_blocks
from qcompress.plan.sensitivity import SENSITIVITY, Sensitivity, checkpoint_sha256, read_sensitivity
from qcompress.report.document import AccuracyFigures
from qcompress.runtime.load_packed import Held, held_bytes
from qcompress.types.plan import Plan, Recipe
from qcompress.types.run import ModelRun, Say

NETWORKS = 2
"""Times the weights are in memory while a network is measured: in it, and as they were read."""
REPLACE_HINT = "measure anew with --force, or keep both with --cache FILE"


def is_artifact(path: Path) -> bool:
    """Whether a path holds an artifact rather than a plain checkpoint; of a folder, its first file decides."""
    files = weight_files(path) if path.is_dir() else [path]
    if not files:
        return False
    return "qcompress" in read_container(files[0], CheckpointError).metadata


def is_measured(recipe: Recipe) -> bool:
    """Whether a recipe has both a task and the data to measure it on."""
    return recipe.task is not None and recipe.data is not None and recipe.data.eval is not None


def load_network(model_run: ModelRun, checkpoint: Checkpoint | None) -> nn.Module:
    """The recipe's network in float32 on the CPU, with the checkpoint's weights where there is one.

    raises  ModelError, CheckpointError
    """
    refuse_blocks(model_run)
    module = build_network(model_run).float()
    if checkpoint is not None:
        load_weights(module, checkpoint_state(checkpoint), str(checkpoint.path))
    return module


def evaluate(
    path: Path, model_run: ModelRun, max_memory: int | None = None, strip_prefix: str | None = None
) -> list[Measurement]:
    """The task's metrics of a checkpoint or an artifact, whose activation quantizers are in place.

    max_memory    bytes that the network and the weights that are loaded into it may take; None: all that there is
    strip_prefix  what is taken off the names of a checkpoint's tensors
    raises        ModelError, DataError, CheckpointError, ArtifactError, RecipeError; ResourceError
    """
    blocks = choose_blocks(model_run, NETWORKS, max_memory)
    if blocks:
        return evaluate_by_blocks(path, model_run, blocks, max_memory, strip_prefix)
    module = build_network(model_run).float()
    held = sum(value.nbytes for value in module.state_dict().values())
    if is_artifact(path):
        artifact = read_artifact(path, max_memory)
        load_weights(module, read_state(artifact, held=held), str(path))
        attach_grids(module, artifact)
    else:
        load_weights(module, checkpoint_state(read_checkpoint(path, strip_prefix), max_memory, held), str(path))
    return measure_task(module.to(model_run.device), model_run, path.name)


def evaluate_by_blocks(
    path: Path,
    model_run: ModelRun,
    blocks: Sequence[str],
    max_memory: int | None = None,
    strip_prefix: str | None = None,
) -> list[Measurement]:
    """The same with the weights of one block in memory at a time."""
    if is_artifact(path):
        artifact = read_artifact(path, max_memory)
        network = artifact_blueprint(artifact, model_run, blocks).network(artifact_reader(artifact))
        attach_grids(network.module, artifact)
    else:
        source = read_checkpoint(path, strip_prefix)
        network = checkpoint_blueprint(source, model_run, blocks).network(checkpoint_reader(source))
    refuse_no_chain(network, example_batch(model_run).to(model_run.device), model_run.place("model"))
    return measure_by_blocks(network, model_run, path.name)


def measure_by_blocks(network: Offloaded, model_run: ModelRun, what: str) -> list[Measurement]:
    """As `measure_task`, of a network that goes block by block; its weights are gone then."""
    try:
        return measure_task(network.module, model_run, what, lambda batches: run_blocks(network, batches))
    finally:
        network.release()


@dataclass(frozen=True)
class PackedRun:
    """What a network gives that holds its artifact as codes, beside the same network with decoded weights.

    held        how it holds them
    unequal     names of weights that are not bit for bit those of the dense network
    difference  the largest difference of the outputs of the first batch
    """

    measured: list[Measurement]
    held: Held
    unequal: tuple[str, ...]
    difference: float

    @property
    def is_equal(self) -> bool:
        """Whether both networks compute the same."""
        return not self.unequal and self.difference == 0


def evaluate_packed(path: Path, model_run: ModelRun, max_memory: int | None = None) -> PackedRun:
    """The task's metrics of an artifact whose weights are held as codes, and how near that is to decoded ones.

    raises  ArtifactError where the path holds a checkpoint; as `evaluate`
    """
    refuse_blocks(model_run)
    artifact = read_artifact(path, max_memory)
    dense = build_network(model_run).float()
    load_weights(dense, read_state(artifact, held=held_bytes(dense)), str(path))
    packed = build_network(model_run).float()
    # Names and shapes were held against the network when the decoded weights were loaded.
    held = hold_packed(packed, artifact, strict=False)
    unequal = [name for name in held.packed if not torch.equal(_parameter(packed, name), _parameter(dense, name))]
    for module in (dense, packed):
        attach_grids(module.to(model_run.device), artifact)
    first = next(iter(open_batches(model_run, "eval"))).to(model_run.device)
    with torch.no_grad():
        difference = _largest_difference(*(run_model(module.eval(), first) for module in (dense, packed)))
    del dense
    return PackedRun(measure_task(packed, model_run, path.name), held, tuple(unequal), difference)


def _largest_difference(one: Tensor, other: Tensor) -> float:
    """0 where both are alike to the bit, whatever stands there."""
    differs = (one != other) & ~(one.isnan() & other.isnan())
    return float((one - other)[differs].abs().max()) if differs.any() else 0.0


def _parameter(module: nn.Module, name: str) -> Tensor:
    path, _, own = name.rpartition(".")
    value: Tensor = getattr(module.get_submodule(path), own)
    return value


def attach_grids(module: nn.Module, artifact: Artifact) -> None:
    """Attach an artifact's caps and activation quantizers. Raises ArtifactError where the module has no such part."""
    try:
        attach_caps(module, artifact.caps)
        attach_activations(module, artifact.activations)
    except AttributeError as error:
        what = f"quantizes inputs of a module that is not there: {error}"
        raise ArtifactError(str(artifact.path), what, "name the model that the artifact was made with") from None


def measure_task(module: nn.Module, model_run: ModelRun, what: str, run: Run | None = None) -> list[Measurement]:
    """The metrics of the recipe's task on its eval data; `what` names the run to the user.

    run     see `measure`
    raises  RecipeError for a recipe without a task
    """
    task = model_run.recipe.task
    if task is None:
        raise RecipeError(model_run.recipe.source, "names no task", "add `task: {classification: {metric: top1}}`")
    batches = open_batches(model_run, "eval")

    def advance(done: int) -> None:
        model_run.progress(what, done, batches.samples)

    root, allow_code, world = model_run.root, model_run.allow_code, model_run.world
    return measure(
        task, module, batches, model_run.device, advance, root=root, allow_code=allow_code, run=run, world=world
    )


def compare(
    before: Sequence[Measurement],
    after: Sequence[Measurement],
    untuned: Sequence[Measurement] = (),
    kmeans: Sequence[Measurement] = (),
) -> tuple[AccuracyFigures, ...]:
    """The report's figures of two measurements on the same samples, the drop with its paired interval.

    untuned  the artifact's before its codebooks were tuned
    kmeans   of plain k-means with the same settings
    """
    figures = []
    earlier = {one.metric: one.value for one in untuned}
    plain = {one.metric: one.value for one in kmeans}
    for old, new in zip(before, after, strict=True):
        drop, low, high = paired_drop(old, new)
        figures.append(
            AccuracyFigures(
                metric=old.metric,
                baseline=old.value,
                artifact=new.value,
                drop=drop,
                samples=old.samples,
                interval=(low, high),
                baseline_interval=(old.low, old.high),
                artifact_interval=(new.low, new.high),
                untuned=earlier.get(old.metric),
                kmeans=plain.get(old.metric),
                kmeans_ratio=_ratio(new.value, plain.get(old.metric)),
                untuned_ratio=_ratio(earlier.get(old.metric), plain.get(old.metric)),
            )
        )
    return tuple(figures)


def _ratio(value: float | None, base: float | None) -> float | None:
    return None if value is None or not base else value / base


def open_live(checkpoint: Checkpoint, plan: Plan, model_run: ModelRun) -> LiveModel:
    """The live model of a checkpoint for the methods of a plan, with the recipe's calibration data on its device.

    raises  ModelError, DataError, CheckpointError, RecipeError
    """
    recipe = model_run.recipe
    assert recipe.model is not None
    module = load_network(model_run, checkpoint)
    shapes = {tensor.name: tensor.shape for tensor in checkpoint.tensors}
    names = take_shapes(module, shapes).names(shapes)
    data = recipe.data
    calibration: Sequence[Batch] = ()
    if data is not None and data.calibration is not None:
        calibration = [batch.to(model_run.device) for batch in open_batches(model_run, "calibration")]
        if len(calibration) < model_run.world.size:
            what = f"has {len(calibration)} batches for {model_run.world.size} processes, which divide them"
            hint = "ask for more samples or a smaller batch_size, or start fewer processes"
            raise DataError(model_run.place("data.calibration"), what, hint)
    return make_live_model(
        module,
        names.inward(plan).decisions,
        calibration,
        example_batch(model_run, calibration),
        device=model_run.device,
        seed=recipe.seed,
        activations=recipe.activations,
        blocks=recipe.model.blocks,
        place=model_run.place("model"),
        names=names,
        world=model_run.world,
    )


def read_or_measure(
    source: Checkpoint,
    model_run: ModelRun,
    kept_in: Path,
    samples: int = SAMPLES,
    widths: Sequence[int] | None = None,
    *,
    force: bool = False,
    say: Say = lambda _: None,
) -> Sensitivity:
    """What the file holds of this checkpoint, recipe, samples and widths; else measured, and written there.

    widths  None: all
    force   replaces a file that holds something else
    raises  ReportError where it is not to be replaced, and what planning and measuring raise
    """
    plan = open_widths(plan_checkpoint(source, model_run.recipe, model_run), ALL_WIDTHS if widths is None else widths)
    if kept_in.exists():
        kept = _read_own(kept_in, checkpoint_sha256(source), measured_sha256(plan, samples), force)
        if kept is not None:
            say(f"read from {kept_in}")
            return kept
    live = open_live(source, plan, model_run)
    found = measure_sensitivity(live, source, plan, model_run, samples, say)
    if model_run.world.is_first:
        write_whole(SENSITIVITY.text(found), kept_in)
    return found


def _read_own(path: Path, input_sha256: str, measured_sha256: str, force: bool) -> Sensitivity | None:
    """What a file holds of just this; None where it holds something else and is to be replaced.

    raises  ReportError where it is not to be replaced
    """
    try:
        kept = read_sensitivity(path)
        if kept.input_sha256 != input_sha256:
            raise ReportError(str(path), "was measured on another checkpoint", REPLACE_HINT)
        if kept.measured_sha256 != measured_sha256:
            what = "was measured with another recipe, other samples or other widths"
            raise ReportError(str(path), what, REPLACE_HINT)
    except ReportError as error:
        if force:
            return None
        raise ReportError(error.where, error.what, REPLACE_HINT) from None
    return kept
