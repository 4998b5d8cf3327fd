"""numba, where it is installed, compiles the loops of kernels.py: the first time for good, into the user's cache.

Importing numba and reading what it has compiled takes as long as decoding some millions of codes, so that few are
decoded without. What is decoded is the same, and so are the errors: the slower way says them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qcompress.coding import kernels

LEAST_CODES = 1 << 24
"""Codes that are decoded in this process before numba is asked for: 0.4 seconds, what it takes to come."""

_BYTES = "uint8[:, ::1]"
_TABLES = "uint32[::1], uint64[::1], uint64[::1], uint32[::1], uint64[::1], uint8[::1], int64"
_RAW = "uint8[::1], int64[::1], int64[::1], int32[::1]"
_SIGNATURES = {
    kernels.make_intervals: "void(int64[::1], int64[::1], int64[::1], uint32[::1], int64, uint64[::1])",
    kernels.decode_codes: f"boolean({_TABLES}, int64[:, ::1], {_BYTES})",
    kernels.decode_plain: f"boolean({_TABLES}, uint8[::1], uint8[::1], int64[::1], {_RAW}, int32[::1])",
    kernels.decode_trellis: (
        f"boolean({_TABLES}, uint8[::1], uint8[::1], int64, int64, int64, {_RAW}, uint8[::1], int32[::1])"
    ),
}
_CALLED = (
    kernels._next,
    kernels._begin,
    kernels._read_one,
    kernels._read_runs,
    kernels._read_lanes,
    kernels._ended,
    kernels._open_bits,
    kernels._filled_up,
    kernels.decode_codes,
)


class Compiler:
    """What numba makes of the kernels, each at its first use, once there was enough to decode."""

    def __init__(self) -> None:
        self._codes = 0
        self._numba: Any = None
        self._made: dict[Callable[..., Any], Callable[..., Any] | None] = {}

    def pays(self, codes: int) -> bool:
        """Whether so many codes more are to be decoded by compiled loops: they can be, and there were enough."""
        self._codes += codes
        return self._codes >= LEAST_CODES and self._load() is not None

    def of(self, kernel: Callable[..., Any]) -> Callable[..., Any] | None:
        """A kernel, compiled; None where that cannot be."""
        if kernel not in self._made:
            self._made[kernel] = self._compile(kernel)
        return self._made[kernel]

    def _load(self) -> Any:
        """The module, or None: where it is missing, does not fit the other packages, or shall not compile."""
        if self._numba is None:
            try:
                import numba
                from numba.extending import register_jitable
            except Exception:
                # What numba raises beside ImportError where numpy or Python is too new for it, it does not say.
                self._numba = False
                return None
            self._numba = False if numba.config.DISABLE_JIT else numba
            for called in _CALLED if self._numba else ():
                register_jitable(called)
        return self._numba or None

    def _compile(self, kernel: Callable[..., Any]) -> Callable[..., Any] | None:
        numba = self._load()
        if numba is None:
            return None
        for cached in (True, False):
            # Where the cache cannot be written, or what it holds is damaged, this process compiles for itself.
            try:
                with _cache_folder(numba):
                    made: Callable[..., Any] = numba.njit(_SIGNATURES[kernel], cache=cached, nogil=True)(kernel)
                    return made
            except Exception:
                continue
        return None


@contextmanager
def _cache_folder(numba: Any) -> Iterator[None]:
    """While a function is compiled here, numba's cache is a folder of the user's, unless NUMBA_CACHE_DIR names one."""
    before = numba.config.CACHE_DIR
    numba.config.CACHE_DIR = before or str(user_cache())
    try:
        yield
    finally:
        numba.config.CACHE_DIR = before


def user_cache() -> Path:
    """The folder that this user's compiled loops are kept in."""
    if sys.platform == "darwin":
        base = Path("~/Library/Caches")
    elif sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA", "~/AppData/Local"))
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    return Path(os.path.expandvars(base)).expanduser() / "qcompress" / "numba"


COMPILER = Compiler()
