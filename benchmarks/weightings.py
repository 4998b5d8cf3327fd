"""Which error of the weights tells best what a width costs a network: widths chosen by each, at equal bytes.

    QCOMPRESS_DATA=data python benchmarks/weightings.py [--networks resnet20,dscnn] [--bits 3,4]

For each network and width: the divergence (nats a prediction) of the network with all tensors at that width, and at the
widths that a budget of the same bytes chooses by squared errors over a power of the tensors' energy.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from dataclasses import replace
from pathlib import Path

import torch
from networks import CASES, Batches
from torch import Tensor, nn

from qcompress.artifact.layout import make_slots
from qcompress.checkpoint.checkpoint import read_checkpoint
from qcompress.coding.grids import decode
from qcompress.encode.encode_weight import ContextSources, encode_weight
from qcompress.plan.allocate import Costs, allocate, close, make_units, with_bpw
from qcompress.plan.plan import make_plan
from qcompress.recipe import BudgetFlag, recipe_from_flags
from qcompress.types.plan import Plan

POWERS = {"relative": 1.0, "over the norm": 0.5, "absolute": 0.0}
SAMPLES = {"stories": 50, "mobilenet": 100}
USUAL = 500


def log_probabilities(network: nn.Module, batches: Batches) -> list[Tensor]:
    with torch.inference_mode():
        return [network(x).float().log_softmax(-1).flatten(0, -2) for x, _ in batches]


def divergence(network: nn.Module, batches: Batches, reference: list[Tensor]) -> float:
    found = log_probabilities(network, batches)
    each = [(one.exp() * (one - other)).sum(-1).mean() for one, other in zip(reference, found, strict=True)]
    return float(sum(each)) / len(each)


def stored_bits(plan: Plan) -> float:
    compressed = [decision for decision in plan.decisions if decision.compresses]
    n_bytes = sum(slot.n_bytes for decision in compressed for slot in make_slots(decision, "packed"))
    return 8 * n_bytes / sum(decision.tensor.numel for decision in compressed)


def measure(name: str, widths: list[int], folder: Path) -> None:
    case = CASES[name]
    network, state = case.network(folder)
    batches = case.batches(folder, SAMPLES.get(name, USUAL))
    reference = log_probabilities(network, batches)
    source = read_checkpoint(folder / case.weights)
    recipe = recipe_from_flags("squant", {}, "quantize", BudgetFlag("--bpw 8", "bpw", 8.0))
    plan = make_plan(recipe, source.tensors, source.tied, source.axes)
    decoded: dict[tuple[str, int], Tensor] = {}
    errors: dict[str, dict[int, float]] = {}
    for decision in (decision for decision in plan.decisions if decision.is_open):
        info, weight = decision.tensor, state[decision.tensor.name].float()
        for bits, config in decision.widths.configs.items():
            found = encode_weight(weight, replace(decision, config=config), ContextSources(), "cpu")
            decoded[info.name, bits] = decode(found)
            error = float((decoded[info.name, bits] - weight).double().square().sum())
            errors.setdefault(info.name, {})[bits] = error

    def at(closed: Plan) -> float:
        chosen = {d.tensor.name: decoded[d.tensor.name, d.config.bits] for d in closed.decisions if d.compresses}
        network.load_state_dict(chosen, strict=False)
        return divergence(network, batches, reference)

    units = make_units(plan, "packed")
    for bits in widths:
        uniform = close(plan, units, [bits] * len(units))
        bpw = math.ceil(stored_bits(uniform) * 1e4) / 1e4
        cells = [f"{at(uniform):8.4f}"]
        for power in POWERS.values():
            energy = {tensor: float(state[tensor].double().square().sum()) ** power for tensor in errors}
            of = {tensor: {b: error / energy[tensor] for b, error in errors[tensor].items()} for tensor in errors}
            cells.append(f"{at(allocate(source, with_bpw(plan, bpw), 'packed', Costs(of, ''))):8.4f}")
        print(f"| {name} | {bpw:.4f} | " + " | ".join(cells) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", type=lambda text: text.split(","), default=list(CASES))
    parser.add_argument("--bits", type=lambda text: [int(bits) for bits in text.split(",")], default=[2, 3, 4])
    arguments = parser.parse_args()
    folder = os.environ.get("QCOMPRESS_DATA")
    if not folder:
        sys.exit("weightings.py: QCOMPRESS_DATA is not set")
    torch.set_num_threads(1)
    print("| network | bits per weight | one width | " + " | ".join(POWERS) + " |\n|---|" + "---:|" * (2 + len(POWERS)))
    for name in arguments.networks:
        measure(name, arguments.bits, Path(folder))


if __name__ == "__main__":
    main()
