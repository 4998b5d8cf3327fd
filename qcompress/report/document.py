"""A report and its parts are frozen values here. Imports no torch.

docs/report.md defines each figure; document_json writes and reads them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from qcompress.types.config import Shape
from qcompress.types.encoded import ClassUse
from qcompress.types.run import RunFigures

KEPT = "kept"
"""The method of tensors that are stored as they were."""

BINS = 64
"""Of every histogram."""


@dataclass(frozen=True, kw_only=True)
class LayerFigures:
    """What compression did to one tensor. None: not measured, or not a number.

    sqnr_db           follows from relative_error where not given: +infinity without error
    range             (lowest, highest) weight, over all weights
    fences            (lowest, highest) weight that is no outlier: 1.5 interquartile ranges beyond the quartiles
    levels            of the grid or codebook, ascending, each the mean over the tensor's grids; None for vectors,
                      and beyond BINS of them
    step              of an unbounded quantizer, before the factors of rows and columns; None of other grids
    histogram_before  of the weights, histogram_after of what they decode to: counts in BINS equal bins over `range`,
                      decoded values beyond it counted in the end bins
    classes           of unbounded codes that tables code: the scale classes that they use, each with its own table
    entries           of each of its codebooks, as stored
    dead              entries of its codebooks that none of its codes names; duplicates: that repeat an earlier one
    sampled           fences, outliers, kurtosis and histograms come from a fixed subset; all else from every weight
    """

    relative_error: float | None = None
    sqnr_db: float | None = None
    max_error: float | None = None
    range: tuple[float, float] | None = None
    fences: tuple[float, float] | None = None
    levels: tuple[float, ...] | None = None
    outlier_share: float | None = None
    kurtosis: float | None = None
    step: float | None = None
    levels_used: int | None = None
    entropy: float | None = None
    clipped_share: float | None = None
    classes: tuple[ClassUse, ...] | None = None
    entries: int | None = None
    dead: int | None = None
    duplicates: int | None = None
    histogram_before: tuple[int, ...] | None = None
    histogram_after: tuple[int, ...] | None = None
    sampled: bool = False

    def __post_init__(self) -> None:
        if self.sqnr_db is None and self.relative_error is not None:
            object.__setattr__(self, "sqnr_db", sqnr_db(self.relative_error))
        for histogram in (self.histogram_before, self.histogram_after):
            if histogram is not None and len(histogram) != BINS:
                raise ValueError(f"a histogram has {BINS} bins, not {len(histogram)}")
            if histogram is not None and min(histogram) < 0:
                raise ValueError("a histogram counts less than nothing")


def sqnr_db(relative_error: float) -> float:
    """The signal to quantization noise ratio in dB: +infinity without error, NaN of NaN."""
    if math.isnan(relative_error) or math.isinf(relative_error):
        return -relative_error
    # Adding zero makes of the negative zero of a relative error of 1 a plain one.
    return -10 * math.log10(relative_error) + 0.0 if relative_error else math.inf


@dataclass(frozen=True, kw_only=True)
class LayerReport:
    """One tensor of the checkpoint, compressed or kept.

    method                  the method's name, or "kept"
    coding                  how its codes are stored: packed, zstd or ans
    bytes                   of the artifact that are this tensor's own: codes and side information, or its kept data
    dim                     weights that have one code together
    codebook_in             the tensor that stores the codebook which this one shares; None: it has its own, or none
    side_information_bytes  scale, zero point, offset, codebook, where they are stored with the tensor
    baseline_bytes          of the checkpoint
    tied_to                 the tensor that is stored in place of this one, which then has 0 bytes
    sensitivity             where measured: what compressing this tensor alone costs
    bound_gap_db            by how much its error is above the least at its bits that any code could have, were its
                            weights Gaussian of one variance; follows from bytes and SQNR where not given
    """

    name: str
    shape: Shape
    dtype: str
    method: str = KEPT
    bits: int | None = None
    dim: int = 1
    granularity: str | None = None
    group_size: int | None = None
    form: str | None = None
    coding: str | None = None
    codebook_in: str | None = None
    bytes: int
    side_information_bytes: int = 0
    baseline_bytes: int
    tied_to: str | None = None
    reason: str
    sensitivity: float | None = None
    bound_gap_db: float | None = None
    figures: LayerFigures | None = None

    def __post_init__(self) -> None:
        bits, sqnr = self.bits_per_weight, self.sqnr_db
        if self.bound_gap_db is None and self.compressed and bits is not None and sqnr is not None:
            # D(R) of a Gaussian: 2**(-2 R) of its variance.
            object.__setattr__(self, "bound_gap_db", 20 * math.log10(2) * bits - sqnr)

    @property
    def compressed(self) -> bool:
        return self.method != KEPT

    @property
    def weights(self) -> int:
        return math.prod(self.shape)

    @property
    def measured(self) -> LayerFigures:
        """Its figures, all None where there are none."""
        return self.figures if self.figures is not None else LayerFigures()

    @property
    def sqnr_db(self) -> float | None:
        return self.measured.sqnr_db

    @property
    def bits_per_weight(self) -> float | None:
        """Of this tensor's own bytes; None where it stores no weight."""
        return self.bytes * 8 / self.weights if self.weights and self.tied_to is None else None


@dataclass(frozen=True, kw_only=True)
class SizeParts:
    """Every byte of the artifact by its owner.

    side_information  of all tensors, what they pool included
    header            safetensors headers with the manifest and their padding
    index             the index of a sharded folder
    """

    codes: int
    side_information: int
    kept: int
    header: int
    index: int = 0

    @property
    def total(self) -> int:
        return sum(self.by_owner.values())

    @property
    def by_owner(self) -> Mapping[str, int]:
        """Owner -> its bytes."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class SizeFigures:
    """Sizes on disk. Bits per weight count what is stored: a tied copy's weights are not counted again.

    bits_per_weight       codes and all their side information over the compressed weights; None without any
    bits_per_weight_file  the whole artifact over all weights
    entropy_bound_bytes   order-0 entropy of each tensor's codes, summed; side information not counted
    """

    baseline_bytes: int
    artifact_bytes: int
    ratio: float | None
    bits_per_weight: float | None
    bits_per_weight_file: float | None
    entropy_bound_bytes: int | None
    weights: int
    compressed_weights: int
    parts: SizeParts

    def __post_init__(self) -> None:
        if self.parts.total != self.artifact_bytes:
            raise ValueError(f"the parts sum to {self.parts.total} bytes, the artifact has {self.artifact_bytes}")

    @property
    def entropy_bits(self) -> float | None:
        """The entropy bound in bits per compressed weight; None where it was not measured."""
        if self.entropy_bound_bytes is None or not self.compressed_weights:
            return None
        return 8 * self.entropy_bound_bytes / self.compressed_weights


@dataclass(frozen=True, kw_only=True)
class AccuracyFigures:
    """One metric of checkpoint and artifact on the same samples. None: not a number.

    drop               how much worse the artifact is, whichever direction is better: positive is worse
    interval           of the drop, paired, 95 %
    baseline_interval  of the checkpoint's own figure, 95 %, and artifact_interval of the artifact's
    untuned            the artifact's before its codebooks were tuned; None where they were not
    kmeans             of the checkpoint with codebooks of the same settings by k-means alone; None where nothing but
                       that was done
    kmeans_ratio       the artifact's over that, and untuned_ratio the one before tuning; None where that is 0
    """

    metric: str
    baseline: float | None
    artifact: float | None
    drop: float | None
    samples: int
    interval: tuple[float, float] | None = None
    baseline_interval: tuple[float, float] | None = None
    artifact_interval: tuple[float, float] | None = None
    untuned: float | None = None
    kmeans: float | None = None
    kmeans_ratio: float | None = None
    untuned_ratio: float | None = None


@dataclass(frozen=True, kw_only=True)
class GateResult:
    """One limit, such as "max-size" or "max-drop top1", and the value that was held against it.

    In bytes, bits per weight, dB or the metric's unit. A value of None passed as an SQNR without error, or failed as
    not a number.
    """

    name: str
    limit: float | int
    value: float | int | None
    passed: bool


@dataclass(frozen=True, kw_only=True)
class ArtifactFile:
    """The artifact that a report belongs to: its file name without folder, and the SHA-256 of its data."""

    name: str
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Report:
    """All that is known about one artifact. accuracy and run are None where nothing was measured.

    input_sha256  of the checkpoint's names, dtypes, shapes and CRC-32s, as in the artifact's manifest; None: unknown
    """

    artifact: ArtifactFile
    recipe_hash: str
    input_sha256: str | None = None
    size: SizeFigures
    accuracy: tuple[AccuracyFigures, ...] | None = None
    gates: tuple[GateResult, ...] = ()
    warnings: tuple[str, ...] = ()
    run: RunFigures | None = None
    layers: tuple[LayerReport, ...]

    @property
    def compressed(self) -> tuple[LayerReport, ...]:
        return tuple(layer for layer in self.layers if layer.compressed)

    @property
    def measured(self) -> Mapping[str, AccuracyFigures]:
        """Metric -> its figures; empty where nothing was measured."""
        return {item.metric: item for item in self.accuracy or ()}

    @property
    def worst(self) -> LayerReport | None:
        """The compressed tensor of least SQNR, one that is not a number before all others; None without any."""
        measured = [layer for layer in self.compressed if layer.sqnr_db is not None]
        return min(measured, key=lambda layer: badness(layer.sqnr_db), default=None)


def badness(sqnr: float | None) -> tuple[int, float]:
    """A key that sorts the worst SQNR first: NaN, then by dB, then what was not measured."""
    if sqnr is None:
        return (2, 0.0)
    return (0, 0.0) if math.isnan(sqnr) else (1, sqnr)


def make_size(
    baseline_bytes: int,
    artifact_bytes: int,
    layers: Sequence[LayerReport],
    *,
    header_bytes: int,
    index_bytes: int = 0,
    pooled_bytes: int = 0,
) -> SizeFigures:
    """The size figures of an artifact from what its layers and its files hold.

    pooled_bytes  side information that several tensors share and no layer counts
    raises        ValueError where the parts do not sum to artifact_bytes
    """
    compressed = [layer for layer in layers if layer.compressed]
    side_information = sum(layer.side_information_bytes for layer in compressed) + pooled_bytes
    codes = sum(layer.bytes - layer.side_information_bytes for layer in compressed)
    kept = sum(layer.bytes for layer in layers if not layer.compressed)
    weights = sum(layer.weights for layer in layers if layer.tied_to is None)
    compressed_weights = sum(layer.weights for layer in compressed if layer.tied_to is None)
    return SizeFigures(
        baseline_bytes=baseline_bytes,
        artifact_bytes=artifact_bytes,
        ratio=baseline_bytes / artifact_bytes if artifact_bytes else None,
        bits_per_weight=(codes + side_information) * 8 / compressed_weights if compressed_weights else None,
        bits_per_weight_file=artifact_bytes * 8 / weights if weights else None,
        entropy_bound_bytes=entropy_bound(compressed),
        weights=weights,
        compressed_weights=compressed_weights,
        parts=SizeParts(
            codes=codes, side_information=side_information, kept=kept, header=header_bytes, index=index_bytes
        ),
    )


def entropy_bound(compressed: Sequence[LayerReport]) -> int | None:
    """Bytes that the codes would take at the order-0 entropy of each tensor; None where one was not measured."""
    total = 0
    for layer in compressed:
        if layer.tied_to is not None or not layer.weights:
            continue
        if layer.measured.entropy is None:
            return None
        total += math.ceil(layer.weights // layer.dim * layer.measured.entropy / 8)
    return total if compressed else None
