"""A plan is laid out in files here: which tensors each holds, and where their bytes will lie. Imports no torch.

An artifact has one file for each file of its checkpoint, each with a manifest of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from qcompress.artifact.layout import INDEX_NAME, Layout, index_text, make_layout, marked_name, planned_manifest
from qcompress.artifact.manifest import Manifest, make_halved
from qcompress.checkpoint.checkpoint import Checkpoint
from qcompress.checkpoint.safetensors_file import Container
from qcompress.recipe import recipe_hash, recipe_json
from qcompress.registry import ClusterConfig
from qcompress.types import VERSION
from qcompress.types.config import CodingChoice
from qcompress.types.encoded import Fitted
from qcompress.types.plan import STORED_AS_F16, Decision, Outcomes, Plan, codebook_key, shared_groups


@dataclass(frozen=True)
class Shard:
    """One input file on its way to one output file."""

    source: Container
    decisions: tuple[Decision, ...]
    layout: Layout
    manifest: Manifest
    file: str
    seed: int


def make_shards(
    checkpoint: Checkpoint,
    plan: Plan,
    choice: CodingChoice,
    fitted: Fitted | None = None,
    outcomes: Outcomes | None = None,
) -> list[Shard]:
    """The files of the artifact in the order of the checkpoint's, each with its layout from headers alone.

    fitted    what a live model's methods chose: its quantizers are named where their weights lie
    outcomes  of the plan's conditions; what is not known yet takes the most that it can
    """
    fitted, outcomes = fitted or Fitted({}), outcomes or Outcomes()
    by_name = {decision.tensor.name: carried_out(decision, outcomes) for decision in plan.decisions}
    recipe, recipe_sha256 = recipe_json(plan.recipe), recipe_hash(plan.recipe)
    dropped = {d.tensor.name: d.tied_to for d in plan.decisions if d.tied_to is not None}
    modules, shards = _modules(by_name), list[Shard]()
    for source in checkpoint.shards:
        decisions = _with_owners(by_name[info.name] for info in source.tensors)
        own = {d.tensor.name for d in decisions}
        # A network that has other names than its checkpoint has modules that no file holds a tensor of.
        owned = _modules(own) | (set() if shards else {*fitted.activations, *fitted.caps} - modules)
        aliases = {a: t for a, t in checkpoint.tied.items() if a not in by_name and t in own}
        tied = {name: twin for name, twin in dropped.items() if name in own}
        tied |= {alias: dropped.get(twin, twin) for alias, twin in aliases.items()}
        manifest = Manifest(
            tool=f"qcompress {VERSION}",
            recipe=recipe,
            recipe_sha256=recipe_sha256,
            input_bytes=source.file_bytes,
            tensors={},
            tied=tied,
            # A copy that was dropped leaves the metadata: a name there is one that never had bytes of its own.
            adjusted=sorted(outcomes.adjusted & own),
            halved=make_halved(_kept_dtypes(decisions)),
            activations={name: grid for name, grid in fitted.activations.items() if name in owned},
            caps={name: caps.tolist() for name, caps in fitted.caps.items() if name in owned},
            metadata={
                key: value
                for key, value in source.metadata.items()
                if (key, value) != ("format", "pt") and key not in dropped
            },
        )
        manifest = planned_manifest(manifest, decisions, compact=plan.compact)
        layout = make_layout(decisions, choice, manifest)
        file = marked_name(source.path.name) if checkpoint.is_folder else source.path.name
        shards.append(Shard(source, decisions, layout, manifest, file, plan.recipe.seed))
    return shards


def carried_out(decision: Decision, outcomes: Outcomes) -> Decision:
    """The decision with what came of its conditions."""
    name, reason = decision.tensor.name, decision.reason
    if name in outcomes.entries:
        decision = replace(decision, codebook=replace(decision.codebook, entries=outcomes.entries[name]))
        return _with_wide_codebooks(decision) if name in outcomes.spread else decision
    if name in outcomes.aimed:
        reason = f"{reason}; errors are those against the weights that its codes stand for"
        decision = replace(decision, reason=reason)
    if name in outcomes.spread:
        reason = f"{reason}; an exponent a row, which differ too much for one"
        return replace(decision, reason=reason, row_exponents=True)
    if name in outcomes.too_wide:
        reason = reason.replace(STORED_AS_F16, "; float16 cannot hold its values")
        decision = replace(decision, stored=None, reason=reason)
    return replace(decision, reason=f"{reason}; values adjusted") if name in outcomes.adjusted else decision


def _with_wide_codebooks(decision: Decision) -> Decision:
    assert isinstance(decision.config, ClusterConfig)
    reason = f"{decision.reason}; codebooks as F32, since the rows differ too much for float16"
    return replace(decision, config=replace(decision.config, codebook="f32"), reason=reason)


def _with_owners(decisions: Iterable[Decision]) -> tuple[Decision, ...]:
    """The decisions of one file; of those that share a codebook the first stores it."""
    decisions = tuple(decisions)
    owners = {key: group[0].tensor.name for key, group in shared_groups(decisions).items()}

    def placed(decision: Decision) -> Decision:
        key = codebook_key(decision)
        owner = owners.get(key) if key is not None else None
        if owner in (None, decision.tensor.name):
            return decision
        return replace(decision, codebook=replace(decision.codebook, stored_in=owner))

    return tuple(map(placed, decisions))


def planned_files(checkpoint: Checkpoint, plan: Plan, choice: CodingChoice) -> dict[str, int]:
    """Bytes of each file of the artifact, from headers alone: exact where codes are packed, else the most."""
    shards = make_shards(checkpoint, plan, choice)
    files = {shard.file: shard.layout.file_bytes for shard in shards}
    if checkpoint.is_folder and len(shards) > 1:
        files[INDEX_NAME] = len(index_text({shard.file: shard.layout.slots for shard in shards}).encode())
    return files


def _kept_dtypes(decisions: Sequence[Decision]) -> dict[str, tuple[str, str]]:
    """Kept tensor -> its dtype in the input, and as it is stored."""
    kept = (d for d in decisions if not d.compresses and d.tied_to is None)
    return {d.tensor.name: (d.tensor.dtype, d.stored_as.dtype) for d in kept}


def _modules(tensors: Iterable[str]) -> set[str]:
    """The modules of these tensors."""
    return {name.rpartition(".")[0] for name in tensors}
