"""A response says what an error in one layer's weights does to the layer's output and to the network's."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qcompress.coding.rows import rows_from_weight, weight_from_rows
from qcompress.data.batches import Batch
from qcompress.model.graph import batch_norm_of
from qcompress.model.live import LiveModel, find_tensor, layer_name, put_tensors
from qcompress.model.products import caller_of
from qcompress.model.runs import layer_inputs, run_stage
from qcompress.model.stages import Stage, State, TailStage, last_output, stage_output
from qcompress.model.sweep import sweep
from qcompress.registry import RdConfig
from qcompress.solvers.hessian import output_error
from qcompress.solvers.unbounded import conditional_energies, feedback_unbounded
from qcompress.types.plan import Decision

PROBED_SAMPLES = 256
PROBED_VALUES = 1 << 24
"""Values of a network's input that its probes see at most."""
PROBED_OUTPUTS = 1 << 24
"""Values of a block's output that its probes see, about."""
SQUARED_AT_ONCE = 1 << 20
LINEAR_SHARE = 0.005
"""The change of the output that a probe aims at, as a share of its variance: more is no longer in proportion."""
MOST_OFTEN = 2.0
"""How much finer or coarser than the common one the steps of a table's rows may be."""
SMALLEST_GAIN = 0.05
"""Of a batch norm's gains, as a share of their median: a dead channel must not ask for any step."""


@dataclass(frozen=True)
class Response:
    """Of one layer, from inputs of the full-precision network.

    energies  float64 [groups, columns]: conditional energies, see `conditional_energies`
    power     float64 [rows]: the mean square of each output
    gains     float64 [rows]: what the batch norm behind multiplies each output by; ones where there is none; of a
              table the square root of how often each row is looked up
    slope     the network's squared output error for each unit of the layer's: with errors of equal step in all rows,
              and, in `normed_slope`, in units of the normed outputs
    reached   whether any calibration sample reaches the layer; else nothing of the above was measured
    """

    energies: Tensor
    power: Tensor
    gains: Tensor
    slope: float
    normed_slope: float
    reached: bool = True


def measure_responses(
    live: LiveModel, decisions: Mapping[str, Decision[RdConfig]], *, damping: float, slopes: bool = True
) -> dict[str, Response]:
    """The response of every weight that a decision is given for, by its name, in the order in which they run.

    The output error is that of the logits without their mean over classes; where the network goes block by block, that
    of the block's output, as a share of what it gives. A layer is probed with the errors of its own rounding, on grids
    so fine that twice the error does twice the harm.

    slopes  whether layers are probed at all; else slopes are 0
    """
    stages = live.stages
    target = _Target(live) if slopes else None
    found = _measure_tables(live, decisions, target, damping)
    products = [name for name in decisions if not is_lookup(live, name)]
    for step in sweep(live, products, sequential=False):
        decision = decisions[step.tensor]
        rows = rows_from_weight(live.weight(step.tensor), decision.axis).flatten(1).contiguous()
        hessian, gains = step.gram().hessian, _gains(live, step.name, len(rows))
        reached = (conditional_energies(hessian, damping), output_error(rows, hessian), gains)
        if step.stage is None or not step.is_reached:
            found[step.tensor] = Response(*reached, 0.0, 0.0, reached=False)
            continue
        own = (0.0, 0.0)
        if target is not None:
            probe = _Probe(target, stages[stages.index(step.stage) :], step.clean_states)
            own = probe.slopes(decision, rows, hessian, gains)
        found[step.tensor] = Response(*reached, *own)
    callers = [name for stage in stages for name in stage.layers]
    places = {name: callers.index(one) for name in found if (one := caller_of(live.module, name)) in callers}
    return {name: found[name] for name in sorted(found, key=lambda name: places.get(name, len(callers)))}


def _measure_tables(
    live: LiveModel, decisions: Mapping[str, Decision[RdConfig]], target: _Target | None, damping: float
) -> dict[str, Response]:
    """The responses of the weights that are looked up in."""
    stages, found = live.stages, {}
    clean, _ = live.begin()
    tables = {layer_name(name): name for name in decisions if is_lookup(live, name)}
    for index, stage in enumerate(stages if tables else ()):
        names = [name for name in stage.layers if name in tables]
        inputs = layer_inputs(stage, live.module, clean, names)
        for name in names:
            decision = decisions[tables[name]]
            rows = rows_from_weight(live.weight(tables[name]), decision.axis).flatten(1).contiguous()
            gains = _lookups(inputs[name], len(rows))
            own = (0.0, 0.0)
            if target is not None:
                own = _Probe(target, stages[index:], clean).slopes(decision, rows, None, gains)
            # As the conditional energies of inputs that have nothing in common.
            energies = torch.full((1, rows.shape[1]), 1.0 + damping, dtype=torch.float64, device=rows.device)
            found[tables[name]] = Response(energies, _row_errors(rows, None), gains, *own)
        clean = run_stage(stage, live.module, clean)
    for name in sorted({*tables.values()} - {*found}):
        size = find_tensor(live.module, name).shape
        energies = torch.ones(1, size[1], dtype=torch.float64, device=live.device)
        found[name] = Response(
            energies, energies.new_ones(size[0]), energies.new_ones(size[0]), 0.0, 0.0, reached=False
        )
        live.unreached.add(name)
    return found


def _row_errors(rows: Tensor, hessian: Tensor | None) -> Tensor:
    """What `output_error` gives; without a Hessian the sum of each row's squares."""
    if hessian is not None:
        return output_error(rows, hessian)
    few = max(1, SQUARED_AT_ONCE // max(1, rows.shape[1]))
    return torch.cat([part.double().square_().sum(1) for part in torch.split(rows, few)])


def is_lookup(live: LiveModel, tensor: str) -> bool:
    """Whether a weight's rows are looked up by number: no matrix product, so that its rows are errors of their own."""
    return isinstance(live.module.get_submodule(layer_name(tensor)), nn.Embedding)


def _lookups(inputs: Sequence[Tensor], rows: int) -> Tensor:
    """How much each row of a table counts: the square root of how often it is looked up, bounded, float64 [rows]."""
    counts = torch.zeros(rows, dtype=torch.float64, device=inputs[0].device)
    for indices in inputs:
        counts += torch.bincount(indices.reshape(-1), minlength=rows)
    often = (counts + 1).sqrt()
    return (often / often.median()).clamp(1 / MOST_OFTEN, MOST_OFTEN)


def _probed_samples(batches: Sequence[Batch]) -> int:
    """How many batches the probes see."""
    samples = values = 0
    for index, batch in enumerate(batches):
        samples += batch.size
        values += sum(x.numel() for x in (*batch.args, *batch.kwargs.values()))
        if samples >= PROBED_SAMPLES or values >= PROBED_VALUES:
            return index + 1
    return len(batches)


class _Target:
    """What the probed samples make of the network as it was, or of the one block that is looked at."""

    def __init__(self, live: LiveModel) -> None:
        # Of a network that goes block by block there is no copy; its weights are put back to what they were.
        self.module = live.module if live.offloaded is not None else copy.deepcopy(live.module)
        self._of_block = live.at is not None
        states, _ = live.begin()
        self.probed = _probed_samples(live.calibration)
        if self._of_block:
            first = self.outputs(live.stages, states[:1])
            self.probed = min(self.probed, max(1, PROBED_OUTPUTS // max(1, first.numel())))
        self.wanted = self.outputs(live.stages, states[: self.probed])
        self.variance = float(self.wanted.square().mean())

    def outputs(self, stages: Sequence[Stage], states: Sequence[State]) -> Tensor:
        """[positions, channels]: hidden values behind a block, or logits without their mean."""
        after = list(states)
        for stage in stages:
            after = run_stage(stage, self.module, after)
        if self._of_block and not isinstance(stages[-1], TailStage):
            return torch.cat([stage_output(stages[-1], state).flatten(0, -2).float() for state in after])
        return _centred(torch.cat([last_output(state).flatten(0, -2).float() for state in after]))

    def harm(self, found: Tensor) -> tuple[float, float]:
        """Of other outputs: the change as a share of the outputs' variance, and what counts as harm.

        Harm is summed over classes; that of a block is the share, so that all blocks count alike.
        """
        mean = float((found - self.wanted).square().mean())
        share = mean / max(self.variance, 1e-300)
        return share, share if self._of_block else mean * found.shape[-1]


def _centred(logits: Tensor) -> Tensor:
    return logits - logits.mean(-1, keepdim=True)


def _gains(live: LiveModel, name: str, rows: int) -> Tensor:
    """What the batch norm behind a layer multiplies its outputs by, float64 [rows].

    A row that makes several outputs, as of a grouped transposed convolution, has what they have on average.
    """
    norm = batch_norm_of(live, name) if live.traced else None
    if norm is None:
        return torch.ones(rows, dtype=torch.float64, device=live.device)
    variance = find_tensor(live.module, norm.running_var).double()
    gains = (variance + norm.eps).rsqrt()
    if norm.weight is not None:
        gains = gains * find_tensor(live.module, norm.weight).detach().double().abs()
    gains = gains.reshape(-1, rows).square().mean(0).sqrt() if len(gains) != rows else gains
    return gains.clamp_min(SMALLEST_GAIN * float(gains.median())) if float(gains.median()) > 0 else gains + 1.0


@dataclass(frozen=True)
class _Probe:
    """The network from one layer on, whose weights may be changed for a while.

    states  before the first of `stages`
    """

    target: _Target
    stages: Sequence[Stage]
    states: Sequence[State]

    def slopes(
        self, decision: Decision[RdConfig], rows: Tensor, hessian: Tensor | None, gains: Tensor
    ) -> tuple[float, float]:
        """(slope, normed slope) of a layer with these weight rows; without a Hessian they are looked up."""
        if hessian is None:
            count, energy = len(rows), 1.01 * rows.shape[1]
        else:
            energies = conditional_energies(hessian, 0.01)
            count, energy = len(rows) // len(hessian), float(energies.sum())
        power = float(_row_errors(rows, hessian).sum())
        step = (0.1 * power / max(energy * count, 1e-300)) ** 0.5 or 1.0
        for attempt in range(3):
            error = _rounding_error(rows, step, hessian)
            share, harm = self._harm(decision, rows + error)
            if share <= 2 * LINEAR_SHARE or attempt == 2:
                break
            step *= (LINEAR_SHARE / share) ** 0.5
        own = _row_errors(error, hessian)
        total, normed = float(own.sum()), float((own * gains.square()).sum())
        return harm / max(total, 1e-300), harm / max(normed, 1e-300)

    def _harm(self, decision: Decision[RdConfig], rows: Tensor) -> tuple[float, float]:
        """What these rows do, see `_Target.harm`."""
        name, module = decision.tensor.name, self.target.module
        own = find_tensor(module, name).detach().clone()
        put_tensors(module, {name: weight_from_rows(rows, tuple(own.shape), decision.axis)})
        found = self.target.outputs(self.stages, self.states[: self.target.probed])
        put_tensors(module, {name: own})
        return self.target.harm(found)


def _rounding_error(rows: Tensor, step: float, hessian: Tensor | None) -> Tensor:
    if hessian is None:
        return (rows / step).round_().mul_(step).sub_(rows)
    steps = torch.full((1, 1), step, dtype=rows.dtype, device=rows.device)
    return feedback_unbounded(rows, steps, hessian) * step - rows
