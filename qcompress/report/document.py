"""A report and its parts are frozen values here, each field with what people are told of it. Imports no torch.

A figure is a field here, or in a noun that a report holds from elsewhere, and the formula that fills it. Schema,
glossary, CSV, tables and pages follow from its row. A field without one has the row of the same name of another noun.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, TypeAlias

from qcompress.types.encoded import ClassUse
from qcompress.types.figures import Count, NotNegative, Positive, figure
from qcompress.types.run import RunFigures

KEPT = "kept"
"""The method of tensors that are stored as they were."""

BINS = 64
"""Of every histogram."""

MOST_WEIGHTS = 10**18
"""Of one tensor."""

Pair: TypeAlias = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class LayerFigures:
    """What compression did to one tensor; w is a weight, ŵ what its code decodes to. null: not measured, or no number.

    Fences, outliers, kurtosis and histograms come from a fixed subset of the weights where `sampled` says so, all else
    from every weight.
    """

    # fmt: off
    range: Pair | None = field(default=None, metadata=figure(
        "range", "", "the lowest and the highest weight"))
    relative_error: NotNegative | None = field(default=None, metadata=figure(
        "relative error", "number",
        "sum of squared errors over sum of squared weights: 0 is exact, 1 as bad as all zeros",
        "Σ(w − ŵ)² / Σw²; 0 of an all-zero tensor that decodes to zeros",
        short="rel. error", spare=4, other=("error",)))
    sqnr_db: float | None = field(default=None, metadata=figure(
        "SQNR", "decibels",
        "signal to quantization noise ratio in dB, -10 log10(relative_error): 6 dB more halve the errors",
        "−10 log₁₀ of `relative_error`; null beside a relative error of 0: no error, which gates take for infinite",
        short="SQNR dB", other=("sqnr", "dB")))
    max_error: float | None = field(default=None, metadata=figure(
        "largest error", "number", "the largest difference between a weight and its decoded value", "max |w − ŵ|"))
    fences: Pair | None = field(default=None, metadata=figure(
        "fences", "", "1.5 interquartile ranges below the weights' first and above their third quartile",
        "what lies beyond is an outlier"))
    levels: tuple[float, ...] | None = field(default=None, metadata=figure(
        "levels", "", f"what the codes stand for, averaged over the tensor's grids or codebooks; none beyond {BINS}",
        "ascending; null of vectors"))
    outlier_share: float | None = field(default=None, metadata=figure(
        "outliers", "share", "share of weights beyond the fences; 0.7 % for a normal distribution",
        spare=7, other=("outlier",)))
    kurtosis: float | None = field(default=None, metadata=figure(
        "kurtosis", "number", "fourth central moment over the squared variance; 3 is normal, more means heavier tails",
        "Pearson's; null where all weights are equal"))
    step: float | None = field(default=None, metadata=figure(
        "step", "number",
        "of unbounded codes: the distance of neighbouring levels, before the factors of rows and columns",
        "null of other grids"))
    levels_used: Count | None = field(default=None, metadata=figure(
        "levels used", "count", "how many different codes occur"))
    entropy: float | None = field(default=None, metadata=figure(
        "entropy", "number",
        "order-0 entropy in bits a code: what an ideal coder with one table for the tensor would need",
        "−Σ p log₂ p over the codes, each of share p", unit="bits", spare=5))
    clipped_share: float | None = field(default=None, metadata=figure(
        "clipped", "share", "share of weights more than half a step beyond the end levels of their grid", spare=6))
    classes: tuple[ClassUse, ...] | None = field(default=None, metadata=figure(
        "scale classes", "", "of unbounded codes: codes of like magnitude share a table; what they take",
        "null of other codes, and where no tables code them"))
    entries: Count | None = field(default=None, metadata=figure(
        "entries", "count", "of each codebook of the tensor, as stored: no more than values differ",
        "null of grids, as the next two"))
    dead: Count | None = field(default=None, metadata=figure(
        "dead entries", "count", "entries of the tensor's codebooks that none of its codes names",
        "null of several codebooks in a report without weights"))
    duplicates: Count | None = field(default=None, metadata=figure(
        "duplicate entries", "count", "entries of the tensor's codebooks that repeat an earlier one"))
    histogram_before: tuple[Count, ...] | None = field(default=None, metadata=figure(
        "weights before", "", f"counts of the weights in {BINS} equal bins over their range",
        "a value on an edge belongs to the bin above it", other=("histogram",)))
    histogram_after: tuple[Count, ...] | None = field(default=None, metadata=figure(
        "weights after", "", "counts of the decoded values in the same bins; what lies beyond counts in the end bins"))
    sampled: bool = field(default=False, metadata=figure(
        "sampled", "flag", "true: fences, outliers, kurtosis and histograms come from a fixed subset of the weights",
        "evenly spaced, of at most 32,768"))
    # fmt: on

    def __post_init__(self) -> None:
        if self.sqnr_db is None and self.relative_error is not None:
            object.__setattr__(self, "sqnr_db", sqnr_db(self.relative_error))
        for histogram in (self.histogram_before, self.histogram_after):
            if histogram is not None and len(histogram) != BINS:
                raise ValueError(f"a histogram has {BINS} bins, not {len(histogram)}")


def sqnr_db(relative_error: float) -> float:
    """The signal to quantization noise ratio in dB: +infinity without error, NaN of NaN."""
    if math.isnan(relative_error) or math.isinf(relative_error):
        return -relative_error
    # Adding zero makes of the negative zero of a relative error of 1 a plain one.
    return -10 * math.log10(relative_error) + 0.0 if relative_error else math.inf


@dataclass(frozen=True, kw_only=True)
class LayerReport:
    """One tensor of the checkpoint, compressed or kept."""

    # fmt: off
    name: str = field(metadata=figure(
        "name", "text", "as the file has it: of a tensor, an artifact or a gate", short="layer"))
    shape: tuple[Count, ...] = field(metadata=figure(
        "shape", "shape", "the tensor's dimensions", spare=3))
    dtype: str = field(metadata=figure(
        "dtype", "text", "the type of the tensor's values in the checkpoint"))
    method: str = field(default=KEPT, metadata=figure(
        "method", "text", "what chose the tensor's codes; kept: stored as it was", spare=1))
    bits: Positive | None = field(default=None, metadata=figure(
        "bits", "count", "width of a code: 2**bits levels", "null of codes without a width", other=("width",)))
    dim: Positive = field(default=1, metadata=figure(
        "dim", "count", "neighbouring channels that have one code together", other=("vector",)))
    granularity: str | None = field(default=None, metadata=figure(
        "granularity", "text", "which weights share a grid: a tensor, a channel, or a group of a channel"))
    group_size: Count | None = field(default=None, metadata=figure(
        "group size", "count", "weights that share a grid within a channel"))
    form: str | None = field(default=None, metadata=figure(
        "form", "text", "what places the grid beside its scale: nothing (symmetric), a zero point, or an offset",
        "`symmetric`, `zero-point`, `offset`; or `codebook`; `table`: given or fitted values times a scale a group; "
        "`blocked`: scales of blocks times integers; `unbounded`: uniform without ends, entropy coded; `constant`"))
    coding: str | None = field(default=None, metadata=figure(
        "coding", "text", "how codes are stored: packed at their width, or entropy coded by zstd or ans"))
    bytes: Count = field(metadata=figure(
        "bytes", "bytes", "the tensor's own bytes in the artifact: codes and side information, or its kept data",
        "0 of a tied copy"))
    side_information_bytes: Count = field(default=0, metadata=figure(
        "side information", "bytes", "the part of the tensor's bytes that is not codes",
        "what several tensors pool is in none"))
    baseline_bytes: Count
    tied_to: str | None = field(default=None, metadata=figure(
        "tied to", "text", "the tensor that is stored in place of this one"))
    codebook_in: str | None = field(default=None, metadata=figure(
        "codebook in", "text", "the tensor that stores the codebook which this one shares",
        "null: it has its own, or none"))
    reason: str = field(metadata=figure(
        "decided by", "text", "the rule that decided the tensor, or why it was kept", spare=8, other=("rule",)))
    sensitivity: float | None = field(default=None, metadata=figure(
        "sensitivity", "number", "what compressing this tensor alone costs, where that was measured",
        "the divergence at its width", spare=3))
    bound_gap_db: float | None = field(default=None, metadata=figure(
        "distance to the bound", "decibels",
        "dB of error above a Gaussian source's D(R) at the tensor's bits; scalar codes come to 1.53 at high rates",
        "6.02 · bits per weight − SQNR. A trellis comes lower; below 0 where the variance differs from row to row or "
        "column to column, or the distribution is far from normal. Side information that tensors pool is not counted",
        other=("bound",)))
    figures: LayerFigures | None = field(default=None, metadata=figure(
        "figures", "", "what compression did to the tensor; none for a kept one"))
    # fmt: on

    def __post_init__(self) -> None:
        if self.weights > MOST_WEIGHTS:
            raise ValueError("no tensor has so many weights")
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

    @property
    def width(self) -> int | float | None:
        """The bits of a code; of codes without a bound what a weight has taken."""
        return self.bits_per_weight if self.bits is None and self.compressed else self.bits

    def value(self, name: str) -> Any:
        """The figure of this name, of the tensor or of what compression did to it."""
        return getattr(self, name) if hasattr(self, name) else getattr(self.measured, name)


@dataclass(frozen=True, kw_only=True)
class SizeParts:
    """Every byte of the artifact by its owner."""

    # fmt: off
    codes: Count = field(metadata=figure(
        "codes", "bytes", "bytes of the integers that stand for the weights"))
    side_information: Count = field(metadata=figure(
        "side information", "bytes", "bytes of scales, zero points, offsets, codebooks and tables: what decoding needs",
        "what tensors pool included"))
    kept: Count = field(metadata=figure(
        "kept", "bytes", "bytes of the tensors that are stored as they were"))
    header: Count = field(metadata=figure(
        "header", "bytes", "bytes of the safetensors headers, the manifest and their padding"))
    index: Count = field(default=0, metadata=figure(
        "index", "bytes", "bytes of the index of a sharded folder"))
    # fmt: on

    @property
    def total(self) -> int:
        return sum(self.by_owner.values())

    @property
    def by_owner(self) -> Mapping[str, int]:
        """Owner -> its bytes."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class SizeFigures:
    """Sizes on disk. Bits per weight count what is stored: a tied copy's weights are not counted again."""

    # fmt: off
    baseline_bytes: Count = field(metadata=figure(
        "baseline", "bytes", "bytes of the original: of the checkpoint's files, or of one tensor"))
    artifact_bytes: Count = field(metadata=figure(
        "size", "bytes", "bytes of the artifact's files on disk", other=("size",)))
    ratio: float | None = field(metadata=figure(
        "ratio", "times", "baseline_bytes over artifact_bytes: how many times smaller",
        spare=1, other=("compression ratio",)))
    bits_per_weight: float | None = field(metadata=figure(
        "bits per weight", "bits", "stored bits of codes and all their side information over the compressed weights",
        "null without compressed weights", short="b/weight", spare=2, other=("bpw",)))
    bits_per_weight_file: float | None = field(metadata=figure(
        "bits per weight, whole file", "bits",
        "artifact_bytes in bits over all weights, header and kept tensors included"))
    entropy_bound_bytes: Count | None = field(metadata=figure(
        "entropy bound", "bytes",
        "bytes that the codes would take at the order-0 entropy of each tensor, without scales",
        "a coder that models rows or scale classes apart may go below it; null where one was not measured"))
    weights: Count = field(metadata=figure(
        "weights", "count", "elements of all tensors; a tied copy is not counted again"))
    compressed_weights: Count = field(metadata=figure(
        "compressed weights", "count", "elements of the compressed tensors"))
    parts: SizeParts = field(metadata=figure(
        "bytes by owner", "", "every byte of the artifact by what it is for; they sum to artifact_bytes"))
    # fmt: on

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
    """One metric of checkpoint and artifact on the same samples. null: not measured, or not a number."""

    # fmt: off
    metric: str = field(metadata=figure(
        "metric", "text", "what the recipe's task measures, such as top1 or perplexity"))
    baseline: float | None = field(metadata=figure(
        "checkpoint", "metric", "the metric of the checkpoint"))
    artifact: float | None = field(metadata=figure(
        "artifact", "metric", "the file or folder that was written; under accuracy, the metric that it reaches"))
    drop: float | None = field(metadata=figure(
        "drop", "metric", "how much worse the artifact's metric is than the checkpoint's; negative is better",
        "whichever direction of the metric is the better one", spare=2))
    samples: Count = field(metadata=figure(
        "samples", "count", "how many samples the metric was measured on"))
    interval: Pair | None = field(default=None, metadata=figure(
        "interval of the drop", "", "95 % confidence interval of the drop, paired: both saw the same samples"))
    baseline_interval: Pair | None = field(default=None, metadata=figure(
        "checkpoint's interval", "", "95 % confidence interval of the checkpoint's metric"))
    artifact_interval: Pair | None = field(default=None, metadata=figure(
        "artifact's interval", "", "95 % confidence interval of the artifact's metric"))
    untuned: float | None = field(default=None, metadata=figure(
        "before tuning", "metric", "the artifact's metric before the entries of its codebooks were tuned",
        "null where they were not"))
    kmeans: float | None = field(default=None, metadata=figure(
        "k-means alone", "metric", "the metric with codebooks of the same settings by k-means, nothing trained",
        "null where the artifact is just that, or has no codebooks"))
    kmeans_ratio: float | None = field(default=None, metadata=figure(
        "ratio to k-means", "metric", "the artifact's metric over that of k-means alone",
        "null where that is 0, as the next"))
    untuned_ratio: float | None = field(default=None, metadata=figure(
        "ratio before tuning", "metric", "the metric before tuning over that of k-means alone"))
    # fmt: on


@dataclass(frozen=True, kw_only=True)
class GateResult:
    """One limit, and the value that was held against it, in bytes, bits per weight, dB or the metric's unit."""

    # fmt: off
    name: str
    limit: float | int = field(metadata=figure(
        "limit", "number", "what a gate's value is held against; a value equal to its limit passes",
        "with all its digits, as the value"))
    value: float | int | None = field(metadata=figure(
        "value", "number", "what was measured for a gate",
        "null: passed as an SQNR without error, or failed as not a number"))
    passed: bool = field(metadata=figure(
        "passed", "flag", "whether a gate's value keeps its limit; what is not a number never does"))
    # fmt: on


@dataclass(frozen=True, kw_only=True)
class ArtifactFile:
    """The artifact that a report belongs to: its file name without folder, and the SHA-256 of its data."""

    name: str
    sha256: str = field(
        metadata=figure("SHA-256", "text", "of the artifact's data: ties a report to its artifact"),
    )


@dataclass(frozen=True, kw_only=True)
class Report:
    """All that is known about one artifact. accuracy and run are null where nothing was measured."""

    # fmt: off
    artifact: ArtifactFile
    recipe_hash: str = field(metadata=figure(
        "recipe hash", "text", "of the resolved recipe, as the artifact's manifest has it"))
    input_sha256: str | None = field(default=None, metadata=figure(
        "input hash", "text", "of the checkpoint's tensors: which checkpoint the artifact was made from",
        "of their names, dtypes, shapes and CRC-32s; of several files, of their names and hashes; null: unknown"))
    size: SizeFigures
    accuracy: tuple[AccuracyFigures, ...] | None = field(default=None, metadata=figure(
        "accuracy", "", "metrics of checkpoint and artifact, measured on the same samples"))
    gates: tuple[GateResult, ...] = field(default=(), metadata=figure(
        "gates", "", "limits that fail a run with exit code 4"))
    warnings: tuple[str, ...] = field(default=(), metadata=figure(
        "warnings", "", "what was also said while the artifact was made"))
    run: RunFigures | None = field(default=None, metadata=figure(
        "run", "", "what making the artifact took"))
    layers: tuple[LayerReport, ...] = field(metadata=figure(
        "layers", "count", "every tensor of the checkpoint, kept ones and tied copies included",
        "in its order; by name where the report was read off the artifact"))
    # fmt: on

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
