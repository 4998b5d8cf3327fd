"""DKM: weights are trained as soft means of their centroids, and end in the nearest ones.

Cho et al. 2022, arXiv 2108.12659, sections 3 and 4; memory that grows with the weights alone, as eDKM's (arXiv
2309.00964), by computing attention anew instead of compressing what is kept. Centroids start from k-means and go from
step to step without a gradient of their own. The paper tunes one small temperature a model; ours is a share of each
codebook's own gaps that falls as training goes, or a fixed one. A temperature at which all centroids would fall into
one is lowered, and the report says so.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from qcompress.coding.half import exponent_for
from qcompress.coding.rows import rows_from_weight, weight_from_rows
from qcompress.model.live import LiveModel, find_tensor, layer_name
from qcompress.registry import DkmConfig
from qcompress.solvers.codebooks import (
    BookEvidence,
    encode_nearest,
    first_codebooks,
    rows_from_vectors,
    table_parts,
    vectors_from_rows,
)
from qcompress.solvers.dkm import soft_cluster
from qcompress.solvers.dkm_table import soft_cluster_table
from qcompress.solvers.dkm_temperature import critical_temperature, hard_codes, relative_temperature, share_at
from qcompress.training.adjusted import adjusted_tensors
from qcompress.training.loop import Learn
from qcompress.types import Codebook, Decision, Encoded, Fitted

GUARD = 0.9
"""Share of the critical temperature that is not passed."""
LEVELS = {"bf16": torch.bfloat16, "f16": torch.float16}


def fit(live: LiveModel, decisions: Sequence[Decision], learn: Learn) -> Fitted:
    """Codes and codebooks of trained weights, and every other tensor that training changed.

    learn  trains `live.quantized`, and calls back after each step with the share of training that is done
    """
    module = live.quantized
    module.requires_grad_(True)
    shared: dict[str, SoftShared] = {}
    try:
        for decision in decisions:
            name = decision.tensor.name
            owner, leaf = module.get_submodule(layer_name(name)), name.rpartition(".")[2]
            shared[name] = SoftShared(find_tensor(module, name), decision, live.generator(name))
            parametrize.register_parametrization(owner, leaf, shared[name], unsafe=True)

        def after_step(done: float) -> None:
            for one in shared.values():
                one.progress = done

        learn(module, after_step)
        encoded: dict[str, Encoded] = {
            decision.tensor.name: shared[decision.tensor.name].encode(_original(module, decision))
            for decision in decisions
        }
    finally:
        for name in shared:
            owner, leaf = module.get_submodule(layer_name(name)), name.rpartition(".")[2]
            parametrize.remove_parametrizations(owner, leaf, leave_parametrized=False)
        module.requires_grad_(False).eval()
    held = [name for name, one in shared.items() if one.held]
    notes = [f"{name}: the temperature was held below where its centroids merge" for name in held]
    return Fitted({**encoded, **adjusted_tensors(live, set(encoded))}, notes=tuple(notes))


def _original(module: nn.Module, decision: Decision) -> Tensor:
    """The trained weight beneath its parametrization."""
    owner, leaf = layer_name(decision.tensor.name), decision.tensor.name.rpartition(".")[2]
    weight: Tensor = module.get_submodule(owner).parametrizations[leaf].original  # type: ignore[index,union-attr]
    return weight.detach()


class SoftShared(nn.Module):
    """A weight as soft means of its centroids while it is trained, as the nearest ones in eval mode.

    centroids  float32 [tables, entries, dim], those of the last step
    progress   share of training that is done
    held       whether a temperature had to be lowered
    """

    def __init__(self, weight: Tensor, decision: Decision, generator: torch.Generator) -> None:
        super().__init__()
        self.config: DkmConfig = decision.config
        self.axis = decision.axis
        matrix = rows_from_weight(weight.detach(), self.axis).flatten(1)
        on_cpu = torch.Generator().manual_seed(generator.initial_seed())
        found = first_codebooks(matrix.cpu(), self.config, "optimal", BookEvidence(on_cpu))
        self.register_buffer("centroids", found.to(weight.device), persistent=False)
        self.centroids: Tensor
        self.progress = 0.0
        self.held = False

    def forward(self, weight: Tensor) -> Tensor:
        matrix = rows_from_weight(weight, self.axis).flatten(1)
        parts = table_parts(matrix, self.config)
        found, moved = [], []
        for part, centroids in zip(parts, self.centroids, strict=True):
            points = vectors_from_rows(part, self.config.dim)
            soft, after = self._soft(points, centroids) if self.training else (_nearest(points, centroids), centroids)
            found.append(rows_from_vectors(soft, matrix.shape[1]))
            moved.append(after.detach())
        if self.training:
            self.centroids = torch.stack(moved)
        return weight_from_rows(torch.cat(found), tuple(weight.shape), self.axis)

    def _soft(self, points: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
        config = self.config
        temperature = config.temperature
        if temperature is None:
            share = share_at(self.progress, config.temperature_share[0], config.temperature_share[1])
            temperature = relative_temperature(centroids, share, config.metric)
        most = GUARD * critical_temperature(points, config.metric)
        if 0 < most < temperature:
            self.held, temperature = True, most
        if config.levels == "f32":
            return soft_cluster(points, centroids, temperature, config.iterations, config.metric)
        kind = LEVELS[config.levels]
        return soft_cluster_table(points, centroids, temperature, config.iterations, config.metric, levels=kind)

    def encode(self, weight: Tensor) -> Codebook:
        """Every trained weight in the nearest of the last centroids as they are stored."""
        matrix = rows_from_weight(weight.cpu(), self.axis).flatten(1)
        values = self.centroids.cpu()
        if self.config.dim == 1:
            values = values.sort(1).values
        exponent = exponent_for(float(values.abs().max()))
        encoded = encode_nearest(matrix, values, self.config, exponent, tuple(weight.shape))
        return Codebook(
            encoded.codes, encoded.bits, encoded.centroids, encoded.exponent, encoded.shape, encoded.scale, self.axis
        )


def _nearest(points: Tensor, centroids: Tensor) -> Tensor:
    return centroids[hard_codes(points, centroids)]
