"""Plain values that describe a run: its recipe and device, and what it gives a method. No torch at run time."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, TypeVar, cast

from qcompress.types.config import CodingChoice
from qcompress.types.figures import figure
from qcompress.types.plan import Recipe
from qcompress.types.ranks import ALONE, World

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Say: TypeAlias = Callable[[str], None]
"""Called with a line on what begins."""

SampleProgress: TypeAlias = Callable[[str, int, int], None]
"""Called with what runs, the samples done and the samples in all."""
Json: TypeAlias = "bool | int | float | str | Sequence[Json] | Mapping[str, Json] | None"
"""A value of JSON that is to be written; whatever is read is checked before it has a type."""

Made = TypeVar("Made")

Progress = Callable[[str, int], None]
"""Called with a tensor's name and its bytes in the checkpoint once it is done."""


@dataclass(frozen=True)
class ModelRun:
    """A recipe whose model and data are used, and where they run.

    allow_code  whether files that the recipe names may be run
    world       the ranks that divide samples
    """

    recipe: Recipe
    device: torch.device
    allow_code: bool = False
    progress: SampleProgress = lambda *_: None
    world: World = ALONE

    @property
    def root(self) -> Path:
        """What the recipe's paths start from."""
        return self.recipe.root

    def place(self, section: str) -> str:
        """How errors name a section of the recipe."""
        return self.recipe.place(section)


def _processor_seconds() -> float:
    """Of this process since it began, all its threads, and of the processes that it started and waited for."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(one.ru_utime + one.ru_stime for one in used)


@dataclass(frozen=True)
class Clock:
    """What a run's seconds count from: the wall clock and the processor seconds of the process when it began."""

    wall: float = field(default_factory=time.monotonic)
    processor: float = field(default_factory=_processor_seconds)

    @property
    def seconds(self) -> float:
        """Since the run began."""
        return time.monotonic() - self.wall

    @property
    def cpu_seconds(self) -> float:
        """Of all threads and of processes that have ended, since the run began."""
        return _processor_seconds() - self.processor


_command: ContextVar[Clock | None] = ContextVar("command", default=None)


def begin_command() -> None:
    """This process is one command: from now on every run in it counts from the start of the process."""
    _command.set(Clock(time.monotonic() - _processor_seconds(), 0.0))


def start_clock() -> Clock:
    """The clock of a run that begins: that of the command which this process is, else a new one."""
    return _command.get() or Clock()


@dataclass(frozen=True, kw_only=True)
class RunFigures:
    """What a run took."""

    # fmt: off
    seconds: float = field(metadata=figure("seconds", "seconds", "wall time of the whole command"))
    cpu_seconds: float = field(metadata=figure(
        "processor seconds", "seconds", "processor time of the whole command, all threads and processes"))
    peak_memory_bytes: int = field(metadata=figure(
        "peak memory", "bytes", "the largest resident memory of the process"))
    device: str = field(metadata=figure("device", "text", "where the methods computed"))
    versions: Mapping[str, str] = field(metadata=figure(
        "versions", "", "of qcompress and of what its figures may depend on"))
    # fmt: on


@dataclass
class Gram:
    """Second moments of a layer's inputs: what its output error depends on.

    hessian  float64 [groups, columns, columns], the mean over positions of x^ x^T, x^ from the quantized network
    cross    the mean of x x^^T, x from the full-precision network; None where both networks gave the same
    mean     float64 [groups, columns], of x^; `clean_mean` of x
    count    positions
    """

    hessian: Tensor
    cross: Tensor | None
    mean: Tensor
    clean_mean: Tensor
    count: int
    _made: dict[str, object] = field(default_factory=dict, repr=False, compare=False)

    def once(self, what: str, make: Callable[[], Made]) -> Made:
        """What `make` gives, which is made once for all weights that share this Gram.

        what  names it, with all that it depends on beside the Gram
        """
        if what not in self._made:
            self._made[what] = make()
        return cast("Made", self._made[what])


@dataclass(frozen=True)
class InputMoments:
    """Means and variances of a convolution's input channels: float64 [groups, channels of a group]."""

    mean: Tensor
    variance: Tensor


@dataclass(frozen=True)
class Whole:
    """What a method knows of all rows of a weight while it encodes some of them.

    deviation  of the weights from zero
    largest    of their magnitudes
    sample     float32 [rows, columns], evenly spread rows, all of them where they are few
    kept       what the method keeps from one block of rows to the next
    """

    deviation: float
    largest: float
    sample: Tensor
    kept: MutableMapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class EncodeContext:
    """What a method that encodes one weight may draw on beside the weight and its config.

    exponent         scales, offsets and centroids of half precision count in units of 2**exponent
    generator        random numbers of this tensor
    gram             second moments of the layer's inputs, for methods that work from saved statistics
    moments          of a convolution's input channels, as the batch norms before it tell them
    sensitivity      float64 [columns] or, one a group of channels, [groups, columns], not negative: what a squared
                     error of a weight in that column counts; None: all alike
    shared           codebook float [1, entries, dim] and exponent that several tensors have together
    representatives  float [at most 2**bits]: what finetune-reg learned for this tensor
    whole            all rows, where only some of them are given; None: those that are given are all
    """

    exponent: int
    generator: torch.Generator
    gram: Gram | None = None
    moments: InputMoments | None = None
    sensitivity: Tensor | None = None
    shared: tuple[Tensor, int] | None = None
    representatives: Tensor | None = None
    whole: Whole | None = None


@dataclass(frozen=True)
class FitContext:
    """What a method on a live model may draw on beside the model and its decisions.

    rate      bits a weight that codes without widths are to take, about, where a budget says so
    trainer   a training.trainer.Trainer, for the methods that need training
    say       called with a line on what begins
    kept      what a method keeps for the next attempt at a budget on the same network, by the method's name
    measured  of a network that goes block by block: what the method has returned as `Fitted.measured` so far; None
              where it sees the blocks for the first time, and is to measure them and to encode nothing
    """

    rate: float | None = None
    trainer: object = None
    say: Say = lambda _: None
    kept: MutableMapping[str, object] = field(default_factory=dict)
    measured: Mapping[str, Tensor] | None = None


def forked_seed(seed: int, name: str) -> int:
    """A seed of one's own for whatever has this name."""
    import hashlib

    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:7], "little")


def seeded_generator(seed: int, name: str, device: torch.device | str) -> torch.Generator:
    """Random numbers for one layer or tensor, whatever the order in which they come."""
    import torch

    return torch.Generator(device).manual_seed(forked_seed(seed, name))


@dataclass(frozen=True)
class Options:
    """How to run, not what: none of it changes the bytes, but for `choice`, `device`, `rate` and the files.

    statistics       a file of the layers' input statistics, for the methods that can work from them
    representatives  a file of what finetune-reg has learned, for the methods that take it up
    rate             bits a weight that codes without widths are to take, about; a budget's search sets it
    say              called with a line on what begins, and on what a run that resumes drops
    world            the ranks that run together
    """

    output: Path
    choice: CodingChoice = "auto"
    force: bool = False
    threads: int = 1
    device: str = "cpu"
    max_memory: int | None = None
    resume: bool = False
    statistics: Path | None = None
    representatives: Path | None = None
    rate: float | None = None
    progress: Progress | None = None
    say: Say = lambda _: None
    world: World = ALONE
