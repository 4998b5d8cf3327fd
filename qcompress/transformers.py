"""`import qcompress.transformers` lets transformers load compressed folders, which stay compressed in memory.

import qcompress.transformers
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("llama-w4")
"""

from qcompress.data.user_code import import_package

# First, so that a missing extra is named, and that networks import beside a torchvision that lacks operators.
import_package("transformers")

from qcompress.runtime.plugin import QcompressConfig  # noqa: E402

__all__ = ["QcompressConfig"]
