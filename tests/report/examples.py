"""Reports to test with, every number written by hand."""

from __future__ import annotations

from dataclasses import replace

from qcompress.report.document import (
    AccuracyFigures,
    ArtifactFile,
    GateResult,
    LayerFigures,
    LayerReport,
    Report,
)
from qcompress.report.size import make_size
from qcompress.types.run import RunFigures


def conv_figures() -> LayerFigures:
    return LayerFigures(
        relative_error=0.01,
        max_error=0.25,
        range=(-1.5, 2.0),
        fences=(-1.25, 1.5),
        levels=(-1.5, -0.5, 0.5, 1.5),
        outlier_share=0.0078125,
        kurtosis=3.25,
        levels_used=4,
        entropy=1.5,
        clipped_share=0.125,
        histogram_before=tuple(range(64)),
        histogram_after=(0,) * 63 + (128,),
    )


def layer(name: str, figures: LayerFigures | None) -> LayerReport:
    """128 weights at 2 bits: 32 bytes of codes, 16 of side information."""
    return LayerReport(
        name=name,
        shape=(8, 16),
        dtype="F32",
        bytes=48,
        baseline_bytes=512,
        reason="rules[0]",
        method="squant",
        bits=2,
        granularity="channel",
        form="offset",
        coding="packed",
        side_information_bytes=16,
        figures=figures,
    )


def kept(name: str) -> LayerReport:
    return LayerReport(name=name, shape=(8,), dtype="F32", bytes=32, baseline_bytes=32, reason="one dimension")


def make_report(*layers: LayerReport, name: str = "model-w2.safetensors", header_bytes: int = 120) -> Report:
    total = sum(one.bytes for one in layers) + header_bytes
    baseline = sum(one.baseline_bytes for one in layers) + 80
    return Report(
        artifact=ArtifactFile(name=name, sha256="ab" * 32),
        recipe_hash="cd" * 32,
        size=make_size(baseline, total, layers, header_bytes=header_bytes),
        layers=layers,
    )


def small_report() -> Report:
    exact = LayerFigures(relative_error=0.0, max_error=0.0, levels_used=1, entropy=0.0)
    return make_report(layer("conv.weight", conv_figures()), kept("conv.bias"), layer("head|fc.weight", exact))


def full_report() -> Report:
    """Every key filled."""
    return replace(
        small_report(),
        input_sha256="ef" * 32,
        accuracy=(
            AccuracyFigures(
                metric="top1",
                baseline=0.75,
                artifact=0.74,
                drop=0.01,
                samples=1000,
                interval=(0.002, 0.018),
                baseline_interval=(0.7222, 0.7758),
                artifact_interval=(0.7119, 0.7662),
            ),
        ),
        gates=(
            GateResult(name="max-size", limit=1000, value=248, passed=True),
            GateResult(name="min-sqnr", limit=20.5, value=20.0, passed=False),
        ),
        warnings=("conv.bias is kept",),
        run=RunFigures(
            seconds=1.23456789,
            cpu_seconds=2.5,
            peak_memory_bytes=10**9,
            device="cpu",
            versions={"torch": "2", "a": "1"},
        ),
    )
