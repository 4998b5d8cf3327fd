"""Options that several commands take together: a group is one parameter of a command and many of the command line."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from functools import wraps
from typing import Any, get_type_hints

from qcompress.cli import options as opt


@dataclass(frozen=True)
class OutputFlags:
    """What a command that makes an artifact writes, and where."""

    coding: opt.CodingOption = opt.Coding.auto
    output: opt.Output = None
    force: opt.Force = False
    dry_run: opt.DryRun = False


@dataclass(frozen=True)
class RunFlags:
    """How a command that makes an artifact computes."""

    device: opt.DeviceOption = opt.Device.auto
    threads: opt.Threads = None
    max_memory: opt.MaxMemory = None
    seed: opt.Seed = None
    skip_nonfinite: opt.SkipNonfinite = False
    resume: opt.Resume = False


@dataclass(frozen=True)
class GateFlags:
    """The gates of the command line."""

    max_size: opt.MaxSize = None
    max_bpw: opt.MaxBpw = None
    min_sqnr: opt.MinSqnr = None
    min_metric: opt.MinMetric = None
    max_drop: opt.MaxDrop = None


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
