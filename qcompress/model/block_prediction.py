"""The prediction difference: how far the network's answer moves when one block's output does.

Liu et al. 2023, arXiv 2212.07048, section 3.2: KL(softmax(z / T) || softmax(z' / T)), z' through the rest of the
full-precision network. Its quadratic form, ours, needs that rest only once a sample: near z the divergence is
dz^T (diag p - p p^T) dz / (2 T^2), and with random signs v and g = J^T (diag p - p p^T)^(1/2) v, the mean of (g . dy)^2
over v is just that for small dy.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

PROBE_VALUES = 1 << 28
MOST_PROBES = 4
"""Numbers that probes may take in memory, and how many a sample has at most."""


def prediction_difference(clean: Tensor, found: Tensor, temperature: float) -> Tensor:
    """The mean divergence of softened predictions over samples and places; nothing where both logits are one.

    clean, found  logits [samples, ..., classes]
    """
    classes = clean.shape[-1]
    wanted = F.log_softmax(clean.reshape(-1, classes) / temperature, -1)
    given = F.log_softmax(found.reshape(-1, classes) / temperature, -1)
    return F.kl_div(given, wanted, reduction="batchmean", log_target=True)


def half_fisher(logits: Tensor, signs: Tensor, temperature: float) -> Tensor:
    """(diag p - p p^T)^(1/2) v for p = softmax(logits / T), factored as diag(sqrt p) (v - sqrt p (sqrt p . v)).

    logits, signs  [samples, classes]
    """
    root = F.softmax(logits / temperature, -1).sqrt()
    halved: Tensor = root * (signs - root * (root * signs).sum(-1, keepdim=True))
    return halved


def probe(
    outputs: Tensor, rest: Callable[[Tensor], Tensor], temperature: float, probes: int, generator: torch.Generator
) -> Tensor:
    """g [samples, probes, *output], divided by sqrt(2 probes) T: the sum of squares of g . dy estimates the divergence.

    outputs  a block's full-precision outputs [samples, ...]
    rest     from them to the logits [samples, classes] of the full-precision network
    """
    found = []
    for _ in range(probes):
        y = outputs.detach().requires_grad_(True)
        with torch.enable_grad():
            logits = rest(y)
            flat = logits.reshape(-1, logits.shape[-1])
            signs = torch.randint(0, 2, flat.shape, generator=generator, device=flat.device).to(flat.dtype) * 2 - 1
            weighted = (flat * half_fisher(flat.detach(), signs, temperature)).sum()
            (gradient,) = torch.autograd.grad(weighted, y)
        found.append(gradient)
    places = flat.shape[0] // len(outputs)
    return torch.stack(found, 1) / (temperature * math.sqrt(2 * probes * places))


def quadratic_difference(probes: Tensor, change: Tensor) -> Tensor:
    """The mean over samples of the divergence that a change of the block's output makes, to second order.

    probes  of these samples, from `probe`; change [samples, ...]
    """
    along: Tensor = (probes.flatten(2) * change.flatten(1).unsqueeze(1)).sum(2)
    total: Tensor = along.square().sum(1).mean()
    return total


def fitting_probes(outputs: Tensor) -> int:
    """How many probes a sample may have, for memory's sake."""
    return max(1, min(MOST_PROBES, PROBE_VALUES // max(outputs.numel(), 1)))
