"""Compress the weights of neural networks: a safetensors checkpoint in, a small artifact and an honest report out.

import qcompress

state_dict = qcompress.load_state_dict("model-w2.safetensors")
qcompress.load_into(module, "model-w2.safetensors")
"""

from qcompress.types import VERSION as __version__

# Of `python -m qcompress` this runs while the current folder is on the import path: it imports nothing of the standard
# library, which a file there could stand in for.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from qcompress.compress.load import load_into, load_state_dict

__all__ = ["__version__", "load_into", "load_state_dict"]


def __getattr__(name: str) -> object:
    # The command line imports this package, and must not import torch for --help.
    if name in ("load_into", "load_state_dict"):
        from qcompress.compress import load

        return getattr(load, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
