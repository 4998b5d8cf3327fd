"""The glossary defines every figure in one line: for --explain, HTML and docs/glossary.md. Imports no torch."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass

from qcompress.report.document import BINS


@dataclass(frozen=True, slots=True)
class Term:
    """One figure: `title` as people read it, `line` its definition in one line, `other` further names for it."""

    title: str
    line: str
    other: tuple[str, ...] = ()


SECTIONS: Mapping[str, Mapping[str, Term]] = {
    "Size": {
        "baseline_bytes": Term("baseline", "bytes of the original: of the checkpoint's files, or of one tensor"),
        "artifact_bytes": Term("size", "bytes of the artifact's files on disk", ("size",)),
        "ratio": Term("ratio", "baseline_bytes over artifact_bytes: how many times smaller", ("compression ratio",)),
        "weights": Term("weights", "elements of all tensors; a tied copy is not counted again"),
        "compressed_weights": Term("compressed weights", "elements of the compressed tensors"),
        "bits_per_weight": Term(
            "bits per weight",
            "stored bits of codes and all their side information over the compressed weights",
            ("bpw", "b/weight"),
        ),
        "bits_per_weight_file": Term(
            "bits per weight, whole file", "artifact_bytes in bits over all weights, header and kept tensors included"
        ),
        "entropy_bound_bytes": Term(
            "entropy bound", "bytes that the codes would take at the order-0 entropy of each tensor, without scales"
        ),
        "parts": Term("bytes by owner", "every byte of the artifact by what it is for; they sum to artifact_bytes"),
        "codes": Term("codes", "bytes of the integers that stand for the weights"),
        "side_information": Term(
            "side information", "bytes of scales, zero points, offsets, codebooks and tables: what decoding needs"
        ),
        "kept": Term("kept", "bytes of the tensors that are stored as they were"),
        "header": Term("header", "bytes of the safetensors headers, the manifest and their padding"),
        "index": Term("index", "bytes of the index of a sharded folder"),
    },
    "Accuracy": {
        "accuracy": Term("accuracy", "metrics of checkpoint and artifact, measured on the same samples"),
        "metric": Term("metric", "what the recipe's task measures, such as top1 or perplexity"),
        "baseline": Term("checkpoint", "the metric of the checkpoint"),
        "artifact": Term("artifact", "the file or folder that was written; under accuracy, the metric that it reaches"),
        "drop": Term("drop", "how much worse the artifact's metric is than the checkpoint's; negative is better"),
        "interval": Term(
            "interval of the drop", "95 % confidence interval of the drop, paired: both saw the same samples"
        ),
        "baseline_interval": Term("checkpoint's interval", "95 % confidence interval of the checkpoint's metric"),
        "artifact_interval": Term("artifact's interval", "95 % confidence interval of the artifact's metric"),
        "untuned": Term("before tuning", "the artifact's metric before the entries of its codebooks were tuned"),
        "kmeans": Term("k-means alone", "the metric with codebooks of the same settings by k-means, nothing trained"),
        "kmeans_ratio": Term("ratio to k-means", "the artifact's metric over that of k-means alone"),
        "untuned_ratio": Term("ratio before tuning", "the metric before tuning over that of k-means alone"),
        "samples": Term("samples", "how many samples the metric was measured on"),
        "pareto_front": Term(
            "Pareto front", "artifacts that none beats: no other is as small and as good, and better in one", ("front",)
        ),
    },
    "Layers": {
        "layers": Term("layers", "every tensor of the checkpoint, kept ones and tied copies included"),
        "name": Term("name", "as the file has it: of a tensor, an artifact or a gate"),
        "shape": Term("shape", "the tensor's dimensions"),
        "dtype": Term("dtype", "the type of the tensor's values in the checkpoint"),
        "method": Term("method", "what chose the tensor's codes; kept: stored as it was"),
        "bits": Term("bits", "width of a code: 2**bits levels", ("width",)),
        "dim": Term("dim", "neighbouring channels that have one code together", ("vector",)),
        "codebook_in": Term("codebook in", "the tensor that stores the codebook which this one shares"),
        "granularity": Term("granularity", "which weights share a grid: a tensor, a channel, or a group of a channel"),
        "group_size": Term("group size", "weights that share a grid within a channel"),
        "form": Term("form", "what places the grid beside its scale: nothing (symmetric), a zero point, or an offset"),
        "coding": Term("coding", "how codes are stored: packed at their width, or entropy coded by zstd or ans"),
        "bytes": Term("bytes", "the tensor's own bytes in the artifact: codes and side information, or its kept data"),
        "side_information_bytes": Term("side information", "the part of the tensor's bytes that is not codes"),
        "tied_to": Term("tied to", "the tensor that is stored in place of this one"),
        "reason": Term("decided by", "the rule that decided the tensor, or why it was kept", ("rule",)),
        "sensitivity": Term("sensitivity", "what compressing this tensor alone costs, where that was measured"),
        "figures": Term("figures", "what compression did to the tensor; none for a kept one"),
    },
    "Sensitivity": {
        "divergence": Term(
            "divergence", "of the network's output with one layer quantized from its output as it was; 0 is none"
        ),
        "divergence_kind": Term(
            "kind of divergence", "kl: Kullback-Leibler, nats a prediction; relative-error: squared error over energy"
        ),
        "divergence_data": Term("divergence data", "the part of the recipe's data that divergences were measured on"),
        "divergence_samples": Term("divergence samples", "how many samples divergences were measured on"),
        "metric_samples": Term("metric samples", "how many samples of data.eval the metrics were measured on"),
        "metrics": Term("metrics", "the task's metrics with one layer quantized"),
        "widths": Term("measured widths", "what one layer costs at each width, ascending"),
        "grid": Term("grid", "granularity and form of a layer's grid, the same at each width"),
        "checkpoint": Term("checkpoint file", "name of the checkpoint that was measured"),
        "measured_sha256": Term(
            "measured SHA-256", "of model, data, task, grids, widths and samples, on which sensitivities depend"
        ),
        "higher": Term("higher", "whether more of a metric is better"),
    },
    "Errors and distributions": {
        "relative_error": Term(
            "relative error", "sum of squared errors over sum of squared weights: 0 is exact, 1 as bad as all zeros",
            ("error", "rel. error"),
        ),
        "sqnr_db": Term(
            "SQNR",
            "signal to quantization noise ratio in dB, -10 log10(relative_error): 6 dB more halve the errors",
            ("sqnr", "SQNR dB", "dB"),
        ),
        "worst_sqnr_db": Term("worst SQNR", "the least SQNR of the compressed tensors, in dB", ("worst dB",)),
        "worst_layer": Term("worst layer", "the compressed tensor of least SQNR"),
        "max_error": Term("largest error", "the largest difference between a weight and its decoded value"),
        "range": Term("range", "the lowest and the highest weight"),
        "fences": Term("fences", "1.5 interquartile ranges below the weights' first and above their third quartile"),
        "outlier_share": Term(
            "outliers", "share of weights beyond the fences; 0.7 % for a normal distribution", ("outlier",)
        ),
        "kurtosis": Term(
            "kurtosis", "fourth central moment over the squared variance; 3 is normal, more means heavier tails"
        ),
        "levels": Term(
            "levels", f"what the codes stand for, averaged over the tensor's grids or codebooks; none beyond {BINS}"
        ),
        "step": Term(
            "step", "of unbounded codes: the distance of neighbouring levels, before the factors of rows and columns"
        ),
        "bound_gap_db": Term(
            "distance to the bound",
            "dB of error above a Gaussian source's D(R) at the tensor's bits; scalar codes come to 1.53 at high rates",
            ("bound",),
        ),
        "classes": Term("scale classes", "of unbounded codes: codes of like magnitude share a table; what they take"),
        "context": Term("table", "its number: that of a scale class, and 32 or 64 more in states of a trellis"),
        "count": Term("codes", "how many of the tensor's codes the table codes"),
        "magnitude": Term("magnitude", "mean absolute code of a scale class"),
        "ideal_bits": Term("ideal bits", "bits a code at the order-0 entropy of the tensor's codes in the class"),
        "table_bits": Term("table bits", "bits a code under the stored table, which other tensors may share"),
        "levels_used": Term("levels used", "how many different codes occur"),
        "entries": Term("entries", "of each codebook of the tensor, as stored: no more than values differ"),
        "dead": Term("dead entries", "entries of the tensor's codebooks that none of its codes names"),
        "duplicates": Term("duplicate entries", "entries of the tensor's codebooks that repeat an earlier one"),
        "entropy": Term(
            "entropy", "order-0 entropy in bits a code: what an ideal coder with one table for the tensor would need"
        ),
        "clipped_share": Term(
            "clipped", "share of weights more than half a step beyond the end levels of their grid", ("clipped",)
        ),
        "histogram_before": Term(
            "weights before", f"counts of the weights in {BINS} equal bins over their range", ("histogram",)
        ),
        "histogram_after": Term(
            "weights after", "counts of the decoded values in the same bins; what lies beyond counts in the end bins"
        ),
        "sampled": Term(
            "sampled", "true: fences, outliers, kurtosis and histograms come from a fixed subset of the weights"
        ),
    },
    "Gates": {
        "gates": Term("gates", "limits that fail a run with exit code 4"),
        "limit": Term("limit", "what a gate's value is held against; a value equal to its limit passes"),
        "value": Term("value", "what was measured for a gate"),
        "passed": Term("passed", "whether a gate's value keeps its limit; what is not a number never does"),
        "max-size": Term("max-size", "gate: artifact_bytes are at most so many"),
        "max-bpw": Term("max-bpw", "gate: bits_per_weight are at most so many"),
        "min-sqnr": Term("min-sqnr", "gate: the SQNR of the worst compressed tensor is at least so many dB"),
        "min-metric": Term("min-metric", "gate: a metric of the artifact is at least so high"),
        "max-drop": Term(
            "max-drop", "gate: a metric's drop is at most so large; with --baseline-report, beyond that report's drop"
        ),
        "max-growth": Term(
            "max-growth", "gate: artifact_bytes grow over those of the --baseline-report by at most this share"
        ),
    },
    "Run": {
        "run": Term("run", "what making the artifact took"),
        "seconds": Term("seconds", "wall time of the whole command"),
        "cpu_seconds": Term("processor seconds", "processor time of the whole command, all threads and processes"),
        "peak_memory_bytes": Term("peak memory", "the largest resident memory of the process"),
        "device": Term("device", "where the methods computed"),
        "versions": Term("versions", "of qcompress and of what its figures may depend on"),
        "sha256": Term("SHA-256", "of the artifact's data: ties a report to its artifact"),
        "recipe_hash": Term("recipe hash", "of the resolved recipe, as the artifact's manifest has it"),
        "input_sha256": Term("input hash", "of the checkpoint's tensors: which checkpoint the artifact was made from"),
        "warnings": Term("warnings", "what was also said while the artifact was made"),
    },
    "Comparison": {
        "label": Term("label", "A, B, C: the artifacts in the order in which they were given"),
        "bytes_change": Term("change in bytes", "bytes less those of the first artifact"),
        "sqnr_change_db": Term("change in SQNR", "SQNR less that of the first artifact, in dB; positive is better"),
        "trade_offs": Term("trade-offs", "size against quality of several artifacts, with their Pareto front"),
        "higher_is_better": Term("higher is better", "whether a larger value of the metric is the better one"),
    },
}  # fmt: skip
"""Names as the report's JSON and the command line spell them."""

GLOSSARY: Mapping[str, Term] = {name: term for terms in SECTIONS.values() for name, term in terms.items()}


def find_term(word: str) -> str | None:
    """The name of the term that `word` means, in any case, with any of its names; None for an unknown one."""
    return _names().get(_folded(word))


def nearest_terms(word: str) -> tuple[str, ...]:
    """Up to three terms whose names look or begin like `word`, nearest first."""
    known, folded = _names(), _folded(word)
    close = difflib.get_close_matches(folded, known, n=6, cutoff=0.6)
    close += [name for name in known if folded and folded in name]
    return tuple(dict.fromkeys(known[name] for name in close))[:3]


def explain(name: str) -> str:
    """One line: the name and the definition of a term of the glossary."""
    return f"{name}: {GLOSSARY[name].line}"


def glossary_markdown() -> str:
    """The text of docs/glossary.md."""
    lines = [
        "# Glossary",
        "",
        "Figures in one line each, as `qcompress report --explain NAME` prints it. Formulas: [report.md](report.md).",
    ]
    for section, terms in SECTIONS.items():
        lines += ["", f"## {section}", "", "| figure | |", "|---|---|"]
        lines += [f"| `{name}` | {_markdown(term.line)} |" for name, term in terms.items()]
    return "\n".join(lines) + "\n"


def _markdown(line: str) -> str:
    return line.replace("*", "\\*")


def _names() -> dict[str, str]:
    """Folded spelling -> name; a term's own name goes before another's title."""
    spelt: dict[str, str] = {}
    for name in GLOSSARY:
        spelt.setdefault(_folded(name), name)
    for name, term in GLOSSARY.items():
        for spelling in (*term.other, term.title):
            spelt.setdefault(_folded(spelling), name)
    return spelt


def _folded(word: str) -> str:
    return "".join(letter for letter in word.casefold() if letter.isalnum())
