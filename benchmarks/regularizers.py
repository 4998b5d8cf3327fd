"""Cost of each regularizer on one large weight against its plain autograd form, and of a ResNet-20 training step.

    python benchmarks/regularizers.py [--weights 25000000] [--runs 3] [--only NAME] [--json FILE|-]

Both add the gradient to one that is there already, as training does: the plain form by loss.backward(). Every run is a
process of its own with one thread: `cpu` is the median processor time of a call after one that is not counted, `floats`
the growth of the process's peak memory in float32 numbers a weight. A step is one of ResNet-20, 128 images.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from timing import render, seconds_of, show

OPTIONS: dict[str, dict[str, Any]] = {
    "dsmm": {"preset": "paper-dsmm"},
    "dsmm channel": {"alpha": 10.0, "granularity": "channel"},
    "sine": {"levels": 4, "range": (-0.1, 0.1), "outside": "periodic"},
    "sine grid": {"bits": 2},
    "cosine": {"levels": 4, "range": (-0.1, 0.1), "outside": "periodic"},
    "min-squared": {"levels": 16},
    "exponential": {"levels": 16},
    "l2": {},
    "linf": {},
    "margin": {},
    "kurtosis": {},
}
COLUMNS = 5000


def plain(name: str, config: Any, penalty: Any) -> Callable[[Any], Any]:
    """The formula as one would write it with autograd."""
    import torch

    terms = {key: term.detach().clone().requires_grad_(True) for key, term in penalty.terms.items()}

    def dsmm(w: Any) -> Any:
        alpha = terms["alpha"].view(-1, 1)
        rows = w if config.granularity == "channel" else w.view(1, -1)
        high, low = torch.softmax(alpha * rows, 1), torch.softmax(-alpha * rows, 1)
        return ((high * rows).sum(1) - (low * rows).sum(1)).mean() + torch.exp(-alpha).mean()

    def sine(w: Any) -> Any:
        if config.bits is not None:
            step = (w.detach().amax(1, keepdim=True) - w.detach().amin(1, keepdim=True)) / (2**config.bits - 1)
            return torch.sin(math.pi * w / step).abs().sum()
        low, high = config.range
        return torch.sin(math.pi * (config.levels - 1) * (w - low) / (high - low)).abs().sum()

    def cosine(w: Any) -> Any:
        low, high = config.range
        return torch.cos(math.pi * config.levels * (w - low) / (high - low)).abs().sum()

    def distance(w: Any) -> Any:
        return (w.view(-1, 1) - terms["representatives"]).abs().min(1).values

    def kurtosis(w: Any) -> Any:
        centred = w - w.mean()
        return (centred.pow(4).mean() / centred.pow(2).mean().pow(2) - config.target).pow(2)

    def margin(w: Any) -> Any:
        return (terms["margin"] + (w.abs() - terms["margin"]).clamp_min(0).sum()).sum()

    forms = {
        "dsmm": dsmm,
        "sine": sine,
        "cosine": cosine,
        "min-squared": lambda w: distance(w).square().sum(),
        "exponential": lambda w: (1 - torch.exp(-config.scale * distance(w))).sum(),
        "l2": lambda w: 0.5 * w.square().sum(),
        "linf": lambda w: w.abs().max(),
        "margin": margin,
        "kurtosis": kurtosis,
    }
    return forms[name]


def measure(case: str, form: str, weights: int, calls: int) -> dict[str, float]:
    """Processor seconds of a call and peak floats a weight, in this process."""
    import torch

    from qcompress.registry.regularizers import REGULARIZERS

    torch.set_num_threads(1)
    name = case.split()[0]
    entry = REGULARIZERS[name]
    config = entry.config(**OPTIONS[case])
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(weights // COLUMNS, COLUMNS, generator=generator).mul_(0.05)
    module, _, function = entry.target.partition(":")
    penalty = getattr(import_module(module), function)(config, weight)
    weight.requires_grad_(True)
    weight.grad = torch.zeros_like(weight)
    loss = plain(name, config, penalty)

    def ours() -> None:
        assert weight.grad is not None
        penalty.accumulate(weight.detach(), weight.grad, config.strength)

    def theirs() -> None:
        (config.strength * loss(weight)).backward()

    call = ours if form == "ours" else theirs
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = seconds_of(call, calls, warm=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"cpu": seconds, "floats": (peak - before) * 1024 / 4 / weights}


def step_overhead(calls: int) -> dict[str, float]:
    """Processor seconds of a ResNet-20 training step of 128 images, and of each regularizer's share in it."""
    import torch

    from qcompress.data.user_code import find_callable
    from qcompress.registry.regularizers import REGULARIZERS
    from qcompress.training.penalties import attach_penalties
    from qcompress.types.plan import Rule

    torch.set_num_threads(1)
    nets = Path(__file__).parents[1] / "recipes" / "nets"
    module = find_callable("cifar_resnet.py:resnet20", nets, True, "nets")().train()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01, momentum=0.9)
    images, labels = torch.randn(128, 3, 32, 32), torch.randint(10, (128,))

    def step() -> None:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(module(images), labels).backward()
        optimizer.step()

    found = {"step": seconds_of(step, calls, warm=True)}
    for case, options in OPTIONS.items():
        name = case.split()[0]
        config = REGULARIZERS[name].config(**{**options, "start": 0.0, "ramp": 0.0})
        penalties = attach_penalties(module, [Rule("*.weight", name, config, "benchmark")])

        def add(penalties: Any = penalties) -> None:
            penalties.add(0, 1, 0.0)
            penalties.after(0, 1, 0.0)

        found[case] = seconds_of(add, calls, warm=True)
    return found


def child(*words: str) -> dict[str, float]:
    done = subprocess.run([sys.executable, __file__, *words], check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=int, default=25_000_000)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--only")
    parser.add_argument("--json", metavar="FILE|-")
    parser.add_argument("--child", nargs="*", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        case, form = asked.child
        found = step_overhead(9) if case == "step" else measure(case, form, asked.weights, 3)
        print(json.dumps(found))
        return
    steps = [child("--child", "step", "ours") for _ in range(asked.runs)]
    rows = [figures(case, asked, steps) for case in OPTIONS if not asked.only or asked.only in case]
    show(rows, f"{asked.weights:,} weights, {asked.runs} runs\n{render(rows)}", asked.json)


def figures(case: str, asked: argparse.Namespace, steps: list[dict[str, float]]) -> dict[str, Any]:
    """Medians of a regularizer's runs, its time against plain autograd, and what it adds to a training step."""
    runs = {
        form: [child("--weights", str(asked.weights), "--child", case, form) for _ in range(asked.runs)]
        for form in ("ours", "plain")
    }
    cpu, floats = (
        {form: statistics.median(row[key] for row in rows) for form, rows in runs.items()} for key in ("cpu", "floats")
    )
    return {
        "name": case,
        "ns a weight": cpu["ours"] / asked.weights * 1e9,
        "floats": floats["ours"],
        "plain floats": floats["plain"],
        "times faster": cpu["plain"] / cpu["ours"],
        "percent of a step": statistics.median(100 * run[case] / run["step"] for run in steps),
    }


if __name__ == "__main__":
    main()
