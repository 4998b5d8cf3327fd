"""Every method by name: its config, what it needs, what it refuses, and where its code lies. Imports no torch.

A new method is a new file, an entry here, its tests and its line in the docs.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from qcompress.registry.calibrated import AdaroundConfig, DfqConfig, GptqConfig, PdquantConfig
from qcompress.registry.clusters import (
    ClusterConfig,
    DkmConfig,
    KmeansConfig,
    LearnedConfig,
    Tune,
    refuse_codebook,
    refuse_cost,
)
from qcompress.registry.grids import GridConfig, HqqConfig, MseConfig, RtnConfig, SquantConfig, refuse_grid
from qcompress.registry.rd import RdConfig, refuse_lattice
from qcompress.registry.trained import LsqConfig, PactConfig
from qcompress.types import Family, Shape

__all__ = [
    "BUDGET_METHOD",
    "DEFAULT_METHOD",
    "EXPORTERS",
    "METHODS",
    "AdaroundConfig",
    "ClusterConfig",
    "DfqConfig",
    "DkmConfig",
    "Exporter",
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
    "refuse_codebook",
    "refuse_cost",
    "refuse_grid",
    "refuse_lattice",
]


@dataclass(frozen=True)
class Method:
    """One method: `target` is "module:function", imported only when it runs.

    needs       what it works from: `weights` alone, tensor by tensor; the `graph` of a live model; `calibration` data
                too; `training` data
    adjusts     whether it changes tensors that it was not given: batch norms, biases
    statistics  whether it can also work from saved statistics of the layers' inputs, with no live model; one that
                needs weights alone lets them weigh its errors
    representatives  whether it takes up what finetune-reg has learned, as one more argument
    live        "module:function" in place of `target` where there are a live model and calibration data:
                fit(live, decisions, bits) -> Fitted, whose codes take at most so many bits together
    refuse      (config, shape [rows, ...] of a weight) -> why the weight cannot have this grid, or None
    """

    name: str
    family: Family
    config: type[Any]
    needs: Literal["weights", "graph", "calibration", "training"]
    adjusts: bool
    refuse: Callable[[Any, Shape], str | None]
    target: str
    statistics: bool = False
    representatives: bool = False
    live: str | None = None

    @property
    def has_widths(self) -> bool:
        """Whether its codes have a fixed number of bits, which a budget may choose."""
        return any(option.name == "bits" for option in fields(self.config))

    def load(self) -> Callable[..., Any]:
        """The function: encode(weight float32 [rows, ...], config, exponent) -> Affine where `needs` is weights; of the
        family cluster encode(weight [rows, ...] in its dtype, config, exponent, evidence) -> Codebook; else
        fit(live: LiveModel, decisions) -> Fitted, with `learn` as one more argument where `needs` is training."""
        return _load(self.target)

    def load_live(self) -> Callable[..., Any]:
        """The function that `live` names."""
        return _load(self.live or "")

    def load_encode(self) -> Callable[..., Any]:
        """encode(weight, decision, gram, generator) -> Affine, where `statistics` is true."""
        return _load(f"{self.target.partition(':')[0]}:encode")


def _load(target: str) -> Callable[..., Any]:
    module, function = target.split(":")
    loaded: Callable[..., Any] = getattr(importlib.import_module(module), function)
    return loaded


def _grid_method(name: str, config: type[GridConfig]) -> Method:
    return Method(name, "quantize", config, "weights", False, refuse_grid, f"qcompress.methods.{name}:encode")


def _live_method(
    name: str,
    config: type[GridConfig],
    needs: Literal["graph", "calibration"],
    *,
    adjusts: bool = False,
    statistics: bool = False,
) -> Method:
    target = f"qcompress.methods.{name}:fit"
    return Method(name, "quantize", config, needs, adjusts, refuse_grid, target, statistics)


def _cluster_method(name: str, config: type[ClusterConfig], *, representatives: bool = False) -> Method:
    target = f"qcompress.methods.{name}:encode"
    return Method(
        name, "cluster", config, "weights", False, refuse_codebook, target, True, representatives=representatives
    )


METHODS: Mapping[str, Method] = {
    method.name: method
    for method in (
        _grid_method("rtn", RtnConfig),
        _grid_method("mse", MseConfig),
        _grid_method("squant", SquantConfig),
        _grid_method("hqq", HqqConfig),
        _live_method("dfq", DfqConfig, "graph", adjusts=True),
        _live_method("adaround", AdaroundConfig, "calibration", adjusts=True, statistics=True),
        _live_method("gptq", GptqConfig, "calibration", statistics=True),
        _live_method("pdquant", PdquantConfig, "calibration"),
        Method(
            "rd",
            "quantize",
            RdConfig,
            "weights",
            True,
            refuse_lattice,
            "qcompress.methods.rd:encode",
            live="qcompress.methods.rd:fit",
        ),
        Method("lsq", "quantize", LsqConfig, "training", True, refuse_grid, "qcompress.methods.lsq:fit"),
        Method("pact", "quantize", PactConfig, "training", True, refuse_grid, "qcompress.methods.pact:fit"),
        _cluster_method("kmeans", KmeansConfig),
        _cluster_method("learned", LearnedConfig, representatives=True),
        Method("dkm", "cluster", DkmConfig, "training", True, refuse_codebook, "qcompress.methods.dkm:fit"),
    )
}

BUDGET_METHOD = "rd"
"""What a budget alone means."""

DEFAULT_METHOD = "squant"
"""The best data-free method we have measured (docs/methods.md): what `--bits` alone runs."""


@dataclass(frozen=True)
class Exporter:
    """One format to export to: a function (artifact, output, *, force) -> bytes written; None where not built yet."""

    name: str
    suffix: str
    target: str | None = None

    def load(self) -> Callable[..., int]:
        """The function; only where `target` names one."""
        return _load(self.target or "")


EXPORTERS: Mapping[str, Exporter] = {
    exporter.name: exporter
    for exporter in (
        Exporter("safetensors", ".safetensors", "qcompress.exporters.safetensors:export"),
        Exporter("compressed-tensors", ".safetensors"),
        Exporter("gguf", ".gguf"),
        Exporter("onnx", ".onnx"),
        Exporter("coreml", ".mlpackage"),
        Exporter("mlx", ".safetensors"),
    )
}
