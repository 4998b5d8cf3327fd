"""What commands with a live model share: its device, its progress, and leave to run code."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from qcompress.cli import options as opt
from qcompress.cli.streams import PLAIN_LINE_SECONDS, Streams, print_note

if TYPE_CHECKING:
    import torch

    from qcompress.evaluate import Setting
    from qcompress.types import Recipe


def make_setting(
    recipe: Recipe, device: opt.Device, allow_code: bool, streams: Streams, threads: int | None = None
) -> Setting:
    """Where a recipe's live parts run, on one thread unless told otherwise. Raises ResourceError for no such device."""
    import torch

    from qcompress.evaluate import Setting

    torch.set_num_threads(threads or 1)
    return Setting(recipe, live_device(device), allow_code, _Progress(streams).show)


def live_device(device: opt.Device) -> torch.device:
    """The device of a live model: auto is CUDA where there is one."""
    import torch

    from qcompress.errors import ResourceError

    has_cuda = torch.cuda.is_available()
    if device is opt.Device.cuda and not has_cuda:
        raise ResourceError("--device cuda", "this machine or this torch has no CUDA device", "use --device cpu")
    return torch.device("cuda" if has_cuda and device is not opt.Device.cpu else "cpu")


def say(streams: Streams, text: str) -> None:
    """A line on what begins, unless the run is to be quiet."""
    if not streams.quiet:
        print_note(text)


class _Progress:
    """A line now and then while samples run through a network."""

    def __init__(self, streams: Streams) -> None:
        self._every = 0.0 if streams.verbose else PLAIN_LINE_SECONDS
        self._quiet = streams.quiet
        self._said = time.monotonic()

    def show(self, what: str, done: int, samples: int) -> None:
        now = time.monotonic()
        if not self._quiet and now - self._said >= self._every:
            self._said = now
            print_note(f"{what}: {done:,} of {samples:,} samples")
