"""DKM trains weights as soft means of their centroids, and ends in the nearest ones.

Cho et al. 2022, arXiv 2108.12659, sections 3 and 4; memory that grows with the weights alone, as eDKM's (arXiv
2309.00964), by computing attention anew instead of compressing what is kept. Centroids start from k-means and go from
step to step without a gradient of their own. The paper tunes one small temperature a model; ours is a share of each
codebook's own gaps that falls as training goes, or a fixed one. A temperature at which all centroids would fall into
one is lowered, and the report says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from qcompress.clustering.codebooks import (
    encode_nearest,
    first_codebooks,
    rows_from_vectors,
    table_parts,
    vectors_from_rows,
)
from qcompress.clustering.dkm import critical_temperature, hard_codes, relative_temperature, share_at, soft_cluster
from qcompress.clustering.dkm_table import soft_cluster_table
from qcompress.coding.grids import TORCH_DTYPES, exponent_for, store_centroids, stored_values
from qcompress.coding.rows import rows_from_weight, weight_from_rows
from qcompress.model.live import LiveModel, find_tensor
from qcompress.registry import DkmConfig
from qcompress.training.fake_quantize import adjusted_tensors, trained_beneath, trained_weight
from qcompress.training.trainer import trainer_of
from qcompress.types.encoded import Codebook, Encoded, Fitted
from qcompress.types.plan import Decision
from qcompress.types.run import EncodeContext, FitContext

GUARD = 0.9
"""Share of the critical temperature that is not passed."""
LEVELS = {"bf16": torch.bfloat16, "f16": torch.float16}


def fit(live: LiveModel, decisions: Sequence[Decision[DkmConfig]], context: FitContext) -> Fitted:
    """Codes and codebooks of trained weights, and every other tensor that training changed.

    raises  DataError, TrainingError
    """
    names = [decision.tensor.name for decision in decisions]
    shared = {
        name: SoftShared(find_tensor(live.quantized, name), decision, live.generator(name))
        for name, decision in zip(names, decisions, strict=True)
    }

    def after_step(done: float) -> None:
        for one in shared.values():
            one.progress = done

    with trained_beneath(live, trainer_of(context), shared, after_step=after_step) as module:
        encoded: dict[str, Encoded] = {name: one.encode(trained_weight(module, name)) for name, one in shared.items()}
    held = [name for name, one in shared.items() if one.held]
    notes = [f"{name}: the temperature was held below where its centroids merge" for name in held]
    return Fitted({**encoded, **adjusted_tensors(live, set(encoded))}, notes=tuple(notes))


class SoftShared(nn.Module):
    """A weight as soft means of its centroids while it is trained; in eval mode as the nearest ones, which is what the
    artifact will give.

    centroids  float32 [tables, entries, dim], those of the last step
    progress   share of training that is done
    held       whether a temperature had to be lowered
    """

    def __init__(self, weight: Tensor, decision: Decision[DkmConfig], generator: torch.Generator) -> None:
        super().__init__()
        self.config = decision.config
        self.tensor, self.axis = decision.tensor, decision.axis
        self.dtype = TORCH_DTYPES[decision.tensor.dtype]
        matrix = rows_from_weight(weight.detach(), self.axis).flatten(1)
        on_cpu = torch.Generator().manual_seed(generator.initial_seed())
        found = first_codebooks(matrix.cpu(), self.config, "optimal", EncodeContext(0, on_cpu))
        # Both are part of what a run that is broken off goes on from.
        self.register_buffer("centroids", found.to(weight.device))
        self.register_buffer("held", torch.zeros((), dtype=torch.bool, device=weight.device))
        self.centroids: Tensor
        self.held: Tensor
        self.progress = 0.0

    def forward(self, weight: Tensor) -> Tensor:
        matrix = rows_from_weight(weight, self.axis).flatten(1)
        parts = [vectors_from_rows(part, self.config.dim) for part in table_parts(matrix, self.config)]
        if self.training:
            found, moved = zip(*map(self._soft, parts, self.centroids), strict=True)
            self.centroids = torch.stack([one.detach() for one in moved])
        else:
            found = tuple(map(self._hard, parts, self._stored()))
        rows = torch.cat([rows_from_vectors(one, matrix.shape[1]) for one in found])
        return weight_from_rows(rows, tuple(weight.shape), self.axis)

    def _soft(self, points: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
        config = self.config
        temperature = config.temperature
        if temperature is None:
            share = share_at(self.progress, config.temperature_share[0], config.temperature_share[1])
            temperature = relative_temperature(centroids, share, config.metric)
        most = GUARD * critical_temperature(points, config.metric)
        if 0 < most < temperature:
            temperature = most
            self.held.fill_(True)
        if config.levels == "f32":
            return soft_cluster(points, centroids, temperature, config.iterations, config.metric)
        kind = LEVELS[config.levels]
        return soft_cluster_table(points, centroids, temperature, config.iterations, config.metric, levels=kind)

    def _hard(self, points: Tensor, centroids: Tensor) -> Tensor:
        """Every point as the nearest of these in the checkpoint's dtype."""
        return centroids.to(self.dtype).float()[hard_codes(points, centroids)]

    def _stored(self) -> Tensor:
        """The centroids as the disk will hold them, like `centroids`: what is measured is what will be loaded."""
        centroids, scale, exponent = store_centroids(self.centroids, self.config.codebook, self._exponent())
        return stored_values(centroids, scale, exponent)

    def _exponent(self) -> int:
        return exponent_for(float(self.centroids.abs().max()))

    def encode(self, weight: Tensor) -> Codebook:
        """Every trained weight in the nearest of the last centroids as they are stored."""
        matrix = rows_from_weight(weight.cpu(), self.axis).flatten(1)
        values = self.centroids.cpu()
        if self.config.dim == 1:
            values = values.sort(1).values
        encoded = encode_nearest(matrix, values, self.config, self._exponent(), tuple(weight.shape))
        return replace(encoded, axis=self.axis, dtype=self.tensor.dtype)
