"""Pin what the command line writes: hashes of artifacts and checkpoints, figures of reports, plans and exit codes.

    python tests/golden/bytes.py --write [CASE-GLOB...]
    python tests/golden/bytes.py --check [CASE-GLOB...]

`--write` runs the cases, all or those that a glob names, and keeps what they give in bytes.json beside this file.
`--check` runs them again, prints a line for each value that differs, and exits with 1 where one does. A change of the
code that is to change no output leaves every value alone.

Weights and data are drawn here, everything runs through the public command line in this process, and a case sees no
output of another one. Hashes hold for one version of torch on one kind of processor, which the case `surroundings`
pins: where that differs, write all anew from the code before the change.
"""

from __future__ import annotations

import os

# Before anything imports torch: the order of sums depends on the number of threads.
os.environ["OMP_NUM_THREADS"] = "1"

import argparse
import contextlib
import csv
import hashlib
import io
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from itertools import product
from pathlib import Path
from typing import Any, TypeAlias

import networks
import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from qcompress.cli import main
from qcompress.registry import METHODS

Pinned: TypeAlias = dict[str, Any]
Case: TypeAlias = Callable[[Path], Pinned]
"""What pins one thing: it is given an empty folder to write to, and runs where weights, data and networks lie."""

# Variables that change what the program does, and that the surroundings must not decide.
DECIDING = ("QCOMPRESS_CODING", "QCOMPRESS_MAX_MEMORY", "QCOMPRESS_SEED", "QCOMPRESS_DATA")
DECIDED = {"QCOMPRESS_THREADS": "1", "QCOMPRESS_DEVICE": "cpu"}
HERE = Path(__file__).parent
STORE = HERE / "bytes.json"
WEIGHTS, BLOCKS, NETWORK = "weights.safetensors", "blocks.safetensors", "separable.safetensors"

# What a run took, where, and with which versions.
RUN_DEPENDENT = {"run", "versions", "seconds", "cpu_seconds", "peak_memory_bytes", "generator", "device"}
# The keys whose text names something; all other text is for people, and may change.
NAMING = {
    *("name", "names", "method", "methods", "dtype", "granularity", "form", "coding", "codebook_in", "tied_to", "gate"),
    *("metric", "action", "regularizer", "family", "grid", "match", "input_sha256", "recipe_sha256", "recipe_hash"),
}
FAILED = "failed"
DIGITS = 9
LONGEST = 8
"""Longer lists of numbers are pinned as a hash."""


# Running


def run(*words: object, codes: Sequence[int] = (0,)) -> str:
    """What one command line prints to stdout, where it leaves with one of these codes."""
    code, out, err = leave(*words)
    if code not in codes:
        raise RuntimeError(f"qcompress {' '.join(map(str, words))}: exit code {code}\n{err}")
    return out


def leave(*words: object) -> tuple[int, str, str]:
    """The exit code of one command line, and its two streams."""
    out, err, before = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["qcompress", *map(str, words)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                main()
            except SystemExit as leaving:
                return int(leaving.code or 0), out.getvalue(), err.getvalue()
    finally:
        sys.argv = before
    raise AssertionError("the command line came back")


# Pinning


def hash_of(path: Path) -> str | dict[str, str]:
    """The SHA-256 of a file, or of each file under a folder."""
    if path.is_dir():
        return {
            str(one.relative_to(path)): hashlib.sha256(one.read_bytes()).hexdigest()
            for one in sorted(path.rglob("*"))
            if one.is_file()
        }
    return hashlib.sha256(path.read_bytes()).hexdigest()


def short_hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def figures(value: Any, key: str = "") -> Any:
    """A document without what depends on the run, and without text but for names; numbers to so many digits."""
    match value:
        case dict():
            kept = {one: figures(inner, one) for one, inner in value.items() if one not in RUN_DEPENDENT}
            return {one: inner for one, inner in kept.items() if inner is not None}
        case list():
            found = [figures(inner, key) for inner in value]
            numbers = all(isinstance(inner, int | float) for inner in found)
            return short_hash(found) if numbers and len(found) > LONGEST else found
        case float():
            return float(f"{value:.{DIGITS}g}")
        case str():
            return value if key in NAMING else None
        case _:
            return value


def spent(report: Mapping[str, Any]) -> Pinned:
    """What a run came to in a few numbers: bytes, bits per weight, errors, and metrics where there are any."""
    size = report["size"]
    errors = [layer["figures"]["relative_error"] for layer in report["layers"] if layer["figures"]]
    found = [one for one in errors if one is not None]
    return {
        "artifact_bytes": size["artifact_bytes"],
        "bits_per_weight": figures(size["bits_per_weight"]),
        "mean_relative_error": figures(sum(found) / len(found)),
        "bits": {layer["name"]: layer["bits"] for layer in report["layers"] if layer["bits"]},
        "accuracy": {one["metric"]: figures(one["artifact"]) for one in report.get("accuracy") or []},
    }


def words_of(recipe: str) -> list[str]:
    """The words that name a recipe, which is written where networks and data lie."""
    if not recipe:
        return []
    Path("recipe.yaml").write_text(recipe, encoding="utf-8")
    return ["-r", "recipe.yaml", *(["--allow-code"] if "model:" in recipe else [])]


def compressed(
    *words: object, recipe: str = "", dense: bool = True, report: bool = False, budget: bool = False
) -> Case:
    """Pin an artifact: its hash, and that of what it exports to or the code with which the export is refused.

    words   the command and all that follows it but the output
    report  all figures of the report too
    budget  what was spent too
    """

    def pin(folder: Path) -> Pinned:
        output = folder / ("a" if Path(str(words[1])).is_dir() else "a.safetensors")
        document = json.loads(run(*words, *words_of(recipe), "-o", output, "--json", "-", codes=(0, 4)))
        found: Pinned = {"artifact": hash_of(output)}
        if dense:
            target = folder / ("dense" if output.is_dir() else "dense.safetensors")
            code, _, _ = leave("export", output, "--to", "safetensors", "-o", target)
            found["dense"] = code or hash_of(target)
        if report:
            found["report"] = figures(document)
        else:
            found["figures"] = short_hash(figures(document))
        return found | ({"spent": spent(document)} if budget else {})

    return pin


def trained(recipe: str, *words: object, source: str = NETWORK, codes: Sequence[int] = (0,)) -> Case:
    """Pin what finetune-reg writes: the checkpoint, what was learned, the log and the figures of the report."""

    def pin(folder: Path) -> Pinned:
        output = folder / "t.safetensors"
        sources = [source] if source else []
        line = ["finetune-reg", *sources, *words_of(recipe), "-o", output, "--json", "-", *words]
        document = json.loads(run(*line, codes=codes))
        learned, log = folder / "t.reg.safetensors", folder / "t.log.jsonl"
        lines = [figures(json.loads(one)) for one in log.read_text(encoding="utf-8").splitlines()]
        return {
            "checkpoint": hash_of(output),
            "learned": hash_of(learned) if learned.exists() else None,
            "log": short_hash(lines),
            "figures": short_hash(figures(document)),
            "accuracy": {one["metric"]: figures(one["artifact"]) for one in document["accuracy"] or []},
        }

    return pin


def plan(*words: object, recipe: str = "") -> Case:
    """Pin what a dry run decides for each tensor."""
    return lambda folder: figures(json.loads(run(*words, *words_of(recipe), "--dry-run", "--json", "-")))


def refusal(*words: object, recipe: str = "", allowed: bool = True) -> Case:
    """Pin the exit code of a wrong call; where not `allowed`, the recipe's code may not run."""

    def pin(folder: Path) -> Pinned:
        code, out, _ = leave(*words, *(word for word in words_of(recipe) if allowed or word != "--allow-code"))
        if not code:
            raise RuntimeError(f"qcompress {' '.join(map(str, words))}: is not refused")
        return {"exit_code": code, "stdout_is_empty": not out}

    return pin


# Weights and data


def normal(seed: int, *shape: int, scale: float = 0.05) -> Tensor:
    """Weights whose rows differ in size, with a few large ones among them."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.linspace(0.5, 1.5, shape[0]).reshape(-1, *[1] * (len(shape) - 1))
    drawn = torch.randn(shape, generator=generator) * scale * rows
    return torch.where(torch.rand(shape, generator=generator) < 0.01, 4 * drawn, drawn)


def weights() -> dict[str, Tensor]:
    """A tensor of every kind that a checkpoint without a model may hold."""
    return {
        "conv.weight": normal(1, 16, 8, 3, 3),
        "conv.bias": normal(2, 16),
        "depthwise.weight": normal(3, 16, 1, 3, 3),
        "norm.weight": 1 + normal(4, 16),
        "norm.bias": normal(5, 16),
        "norm.running_mean": normal(6, 16),
        "norm.running_var": 1 + normal(7, 16).abs(),
        "norm.num_batches_tracked": torch.tensor(7),
        "linear.weight": normal(8, 32, 64),
        "linear.bias": normal(9, 32),
        "embedding.weight": normal(10, 40, 32, scale=0.5),
        "brain.weight": normal(11, 24, 48).bfloat16(),
        "half.weight": normal(12, 24, 32).half(),
        "double.weight": normal(14, 8, 24).double(),
        "mask": torch.arange(12, dtype=torch.int8).reshape(3, 4),
        "temperature": torch.tensor(2.5),
        "skewed.weight": normal(13, 32, 48).pow(3) * 100,
        "constant.weight": torch.full((8, 16), 0.37),
        "zero.weight": torch.zeros(8, 16),
    }


def blocks() -> dict[str, Tensor]:
    """Blocks of alike layers, stacked experts, and a tensor of more codes than one chunk holds."""
    names = [f"blocks.{block}.{kind}.weight" for block in range(2) for kind in ("q_proj", "k_proj")]
    return {
        **{name: (normal(20 + index, 12, 16) * (1 + index)).bfloat16() for index, name in enumerate(names)},
        "experts.weight": normal(30, 4, 12, 24),
        "large.weight": normal(31, 520, 512),
        "head.weight": normal(32, 8, 16),
        "head.bias": torch.zeros(8),
    }


def hub() -> dict[str, Tensor]:
    """Layers that are stored transposed, stacked experts, and an embedding that the output layer shares."""
    return {
        "h.0.attn.c_attn.weight": normal(40, 16, 24),
        "h.0.mlp.experts.weight": normal(41, 4, 12, 16),
        "h.1.attn.c_attn.weight": normal(42, 16, 24),
        "wte.weight": normal(43, 20, 16),
        "lm_head.weight": normal(43, 20, 16),
    }


def save_sharded(folder: Path, tensors: Mapping[str, Tensor], cut: int, **config: object) -> None:
    """Two shards with their index, and a configuration, which is copied along."""
    folder.mkdir()
    names, places = list(tensors), {}
    for number, part in enumerate((names[:cut], names[cut:]), start=1):
        file = f"model-{number:05}-of-00002.safetensors"
        save_file({one: tensors[one] for one in part}, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(part, file)
    total = sum(value.nbytes for value in tensors.values())
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": places})
    )
    (folder / "config.json").write_text(json.dumps(config))


def save_trained(path: str, module: nn.Module, inputs: Tensor, targets: Tensor, loss: Callable[..., Tensor]) -> None:
    """A network after a few steps on all samples at once."""
    optimizer = torch.optim.Adam(module.parameters(), 1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        loss(module(inputs), targets).backward()
        optimizer.step()
    save_file(module.state_dict(), path)


def lay_out() -> None:
    """Write weights, data and networks to the working directory."""
    shutil.copyfile(HERE / "networks.py", "networks.py")
    save_file(weights(), WEIGHTS, metadata={"format": "pt"})
    save_file(blocks(), BLOCKS, metadata={"format": "pt", "tied.weight": "head.weight"})
    save_sharded(Path("sharded"), weights(), 8, model_type="small")
    save_sharded(Path("hub"), hub(), 3, model_type="gpt2", num_experts=4, tie_word_embeddings=True)
    broken = weights()
    broken["linear.weight"][0, 0] = float("nan")
    save_file(broken, "nan.safetensors")

    random = np.random.default_rng(0)
    labels = random.integers(4, size=96)
    pixels = random.integers(0, 160, size=(96, networks.SIDE, networks.SIDE, 3))
    pixels[..., 0] += 25 * (labels % 2)[:, None, None]
    pixels[..., 1] += 25 * (labels // 2)[:, None, None]
    images = (torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.25
    np.savez("images.npz", x=pixels.astype(np.uint8), y=labels)
    np.savez("mirror.npz", x=images.numpy(), y=images.numpy())
    starts, steps = random.integers(networks.WORDS, size=64), random.integers(1, 4, size=64)
    tokens = (starts[:, None] + steps[:, None] * np.arange(10)) % networks.WORDS
    np.savez("tokens.npz", ids=tokens)

    torch.manual_seed(0)
    cross = nn.functional.cross_entropy
    save_file(networks.separable().state_dict(), "untrained.safetensors")
    save_trained(NETWORK, networks.separable(), images, torch.from_numpy(labels), cross)
    save_trained("mirror.safetensors", networks.mirror(), images, images, nn.functional.mse_loss)
    ids = torch.from_numpy(tokens)
    following = lambda output, right: cross(output[:, :-1].transpose(1, 2), right[:, 1:])  # noqa: E731
    save_trained("text.safetensors", networks.text(), ids, ids, following)


# Recipes

LIVE = """
version: 1
model: {factory: networks.py:separable}
data:
  calibration: {npz: images.npz, samples: 48, batch_size: 16}
  eval: {npz: images.npz}
  normalize: {mean: [0.5], std: [0.25]}
task: {classification: {metric: top1}}
"""
TRAIN = LIVE.replace(
    "  calibration: {npz: images.npz, samples: 48, batch_size: 16}\n",
    "  train: {npz: images.npz, batch_size: 16, augment: [flip]}\n",
)
BOTH = LIVE.replace("  eval:", "  train: {npz: images.npz, batch_size: 16}\n  eval:")
WITHOUT_DATA = """
version: 1
model: {factory: networks.py:separable, input: [3, 8, 8]}
"""
TEXT = """
version: 1
model: {factory: networks.py:text, blocks: "blocks.*"}
data:
  calibration: {npz: tokens.npz, inputs: {input_ids: ids}, samples: 32, batch_size: 16}
  eval: {npz: tokens.npz, inputs: {input_ids: ids}}
task: causal-lm
"""
MIRROR = """
version: 1
model: {factory: networks.py:mirror}
data:
  calibration: {npz: mirror.npz, samples: 32, batch_size: 16}
  train: {npz: mirror.npz, batch_size: 16}
  eval: {npz: mirror.npz}
task: {reconstruction: {peak: 4.0}}
"""
FINETUNE = """
finetune:
  epochs: 2
  optimizer: {sgd: {lr: 0.02, momentum: 0.9, nesterov: true, weight_decay: 1.0e-4}}
  schedule: {cosine: {final: 0.01}}
  warm_up: 0.1
  log_steps: 2
"""
QUICK_FINETUNE = "finetune: {epochs: 1, optimizer: {sgd: {lr: 0.005}}}\n"
CONFIDENCE = "{factory: {factory: networks.py:confidence, metric: confidence}}"
HELD = ("--minimize", "size", "--max-drop", "top1=0.05")
SMALL = "{match: [depthwise.weight, fc.weight], keep: {}}"
NINES = "{{match: [conv.weight, depthwise.weight, last.weight], {}}}"
"""A rule for the layers of whose channels groups of nine can be made."""
W4A8 = "activations: {bits: 8}\n"


def rules(*each: str) -> str:
    """The rules of a recipe, as `METHOD: {options}` for all weights or `GLOB: METHOD: {options}`."""
    lines = [one if one.startswith("{") else f'{{match: "*.weight", {one}}}' for one in each]
    return "rules:\n" + "".join(f"  - {line}\n" for line in lines)


def bare(*each: str, more: str = "") -> str:
    """A recipe without a model."""
    return f"version: 1\n{rules(*each)}{more}"


QUICK = {
    "adaround": "iterations: 20",
    "pdquant": "iterations: 4, correction_steps: 2",
}
"""What makes a method quick."""


def quick(method: str, options: str) -> str:
    return f"{method}: {{{', '.join(filter(None, (options, QUICK.get(method))))}}}"


# Cases


def grid_cases() -> Iterator[tuple[str, Case]]:
    """The methods that need weights alone: widths, granularities, grids, and their options."""
    shared = {"tensor": "granularity: tensor", "channel": "granularity: channel", "group": "group_size: 8"}
    for method, bits, granularity in product(("rtn", "mse", "squant", "hqq"), (1, 2, 3, 4, 8), shared):
        for symmetric in (False, True) if method != "hqq" else (False,):
            options = f"bits: {bits}, {shared[granularity]}, symmetric: {str(symmetric).lower()}"
            # The nine values of a depthwise channel are too few for groups.
            alone = f"{{match: depthwise.weight, rtn: {{bits: {bits}}}}}"
            recipe = bare(*([alone] if granularity == "group" else []), f"{method}: {{{options}}}")
            case = compressed("quantize", WEIGHTS, recipe=recipe)
            yield f"grid/{method}-{bits}-{granularity}{'-symmetric' if symmetric else ''}", case
    for convention, bits in product(("full-range", "narrow", "aimet", "gptq", "mid-rise"), (2, 4, 8)):
        options = f"rtn: {{bits: {bits}, symmetric: true, convention: {convention}}}"
        yield f"grid/rtn-{convention}-{bits}", compressed("quantize", WEIGHTS, recipe=bare(options))
    variants = {
        "mse-grid": "mse: {bits: 3, search: grid}",
        "mse-grid-symmetric": "mse: {bits: 3, search: grid, symmetric: true}",
        "mse-grid-norm": "mse: {bits: 4, search: grid, norm: 1.5, granularity: tensor}",
        "mse-normal": "mse: {bits: 3, effort: normal}",
        "hqq-norm": "hqq: {bits: 3, norm: 0.5, beta: 5.0, iterations: 5}",
        "hqq-round": "hqq: {bits: 3, round_zero: true}",
        "hqq-real": "hqq: {bits: 4, round_zero: false}",
        **{
            f"squant-{span}-{stages}": f"squant: {{bits: 3, range: {span}, stages: {stages}}}"
            for span, stages in product(("minmax", "clip"), ("E", "EK", "EC", "EKC"))
        },
        **{f"squant-paper-{bits}": f"squant: {{bits: {bits}, preset: paper}}" for bits in (2, 4, 8)},
    }
    for name, options in variants.items():
        yield f"grid/{name}", compressed("quantize", WEIGHTS, recipe=bare(options))
    for method, axis in product(("rtn", "mse", "squant", "hqq"), ("0", "1", "2", "[0, 1]", "[2, 0]")):
        recipe = bare(f"{{match: experts.weight, {method}: {{bits: 3, axis: {axis}}}}}")
        name = axis.strip("[]").replace(", ", "-")
        yield f"grid/{method}-axis-{name}", compressed("quantize", BLOCKS, recipe=recipe)


def command_cases() -> Iterator[tuple[str, Case]]:
    """What the command line alone says, codings, folders and dtypes."""
    plain = ("quantize", WEIGHTS)
    yield "command/bits", compressed(*plain, "--bits", 4, report=True)
    yield "command/symmetric", compressed(*plain, "--bits", 4, "--method", "rtn", "--symmetric", report=True)
    yield "command/granularity", compressed(*plain, "--bits", 3, "--method", "mse", "--granularity", "tensor")
    yield "command/effort", compressed(*plain, "--bits", 3, "--method", "mse", "--effort", "normal")
    yield "command/seed", compressed(*plain, "--bits", 3, "--seed", 5)
    yield "command/keep-dtype", compressed(*plain, "--bits", 4, "--keep-dtype", "f16", report=True)
    yield "command/keep-coding", compressed(*plain, "--bits", 4, "--keep-coding", "ans", report=True)
    yield "command/lossless", compressed(*plain, "--lossless", report=True)
    halved = bare('{match: "conv.*", keep: {dtype: f16}}', "rtn: {bits: 2}")
    yield "command/keep-rule", compressed(*plain, recipe=halved)
    mixed = ("{match: [conv.weight, linear.weight], squant: {bits: 8}}", "{match: norm.bias, rtn: {bits: 4}}")
    recipe = bare('{match: "half*", keep: {}}', *mixed, "mse: {bits: 2}")
    yield "command/mixed", compressed(*plain, recipe=recipe, report=True)
    yield "command/skip-nonfinite", compressed("quantize", "nan.safetensors", "--bits", 4, "--skip-nonfinite")
    yield "command/threads", compressed(*plain, "--bits", 4, "--threads", 2)
    yield "command/resume", compressed(*plain, "--bits", 4, "--resume")
    yield "command/max-memory", compressed("quantize", BLOCKS, "--bits", 4, "--max-memory", "1GB")
    yield "command/gates", compressed(*plain, "--bits", 2, "--max-size", "1KB", "--min-sqnr", 3, report=True)
    for source, coding, bits in product(("weights", "blocks"), ("packed", "zstd", "ans", "auto"), (1, 3, 4, 8)):
        line = ("quantize", f"{source}.safetensors", "--bits", bits, "--method", "rtn", "--coding", coding)
        yield f"coding/{source}-{coding}-{bits}", compressed(*line)
    for coding, bits in product(("packed", "zstd", "ans", "auto"), (2, 5)):
        line = ("cluster", BLOCKS, "--bits", bits, "--coding", coding)
        yield f"coding/kmeans-{coding}-{bits}", compressed(*line)
    for method, options in {"squant": "--bits 3", "rd": "--bpw 3 --effort fast"}.items():
        line = ("quantize", "sharded", "--method", method, *options.split())
        yield f"sharded/{method}", compressed(*line, report=method == "squant")
    yield "sharded/hub", compressed("quantize", "hub", "--bits", 3)
    yield "sharded/hub-kmeans", compressed("cluster", "hub", "--bits", 3, "--share", "type")
    yield "sharded/hub-rd", compressed("quantize", "hub", "--bpw", 3, budget=True)
    yield "sharded/kmeans", compressed("cluster", "sharded", "--bits", 3)
    yield "sharded/shared", compressed("cluster", "sharded", "--bits", 3, "--share", "model")
    yield "sharded/keep-dtype", compressed("quantize", "sharded", "--bits", 4, "--keep-dtype", "f16")


def cluster_cases() -> Iterator[tuple[str, Case]]:
    """Codebooks from weights alone."""
    variants = {
        **{f"{bits}": f"bits: {bits}" for bits in (1, 2, 3, 4, 6)},
        "2-channel": "bits: 2, granularity: channel",
        "2-group": "bits: 2, group_size: 4",
        **{f"3-{stored}": f"bits: 3, codebook: {stored}" for stored in ("f16", "f32", "int8")},
        **{f"3-{init}": f"bits: 3, init: {init}" for init in ("optimal", "linear", "density", "random", "k-means++")},
        "3-zero": "bits: 3, zero: true",
        "4-dim-2": "bits: 4, dim: 2",
        "4-dim-4": "bits: 4, dim: 4, codebook: int8",
        "4-dim-2-random": "bits: 4, dim: 2, init: random",
        "3-dim-2-group": "bits: 3, dim: 2, group_size: 8",
    }
    small = "{match: [depthwise.weight, constant.weight, zero.weight, double.weight], kmeans: {bits: 1}}"
    for name, options in variants.items():
        recipe = bare(small, f"kmeans: {{{options}}}")
        case = compressed("cluster", WEIGHTS, recipe=recipe, report=name in ("3-f16", "4-dim-2"))
        yield f"kmeans/{name}", case
    for share, dim in product(("layer", "type", "model"), (1, 2)):
        line = ("cluster", BLOCKS, "--bits", 3, "--dim", dim, "--share", share)
        yield f"kmeans/share-{share}-{dim}", compressed(*line)
    large = bare("{match: large.weight, kmeans: {bits: 10, codebook: int8}}")
    yield "kmeans/10-bits", compressed("cluster", BLOCKS, "--coding", "zstd", recipe=large)
    axis = bare("{match: experts.weight, kmeans: {bits: 3, axis: [0, 1], granularity: group, group_size: 12}}")
    yield "kmeans/axis", compressed("cluster", BLOCKS, recipe=axis)


def live_cases() -> Iterator[tuple[str, Case]]:
    """Methods on a live model, and what goes with them."""
    line = ("quantize", NETWORK)
    calibrated = [name for name, one in METHODS.items() if one.needs in ("graph", "calibration")]
    grids = {
        "3": "bits: 3",
        "2-tensor": "bits: 2, granularity: tensor",
        "4-symmetric": "bits: 4, symmetric: true",
        "4-paper": "bits: 4, preset: paper",
        **{f"3-{span}": f"bits: 3, range: {span}" for span in ("minmax", "mse", "tf-enhanced")},
    }
    for method, name in product(calibrated, grids):
        recipe = LIVE + rules(quick(method, grids[name])) + W4A8
        report = (method, name) == ("gptq", "3")
        yield f"live/{method}-{name}", compressed(*line, recipe=recipe, report=report)
    for method in calibrated:
        recipe = LIVE + rules(NINES.format(quick(method, "bits: 3, group_size: 9")))
        yield f"live/{method}-3-group", compressed(*line, recipe=recipe)
    variants = {
        **{
            f"dfq-{relu6}-{bits}": f"dfq: {{bits: {bits}, granularity: tensor, relu6: {relu6}}}"
            for relu6, bits in product(("skip", "caps", "relax"), (4, 8))
        },
        "dfq-absorb": "dfq: {bits: 6, granularity: tensor, fold: true, absorb: true}",
        **{f"dfq-{one}": f"dfq: {{bits: 4, bias_correction: {one}}}" for one in ("analytic", "empirical", "none")},
        "adaround-sampled": "adaround: {bits: 3, objective: sampled, iterations: 20, batch_size: 8}",
        "adaround-folded": "adaround: {bits: 3, fold: true, iterations: 20}",
        "adaround-symmetric-targets": "adaround: {bits: 3, asymmetric: false, iterations: 20}",
        "gptq-plain": "gptq: {bits: 3, act_order: false, asymmetric: false, descent: 0, sequential: false}",
        "gptq-damped": "gptq: {bits: 3, granularity: tensor, damping: 0.1}",
        "pdquant-exact": "pdquant: {bits: 3, iterations: 4, prediction_form: exact, drop: 0.3}",
        "pdquant-corrected": "pdquant: {bits: 3, iterations: 4, distribution_correction: true, correction_steps: 3}",
    }
    for name, options in variants.items():
        yield f"live/{name}", compressed(*line, recipe=LIVE + rules(options) + W4A8)
    for method in ("rtn", "mse", "squant", "hqq"):
        yield f"live/{method}", compressed(*line, recipe=LIVE + rules(f"{method}: {{bits: 4}}") + W4A8)
    for span in ("mse", "minmax", "percentile", "batch-norm", "noise"):
        recipe = LIVE + rules("squant: {bits: 4}") + f"activations: {{bits: 4, range: {span}}}\n"
        yield f"activations/{span}", compressed(*line, recipe=recipe, report=span == "mse")
    for span in ("batch-norm", "noise"):
        recipe = WITHOUT_DATA + rules("dfq: {bits: 8, granularity: tensor}") + f"activations: {{range: {span}}}\n"
        yield f"activations/{span}-without-data", compressed(*line, recipe=recipe)
    companions = {"bias": "[bias_correction]", "norm": "[batch_norm]", "both": "[bias_correction, batch_norm]"}
    for name, method in product(companions, ("rtn", "gptq")):
        recipe = LIVE + rules(f"{method}: {{bits: 2}}") + f"companions: {companions[name]}\n"
        case = compressed(*line, recipe=recipe, report=(name, method) == ("both", "rtn"))
        yield f"companions/{name}-{method}", case
    recipe = LIVE + rules("kmeans: {bits: 3}") + W4A8 + "companions: [bias_correction, batch_norm]\n"
    yield "companions/kmeans", compressed("cluster", NETWORK, recipe=recipe)
    recipe = LIVE + rules('{match: "fc.weight", gptq: {bits: 4}}', quick("adaround", "bits: 3"))
    yield "live/mixed", compressed(*line, recipe=recipe)
    yield "live/keep-dtype", compressed(*line, "--keep-dtype", "f16", recipe=LIVE + rules("gptq: {bits: 3}"))
    factory = LIVE.replace("npz: images.npz, samples: 48", "factory: networks.py:samples, args: {count: 48}")
    factory = factory.replace("{classification: {metric: top1}}", CONFIDENCE)
    yield "live/factories", compressed(*line, recipe=factory + rules("gptq: {bits: 3}"), budget=True)
    shuffled = LIVE.replace("samples: 48", "samples: 32, shuffle: true")
    yield "live/shuffled", compressed(*line, recipe=shuffled + rules("gptq: {bits: 3}") + "seed: 3\n")
    for method in ("rtn", "gptq", "adaround", "pdquant"):
        recipe = TEXT + rules("{match: embedding.weight, rtn: {bits: 4}}", quick(method, "bits: 4")) + W4A8
        yield f"text/{method}", compressed("quantize", "text.safetensors", recipe=recipe, budget=True)
    for method in ("dfq", "gptq", "adaround"):
        recipe = MIRROR + rules(quick(method, "bits: 4")) + W4A8
        yield f"mirror/{method}", compressed("quantize", "mirror.safetensors", recipe=recipe, budget=True)


def training_cases() -> Iterator[tuple[str, Case]]:
    """Methods that train a network on its grid or codebook."""
    line = ("quantize", NETWORK)
    variants = {
        "lsq-4": "lsq: {bits: 4}",
        "lsq-2-mean": "lsq: {bits: 2, start: mean, learning_rate: 0.001}",
        "lsq-3-tensor": "lsq: {bits: 3, granularity: tensor}",
        "lsq-3-group": NINES.format("lsq: {bits: 3, group_size: 9}"),
        "pact-4": "pact: {bits: 4}",
        "pact-1": "pact: {bits: 1}",
        "pact-2-unit": "pact: {bits: 2, scale: unit, clip: 6.0, clip_decay: 0.001}",
    }
    for name, options in variants.items():
        recipe = TRAIN + rules(options) + "activations: {bits: 4}\n" + QUICK_FINETUNE
        yield f"training/{name}", compressed(*line, recipe=recipe, budget=True, report=name == "lsq-4")
    extras = {
        "distil": "distil: {share: 0.5, temperature: 4}",
        "best": "keep: best",
        "norms": "norm_batches: 3",
        "adamw": "accumulate: 2, clip_norm: 1.0, label_smoothing: 0.1, batch_norm: frozen",
    }
    for name, extra in extras.items():
        finetune = f"finetune: {{epochs: 1, optimizer: {{adamw: {{lr: 0.001}}}}, {extra}}}\n"
        recipe = BOTH + rules("lsq: {bits: 3}") + "activations: {bits: 4, range: minmax}\n" + finetune
        yield f"training/lsq-{name}", compressed(*line, recipe=recipe)
    recipe = BOTH + rules("{match: fc.weight, gptq: {bits: 4}}", "lsq: {bits: 3}") + QUICK_FINETUNE
    yield "training/lsq-beside-gptq", compressed(*line, recipe=recipe)
    recipe = MIRROR + rules("lsq: {bits: 4}") + QUICK_FINETUNE
    yield "training/lsq-mirror", compressed("quantize", "mirror.safetensors", recipe=recipe)
    books = {
        "2": "bits: 2",
        "4-dim-2": "bits: 4, dim: 2",
        "2-plain": "bits: 2, metric: plain, iterations: 2",
        "2-fixed": "bits: 2, temperature: 0.001",
        "2-bf16": "bits: 2, levels: bf16",
        "2-f16-group": "bits: 2, levels: f16, group_size: 4, codebook: int8",
    }
    for name, options in books.items():
        recipe = TRAIN + rules(SMALL, f"dkm: {{{options}}}") + QUICK_FINETUNE
        case = compressed("cluster", NETWORK, recipe=recipe, budget=True, report=name == "2")
        yield f"training/dkm-{name}", case
    for name, options in {
        "rms": "bits: 3, tune: {epochs: 1, learning_rate: 0.001}",
        "sum": "bits: 3, tune: {epochs: 1, gradient: sum}",
        "mean": "bits: 3, tune: {epochs: 1, learning_rate: 0.01, gradient: mean}",
        "vectors": "bits: 4, dim: 2, tune: {epochs: 1, learning_rate: 0.001}",
        "shared": "bits: 3, share: model, zero: true, tune: {epochs: 1, learning_rate: 0.001}",
    }.items():
        recipe = TRAIN + rules(SMALL, f"kmeans: {{{options}}}")
        yield f"tune/{name}", compressed("cluster", NETWORK, recipe=recipe, budget=True)


def lattice_cases() -> Iterator[tuple[str, Case]]:
    """Rate-distortion, with data and without, and with its step in place of a budget."""
    line = ("quantize", WEIGHTS, "--bpw", 2.5)
    for effort, coding in product(("fast", "normal", "high"), ("packed", "zstd", "ans", "auto")):
        if coding == "auto" or effort == "fast":
            yield f"rd/{effort}-{coding}", compressed(*line, "--effort", effort, "--coding", coding, budget=True)
    yield "rd/report", compressed(*line, report=True)
    yield "rd/target-size", compressed("quantize", WEIGHTS, "--target-size", "10KB", budget=True)
    yield "rd/keep-dtype", compressed(*line, "--keep-dtype", "f16", "--effort", "fast", budget=True)
    yield "rd/large", compressed("quantize", BLOCKS, "--bpw", 2, "--effort", "fast", budget=True)
    for prior in ("correlated", "flips", "none"):
        options = f"rd: {{prior: {prior}, step: 0.1, price: 0.02, descent: 1}}"
        yield f"rd/prior-{prior}", compressed("quantize", WEIGHTS, recipe=bare(options))
    least = ("quantize", WEIGHTS, "--minimize", "size", "--min-sqnr", 14, "--effort", "fast")
    yield "rd/minimize", compressed(*least, budget=True)
    live = ("quantize", NETWORK)
    for name, options in {
        "normal": "{}",
        "fast": "{effort: fast}",
        "high": "{effort: high}",
        "relative": "{allocation: relative, columns: true}",
        "measured": "{allocation: measured, match: false, columns: false, damping: 0.1}",
        "free": "{price: 0, descent: 0}",
    }.items():
        recipe = LIVE + rules(f"rd: {options}") + "budget: {bpw: 3}\n"
        yield f"rd/live-{name}", compressed(*live, recipe=recipe, budget=True, report=name == "normal")
    recipe = LIVE + rules("rd: {effort: fast}") + "budget: {size: 5KB}\n" + W4A8
    yield "rd/live-size", compressed(*live, recipe=recipe, budget=True)
    recipe = LIVE + rules("rd: {effort: fast}")
    yield "rd/live-minimize", compressed(*live, *HELD, recipe=recipe, budget=True)
    for name, head in {"text": TEXT, "mirror": MIRROR}.items():
        recipe = head + rules("rd: {}") + "budget: {bpw: 3}\n"
        yield f"rd/{name}", compressed("quantize", f"{name}.safetensors", recipe=recipe, budget=True)


def budget_cases() -> Iterator[tuple[str, Case]]:
    """Budgets of methods with widths."""
    line = ("quantize", WEIGHTS)
    for method, bpw in product(("rtn", "mse", "squant", "hqq"), (2.25, 4.5)):
        flags = ("--method", method, "--bpw", bpw)
        yield f"budget/{method}-{bpw}", compressed(*line, *flags, budget=True)
    yield "budget/size", compressed(*line, "--method", "squant", "--target-size", "11KB", budget=True)
    yield "budget/linked", compressed("quantize", BLOCKS, "--method", "rtn", "--bpw", 3, budget=True)
    yield "budget/minimize", compressed(*line, "--method", "rtn", "--minimize", "size", "--min-sqnr", 12, budget=True)
    recipe = bare('{match: "conv.*", keep: {}}', "squant: {}", more="budget: {bpw: 3.0}\n")
    yield "budget/recipe", compressed(*line, recipe=recipe, budget=True)
    live = ("quantize", NETWORK)
    for method in ("squant", "gptq", "dfq", "adaround"):
        recipe = LIVE + rules(quick(method, "")) + "budget: {bpw: 3.5}\n"
        yield f"budget/live-{method}", compressed(*live, recipe=recipe, budget=True)
    recipe = LIVE + rules("rtn: {}")
    yield "budget/live-minimize", compressed(*live, *HELD, recipe=recipe, budget=True)
    yield "budget/sensitivity", sensitivity


def sensitivity(folder: Path) -> Pinned:
    """Pin what each layer costs at each width, and the widths that a budget makes of it."""
    cache, recipe = folder / "s.json", LIVE + rules("squant: {bits: 4}")
    line = ["report", "--sensitivity", NETWORK, *words_of(recipe)]
    measured = json.loads(run(*line, "--widths", "2,4,8", "--samples", 32, "--cache", cache, "--json", "-"))
    flags = ("--method", "squant", "--bpw", 4.5, "--sensitivity", cache)
    case = compressed("quantize", NETWORK, *flags, budget=True)
    return {"sensitivity": figures(measured), "budget": case(folder)}


def statistics_case(command: str, recipe: str, *words: object) -> Case:
    """Pin saved statistics, and a run without a model that works from them."""

    def pin(folder: Path) -> Pinned:
        saved = folder / "s.safetensors"
        live = ["quantize", NETWORK, *words_of(LIVE + rules("rtn: {bits: 4}")), "-q"]
        run(*live, "-o", folder / "live.safetensors", "--save-statistics", saved)
        case = compressed(command, NETWORK, *words, "--statistics", saved, recipe=recipe)
        return {"statistics": hash_of(saved), **case(folder)}

    return pin


def learned_case(options: str, *words: object) -> Case:
    """Pin clusters on the representatives that finetune-reg has learned."""

    def pin(folder: Path) -> Pinned:
        found = trained(TRAIN + FINETUNE + f'  regularize: [{{match: "*.weight", {options}}}]\n')(folder)
        case = compressed("cluster", folder / "t.safetensors", "--method", "learned", *words)
        return {"training": found, **case(folder)}

    return pin


def chained_cases() -> Iterator[tuple[str, Case]]:
    """Runs that take up what other runs left."""
    for method in ("gptq", "adaround"):
        yield f"statistics/{method}", statistics_case("quantize", "", "--method", method, "--bits", 3)
    yield "statistics/paper", statistics_case("quantize", bare("gptq: {bits: 3, preset: paper}"))
    yield "statistics/kmeans", statistics_case("cluster", "", "--bits", 3)
    vectors = bare("{match: [conv.weight, pointwise.weight], kmeans: {bits: 3, dim: 2}}")
    yield "statistics/vectors", statistics_case("cluster", vectors)
    yield "statistics/shared", statistics_case("cluster", "", "--bits", 3, "--share", "model")
    yield "learned/min-squared", learned_case("min-squared: {levels: 4}")
    yield "learned/exponential", learned_case("exponential: {levels: 4, share: model}", "--coding", "packed")
    yield "learned/static", learned_case("min-squared: {levels: 4, learnable: false}")


def regularizer_cases() -> Iterator[tuple[str, Case]]:
    """Every regularizer, its options, and how it is trained with."""
    variants = {
        "dsmm": "dsmm: {}",
        "dsmm-paper": "dsmm: {preset: paper-dsmm}",
        "dsmm-channel": "dsmm: {granularity: channel, reduction: sum, normalize: std}",
        "dsmm-learned": "dsmm: {alpha: 2.0, learnable: true, learning_rate: 0.1, dim: 2}",
        "sine": "sine: {levels: 4}",
        "sine-paper": "sine: {levels: 4, preset: paper-qar}",
        "sine-bits": "sine: {bits: 2, strength: 0.001, start: 0.0, ramp: 0.2}",
        "sine-bits-tensor": "sine: {bits: 3, granularity: tensor, power: 2, height: gap}",
        "sine-clamp": "sine: {levels: 8, outside: clamp, range: sigma, power: 2, reduction: mean}",
        "cosine": "cosine: {levels: 4}",
        "cosine-paper": "cosine: {levels: 4, preset: paper-qar}",
        "cosine-range": "cosine: {levels: 4, range: [-0.3, 0.3], outside: hinge, height: gap}",
        "min-squared": "min-squared: {levels: 4}",
        "min-squared-paper": "min-squared: {levels: 4, preset: paper-qar}",
        "min-squared-proximal": "min-squared: {levels: 4, coupling: proximal, share: type}",
        "min-squared-static": "min-squared: {levels: 8, learnable: false, init: linear, range: sigma}",
        "min-squared-density": "min-squared: {levels: 4, init: density, share: model, coupling: decoupled}",
        "exponential": "exponential: {levels: 4}",
        "exponential-paper": "exponential: {levels: 4, preset: paper-qar, scale: 3.0}",
        "exponential-proximal": "exponential: {levels: 4, init: quantile, coupling: proximal, strength: 0.1}",
        "l2": "l2: {}",
        "l2-proximal": "l2: {strength: 0.01, coupling: proximal, layers: conv}",
        "l2-decoupled": "l2: {strength: 0.01, coupling: decoupled, every: 3, normalize: var}",
        "linf": "linf: {}",
        "linf-channel": "linf: {granularity: channel, layers: dense}",
        "margin": "margin: {}",
        "margin-tail": "margin: {margin: 1.5, tail_fraction: 0.05, granularity: channel}",
        "kurtosis": "kurtosis: {}",
        "kurtosis-channel": "kurtosis: {target: 2.0, granularity: channel, layer_reduction: mean}",
        "shape-cosine": "l2: {start: 0.1, ramp: 0.3, hold: 0.3, shape: cosine}",
        "shape-tanh": "linf: {start: 0.1, ramp: 0.5, shape: tanh}",
    }
    for name, options in variants.items():
        yield f"finetune/{name}", trained(TRAIN + FINETUNE + f'  regularize: [{{match: "*.weight", {options}}}]\n')
    regularize = '  regularize: [{match: "fc.*", keep: {}}, {match: "*.weight", dsmm: {}}]\n'
    extras = {
        "distil": "  distil: {share: 0.5, temperature: 4}\n",
        "best": "  keep: best\n  label_smoothing: 0.1\n",
        "accumulate": "  accumulate: 2\n  clip_norm: 0.5\n",
        "norms": "  norm_batches: 3\n",
        "frozen": "  batch_norm: frozen\n",
        "bfloat16": "  precision: bfloat16\n",
        "loss": "  loss: networks.py:smoothed\n",
        "widths": "  naive_bits: [2, 4, 8]\n  kmeans_bits: [1, 3]\n",
    }
    for name, extra in extras.items():
        yield f"finetune/{name}", trained(TRAIN + FINETUNE + extra + regularize)
    base = TRAIN + FINETUNE + regularize
    adamw = base.replace("sgd: {lr: 0.02, momentum: 0.9, nesterov: true,", "adamw: {lr: 0.01, betas: [0.9, 0.99],")
    yield "finetune/adamw", trained(adamw)
    yield "finetune/step", trained(base.replace("{cosine: {final: 0.01}}", "{step: {at: [0.5], factor: 0.1}}"))
    yield "finetune/crop", trained(base.replace("[flip]", "[flip, crop4]"))
    yield "finetune/scratch", trained(base, source="")
    yield "finetune/seed", trained(base, "--seed", 7)
    yield "finetune/resume", trained(base, "--resume")
    yield "finetune/gate", trained(base, "--min-metric", "top1=1.01", codes=(4,))
    yield "finetune/plain", trained(TRAIN + FINETUNE)
    yield "finetune/untrained", trained(base, source="untrained.safetensors")
    mirror = MIRROR + FINETUNE + '  regularize: [{match: "*.weight", dsmm: {}}]\n'
    yield "finetune/mirror", trained(mirror, source="mirror.safetensors")


def report_case(command: Sequence[object], source: str, recipe: str = "") -> Case:
    """Pin what `report`, `verify` and `eval` say of an artifact."""

    def pin(folder: Path) -> Pinned:
        output = folder / ("a" if Path(source).is_dir() else "a.safetensors")
        run(command[0], source, *command[1:], *words_of(recipe), "-o", output, "-q")
        stored = next(folder.glob("*.report.json"))
        found: Pinned = {"stored": figures(json.loads(run("report", output, "--format", "json")))}
        found["compared"] = short_hash(figures(json.loads(run("report", output, stored, "--format", "json"))))
        if recipe:
            found["eval"] = figures(json.loads(run("eval", output, *words_of(recipe), "--json", "-")))
            found["eval_checkpoint"] = figures(json.loads(run("eval", source, *words_of(recipe), "--json", "-")))
        stored.unlink()
        found["alone"] = short_hash(figures(json.loads(run("report", output, "--format", "json"))))
        measured = run("report", output, "--baseline", source, "--format", "json")
        found["measured"] = short_hash(figures(json.loads(measured)))
        rows = csv.DictReader(io.StringIO(run("report", output, "--baseline", source, "--format", "csv")))
        found["csv"] = [short_hash({key: figures(as_number(row[key]), key) for key in row}) for row in rows]
        found["verify"] = figures(json.loads(run("verify", output, "--json", "-")))
        return found

    return pin


def as_number(text: str) -> float | str:
    """What a cell of a table holds."""
    try:
        return float(text)
    except ValueError:
        return text


def report_cases() -> Iterator[tuple[str, Case]]:
    """Reports of finished artifacts."""
    yield "report/quantize", report_case(["quantize", "--bits", 3], WEIGHTS)
    yield "report/cluster", report_case(["cluster", "--bits", 3], WEIGHTS)
    yield "report/rd", report_case(["quantize", "--bpw", 3], WEIGHTS)
    yield "report/sharded", report_case(["quantize", "--bits", 2], "sharded")
    yield "report/live", report_case(["quantize"], NETWORK, LIVE + rules("gptq: {bits: 3}") + W4A8)


def plan_cases() -> Iterator[tuple[str, Case]]:
    """Dry runs."""
    yield "plan/bits", plan("quantize", WEIGHTS, "--bits", 4)
    yield "plan/packed", plan("quantize", "sharded", "--bits", 3, "--coding", "packed", "--keep-dtype", "f16")
    groups = "{match: linear.weight, mse: {bits: 2, group_size: 16}}"
    recipe = bare('{match: "conv.*", keep: {}}', groups, "rtn: {bits: 8}")
    yield "plan/mixed", plan("quantize", WEIGHTS, recipe=recipe)
    yield "plan/cluster", plan("cluster", BLOCKS, "--bits", 3, "--share", "layer")
    yield "plan/budget", plan("quantize", WEIGHTS, "--bpw", 2.5, "--method", "squant")
    yield "plan/rd", plan("quantize", WEIGHTS, "--bpw", 2.5)
    yield "plan/live", plan("quantize", NETWORK, recipe=LIVE + rules("gptq: {bits: 4}") + W4A8)
    recipe = TRAIN + rules("lsq: {bits: 4}") + QUICK_FINETUNE
    yield "plan/train", plan("quantize", NETWORK, recipe=recipe)
    yield "plan/hub", plan("quantize", "hub", "--bits", 4)
    yield "recipe/show", shown(LIVE + rules("adaround: {bits: 4}") + W4A8)
    yield "recipe/show-finetune", shown(TRAIN + FINETUNE + '  regularize: [{match: "*", sine: {levels: 4}}]\n')
    yield "recipe/schema", lambda folder: {"keys": short_hash(sorted(keys_of(json.loads(run("recipe", "schema")))))}


def shown(recipe: str) -> Case:
    """Pin a recipe with every default filled in."""
    return lambda folder: json.loads(run("recipe", "show", words_of(recipe)[1], "--json", "-"))


def keys_of(document: Any) -> set[str]:
    """Every key in a document."""
    match document:
        case dict():
            return set(document).union(*map(keys_of, document.values()))
        case list():
            return set().union(*map(keys_of, document))
        case _:
            return set()


def refusal_cases() -> Iterator[tuple[str, Case]]:
    """Wrong calls."""
    plain, live = ("quantize", WEIGHTS), LIVE + rules("rtn: {bits: 4}")
    yield "refused/command", refusal("qunatize")
    yield "refused/option", refusal(*plain, "--bist", 2)
    yield "refused/bits", refusal(*plain, "--bits", 9)
    yield "refused/nothing", refusal(*plain)
    yield "refused/method", refusal(*plain, "--bits", 2, "--method", "squantt")
    yield "refused/group-size", refusal("cluster", WEIGHTS, "--bits", 2, "--group-size", 7)
    yield "refused/missing", refusal("quantize", "none.safetensors", "--bits", 2)
    yield "refused/nan", refusal("quantize", "nan.safetensors", "--bits", 2)
    yield "refused/live-method", refusal(*plain, "--bits", 3, "--method", "gptq")
    yield "refused/budget", refusal(*plain, "--bpw", 0.05)
    yield "refused/input", refusal(*plain, "--bits", 2, "-o", WEIGHTS)
    yield "refused/recipe", refusal(*plain, recipe=bare("squant: {bit: 2}"))
    yield "refused/no-match", refusal(*plain, recipe=bare("{match: none, rtn: {bits: 2}}"))
    yield "refused/export", refusal("export", WEIGHTS, "--to", "coreml")
    yield "refused/verify", refusal("verify", WEIGHTS)
    yield "refused/report", refusal("report", WEIGHTS)
    yield "refused/code", refusal("quantize", NETWORK, recipe=live, allowed=False)
    yield "refused/metric", refusal("quantize", NETWORK, "--min-metric", "bleu=1", recipe=live)


def surroundings(folder: Path) -> Pinned:
    """Pin what hashes may depend on beside the code."""
    return {"torch": torch.__version__, "numpy": np.__version__, "processor": torch.backends.cpu.get_cpu_capability()}


def all_cases() -> dict[str, Case]:
    makers = (
        *(grid_cases, command_cases, cluster_cases, live_cases, training_cases, lattice_cases, budget_cases),
        *(chained_cases, regularizer_cases, report_cases, plan_cases, refusal_cases),
    )
    return {"surroundings": surroundings, **{name: case for make in makers for name, case in make()}}


# Writing and checking


def pin_all(cases: Mapping[str, Case]) -> tuple[dict[str, Pinned], dict[str, float]]:
    """What each case pins, and its seconds; each has a folder of its own. Of one that fails it is {FAILED: why}."""
    pinned: dict[str, Pinned] = {}
    seconds: dict[str, float] = {}
    for name, case in cases.items():
        folder = Path("out")
        folder.mkdir()
        before = time.process_time()
        try:
            # As JSON gives it back, so that it compares with what was kept.
            pinned[name] = json.loads(json.dumps(case(folder)))
        except Exception as error:
            pinned[name] = {FAILED: f"{type(error).__name__}: {error}"}
        seconds[name] = time.process_time() - before
        shutil.rmtree(folder)
        Path("recipe.yaml").unlink(missing_ok=True)
    return pinned, seconds


def differences(old: Any, new: Any, path: str) -> Iterator[str]:
    """A line for each value that is not as it was."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in dict.fromkeys((*old, *new)):
            yield from differences(old.get(key), new.get(key), f"{path} {key}")
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for index, pair in enumerate(zip(old, new, strict=True)):
            yield from differences(*pair, f"{path} {index}")
    elif old != new:
        yield f"{path}: {json.dumps(old)} -> {json.dumps(new)}"


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def start() -> int:
    """Read the command line, run the cases, and give the exit code."""
    os.environ.update(DECIDED)
    for name in DECIDING:
        os.environ.pop(name, None)
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--write", action="store_true", help="keep what the cases give")
    mode.add_argument("--check", action="store_true", help="hold what the cases give against what was kept")
    parser.add_argument("--slowest", type=int, default=0, metavar="N", help="say which cases took longest")
    parser.add_argument("globs", nargs="*", default=["*"], metavar="CASE-GLOB", help="which cases, as 'grid/rtn-*'")
    asked = parser.parse_args()
    cases = all_cases()
    chosen = {name: case for name, case in cases.items() if any(fnmatchcase(name, glob) for glob in asked.globs)}
    if not chosen:
        parser.error(f"no case is named {' or '.join(asked.globs)}")
    kept: dict[str, Pinned] = json.loads(STORE.read_text(encoding="utf-8")) if STORE.exists() else {}
    origin = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            lay_out()
            found, seconds = pin_all(chosen)
        finally:
            os.chdir(origin)
    for name in sorted(seconds, key=seconds.__getitem__, reverse=True)[: asked.slowest]:
        say(f"{seconds[name]:7.2f} s  {name}")
    failed = [f"{name}: {value[FAILED]}" for name, value in found.items() if FAILED in value]
    if asked.write and failed:
        say("\n".join([*failed, f"{len(failed)} of {len(found)} cases fail; nothing is written"]))
        return 1
    if asked.write:
        whole = {name: (kept | found)[name] for name in cases if name in kept or name in found}
        lines = [f"{json.dumps(name)}: {json.dumps(value, sort_keys=True)}" for name, value in whole.items()]
        STORE.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
        say(f"{len(found)} cases written, {sum(seconds.values()):.0f} s of CPU")
        return 0
    lost = [name for name in kept if name not in cases and any(fnmatchcase(name, glob) for glob in asked.globs)]
    changed = [list(differences(kept.get(name), found.get(name), name)) for name in (*found, *lost)]
    for line in (line for lines in changed for line in lines):
        say(line)
    wrong = sum(map(bool, changed))
    say(f"{wrong} of {len(changed)} cases differ, {sum(seconds.values()):.0f} s of CPU")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(start())
