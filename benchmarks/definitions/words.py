"""What commands of several groups of rows have in common."""

from __future__ import annotations

from collections.abc import Iterable

RESNET20 = "$QCOMPRESS_DATA/cifar10/resnet20.safetensors"
RESNET32 = "$QCOMPRESS_DATA/cifar10/resnet32.safetensors"
MOBILENET = "$QCOMPRESS_DATA/imagenet/mobilenet_v1_075_224.safetensors"
STORIES = "$QCOMPRESS_DATA/stories/stories260K.safetensors"

TOP1 = {"top1": "0.accuracy.top1.artifact", "fp32": "0.accuracy.top1.baseline"}
CHANCE = 0.15
"""Top-1 of ten classes below which nothing was learned: half as much again as guessing gives."""
SIZE = {"bpw": "0.size.bits_per_weight", "bytes": "0.size.artifact_bytes"}


def path_of(recipe: str) -> str:
    """Of a ready recipe, or of one that only rows use."""
    return f"{recipe}.yaml" if recipe.startswith("benchmarks/") else f"recipes/{recipe}.yaml"


def sets(changes: Iterable[str]) -> str:
    """`--set` for each change of a recipe."""
    return "".join(f" --set '{change}'" if " " in change else f" --set {change}" for change in changes)


def live(verb: str, checkpoint: str, recipe: str, changes: Iterable[str] = (), more: str = "") -> str:
    """A command that needs the network that its recipe names; what it writes is the row's file."""
    words = f"qcompress {verb} {checkpoint}".rstrip()
    return f"{words} -r {path_of(recipe)}{sets(changes)}{more} --allow-code --threads 1 --force -o $OUT --json -"


def bare(verb: str, checkpoint: str, more: str) -> str:
    """A command that needs the checkpoint alone."""
    return f"qcompress {verb} {checkpoint} {more} --threads 1 --force -o $OUT --json -"
