"""Training that has run away is seen before anything of it is written: values that are no numbers, or beyond use."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from qcompress.errors import TrainingError
from qcompress.registry.regularizers import KurtosisConfig
from qcompress.training.penalties import Penalties, Regularized

LARGEST = 1e18
"""A magnitude beyond which float32 holds no square of it, so that no variance, norm or step can be formed."""
SMALLEST = 1e-10
"""A root mean square below which float32 holds no fourth power, so that neither kurtosis nor variance can be formed."""
MOST_GROWTH = 10.0
"""By how much a weight may have grown before a word is said."""
HINT = "lower the learning rate or the strength, or set clip_norm"


def refuse_runaway(module: nn.Module, penalties: Penalties, step: int) -> None:
    """Raise TrainingError where a parameter, a buffer or something that a regularizer learns is not finite, or is
    larger than any number that float32 can square."""
    for name, value in _changed(module, penalties):
        largest = float(value.detach().abs().amax()) if value.numel() else 0.0
        # A variance is a square already.
        if not largest <= (LARGEST**2 if name.endswith("running_var") else LARGEST):
            what = f"after step {step} {name!r} holds values that are no numbers, or of a size that no network uses"
            raise TrainingError("training", what, HINT)


def _changed(module: nn.Module, penalties: Penalties) -> Iterator[tuple[str, Tensor]]:
    for name, value in (*module.named_parameters(), *module.named_buffers()):
        # A mask's entries may be minus infinity from the start; what training changes may not.
        trained = isinstance(value, nn.Parameter) or name.rpartition(".")[2].startswith("running_")
        if trained and value.is_floating_point():
            yield name, value
    for one in penalties.regularized:
        yield from ((f"{one.name}.{key}", term) for key, term in one.penalty.terms.items())


def sizes_of(module: nn.Module) -> dict[str, float]:
    """Name -> root mean square, of every weight of two or more dimensions; of a quantized one without its quantizer."""
    return {
        name.replace(".parametrizations.", ".").removesuffix(".original"): float(
            value.detach().double().square().mean().sqrt()
        )
        for name, value in module.named_parameters()
        if value.ndim >= 2 and value.numel()
    }


def growth_words(before: Mapping[str, float], after: Mapping[str, float]) -> list[str]:
    """A line on the weights that have grown tenfold, the most grown one first; no line where none has."""
    grown = {name: after[name] / size for name, size in before.items() if size > 0 and name in after}
    grown = {name: factor for name, factor in grown.items() if factor > MOST_GROWTH}
    if not grown:
        return []
    worst = max(grown, key=lambda name: grown[name])
    more = f" and {len(grown) - 1} more" if len(grown) > 1 else ""
    return [f"{worst}{more}: grew {grown[worst]:.3g} times in size while training: check rate, strength and accuracy"]


def leave_out_tiny(penalties: Penalties, rate: float) -> tuple[Penalties, list[str]]:
    """The penalties without those of weights that are zero, or so small that the first step would throw them away.

    A penalty in units of the weight's own size (kurtosis, `normalize`) has a gradient that grows as the weight shrinks.

    rate     the highest learning rate
    returns  and a line that names what was left out
    """
    tiny = [one.name for one in penalties.regularized if _by_own_size(one) and _thrown_away(one, rate)]
    if not tiny:
        return penalties, []
    kept: Sequence[Regularized] = [one for one in penalties.regularized if one.name not in tiny]
    more = f" and {len(tiny) - 1} more" if len(tiny) > 1 else ""
    line = f"{tiny[0]}{more}: zero or tiny, where a penalty in units of the weight's size explodes: left out"
    return Penalties(kept), [line]


def _by_own_size(one: Regularized) -> bool:
    return isinstance(one.config, KurtosisConfig) or one.config.normalize != "none"


def _thrown_away(one: Regularized, rate: float) -> bool:
    """Whether the penalty's first full step is longer than the weight itself, or no number."""
    seen = one.seen().detach()
    size = float(seen.double().norm())
    if size <= SMALLEST * seen.numel() ** 0.5:
        return True
    pull = torch.zeros_like(seen)
    one.penalty.accumulate(seen, pull, (one.config.strength or 0.0) * one.share)
    return not rate * float(pull.double().norm()) < size
