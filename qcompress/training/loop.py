"""The training loop reads top to bottom: batches, loss, penalties, step, log, metric, saved states."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from qcompress.data.augment import Draw, read_augmented
from qcompress.data.batches import Batch, Batches, first_tensor, run_model
from qcompress.data.foreign import first_line
from qcompress.data.measurement import Measurement
from qcompress.errors import DataError, ModelError, TrainingError
from qcompress.training.losses import Loss
from qcompress.training.optimizers import Group, make_optimizer, rate_at
from qcompress.training.penalties import Penalties
from qcompress.training.runaway import growth_words, refuse_runaway, sizes_of
from qcompress.training.state import DamagedState, Progress, Trainee, load_state, save_state
from qcompress.types.data_settings import Augmentation
from qcompress.types.ranks import ALONE, World
from qcompress.types.run import seeded_generator
from qcompress.types.settings import Training

SAVED_SECONDS = 300.0
"""A state is saved at least so often, where the recipe does not count steps."""
PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Data:
    """What is trained on; `place` names it in errors."""

    batches: Batches
    augment: tuple[Augmentation, ...] = ()
    place: str = "data.train"

    def read(self, samples: Sequence[int], draw: Draw) -> Batch:
        """A rank's part of a batch of these samples, augmented. Raises DataError."""
        return read_augmented(self.batches, self.augment, samples, draw, self.place)


@dataclass(frozen=True)
class Watch:
    """Who looks on.

    measure   the task's metrics of the module, the headline first; None where there is nothing to measure on
    say       called with a line of words now and then
    log       the JSONL file: a line every few steps, and one an epoch
    state     the file of saved states
    resume    whether to go on from what lies there
    identity  of recipe and checkpoint: the state of another run is refused
    """

    measure: Callable[[nn.Module], Sequence[Measurement]] | None = None
    say: Callable[[str], None] = lambda _: None
    log: Path | None = None
    state: Path | None = None
    resume: bool = False
    identity: str = ""


@dataclass(frozen=True)
class Trained:
    """How training went.

    steps    optimizer steps
    seconds  of training and of measuring after each epoch
    loss     mean of the last epoch's steps, penalties not counted
    kept     the epoch whose weights were kept, from 1
    metrics  after each epoch: metric -> value; empty where nothing is measured
    warnings what is to be said of the weights that came out
    """

    steps: int
    seconds: float
    loss: float
    kept: int
    metrics: tuple[Mapping[str, float], ...] = ()
    warnings: tuple[str, ...] = ()


def train(
    module: nn.Module,
    data: Data,
    loss_of: Loss,
    training: Training,
    penalties: Penalties,
    watch: Watch = Watch(),
    *,
    seed: int = 0,
    world: World = ALONE,
    after_step: Callable[[float], None] = lambda _: None,
    groups: Sequence[Group] = (),
) -> Trained:
    """Train a module in place; it is left in eval mode, with the weights that `keep` asks for.

    Equal inputs and seed give equal weights on one device, also when a run was broken off and resumed. On several ranks
    each takes its share of every batch: together they do what one process with the whole batch would.

    after_step  called after each step with the share of all steps that are done, and before the first of a resumed run
    groups      parameters of the module that have an optimizer's settings of their own, see `make_optimizer`
    raises      DataError for fewer samples than a batch; TrainingError for a loss that is not finite, and for a saved
                state that does not fit; TrainingError for weights that have run away
    """
    optimizer = make_optimizer(training.optimizer, module, penalties.learned(training.optimizer), groups)
    highest = [group["lr"] for group in optimizer.param_groups]
    device = next(module.parameters()).device
    scaler = torch.amp.GradScaler(device.type) if training.precision == "float16" else None
    trainee = Trainee(module, optimizer, penalties, Progress(), scaler)
    progress = trainee.progress
    refuse_few(data, training.accumulate, world)
    if watch.resume and watch.state is not None and watch.state.exists():
        try:
            load_state(watch.state, trainee, watch.identity)
        except DamagedState as damage:
            watch.say(f"{watch.state.name} is dropped, and training starts anew: it {damage.what}")
    progress.sizes = progress.sizes or sizes_of(module)
    log = _Log(watch.log if world.is_first else None, progress.log_bytes)
    run = _Run(data, loss_of, training, trainee, watch, seed, world, world.wrap(module), log, highest)
    if progress.step:
        watch.say(f"going on from step {progress.step} of {run.total}")
        after_step(progress.step / run.total)
    while progress.epoch < training.epochs:
        _to_train(module, frozen=training.batch_norm == "frozen")
        for batches in _portions(run):
            loss, penalty, rate = _step(run, batches)
            after_step(progress.step / run.total)
            progress.losses = (progress.losses[0] + loss, progress.losses[1] + 1)
            if progress.step % training.log_steps == 0:
                log.write(step=progress.step, loss=loss, penalty=penalty, lr=rate)
                watch.say(_step_words(run, loss, penalty))
            if _is_due(run):
                _save(run)
        _end_epoch(run)
        _save(run)
    kept = training.epochs
    if training.keep == "best" and progress.best_state:
        kept = progress.best_epoch
        module.load_state_dict(progress.best_state)
    module.eval()
    grown = tuple(growth_words(progress.sizes, sizes_of(module)))
    return Trained(run.total, progress.seconds, run.loss, kept, tuple(progress.metrics), grown)


def refuse_few(data: Data, accumulate: int, world: World) -> None:
    """Raise DataError where there are fewer samples than one step of all ranks takes."""
    needed = data.batches.batch_size * accumulate * world.size
    if data.batches.samples < needed:
        what = f"has {data.batches.samples} samples, fewer than the {needed} of one step"
        raise DataError(data.place, what, "lower batch_size, or accumulate less")


def steps_an_epoch(data: Data, training: Training, world: World) -> int:
    """Steps of the optimizer in one epoch: what does not fill a step of all ranks is left out."""
    return data.batches.samples // world.size // data.batches.batch_size // training.accumulate


@dataclass
class _Run:
    """What the steps of one run share.

    highest     learning rate of each of the optimizer's groups
    loss        mean of the last epoch that ended
    spent       seconds that training took before this process
    first_step  that this process takes
    """

    data: Data
    loss_of: Loss
    training: Training
    trainee: Trainee
    watch: Watch
    seed: int
    world: World
    parallel: nn.Module
    log: _Log
    highest: Sequence[float]
    loss: float = math.nan
    started: float = field(default_factory=time.monotonic)
    saved: float = field(default_factory=time.monotonic)
    spent: float = field(init=False)
    first_step: int = field(init=False)

    def __post_init__(self) -> None:
        self.spent, self.first_step = self.trainee.progress.seconds, self.trainee.progress.step

    @property
    def device(self) -> torch.device:
        return next(self.trainee.module.parameters()).device

    def placed(self, batch: Batch) -> Batch:
        """The batch on the device, as training lays it out. Weights stay as they are: each layer follows its input."""
        batch = batch.to(self.device)
        return batch.channels_last() if self.training.memory_format == "channels_last" else batch

    @property
    def steps_an_epoch(self) -> int:
        return steps_an_epoch(self.data, self.training, self.world)

    @property
    def total(self) -> int:
        return self.training.epochs * self.steps_an_epoch


def _to_train(module: nn.Module, *, frozen: bool) -> None:
    """Training mode, but for batch norms that are to keep what they have seen."""
    module.train()
    if frozen:
        for part in module.modules():
            if isinstance(part, _BatchNorm):
                part.eval()


def _portions(run: _Run) -> Iterator[list[Batch]]:
    """The batches of each step that is left of this epoch, augmented, on the device."""
    progress, accumulate = run.trainee.progress, run.training.accumulate
    done = progress.step - progress.epoch * run.steps_an_epoch
    order = seeded_generator(run.seed, f"order of epoch {progress.epoch}", "cpu")
    drawn = run.data.batches.shuffled(order, run.world.size, skip=done * accumulate)
    for index in range(done, run.steps_an_epoch):
        portion = []
        for place, samples in enumerate(itertools.islice(drawn, accumulate)):
            epoch, batch = f"images of {progress.epoch}", f"{index}, {place}"
            draw = Draw(run.seed, epoch, batch, run.world.rank, run.world.size)
            portion.append(run.placed(run.data.read(samples, draw)))
        yield portion


def _step(run: _Run, batches: Sequence[Batch]) -> tuple[float, float, float]:
    """One optimizer step: its loss, its penalty, and the learning rate of the weights."""
    trainee, training = run.trainee, run.training
    optimizer, penalties, scaler, step = trainee.optimizer, trainee.penalties, trainee.scaler, trainee.progress.step
    share = rate_at(training.schedule, training.warm_up, step / run.total)
    for group, most in zip(optimizer.param_groups, run.highest, strict=True):
        group["lr"] = share * most
    rate = share * run.highest[0]
    optimizer.zero_grad()
    penalties.zero_grad()
    loss = _backward(run, batches)
    if scaler is not None:
        scaler.unscale_(optimizer)
    penalty = penalties.add(step, run.total, rate)
    if training.clip_norm is not None:
        nn.utils.clip_grad_norm_(trainee.module.parameters(), training.clip_norm)
    if scaler is None:
        optimizer.step()
    else:
        scaler.step(optimizer)
        scaler.update()
    penalties.after(step, run.total, rate)
    trainee.progress.step += 1
    return loss, penalty, rate


def _backward(run: _Run, batches: Sequence[Batch]) -> float:
    """The loss of one step, its gradients added to the parameters'. Raises TrainingError where it is not finite."""
    precision, scaler = PRECISIONS[run.training.precision], run.trainee.scaler
    total = torch.zeros((), device=run.device)
    for place, batch in enumerate(batches):
        # Ranks exchange gradients once a step, with the last batch.
        waits = run.world.size > 1 and place + 1 < len(batches)
        with run.parallel.no_sync() if waits else contextlib.nullcontext():  # type: ignore[operator]
            with torch.autocast(run.device.type, precision, enabled=precision is not None):
                output = _output(run, batch)
                loss: Tensor = run.loss_of(output, batch) / len(batches)
            (loss if scaler is None else scaler.scale(loss)).backward()  # type: ignore[no-untyped-call]
        total += loss.detach()
    value = float(run.world.mean(total))
    if not math.isfinite(value):
        what = f"the loss is {value} at step {run.trainee.progress.step + 1} of {run.total}"
        raise TrainingError("training", what, "lower the learning rate or the strength, or set clip_norm")
    return value


def _output(run: _Run, batch: Batch) -> Tensor:
    """What the network gives first. Raises ModelError where it asks for another order in memory than it gets."""
    try:
        return first_tensor(run.parallel(*batch.args, **batch.kwargs))
    except RuntimeError as error:
        if run.training.memory_format is not None and "view" in str(error):
            hint = "leave memory_format out, or let the network use reshape for view"
            raise ModelError("training", f"the network does not run channels last: {first_line(error)}", hint) from None
        raise


def _end_epoch(run: _Run) -> None:
    """Refresh batch norms where that is asked for, measure, note what is best, and write the epoch's line."""
    progress, watch, norms = run.trainee.progress, run.watch, run.training.norm_batches
    progress.epoch += 1
    if norms:
        # On every rank, so that all of them go on from the same statistics.
        refresh_norms(run.trainee.module, map(run.placed, norm_batches(run.data, norms, run.seed)))
    measured: Sequence[Measurement] = ()
    if watch.measure is not None and run.world.is_first:
        measured = watch.measure(run.trainee.module)
    run.world.wait()
    metrics = {one.metric: one.value for one in measured}
    progress.metrics.append(metrics)
    if measured and run.training.keep == "best":
        headline = measured[0].metric
        before = progress.metrics[progress.best_epoch - 1][headline] if progress.best_epoch else None
        sign = 1 if measured[0].higher else -1
        if before is None or sign * metrics[headline] > sign * before:
            progress.best_epoch = progress.epoch
            progress.best_state = {k: v.detach().clone() for k, v in run.trainee.module.state_dict().items()}
    total, steps = progress.losses
    run.loss = total / max(steps, 1)
    progress.losses = (0.0, 0)
    run.log.write(epoch=progress.epoch, step=progress.step, loss=run.loss, metrics=metrics)
    words = "".join(f", {name} {value:.4g}" for name, value in metrics.items())
    watch.say(f"epoch {progress.epoch} of {run.training.epochs}: loss {run.loss:.4g}{words}")


def _is_due(run: _Run) -> bool:
    """Whether a state is to be saved within an epoch."""
    every = run.training.save_steps
    if every is not None:
        return run.trainee.progress.step % every == 0
    # Ranks must agree, and clocks do not.
    return run.world.size == 1 and time.monotonic() - run.saved > SAVED_SECONDS


def _save(run: _Run) -> None:
    """Save the state where one is asked for. Raises TrainingError for a run gone astray; the state before stays."""
    refuse_runaway(run.trainee.module, run.trainee.penalties, run.trainee.progress.step)
    run.saved = time.monotonic()
    run.trainee.progress.seconds = run.spent + run.saved - run.started
    run.trainee.progress.log_bytes = run.log.bytes
    if run.watch.state is not None and run.world.is_first:
        save_state(run.watch.state, run.trainee, run.watch.identity)
    run.world.wait()


def _step_words(run: _Run, loss: float, penalty: float) -> str:
    step = run.trainee.progress.step
    pace = (time.monotonic() - run.started) / max(step - run.first_step, 1)
    words = f"step {step} of {run.total}: loss {loss:.4g}"
    return words + (f", penalty {penalty:.4g}" if penalty else "") + f", about {pace * (run.total - step):.0f} s left"


class _Log:
    """The JSONL file, cut to the length that it had when the state was saved; None: nothing is written."""

    def __init__(self, path: Path | None, length: int) -> None:
        self._path = path
        self.bytes = length
        if path is not None:
            with path.open("ab") as file:
                file.truncate(length)

    def write(self, **values: object) -> None:
        if self._path is not None:
            with self._path.open("ab") as file:
                file.write(json.dumps(values).encode() + b"\n")
                self.bytes = file.tell()


def norm_batches(data: Data, count: int, seed: int) -> Iterator[Batch]:
    """So many batches for batch norms, the same ones each time, of images as training sees them.

    Others give other statistics: black around an image takes part in those that the weights were trained with.
    """
    drawn = data.batches.shuffled(seeded_generator(seed, "batch norms", "cpu"))
    for index, samples in enumerate(itertools.islice(drawn, count)):
        yield data.read(samples, Draw(seed, "images of batch norms", str(index)))


@torch.no_grad()
def refresh_norms(module: nn.Module, batches: Iterable[Batch]) -> None:
    """Give every batch norm the mean of the batches' statistics; all else stays, and the module is left in eval mode.

    Training keeps a running mean over weights that no longer are: with few levels they change in leaps.
    """
    module.eval()
    norms = [one for one in module.modules() if isinstance(one, _BatchNorm) and one.running_mean is not None]
    if not norms:
        return
    kept = [(norm.momentum, norm.num_batches_tracked.clone()) for norm in norms]  # type: ignore[union-attr]
    try:
        for norm in norms:
            norm.reset_running_stats()
            # Without a momentum the statistics are a plain mean.
            norm.momentum = None
            norm.train()
        for batch in batches:
            run_model(module, batch)
    finally:
        for norm, (momentum, count) in zip(norms, kept, strict=True):
            norm.momentum = momentum
            norm.num_batches_tracked.copy_(count)  # type: ignore[union-attr]
        module.eval()
