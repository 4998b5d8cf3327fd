"""The registry finds methods and exporters by name, and in registry.regularizers regularizers. Imports no torch.

A method is a new file in methods/, its config and its entry together in one of these files, its tests and its line in
the docs; an exporter is a new file in exporters/ and an entry here.
"""

from __future__ import annotations

from collections.abc import Mapping

from qcompress.registry.calibrated import (
    CALIBRATED,
    AdaroundConfig,
    DfqConfig,
    ExactConfig,
    GptqConfig,
    LsqConfig,
    PactConfig,
    PdquantConfig,
    RdConfig,
)
from qcompress.registry.clusters import (
    CLUSTERS,
    ClusterConfig,
    DkmConfig,
    KmeansConfig,
    LearnedConfig,
    Tune,
    refuse_cost,
)
from qcompress.registry.contract import Encode, Export, Exporter, Fit, Method, load
from qcompress.registry.grids import GRIDS, GridConfig, HqqConfig, MseConfig, RtnConfig, SquantConfig

__all__ = [
    "BUDGET_METHOD",
    "DEFAULT_METHOD",
    "EXPORTERS",
    "METHODS",
    "AdaroundConfig",
    "ClusterConfig",
    "DfqConfig",
    "DkmConfig",
    "Encode",
    "ExactConfig",
    "Export",
    "Exporter",
    "Fit",
    "GptqConfig",
    "GridConfig",
    "HqqConfig",
    "KmeansConfig",
    "LearnedConfig",
    "LsqConfig",
    "Method",
    "MseConfig",
    "PactConfig",
    "PdquantConfig",
    "RdConfig",
    "RtnConfig",
    "SquantConfig",
    "Tune",
    "load",
    "refuse_cost",
]

METHODS: Mapping[str, Method] = {method.name: method for method in (*GRIDS, *CALIBRATED, *CLUSTERS)}

BUDGET_METHOD = "rd"
"""What a budget alone means."""

DEFAULT_METHOD = "squant"
"""The best data-free method we have measured (docs/methods.md): what `--bits` alone runs."""

EXPORTERS: Mapping[str, Exporter] = {
    exporter.name: exporter
    for exporter in (
        Exporter("safetensors", ".safetensors", target="qcompress.exporters.safetensors:export"),
        Exporter(
            "compressed-tensors",
            ".safetensors",
            "folder",
            "qcompress.exporters.compressed_tensors:export",
            takes=("keep_unfit", "mixed"),
        ),
        Exporter(
            "gguf",
            ".gguf",
            "file",
            "qcompress.exporters.gguf:export",
            takes=("keep_unfit", "pad_hidden", "round_scales"),
        ),
        Exporter("onnx", ".onnx", "file"),
        Exporter("coreml", ".mlpackage", "folder"),
        Exporter("mlx", ".safetensors", "folder", "qcompress.exporters.mlx:export", takes=("keep_unfit",)),
    )
}
