"""Codebooks as far as they must be known before any tensor is encoded: how many entries, and what several share.

A pass over the weights of its own: of a codebook for one tensor it looks at a few blocks, unless few values differ; of
one that several tensors share it reads all of them once.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from qcompress.coding.half import exponent_for
from qcompress.coding.rows import rows_from_weight
from qcompress.encoded import Codebook, Encoded
from qcompress.model.live import seeded_generator
from qcompress.model.statistics import Statistics, read_statistics
from qcompress.registry import METHODS
from qcompress.solvers.codebooks import BookEvidence, count_entries, spread_sensitivity, vectors_from_rows
from qcompress.solvers.kmeans_shared import ScalarCounts, VectorSample
from qcompress.types import BookKey, Decision, Plan, book_key, row_shape, shared_groups

WeightOf: TypeAlias = Callable[[Decision], Tensor]
"""The weight of a decision, on the CPU, in its own dtype and shape."""
SharedBooks: TypeAlias = Mapping[BookKey, tuple[Tensor, int]]
"""Codebook float [1, entries, dim] and exponent of every key."""


@dataclass(frozen=True)
class Evidence:
    """What encoding draws on beside a weight.

    statistics       the file of the layers' input statistics, for methods that can work from them
    representatives  the file of what finetune-reg has learned
    books            the codebooks that several tensors share
    """

    seed: int = 0
    statistics: Path | None = None
    representatives: Path | None = None
    books: SharedBooks = field(default_factory=dict)

    def of_book(self, decision: Decision) -> BookEvidence:
        """What the codebook of one tensor is made from. Raises DataError where statistics do not fit it."""
        name, key = decision.tensor.name, book_key(decision)
        return BookEvidence(
            generator=seeded_generator(self.seed, name, "cpu"),
            sensitivity=None if self.statistics is None else sensitivity_of(decision, read_statistics(self.statistics)),
            shared=None if key is None else self.books[key],
        )

    @property
    def fingerprint(self) -> str:
        """Changes with whatever codebooks were shared: a resumed run may only go on with the same."""
        crcs = [
            zlib.crc32(values.contiguous().numpy().data, exponent & 0xFF) for values, exponent in self.books.values()
        ]
        return json.dumps(crcs)


def sensitivity_of(decision: Decision, statistics: Statistics) -> Tensor | None:
    """float64 [groups, columns], or None for a weight that the statistics do not know. Raises DataError."""
    return statistics.sensitivity(decision.tensor.name, row_shape(decision.tensor.shape, decision.axis))


def with_entries_counted(plan: Plan, weight_of: WeightOf, evidence: Evidence, encoded: Mapping[str, Encoded]) -> Plan:
    """The plan with the number of entries that each codebook will store.

    encoded  the weights that have their codes already
    """

    def counted(decision: Decision) -> Decision:
        ready = encoded.get(decision.tensor.name)
        key = book_key(decision)
        if not decision.compresses or decision.config.form != "codebook":
            return decision
        if isinstance(ready, Codebook):
            entries = ready.centroids.shape[1]
        elif key is not None:
            entries = evidence.books[key][0].shape[1]
        elif decision.book.entries is not None:
            return decision
        else:
            entries = count_entries(_matrix(decision, weight_of(decision)), decision.config)
        return replace(decision, book=replace(decision.book, entries=entries))

    return replace(plan, decisions=tuple(map(counted, plan.decisions)))


def make_shared_books(decisions: Sequence[Decision], weight_of: WeightOf, evidence: Evidence) -> SharedBooks:
    """The codebooks that several tensors share, each from all its weights, seen one tensor at a time.

    With statistics, errors are weighed by them where all tensors of a codebook have some. Raises DataError.
    """
    return {key: _shared_book(key, group, weight_of, evidence) for key, group in shared_groups(decisions).items()}


def _shared_book(
    key: BookKey, group: Sequence[Decision], weight_of: WeightOf, evidence: Evidence
) -> tuple[Tensor, int]:
    config = group[0].config
    generator = seeded_generator(evidence.seed, f"{key[0]} {config}", "cpu")
    total = sum(d.tensor.numel for d in group)
    counts = ScalarCounts() if config.dim == 1 else VectorSample(total // config.dim, generator)
    known = _sensitivities(group, evidence)
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


def _sensitivities(group: Sequence[Decision], evidence: Evidence) -> Callable[[Decision], Tensor] | None:
    if evidence.statistics is None:
        return None
    statistics = read_statistics(evidence.statistics)

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
    deaf = sorted({d.method or "" for d in clustered if not METHODS[d.method or ""].statistics})
    lacking = sorted(d.tensor.name for d in clustered if d.method not in deaf and sensitivity_of(d, known) is None)
    more = f" and {len(lacking) - 3} more" if len(lacking) > 3 else ""
    lines = [f"{method} draws on no statistics: unweighed" for method in deaf]
    return lines + (
        [f"{statistics.name} knows nothing of {', '.join(lacking[:3])}{more}: unweighed"] if lacking else []
    )


def _matrix(decision: Decision, weight: Tensor) -> Tensor:
    """[rows, columns]; of float64 as float32, which is what is clustered."""
    rows = rows_from_weight(weight, decision.axis).flatten(1)
    return rows.float() if rows.dtype == torch.float64 else rows
