"""Outputs of an artifact against those of its checkpoint, on the eval data of a recipe, as JSON.

    python benchmarks/divergence.py ARTIFACT CHECKPOINT -r RECIPE

divergence  of the outputs from the checkpoint's, in nats, the mean over samples or tokens
agreement   the share of them whose largest output is the checkpoint's
top1        the share whose largest output is the label; a language model has its perplexity
ARTIFACT may be a checkpoint too.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch

from qcompress.checkpoint.checkpoint import read_checkpoint
from qcompress.compress.evaluate import is_artifact
from qcompress.compress.load import checkpoint_state, load_state_dict
from qcompress.data.batches import Batch
from qcompress.data.sources import open_batches
from qcompress.model.build import build_network, load_weights
from qcompress.recipe import read_recipe
from qcompress.types.run import ModelRun


def load(path: Path, model_run: ModelRun) -> torch.nn.Module:
    network = build_network(model_run).float().eval()
    state = load_state_dict(path) if is_artifact(path) else checkpoint_state(read_checkpoint(path))
    load_weights(network, state, str(path))
    return network


def log_probabilities(network: torch.nn.Module, batch: Batch) -> torch.Tensor:
    found: torch.Tensor = network(*batch.args, **batch.kwargs).float().log_softmax(-1)
    return found


@torch.no_grad()
def compare(artifact: Path, checkpoint: Path, recipe: Path) -> dict[str, float]:
    """The figures that the module's docstring names."""
    model_run = ModelRun(read_recipe(recipe), torch.device("cpu"), allow_code=True)
    whole, coded = load(checkpoint, model_run), load(artifact, model_run)
    divergence = loss = 0.0
    agreed = right = count = 0
    for batch in open_batches(model_run, "eval"):
        one, other = log_probabilities(whole, batch), log_probabilities(coded, batch)
        labels = batch.labels
        if batch.lengths is not None:
            inside = torch.arange(one.shape[1] - 1) < batch.lengths.unsqueeze(1) - 1
            labels = batch.args[0][:, 1:][inside]
            one, other = one[:, :-1][inside], other[:, :-1][inside]
        assert labels is not None
        divergence += float((one.exp() * (one - other)).sum())
        agreed += int((one.argmax(-1) == other.argmax(-1)).sum())
        right += int((other.argmax(-1) == labels).sum())
        loss -= float(other.gather(-1, labels.unsqueeze(-1)).sum())
        count += len(labels)
    found = {"divergence": divergence / count, "agreement": agreed / count, "top1": right / count}
    return found | {"perplexity": math.exp(loss / count)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("-r", "--recipe", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(json.dumps(compare(options.artifact, options.checkpoint, options.recipe)))


if __name__ == "__main__":
    main()
