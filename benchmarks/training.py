"""Training: time of a step of ResNet-20, in float32 and bfloat16, with channels first and last in memory.

    python benchmarks/training.py [--batch 128] [--steps 20] [--repeats 3] [--json FILE|-]

The training loop of `finetune-reg` on random images of 32 x 32 in bytes, with flip and crop4, on one thread: processor
time of so many steps, the median over runs that take turns, so that a busy machine slows all of them alike.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

from timing import render, show

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "recipes" / "nets"))

FORMS = {
    "float32": {},
    "float32, channels_last": {"memory_format": "channels_last"},
    "bfloat16": {"precision": "bfloat16"},
    "bfloat16, channels_last": {"precision": "bfloat16", "memory_format": "channels_last"},
}
"""Name -> options of `finetune`."""
EPOCH = 20_000
"""Images of an epoch, as cifar10/train20k.npz has them."""


def make_run(form: str, batch: int) -> Callable[[int], None]:
    """A call that trains a network of its own for so many steps."""
    import torch
    from cifar_resnet import resnet20

    from qcompress.data.batches import Batch, Batches
    from qcompress.training.loop import Data, train
    from qcompress.training.losses import make_loss
    from qcompress.training.penalties import Penalties
    from qcompress.types.data_settings import Crop4, Flip
    from qcompress.types.settings import Classification, Sgd, Training

    torch.set_num_threads(1)
    torch.manual_seed(0)
    network = resnet20()
    training = Training(**FORMS[form], optimizer=Sgd(lr=1e-4))
    loss = make_loss(Classification())

    def run(steps: int) -> None:
        count = batch * steps
        x, y = torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8), torch.randint(10, (count,))
        batches = Batches(
            count,
            batch,
            lambda samples: Batch((x[[*samples]],), labels=y[[*samples]]),
            lambda read: Batch((read.args[0].float() / 128 - 1,), labels=read.labels),
        )
        train(network, Data(batches, (Flip(), Crop4())), loss, training, Penalties([]))

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", metavar="FILE|-")
    options = parser.parse_args()
    runs = {form: make_run(form, options.batch) for form in FORMS}
    seconds: dict[str, list[float]] = {form: [] for form in FORMS}
    for run in runs.values():
        run(2)
    for _ in range(options.repeats):
        for form, run in runs.items():
            begun = time.process_time()
            run(options.steps)
            seconds[form].append(time.process_time() - begun)
    medians = {form: statistics.median(values) / options.steps for form, values in seconds.items()}
    rows = [
        {
            "name": form,
            "seconds": value,
            "epoch": value * EPOCH / options.batch,
            "times": statistics.median(
                plain / own for plain, own in zip(seconds["float32"], seconds[form], strict=True)
            ),
        }
        for form, value in medians.items()
    ]
    show(rows, render(rows), options.json)


if __name__ == "__main__":
    main()
