"""Decisions and what became of them -> the layers and the run of a report."""

from __future__ import annotations

import platform
import resource
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

import qcompress
from qcompress.artifact.layout import part_name
from qcompress.artifact.manifest import Entry
from qcompress.report.document import LayerFigures, LayerReport, RunFigures
from qcompress.types import Decision


def kept_layer(decision: Decision, n_bytes: int) -> LayerReport:
    """A tensor that was kept in `n_bytes`, or, with none, is tied to another."""
    return LayerReport(**_tensor_fields(decision), bytes=n_bytes, tied_to=decision.tied_to)


def compressed_layer(
    decision: Decision, sizes: Mapping[str, int], entry: Entry, figures: LayerFigures, side_bytes: int = 0
) -> LayerReport:
    """A compressed tensor; `sizes` are the bytes of its stored parts by their full names.

    side_bytes  of its codes: side information among them
    """
    config, total = decision.config, sum(sizes.values())
    return LayerReport(
        **_tensor_fields(decision),
        bytes=total,
        method=decision.method or "",
        bits=config.bits,
        dim=entry.dim,
        granularity=config.granularity,
        group_size=config.group_size,
        form=config.form,
        sensitivity=decision.sensitivity,
        coding=entry.coding,
        codebook_in=entry.codebook,
        side_information_bytes=total - sizes[part_name(decision.tensor.name, "codes")] + side_bytes,
        figures=figures,
    )


def _tensor_fields(decision: Decision) -> dict[str, Any]:
    tensor = decision.tensor
    return {
        "name": tensor.name,
        "shape": tensor.shape,
        "dtype": tensor.dtype,
        "baseline_bytes": tensor.n_bytes,
        "reason": decision.reason,
    }


def run_figures(seconds: float, cpu_seconds: float, device: str) -> RunFigures:
    """What a run took, with the largest resident memory of this process so far and all that figures depend on."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return RunFigures(
        seconds=seconds,
        cpu_seconds=cpu_seconds,
        peak_memory_bytes=peak if platform.system() == "Darwin" else peak * 1024,
        device=device,
        versions={
            "qcompress": qcompress.__version__,
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "numpy": np.__version__,
        },
    )
