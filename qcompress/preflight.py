"""What is looked at before anything is written: weights that are no numbers, false ties, memory and disk."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from qcompress.artifact.layout import make_slots
from qcompress.checkpoint import Checkpoint, tensor_view
from qcompress.coding.payload import CodingChoice
from qcompress.errors import CheckpointError, InputError, ResourceError, raise_all
from qcompress.options import Options
from qcompress.types import Decision, Plan
from qcompress.worker import BLOCK_WEIGHTS, count_nonfinite, nonfinite_error, survey_bytes

BLOCK_COPIES = 24
"""Float32 copies of a block that the most memory-hungry method holds at once."""


def keep_nonfinite(checkpoint: Checkpoint, plan: Plan) -> Plan:
    """The plan with every weight that holds NaN or Inf kept as it is. Reads all weights once."""
    decisions = []
    for decision in plan.decisions:
        if decision.compresses:
            source = checkpoint.shard_of(decision.tensor.name)
            if not survey_bytes(source.bytes_of(decision.tensor.name), decision.tensor.dtype).finite:
                count = count_nonfinite(tensor_view(source, decision.tensor))
                reason = f"{count} values are NaN or Inf (--skip-nonfinite)"
                decision = replace(decision, method=None, config=None, reason=reason)
        decisions.append(decision)
    return replace(plan, decisions=tuple(decisions))


def refuse_nonfinite(checkpoint: Checkpoint, plan: Plan) -> None:
    """Raise CheckpointError (Refusals where several) for every weight to compress that holds NaN or Inf."""
    errors: list[InputError] = []
    for decision in plan.decisions:
        if decision.compresses:
            source, tensor = checkpoint.shard_of(decision.tensor.name), decision.tensor
            if not survey_bytes(source.bytes_of(tensor.name), tensor.dtype).finite:
                errors.append(nonfinite_error(source, tensor, count_nonfinite(tensor_view(source, tensor))))
    raise_all(errors)


def refuse_untrue_ties(checkpoint: Checkpoint, plan: Plan) -> None:
    """Raise CheckpointError where a copy that would be dropped is none: its bytes are not those of its twin."""
    for decision in plan.decisions:
        if decision.tied_to is None:
            continue
        name, twin = decision.tensor.name, decision.tied_to
        one = checkpoint.shard_of(name).bytes_of(name)
        other = checkpoint.shard_of(twin).bytes_of(twin)
        if one != other:
            what = f"is called tied to {twin!r}, and their values differ"
            mend = "name it in a rule without a wildcard, which stores it by itself"
            raise CheckpointError(f"{checkpoint.path}: tensor {name!r}", what, mend)


def fitting_threads(plan: Plan, options: Options) -> int:
    """As many threads as were asked for and --max-memory allows. Raises ResourceError where not even one fits."""
    needs = {d.tensor.name: _memory_needed(d, options.choice) for d in plan.decisions if d.compresses}
    if options.max_memory is None or not needs:
        return options.threads
    name, largest = max(needs.items(), key=lambda item: item[1])
    fitting = options.max_memory // largest
    if fitting < 1:
        what = f"needs about {largest} bytes of memory, more than --max-memory {options.max_memory}"
        mend = "allow more, or use --coding packed and granularity channel or group"
        raise ResourceError(f"tensor {name!r}", what, mend)
    return min(options.threads, fitting)


def _memory_needed(decision: Decision, choice: CodingChoice) -> int:
    """Bytes that encoding one tensor takes at most, roughly: its blocks, and its codes where they wait for coding."""
    weights = decision.tensor.numel
    block = weights if decision.config.granularity == "tensor" else min(weights, BLOCK_WEIGHTS)
    gathered = 0 if choice == "packed" else 3 * max(slot.n_bytes for slot in make_slots(decision, choice))
    copies = 6 if decision.config.granularity == "tensor" else BLOCK_COPIES
    return 4 * copies * block + gathered


def refuse_full_disk(output: Path, needed: int) -> None:
    """Raise ResourceError where the disk has fewer than `needed` bytes left for the artifact."""
    free = shutil.disk_usage(output.parent).free
    if needed > free:
        what = f"the artifact may need {needed} bytes and the disk has {free} left"
        raise ResourceError(str(output), what, "free some space, or write to another disk with -o")
