"""A recipe's own keys, the ones that are known but not built yet, and the ranges of what is no method's option."""

from __future__ import annotations

from typing import Any

from qcompress.recipe.sizes import SIZE_PATTERN

VERSION = 1

SEED: dict[str, Any] = {"type": "integer", "minimum": 0, "maximum": 2**63 - 1, "default": 0}

SIZE: dict[str, Any] = {"anyOf": [{"type": "integer", "minimum": 1}, {"type": "string", "pattern": SIZE_PATTERN}]}

METRICS: dict[str, Any] = {"type": "object", "additionalProperties": {"type": "number"}}

GATES: dict[str, dict[str, Any]] = {
    "max_size": {
        "description": "Largest artifact, in bytes: 2000000, 2MB (powers of 1000) or 2MiB (powers of 1024)",
        **SIZE,
    },
    "max_bpw": {
        "description": "Most bits per weight",
        "type": "number",
        "exclusiveMinimum": 0,
    },
    "min_sqnr": {"description": "Least signal-to-noise ratio of any tensor, in decibels", "type": "number"},
    "min_metric": {"description": "Least value of each named metric", **METRICS},
    "max_drop": {"description": "Most that each named metric may fall below the checkpoint's", **METRICS},
}

BUDGET: dict[str, dict[str, Any]] = {
    "bpw": {
        "description": "Bits per compressed weight, all side information counted",
        "type": "number",
        "exclusiveMinimum": 0,
    },
    "size": {"description": "Bytes of the whole artifact, as in max_size", **SIZE},
    "minimize": {"description": "The smallest artifact that holds the gates", "enum": ["size"]},
}
"""What a budget may say; one of them."""

SENSITIVITY: dict[str, Any] = {
    "description": "File of what each layer costs at each width, from `report --sensitivity`",
    "type": "string",
    "minLength": 1,
}
