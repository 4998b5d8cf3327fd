"""`import qcompress.transformers` lets transformers load compressed folders, which stay compressed in memory.

import qcompress.transformers
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("llama-w4")
"""

from qcompress.runtime.plugin import QcompressConfig

__all__ = ["QcompressConfig"]
