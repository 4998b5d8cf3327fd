"""Preflight checks refuse what would stop a run later: non-finite weights, false ties, too little memory or disk."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from itertools import zip_longest
from pathlib import Path

import torch
from torch import Tensor

from qcompress.artifact.layout import make_slots
from qcompress.checkpoint.checkpoint import Checkpoint, tensor_view
from qcompress.coding.grids import spread_too_far
from qcompress.coding.planes import BLOCK_VALUES
from qcompress.coding.rows import row_slices
from qcompress.coding.spool import HELD_BYTES
from qcompress.encode.encode_tensor import has_rows_of_grids
from qcompress.encode.encode_unbounded import block_weights
from qcompress.encode.job import BLOCK_WEIGHTS, count_nonfinite, refuse_out_of_range, stored_rows, survey_bytes
from qcompress.errors import CheckpointError, InputError, ResourceError, Subject, raise_all
from qcompress.plan.files import Shard
from qcompress.types.config import CodingChoice
from qcompress.types.encoded import Fitted, Grouped, Kept
from qcompress.types.plan import Decision, Plan, TensorInfo, row_shape
from qcompress.types.ranks import ALONE, World
from qcompress.types.run import Options

BLOCK_COPIES = 24
"""Float32 copies of a block that the most memory-hungry method holds at once."""
CODED_COPIES = 6
"""The same of the bytes of a kept tensor that is coded."""
HALF_ERROR = 2.0**-9
"""The most that a tensor may change, relative to its size, to be stored as float16 on request."""


def too_wide_for_f16(checkpoint: Checkpoint, plan: Plan, fitted: Fitted, world: World = ALONE) -> frozenset[str]:
    """The kept tensors that were to be stored as float16 and cannot: too large, or too small altogether.

    Ranks divide the tensors.
    """

    def is_too_wide(decision: Decision) -> bool:
        tensor = decision.tensor
        adjusted = fitted.encoded.get(tensor.name)
        value = adjusted.value if isinstance(adjusted, Kept) else None
        if value is None:
            value = tensor_view(checkpoint.shard_of(tensor.name), tensor)
        return not _bears_half(value)

    return _those(is_too_wide, [decision for decision in plan.decisions if decision.stored is not None], world)


def _those(holds: Callable[[Decision], bool], decisions: Sequence[Decision], world: World) -> frozenset[str]:
    """The tensors of which something holds, looked at by one rank each."""
    found = world.spread(decisions, lambda decision: decision.tensor.n_bytes, holds)
    return frozenset(decision.tensor.name for decision, yes in zip(decisions, found, strict=True) if yes)


def _bears_half(value: Tensor) -> bool:
    """Whether float16 holds every number, and all together to 2**-9 of their size."""
    exact = value.detach().double()
    error = exact.half().double() - exact
    return bool(error.isfinite().all()) and float(error.norm()) <= HALF_ERROR * float(exact.norm())


def spread_rows(checkpoint: Checkpoint, plan: Plan, fitted: Fitted, world: World = ALONE) -> frozenset[str]:
    """The weights with grids, or codebooks, by row where one exponent does not hold those of all rows. Reads them once.

    fitted  weights that have their codes, and exponents, already are not read
    """

    def is_spread(decision: Decision) -> bool:
        ready = fitted.encoded.get(decision.tensor.name)
        if ready is not None:
            return isinstance(ready, Grouped) and ready.row_exponents is not None
        return _is_spread(checkpoint, decision)

    compressed = [decision for decision in plan.decisions if decision.compresses]
    # Where a config has an exponent a row anyway the decision says nothing of it.
    return _those(is_spread, [decision for decision in compressed if not decision.config.row_exponents], world)


def _is_spread(checkpoint: Checkpoint, decision: Decision) -> bool:
    """Whether a scale of some row would be a float16 of few bits, or none, under the exponent of the largest one."""
    tensor, config = decision.tensor, decision.config
    has_codebooks = config.form == "codebook" and config.unit != "tensor" and config.codebook != "f32"
    own_codebooks = has_codebooks and decision.codebook.shared is None
    # Scales that are to be float16 numbers have one exponent, whatever the rows.
    one_exponent = config.scales == "f16" or not has_rows_of_grids(decision)
    if not tensor.numel or (one_exponent and not own_codebooks):
        return False
    rows = stored_rows(checkpoint.shard_of(tensor.name), decision)
    columns = tensor.numel // rows.shape[0]
    spans = row_slices(rows.shape[0], columns, BLOCK_WEIGHTS)
    largest = torch.cat([rows[span].flatten(1).abs().amax(1).double() for span in spans])
    return spread_too_far(largest, config.code_bits)


def count_nonfinite_values(checkpoint: Checkpoint, tensor: TensorInfo) -> int:
    """How many values of a weight are NaN or Inf. Reads it once."""
    source = checkpoint.shard_of(tensor.name)
    if survey_bytes(source.pieces_of(tensor.name), tensor.dtype).finite:
        return 0
    return count_nonfinite(tensor_view(source, tensor))


def refuse_nonfinite(checkpoint: Checkpoint, plan: Plan) -> None:
    """Raise CheckpointError (Refusals where several) for every weight to compress that float32 does not hold."""
    errors: list[InputError] = []
    for decision in plan.decisions:
        if decision.compresses:
            source, tensor = checkpoint.shard_of(decision.tensor.name), decision.tensor
            try:
                refuse_out_of_range(source, tensor, survey_bytes(source.pieces_of(tensor.name), tensor.dtype))
            except CheckpointError as error:
                errors.append(error)
    raise_all(errors)


def refuse_untrue_ties(checkpoint: Checkpoint, plan: Plan) -> None:
    """Raise CheckpointError where a copy that would be dropped is none: its bytes are not those of its twin."""
    errors: list[InputError] = []
    for decision in plan.decisions:
        if decision.tied_to is None:
            continue
        name, twin = decision.tensor.name, decision.tied_to
        one, other = (checkpoint.shard_of(each).pieces_of(each) for each in (name, twin))
        if any(a != b for a, b in zip_longest(one, other)):
            what = f"is called tied to {twin!r}, and their values differ"
            hint = "name it in a rule without a wildcard, which stores it by itself"
            cause = "are called tied to others, and their values differ"
            errors.append(CheckpointError(str(checkpoint.path), what, hint, Subject(name), cause))
    raise_all(errors)


def fitting_threads(plan: Plan, options: Options) -> int:
    """As many threads as were asked for and --max-memory allows. Raises ResourceError where not even one fits."""
    coded = [decision for decision in plan.decisions if decision.compresses or decision.coding is not None]
    if options.max_memory is None or not coded:
        return options.threads
    needed, largest = max(((_memory_needed(one, options.choice), one) for one in coded), key=lambda pair: pair[0])
    fitting = options.max_memory // needed
    if fitting < 1:
        what = f"needs about {needed} bytes of memory, more than --max-memory {options.max_memory}"
        instead = "use --coding packed and granularity channel or group" if largest.compresses else "keep it uncoded"
        raise ResourceError(f"tensor {largest.tensor.name!r}", what, f"allow more, or {instead}")
    return min(options.threads, fitting)


def _memory_needed(decision: Decision, choice: CodingChoice) -> int:
    """Bytes that encoding one tensor takes at most, roughly: its blocks, and its codes where they wait for coding."""
    weights = decision.tensor.numel
    if not decision.compresses:
        return CODED_COPIES * decision.stored_as.n_bytes * min(weights, BLOCK_VALUES) // weights
    if decision.config.form == "unbounded":
        rows = row_shape(decision.tensor.shape, decision.axis)[0]
        block = min(weights, max(block_weights(decision), weights // max(rows, 1)))
        # Codes and payload wait, of which files hold what is beyond; rows that do not lead are taken from all of them.
        read = 0 if decision.axis == tuple(range(len(decision.axis))) else decision.tensor.n_bytes
        return 4 * BLOCK_COPIES * block + 2 * min(weights, HELD_BYTES) + read
    block = weights if decision.config.unit == "tensor" else min(weights, BLOCK_WEIGHTS)
    gathered = 0 if choice == "packed" else 3 * max(slot.n_bytes for slot in make_slots(decision, choice))
    copies = 6 if decision.config.unit == "tensor" else BLOCK_COPIES
    return 4 * copies * block + gathered


def refuse_full_disk(output: Path, shards: Sequence[Shard], budget_bytes: int | None) -> None:
    """Raise ResourceError where the disk has too few bytes left for the artifact.

    budget_bytes  the most that it may take, where a budget says so

    Codes without a width have no bound that means anything: their file is taken to need no more than the one it is made
    from.
    """
    needed = sum(
        shard.layout.file_bytes
        if shard.layout.exact
        else min(shard.layout.file_bytes, shard.layout.header_bytes + shard.source.file_bytes)
        for shard in shards
    )
    if budget_bytes is not None:
        needed = min(needed, budget_bytes)
    free = shutil.disk_usage(output.parent).free
    if needed > free:
        what = f"the artifact may need {needed} bytes and the disk has {free} left"
        raise ResourceError(str(output), what, "free some space, or write to another disk with -o")
