"""What a registry holds: methods and exporters, and the types of the functions that they name. Imports no torch."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, Literal, Protocol, cast

from typing_extensions import TypeVar

from qcompress.types.config import MethodConfig
from qcompress.types.plan import Family, WeightKind

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from qcompress.types.encoded import Encoded, Fitted
    from qcompress.types.export import ExportOptions, ExportPlan
    from qcompress.types.plan import Decision
    from qcompress.types.run import EncodeContext, FitContext

ConfigT = TypeVar("ConfigT", bound=MethodConfig, covariant=True, default=MethodConfig)
ConfigT_contra = TypeVar("ConfigT_contra", bound=MethodConfig, contravariant=True)
LiveT = TypeVar("LiveT", contravariant=True)
ArtifactT = TypeVar("ArtifactT", contravariant=True)


class Encode(Protocol[ConfigT_contra]):
    """The codes of one weight, from the weight and what the context tells of it.

    weight   [rows, ...], its channel axes first and made one: float32, or of its own dtype on the CPU where the
             method clusters
    returns  codes and grid of that shape; the caller gives it the weight's own shape, axes and dtype
    """

    def __call__(self, weight: Tensor, config: ConfigT_contra, context: EncodeContext, /) -> Encoded: ...


class Fit(Protocol[LiveT, ConfigT_contra]):
    """The codes of all weights of a live model that the decisions name, and what the method changed beside them.

    live  a model.live.LiveModel. The decoded weights go into `live.quantized`, where whoever called puts them again: a
          method that works layer by layer needs them there before it ends, one that trains does not
    """

    def __call__(
        self, live: LiveT, decisions: Sequence[Decision[ConfigT_contra]], context: FitContext, /
    ) -> Fitted: ...


class Export(Protocol[ArtifactT]):
    """All that an artifact becomes in another tool's format, decided before a byte of it is written.

    artifact  an artifact.reader.Artifact, of which headers and, where the format asks for it, grids are read
    raises    ArtifactError (Refusals where several) for what the format cannot hold
    """

    def __call__(self, artifact: ArtifactT, options: ExportOptions, /) -> ExportPlan: ...


def load(target: str) -> object:
    """What "module:name" names, imported now; the registry says of which type it is."""
    module, name = target.split(":")
    return getattr(importlib.import_module(module), name)


@dataclass(frozen=True)
class Method(Generic[ConfigT]):
    """One method: its module is imported only when it runs, and holds `encode`, `fit` or both.

    needs            what it works from: `weights` alone, tensor by tensor; the `graph` of a live model; `calibration`
                     data too; `training` data
    takes            on a live model, of which kind the weights are that it can take; empty: any
    called           on a live model, whether a forward pass must call the modules that hold its weights
    adjusts          whether it changes tensors that it was not given: batch norms, biases
    rates            whether its codes have a step of any size in place of a width
    statistics       whether saved statistics of the layers' inputs can stand in for a live model or, where it needs
                     weights alone, weigh its errors
    representatives  whether it takes up what finetune-reg has learned
    module           where its code lies; qcompress.methods.NAME where empty
    """

    name: str
    family: Family
    config: type[ConfigT]
    needs: Literal["weights", "graph", "calibration", "training"]
    takes: tuple[WeightKind, ...] = ()
    called: bool = False
    adjusts: bool = False
    rates: bool = False
    statistics: bool = False
    representatives: bool = False
    module: str = ""

    @property
    def encodes(self) -> bool:
        """Whether it can encode one weight by itself."""
        return self.needs == "weights" or (self.needs == "calibration" and self.statistics)

    @property
    def fits(self) -> bool:
        """Whether it can work on a live model; one that has rates does so where there are calibration data."""
        return self.needs != "weights" or self.rates

    def load_encode(self) -> Encode[ConfigT]:
        """Its `encode`, where `encodes` is true."""
        return cast("Encode[ConfigT]", self._load("encode"))

    def load_fit(self) -> Fit[object, ConfigT]:
        """Its `fit`, where `fits` is true."""
        return cast("Fit[object, ConfigT]", self._load("fit"))

    def _load(self, function: str) -> object:
        return load(f"{self.module or f'qcompress.methods.{self.name}'}:{function}")


@dataclass(frozen=True)
class Exporter:
    """One format to export to.

    suffix  of the output where it is one file, and
    writes  what that is: a `folder`, a `file`, or whichever of them the artifact is
    target  "module:function" of an Export; None where it is not built yet
    takes   the fields of ExportOptions that it heeds
    """

    name: str
    suffix: str
    writes: Literal["same", "folder", "file"] = "same"
    target: str | None = None
    takes: tuple[str, ...] = ()

    def load(self) -> Export[object]:
        """The function; only where `target` names one."""
        return cast("Export[object]", load(self.target or ""))
