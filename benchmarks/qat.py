"""Quantization-aware training: time of a training step with LSQ and PACT against plain training of the same network.

    python benchmarks/qat.py [--batch 64] [--repeats 15] [--bits 2] [--json FILE|-]

ResNet-20 on random images of 32 x 32, SGD with momentum, one thread, processor time: the median over steps that take
turns, so that a busy machine slows all of them alike. Weights and inputs of every layer are quantized.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from timing import render, show

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "recipes" / "nets"))

FORMS = ("plain", "lsq", "pact")


def make_steps(options: argparse.Namespace, stack: ExitStack) -> dict[str, Callable[[], None]]:
    """Form -> one training step; quantizers stay attached until `stack` is left."""
    import torch
    import torch.nn.functional as F
    from cifar_resnet import resnet20

    from qcompress.data.batches import Batch
    from qcompress.methods import lsq, pact
    from qcompress.model.live import find_tensor, make_live_model
    from qcompress.registry import METHODS
    from qcompress.training.fake_quantize import activation_inits, fake_quantized
    from qcompress.types.plan import Decision, TensorInfo
    from qcompress.types.settings import ActivationSettings

    torch.set_num_threads(1)
    torch.manual_seed(0)
    network = resnet20()
    x, y = torch.randn(options.batch, 3, 32, 32), torch.randint(10, (options.batch,))

    class Show:
        """The part of training that shows data."""

        def first_batches(self, _: Any) -> list[Batch]:
            return [Batch((x,))]

    def make(form: str) -> Callable[[], None]:
        module = copy.deepcopy(network)
        if form != "plain":
            config = METHODS[form].config(bits=options.bits)
            decisions = [
                Decision(TensorInfo(name, tuple(value.shape), "F32"), form, config, "benchmark")
                for name, value in module.state_dict().items()
                if value.ndim >= 2
            ]
            settings = ActivationSettings(bits=options.bits)
            live = make_live_model(
                module, decisions, [], Batch((x[:2],)), device=torch.device("cpu"), activations=settings
            )
            inits = activation_inits(live, Show())
            weights: dict[str, Any] = {}
            inputs: dict[str, Any] = {}
            for decision in decisions:
                name = decision.tensor.name
                kind = lsq.LearnedStep if form == "lsq" else pact.SquashedWeight
                weights[name] = kind(find_tensor(live.quantized, name), decision)
            for name, init in inits.items():
                inputs[name] = lsq.InputStep(init, False) if form == "lsq" else pact.InputClip(name, init, config)
            module = stack.enter_context(fake_quantized(live, weights, inputs))
        module.train()
        optimizer = torch.optim.SGD(module.parameters(), lr=1e-4, momentum=0.9)

        def step() -> None:
            optimizer.zero_grad()
            F.cross_entropy(module(x), y).backward()
            optimizer.step()

        return step

    return {form: make(form) for form in FORMS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--json", metavar="FILE|-")
    options = parser.parse_args()
    seconds: dict[str, list[float]] = {form: [] for form in FORMS}
    with ExitStack() as stack:
        steps = make_steps(options, stack)
        for turn in range(options.repeats + 2):
            for form, step in steps.items():
                begun = time.process_time()
                step()
                if turn >= 2:
                    seconds[form].append(time.process_time() - begun)
    medians = {form: statistics.median(values) for form, values in seconds.items()}
    rows = [{"name": form, "seconds": value, "ratio": value / medians["plain"]} for form, value in medians.items()]
    show(rows, render(rows), options.json)


if __name__ == "__main__":
    main()
