"""The clustering section of docs/results.md: ResNet-20 and MobileNet by k-means, tuned, and by DKM, from some starts.

    QCOMPRESS_DATA=data python benchmarks/results_clusters.py --starts FOLDER --work results

FOLDER holds the checkpoints that the recipes `recipes/cifar10/resnet20_train_*.yaml` make, by name. Finished runs lie
in the work folder as JSON and are not repeated; --only takes a part of a run's name, --page runs nothing.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any, NamedTuple

from page import put_section, words_beside
from runs import ROOT, call, top1

SETTINGS = ((1, 1), (2, 1), (4, 1), (2, 2), (4, 4))
"""Bits of a code, and weights that share one."""
CLIPPED = ("data.train.samples=4000", "data.eval.samples=2000")
DKM = ("finetune.epochs=1",)


class Start(NamedTuple):
    """A network to cluster: its checkpoint, its recipe's stem, and for which settings DKM is run too."""

    title: str
    file: str
    recipe: str = "cifar10/resnet20"
    reduced: tuple[str, ...] = CLIPPED
    settings: tuple[tuple[int, int], ...] = SETTINGS
    dkm: tuple[tuple[int, int], ...] = SETTINGS
    changes: tuple[str, ...] = ()


STARTS = {
    "resnet20": Start("ResNet-20, the checkpoint", "data:cifar10/resnet20.safetensors"),
    "min_squared_2": Start("trained to two representatives a layer", "min_squared_2.safetensors", dkm=((1, 1),)),
    "kurtosis": Start("fine-tuned with kurtosis", "kurtosis_0.safetensors"),
    "dsmm": Start("fine-tuned with DSMM", "dsmm_0.safetensors", dkm=()),
    "mobilenet": Start(
        "MobileNetV1 0.75", "data:imagenet/mobilenet_v1_075_224.safetensors", "imagenet/mobilenet_v1_075", ()
    ),
    "mobilenet_channel": Start(
        "MobileNetV1 0.75, a codebook a channel",
        "data:imagenet/mobilenet_v1_075_224.safetensors",
        "imagenet/mobilenet_v1_075",
        (),
        ((2, 1), (4, 1)),
        (),
        ("rules.0.kmeans.granularity=channel",),
    ),
    "mobilenet_dsmm": Start(
        "MobileNetV1 0.75, fine-tuned with DSMM",
        "mobilenet_dsmm.safetensors",
        "imagenet/mobilenet_v1_075",
        (),
        dkm=((4, 1),),
    ),
}


def figures(report: dict[str, Any]) -> dict[str, Any]:
    """Top-1 of the checkpoint and of the artifact before and after tuning, over that of k-means."""
    found = top1(report)
    return {name: found[name] for name in ("baseline", "untuned", "artifact", "kmeans", "kmeans_ratio", "samples")}


def cluster(start: str, method: str, setting: tuple[int, int], options: argparse.Namespace) -> dict[str, Any] | None:
    """The report of one run; None where it is not to be made."""
    bits, dim = setting
    name, about = f"{start}_{method}_{bits}_{dim}", STARTS[start]
    data = Path(os.environ["QCOMPRESS_DATA"])
    checkpoint = data / about.file[5:] if about.file.startswith("data:") else options.starts / about.file
    recipe = ROOT / "recipes" / f"{about.recipe}_{method}.yaml"
    # The ten channels of ResNet-20's last layer, which has the first rule, make no vectors of four.
    widths = {1: setting, 0: (2, 2) if dim == 4 else setting} if "resnet20" in about.recipe else {0: setting}
    changes = [*about.reduced, *about.changes]
    for index, (width, length) in widths.items():
        changes += [f"rules.{index}.{method}.bits={width}", f"rules.{index}.{method}.dim={length}"]
    if method == "dkm":
        changes += DKM
    words = ["cluster", str(checkpoint), "-r", str(recipe), "--allow-code", "--force", "--json", "-"]
    words += ["-o", str(options.work / f"{name}.safetensors")]
    words += [word for change in changes for word in ("--set", change)]
    kept = options.work / f"{name}.json"
    runs = options.only in name and not options.page and checkpoint.is_file()
    return call(words, kept, shown=figures) if runs or kept.is_file() else None


HEAD = """## Weight sharing

Written by `benchmarks/results_clusters.py`; all layers, first and last included, one codebook a layer if nothing else
is said. `bits/dim` are the bits of a code and the weights that share one (Kundu et al. 2024, Figure 3); at 4/4 the
last layer of ResNet-20, whose ten channels 4 does not divide, has 2/2. Reduced to a few CPU minutes a run: ResNet-20
on 2,000 test images, tuned and trained by DKM for one epoch on 4,000 images; MobileNet on 400 photos of ImageNet,
tuned and trained for one epoch on 256. So these figures compare rows and columns, and are no one's best.

    QCOMPRESS_DATA=/path/to/data python benchmarks/results_clusters.py --starts FOLDER --work results

| start | FP32 | bits/dim | bits a weight | k-means | entries tuned | ratio | DKM | ratio |
|---|---:|---|---:|---:|---:|---:|---:|---:|"""


def rows(start: str, options: argparse.Namespace) -> list[str]:
    """The table's lines of one network."""
    lines: list[str] = []
    for setting in STARTS[start].settings:
        plain = cluster(start, "kmeans", setting, options)
        trained = cluster(start, "dkm", setting, options) if setting in STARTS[start].dkm else None
        if plain is None:
            continue
        tuned = figures(plain)
        cells = [STARTS[start].title if not lines else "", f"{tuned['baseline']:.4f}" if not lines else ""]
        cells += [f"{setting[0]}/{setting[1]}", f"{plain['size']['bits_per_weight']:.2f}"]
        cells += [f"{tuned['kmeans']:.4f}", f"{tuned['artifact']:.4f}", _ratio(tuned)]
        cells += ["-", "-"] if trained is None else [f"{top1(trained)['artifact']:.4f}", _ratio(top1(trained))]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _ratio(figures: dict[str, Any]) -> str:
    return "-" if figures["kmeans_ratio"] is None else f"{figures['kmeans_ratio']:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("results"))
    parser.add_argument("--starts", type=Path, default=Path("results"))
    parser.add_argument("--only", default="")
    parser.add_argument("--page", action="store_true")
    options = parser.parse_args()
    options.work.mkdir(exist_ok=True, parents=True)
    lines = [HEAD, *(line for start in STARTS for line in rows(start, options))]
    put_section("clusters", [*lines, "", *words_beside("clusters")])


if __name__ == "__main__":
    main()
