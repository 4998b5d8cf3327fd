"""Which error of the weights tells best what a width costs a network: widths chosen by each, at equal bytes.

    QCOMPRESS_DATA=data python benchmarks/weightings.py [--networks resnet20,stories] [--bits 3,4]

For each network and width: the divergence (nats a prediction) of the network with all tensors at that width, and at the
widths that a budget of the same bytes chooses by squared errors over a power of the tensors' energy. On training data
that are no test's: what is chosen here is a default. Prints JSON: network -> width -> figures.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from networks import CASES, Batches, measure_networks
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


def measure(name: str, widths: list[int], folder: Path) -> dict[str, Any]:
    """Width -> bits a weight and divergences."""
    case = CASES[name]
    network, state = case.network(folder)
    assert case.held_out is not None
    batches = case.held_out(folder)
    reference = log_probabilities(network, batches)
    source = read_checkpoint(folder / case.weights)
    recipe = recipe_from_flags("squant", {}, "quantize", BudgetFlag("--bpw 8", "bpw", 8.0))
    plan = make_plan(recipe, source.tensors, source.tied, source.config)
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

    units, rows = make_units(plan, "packed"), {}
    for bits in widths:
        uniform = close(plan, units, [bits] * len(units))
        bpw = math.ceil(stored_bits(uniform) * 1e4) / 1e4
        row = rows[f"W{bits}"] = {"bits per weight": bpw, "one width": at(uniform)}
        for title, power in POWERS.items():
            energy = {tensor: float(state[tensor].double().square().sum()) ** power for tensor in errors}
            of = {tensor: {b: error / energy[tensor] for b, error in errors[tensor].items()} for tensor in errors}
            row[title] = at(allocate(source, with_bpw(plan, bpw), "packed", Costs(of, "")))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = [name for name, case in CASES.items() if case.held_out is not None]
    parser.add_argument("--bits", type=lambda text: [int(bits) for bits in text.split(",")], default=[2, 3, 4])
    measure_networks(parser, known, lambda name, options, folder: measure(name, options.bits, folder))


if __name__ == "__main__":
    main()
