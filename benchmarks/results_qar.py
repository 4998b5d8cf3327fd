"""The section of docs/results.md on regularizers for codebooks: small AlexNet and VGG16, each against k-means alone.

    QCOMPRESS_DATA=data python benchmarks/results_qar.py --work results [--seeds 3] [--only seed]

Malchiodi, Ferraretto, Frasca 2026, Figure 3, at a fraction of its size. Finished runs lie in the work folder as JSON
and are not repeated; --only takes a part of a run's name, --page runs nothing.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from page import average, put_section, words_beside
from runs import ROOT, call, top1

RECIPES = ROOT / "recipes" / "qar"
SMALL = (
    "data.train.samples=8000",
    "data.train.batch_size=32",
    "data.eval.samples=2000",
    "finetune.epochs=6",
    "finetune.optimizer={adamw: {lr: 0.001}}",
    "finetune.naive_bits=[]",
    "finetune.kmeans_bits=[]",
)
CLUSTERED = ("data.train.samples=4000", "data.eval.samples=2000")
REGULARIZERS = {
    "sine": "{levels: %d, strength: 0.002, start: 0.2, ramp: 0.4, coupling: decoupled}",
    "cosine": "{levels: %d, strength: 0.002, start: 0.2, ramp: 0.4, coupling: decoupled}",
    "min_squared": "{levels: %d, strength: 2.0, start: 0.2, ramp: 0.4, coupling: decoupled}",
    "exponential": "{levels: %d, strength: 0.05, start: 0.2, ramp: 0.4, coupling: decoupled}",
}
SCOPES = {"all": (), "conv": ("rules.1",), "dense": ("rules.0",)}
"""Which layers are clustered: the rules that keep instead."""


class Network(NamedTuple):
    """Arguments that make it small, the patterns of its rules, and the entries a layer that it is shared to."""

    title: str
    arguments: tuple[str, ...]
    layers: dict[str, str]
    levels: tuple[int, ...]


NETWORKS = {
    "alexnet": Network(
        "AlexNet", ("model.args.width=0.25",), {"rules.0": "conv*.weight", "rules.1": "fc*.weight"}, (2, 4)
    ),
    "vgg16": Network(
        "VGG16",
        ("model.args.width=0.125", "model.args.dropout=0.0"),
        {"rules.0": "features.*.weight", "rules.1": "classifier.*.weight"},
        (4, 8),
    ),
}


def once(words: Sequence[str], changes: Sequence[str], kept: Path, *, runs: bool) -> dict[str, Any] | None:
    """The JSON of a command with these changes of its recipe; None where it is not there and not to be made."""
    if not runs and not kept.is_file():
        return None
    changed = [word for change in changes for word in ("--set", change)]
    return call([*words, *changed, "--allow-code", "--force", "--json", "-"], kept)


def figures(
    network: str, name: str, levels: int, scope: str, seed: int, options: argparse.Namespace
) -> dict[str, float] | None:
    """Top-1 of one network in full precision, and clustered before and after tuning; None where it was not run."""
    trained = f"{network}_{name}_{levels}_{seed}" if name != "none" else f"{network}_none_{seed}"
    recipe, checkpoint = RECIPES / f"{network}_{name}.yaml", options.work / f"{trained}.safetensors"
    clustered = f"{trained}_{levels}_{scope}"
    runs = options.only in clustered and not options.page
    about = NETWORKS[network]
    changes = (*about.arguments, *SMALL)
    if name != "none":
        key = f"finetune.regularize.0.{name.replace('_', '-')}"
        changes = (*changes, f"{key}={REGULARIZERS[name] % levels}")
    words = ["finetune-reg", "-r", str(recipe), "--seed", str(seed), "-o", str(checkpoint)]
    if once(words, changes, options.work / f"{trained}.json", runs=runs) is None:
        return None
    kept = tuple(f'{rule}={{match: "{about.layers[rule]}", keep: {{}}}}' for rule in SCOPES[scope])
    widths = ()
    if name == "none":
        bits = levels.bit_length() - 1
        widths = tuple(f"{rule}.kmeans.bits={bits}" for rule in about.layers if rule not in SCOPES[scope])
    words = ["cluster", str(checkpoint), "-r", str(recipe), "-o", str(options.work / "out.safetensors")]
    report = once(words, (*about.arguments, *CLUSTERED, *kept, *widths), options.work / f"{clustered}.json", runs=runs)
    if report is None:
        return None
    found = top1(report)
    return {"FP32": found["baseline"], "before": found["untuned"], "after": found["artifact"]}


HEAD = """## Regularizers for codebooks

Written by `benchmarks/results_qar.py`: top-1 over that of the same training without a regularizer and k-means with as
many entries, before and after three epochs of centroid tuning (Malchiodi, Ferraretto, Frasca 2026, Figure 3). Far
smaller than there: AlexNet of a quarter of the width, VGG16 of an eighth and without dropout, which learns nothing in
so few steps; six epochs of AdamW on 8,000 images of CIFAR-10, tuned on 4,000, measured on 2,000; strengths of our own,
since the paper gives none and so few steps need more; the regularizer works on all layers, whichever are clustered.
Seeds: %d, mean and standard deviation; of k-means the accuracy.

    QCOMPRESS_DATA=/path/to/data python benchmarks/results_qar.py --work results
"""


def table(network: str, levels: int, seeds: range, options: argparse.Namespace) -> Iterator[str]:
    """The lines of one network and one number of entries."""
    yield f"{NETWORKS[network].title}, {levels} entries a layer:\n"
    yield "| regularizer | FP32 | " + " | ".join(f"{scope}, before | after" for scope in SCOPES) + " |"
    yield "|---|---:|" + "---:|" * 2 * len(SCOPES)
    plain = {
        (scope, seed): figures(network, "none", levels, scope, seed, options) for scope in SCOPES for seed in seeds
    }
    for name in ("none", *REGULARIZERS):
        found = {
            (scope, seed): figures(network, name, levels, scope, seed, options) for scope in SCOPES for seed in seeds
        }
        cells = [average([one["FP32"] for (scope, _), one in found.items() if scope == "all" and one is not None], 2)]
        for scope in SCOPES:
            for when in ("before", "after"):
                values = []
                for seed in seeds:
                    one, base = found[scope, seed], plain[scope, seed]
                    if one is not None and base is not None:
                        values.append(one[when] if name == "none" else one[when] / base[when])
                cells.append(average(values, 2))
        title = "none: k-means" if name == "none" else name.replace("_", "-")
        yield f"| {title} | " + " | ".join(cells) + " |"
    yield ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("results"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", default="")
    parser.add_argument("--page", action="store_true")
    options = parser.parse_args()
    assert "QCOMPRESS_DATA" in os.environ
    options.work.mkdir(exist_ok=True, parents=True)
    lines = [HEAD % options.seeds]
    for network in NETWORKS:
        for levels in NETWORKS[network].levels:
            lines += table(network, levels, range(options.seeds), options)
    put_section("qar", [*lines, *words_beside("qar")])


if __name__ == "__main__":
    main()
