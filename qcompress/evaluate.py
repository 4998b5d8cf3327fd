"""A recipe's live model and task: build it, load a checkpoint or an artifact into it, and measure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from qcompress.artifact.reader import Artifact, read_artifact
from qcompress.checkpoint import Checkpoint, read_checkpoint
from qcompress.container import read_container
from qcompress.errors import ArtifactError, CheckpointError, RecipeError
from qcompress.load import checkpoint_state, load_state_dict
from qcompress.model.activations import attach_activations, attach_caps
from qcompress.model.batches import Batch, Batches
from qcompress.model.build import build_model, load_weights
from qcompress.model.data import Source, read_data
from qcompress.model.live import LiveModel, make_live_model
from qcompress.model.tasks import Measurement, measure, paired_drop
from qcompress.report.document import AccuracyFigures
from qcompress.types import Plan, Recipe

Progress = Callable[[str, int, int], None]
"""Called with what runs, the samples done and the samples in all."""


@dataclass(frozen=True)
class Setting:
    """Where a recipe's live parts run.

    allow_code  whether files that the recipe names may be run
    root        what the recipe's paths start from
    """

    recipe: Recipe
    device: torch.device
    allow_code: bool = False
    progress: Progress = lambda *_: None

    @property
    def root(self) -> Path:
        source = Path(self.recipe.source)
        return source.parent if source.suffix else Path()

    def place(self, section: str) -> str:
        return self.recipe.places.get(section, section)

    def build(self) -> nn.Module:
        """The network, untrained, in eval mode. Raises ModelError, UsageError."""
        if self.recipe.model is None:
            raise RecipeError(self.recipe.source, "names no model", "add `model: {factory: ...}`")
        return build_model(self.recipe.model, self.root, self.allow_code, self.place("model"))

    def batches(self, part: str) -> Batches:
        """The recipe's `calibration` or `eval` data. Raises DataError, UsageError, RecipeError."""
        data = self.recipe.data
        source = getattr(data, part, None)
        if data is None or source is None:
            raise RecipeError(self.recipe.source, f"names no data.{part}", f"add `data: {{{part}: ...}}`")
        where = Source(self.root, self.place(f"data.{part}"), data.normalize, self.allow_code)
        return read_data(source, where, self.recipe.seed)


def is_artifact(path: Path) -> bool:
    """Whether a path holds an artifact rather than a plain checkpoint; of a folder, its first file decides."""
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files:
        return False
    return "qcompress" in read_container(files[0], CheckpointError).metadata


def evaluate(path: Path, setting: Setting) -> list[Measurement]:
    """The task's metrics of a checkpoint or an artifact, whose activation quantizers are in place.

    raises  ModelError, DataError, CheckpointError, ArtifactError, RecipeError
    """
    module = setting.build().float()
    if is_artifact(path):
        artifact = read_artifact(path)
        load_weights(module, load_state_dict(path), str(path))
        dress(module, artifact)
    else:
        load_weights(module, checkpoint_state(read_checkpoint(path)), str(path))
    return measure_task(module.to(setting.device), setting, path.name)


def dress(module: nn.Module, artifact: Artifact) -> None:
    """Attach an artifact's caps and activation quantizers. Raises ArtifactError where the module has no such part."""
    try:
        attach_caps(module, artifact.caps)
        attach_activations(module, artifact.activations)
    except AttributeError as error:
        mend = "name the model that the artifact was made with"
        raise ArtifactError(
            str(artifact.path), f"quantizes inputs of a module that is not there: {error}", mend
        ) from None


def measure_task(module: nn.Module, setting: Setting, what: str) -> list[Measurement]:
    """The metrics of the recipe's task on its eval data."""
    task = setting.recipe.task
    if task is None:
        raise RecipeError(setting.recipe.source, "names no task", "add `task: {classification: {metric: top1}}`")
    batches = setting.batches("eval")

    def advance(done: int) -> None:
        setting.progress(what, done, batches.samples)

    return measure(task, module, batches, setting.device, advance, root=setting.root, allow_code=setting.allow_code)


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
    for one, other in zip(before, after, strict=True):
        drop, low, high = paired_drop(one, other)
        figures.append(
            AccuracyFigures(
                metric=one.metric,
                baseline=one.value,
                artifact=other.value,
                drop=drop,
                samples=one.samples,
                interval=(low, high),
                baseline_interval=(one.low, one.high),
                artifact_interval=(other.low, other.high),
                untuned=earlier.get(one.metric),
                kmeans=plain.get(one.metric),
                kmeans_ratio=_ratio(other.value, plain.get(one.metric)),
                untuned_ratio=_ratio(earlier.get(one.metric), plain.get(one.metric)),
            )
        )
    return tuple(figures)


def _ratio(value: float | None, base: float | None) -> float | None:
    return None if value is None or not base else value / base


def open_live(checkpoint: Checkpoint, plan: Plan, setting: Setting) -> LiveModel:
    """The live model of a checkpoint for the methods of a plan, with the recipe's calibration data on its device.

    raises  ModelError, DataError, CheckpointError, RecipeError
    """
    recipe = setting.recipe
    assert recipe.model is not None
    module = setting.build().float()
    load_weights(module, checkpoint_state(checkpoint), str(checkpoint.path))
    data = recipe.data
    calibration: Sequence[Batch] = ()
    if data is not None and data.calibration is not None:
        calibration = [batch.to(setting.device) for batch in setting.batches("calibration")]
    return make_live_model(
        module,
        plan.decisions,
        calibration,
        _example(setting, calibration),
        device=setting.device,
        seed=recipe.seed,
        activations=recipe.activations,
        blocks=recipe.model.blocks,
        place=setting.place("model"),
    )


def _example(setting: Setting, calibration: Sequence[Batch]) -> Batch:
    """A batch that shows what the model takes: of the data that there is, or noise of the shape in the recipe."""
    if calibration:
        return calibration[0].first(2)
    data, model = setting.recipe.data, setting.recipe.model
    if data is not None and data.eval is not None:
        return next(iter(setting.batches("eval"))).first(2)
    if model is not None and model.input:
        generator = torch.Generator().manual_seed(setting.recipe.seed)
        noise: Tensor = torch.randn(2, *model.input, generator=generator)
        return Batch((noise,))
    what = "has no data that shows what it takes"
    raise RecipeError(setting.place("model"), what, "add `input: [3, 224, 224]`, or data.calibration or data.eval")
