"""One weight is encoded here, for files and live models alike, and so are the codebooks that several weights share."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from qcompress.checkpoint.side_files import Statistics, read_representatives, read_statistics, refuse_misfit
from qcompress.clustering.codebooks import count_entries, spread_sensitivity, vectors_from_rows
from qcompress.clustering.kmeans import ScalarCounts
from qcompress.clustering.kmeans_vectors import VectorSample
from qcompress.coding.grids import COMMON_EXPONENT, exponent_for, row_exponents, rows_alike, with_row_exponents
from qcompress.coding.rows import rows_from_weight
from qcompress.registry import METHODS, ClusterConfig, KmeansConfig
from qcompress.types.encoded import (
    Codebook,
    Coded,
    Compressed,
    Constant,
    Encoded,
    Grouped,
    Kept,
    for_tensor,
)
from qcompress.types.plan import CodebookKey, Decision, Plan, codebook_key, row_shape, shared_groups
from qcompress.types.ranks import ALONE, World
from qcompress.types.run import EncodeContext, InputMoments, Json, seeded_generator

SharedCodebooks: TypeAlias = Mapping[CodebookKey, tuple[Tensor, int]]
"""Codebook float [1, entries, dim] and exponent of every key."""
WeightOf: TypeAlias = Callable[[Decision], Tensor]
"""The weight of a decision, on the CPU, in its own dtype and shape."""


@dataclass(frozen=True)
class ContextSources:
    """Where the contexts of all weights of a run come from.

    statistics       the file of the layers' input statistics, for methods that can work from them
    representatives  the file of what finetune-reg has learned
    codebooks        those that several tensors share
    moments          of the inputs of convolutions, by the weight's name
    """

    seed: int = 0
    statistics: Path | None = None
    representatives: Path | None = None
    codebooks: SharedCodebooks = field(default_factory=dict)
    moments: Mapping[str, InputMoments] = field(default_factory=dict)

    def context_of(self, decision: Decision, exponent: int) -> EncodeContext:
        """What encoding one weight may draw on. Raises DataError where statistics hold nothing of it, or do not fit."""
        name, key, method = decision.tensor.name, codebook_key(decision), METHODS[decision.method or ""]
        known = None if self.statistics is None else read_statistics(self.statistics)
        gram = None
        if known is not None and method.needs == "calibration":
            gram = known.gram(name)
            refuse_misfit(gram, row_shape(decision.tensor.shape, decision.axis), f"tensor {name!r}")
        learned = None
        if method.representatives and self.representatives is not None:
            learned = read_representatives(self.representatives)[name]
        return EncodeContext(
            exponent=exponent,
            generator=seeded_generator(self.seed, name, "cpu"),
            gram=gram,
            moments=self.moments.get(name),
            sensitivity=None if known is None or method.family != "cluster" else sensitivity_of(decision, known),
            shared=None if key is None else self.codebooks[key],
            representatives=learned,
        )

    @property
    def fingerprint(self) -> str:
        """Changes with whatever codebooks were shared: a resumed run may only go on with the same."""
        crcs = [
            zlib.crc32(values.contiguous().numpy().data, exponent & 0xFF)
            for values, exponent in self.codebooks.values()
        ]
        return json.dumps(crcs)


def sensitivity_of(decision: Decision, statistics: Statistics) -> Tensor | None:
    """float64 [groups, columns], or None for a weight that the statistics do not know. Raises DataError."""
    return statistics.sensitivity(decision.tensor.name, row_shape(decision.tensor.shape, decision.axis))


def encode_weight(
    weight: Tensor,
    decision: Decision,
    sources: ContextSources,
    device: torch.device | str,
    largest: float | None = None,
) -> Compressed:
    """The codes of a whole weight, with the shape, axes and dtype that the decision names.

    A method that clusters sees the weight on the CPU in its own dtype: the few distinct values of 16 bits are what
    makes that exact and fast. All others see it as float32 on `device`.

    largest  of the magnitudes, where it is known
    """
    rows = rows_from_weight(weight, decision.axis)
    if METHODS[decision.method or ""].family == "cluster":
        rows = rows.contiguous().cpu()
    else:
        rows = rows.to(device=device, dtype=torch.float32).contiguous()
    if largest is None:
        largest = float(weight.abs().max()) if weight.numel() else 0.0
    return for_tensor(encode_rows(rows, decision, sources.context_of(decision, exponent_for(largest))), decision)


def encode_rows(rows: Tensor, decision: Decision, context: EncodeContext) -> Compressed:
    """The codes of rows [rows, ...] of a weight, all or some of them, by the decision's method."""
    encode = METHODS[decision.method or ""].load_encode()
    if not decision.row_exponents:
        found = encode(rows, decision.config, context)
        assert not isinstance(found, Kept)
        return found
    exponents = row_exponents(rows)
    found = encode(rows_alike(rows, exponents), decision.config, replace(context, exponent=COMMON_EXPONENT))
    assert isinstance(found, Grouped)
    return with_row_exponents(found, exponents)


def encode_codes(rows: Tensor, decision: Decision, context: EncodeContext) -> Coded:
    """The same of a method that gives codes, whatever the rows."""
    found = encode_rows(rows, decision, context)
    assert not isinstance(found, Constant)
    return found


def count_stored_entries(
    plan: Plan, weight_of: WeightOf, sources: ContextSources, encoded: Mapping[str, Encoded], world: World = ALONE
) -> dict[str, int]:
    """How many entries each codebook will store, by the tensor's name; ranks divide the tensors.

    encoded  the weights that have their codes already
    """

    def entries_of(decision: Decision) -> int | None:
        ready = encoded.get(decision.tensor.name)
        key = codebook_key(decision)
        if isinstance(ready, Codebook):
            return ready.centroids.shape[1]
        if key is not None:
            return sources.codebooks[key][0].shape[1]
        if decision.codebook.entries is not None:
            return decision.codebook.entries
        config = decision.config
        assert isinstance(config, ClusterConfig)
        zero = isinstance(config, KmeansConfig) and config.zero
        return count_entries(_matrix(decision, weight_of(decision)), config, zero=zero)

    clustered = [one for one in plan.decisions if one.compresses and one.config.form == "codebook"]
    found = world.spread(clustered, _weights, entries_of)
    return {d.tensor.name: entries for d, entries in zip(clustered, found, strict=True) if entries is not None}


def make_shared_codebooks(
    decisions: Sequence[Decision], weight_of: WeightOf, sources: ContextSources, world: World = ALONE
) -> SharedCodebooks:
    """The codebooks that several tensors share, each from all its weights, seen one tensor at a time by one rank.

    With statistics, errors are weighed by them where all tensors of a codebook have some. Raises DataError.
    """

    def made(key: CodebookKey) -> tuple[Tensor, int]:
        return _make_shared_codebook(key, groups[key], weight_of, sources)

    def told(key: CodebookKey) -> Json:
        values, exponent = made(key)
        return [str(values.dtype).removeprefix("torch."), values.tolist(), exponent]

    groups = shared_groups(decisions)
    if world.size == 1:
        return {key: made(key) for key in groups}
    found = world.spread([*groups], lambda key: sum(map(_weights, groups[key])), told)
    return {
        key: (torch.tensor(values, dtype=getattr(torch, dtype)), exponent)
        for key, (dtype, values, exponent) in zip(groups, found, strict=True)
    }


def _weights(decision: Decision) -> int:
    return decision.tensor.numel


def _make_shared_codebook(
    key: CodebookKey, group: Sequence[Decision], weight_of: WeightOf, sources: ContextSources
) -> tuple[Tensor, int]:
    config = group[0].config
    assert isinstance(config, KmeansConfig)
    generator = seeded_generator(sources.seed, f"{key[0]} {config}", "cpu")
    total = sum(d.tensor.numel for d in group)
    counts = ScalarCounts() if config.dim == 1 else VectorSample(total // config.dim, generator)
    known = _sensitivities(group, sources)
    for decision in group:
        matrix = _matrix(decision, weight_of(decision))
        weights = None
        if known is not None:
            weights = spread_sensitivity(known(decision), len(matrix), config.dim).reshape(-1)
        counts.add(matrix if config.dim == 1 else vectors_from_rows(matrix.float(), config.dim), weights)
    entries = min(2**config.bits, total // config.dim)
    if isinstance(counts, ScalarCounts):
        values = counts.cluster(entries, config.init, config.zero, generator).centroids.view(1, -1, 1)
    else:
        values = counts.cluster(entries, config.init, generator).centroids.unsqueeze(0)
    return values, exponent_for(float(values.abs().max()))


def _sensitivities(group: Sequence[Decision], sources: ContextSources) -> Callable[[Decision], Tensor] | None:
    if sources.statistics is None:
        return None
    statistics = read_statistics(sources.statistics)

    def known(decision: Decision) -> Tensor:
        found = sensitivity_of(decision, statistics)
        assert found is not None
        return found

    return known if all(sensitivity_of(decision, statistics) is not None for decision in group) else None


def unweighed(plan: Plan, statistics: Path | None) -> list[str]:
    """A line for the codebooks that statistics hold nothing of, and one for methods that draw on none.

    raises  DataError where the file is missing, or does not fit
    """
    if statistics is None:
        return []
    known = read_statistics(statistics)
    clustered = [d for d in plan.decisions if d.compresses and METHODS[d.method or ""].family == "cluster"]
    methods_ignoring_statistics = sorted({d.method or "" for d in clustered if not METHODS[d.method or ""].statistics})
    lacking = sorted(
        d.tensor.name
        for d in clustered
        if d.method not in methods_ignoring_statistics and sensitivity_of(d, known) is None
    )
    more = f" and {len(lacking) - 3} more" if len(lacking) > 3 else ""
    lines = [f"{method} draws on no statistics: unweighed" for method in methods_ignoring_statistics]
    return lines + (
        [f"{statistics.name} knows nothing of {', '.join(lacking[:3])}{more}: unweighed"] if lacking else []
    )


def _matrix(decision: Decision, weight: Tensor) -> Tensor:
    """[rows, columns]; of float64 as float32, which is what is clustered."""
    rows = rows_from_weight(weight, decision.axis).flatten(1)
    return rows.float() if rows.dtype == torch.float64 else rows
