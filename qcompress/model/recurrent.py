"""What flows into the weights of recurrent layers: the sequence, and the hidden states at each step.

A sequence is seen as a packed one throughout: the rows of all samples at the first step, then at the second, and so on,
samples in the order of falling length.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

LAYERS = (nn.LSTM, nn.GRU, nn.RNN)
CELLS = (nn.LSTMCell, nn.GRUCell, nn.RNNCell)


def is_recurrent(module: nn.Module) -> bool:
    """Whether a module is one of torch's recurrent layers or cells, and computes no more than that."""
    return type(module).forward in {kind.forward for kind in (*LAYERS, *CELLS)}


def recurrent_inputs(module: nn.Module, weight: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """The inputs [positions, columns] of a weight of a recurrent module in one call.

    weight  "weight_ih_l0", "weight_hh_l1_reverse", "weight_hr_l0"; of a cell "weight_ih" or "weight_hh"
    """
    given = [*args, *kwargs.values()] if not args else [*args, kwargs.get("hx")]
    x, state = given[0], given[1] if len(given) > 1 else None
    with torch.no_grad():
        if isinstance(module, CELLS):
            return _cell_inputs(module, weight, x, state)
        return _Unrolled.of(module, x, state).inputs(weight)


def _cell_inputs(module: Any, weight: str, x: Tensor, state: Any) -> Tensor:
    if weight == "weight_ih":
        return x.reshape(-1, x.shape[-1])
    if state is None:
        return x.new_zeros(x.reshape(-1, x.shape[-1]).shape[0], module.hidden_size)
    hidden: Tensor = state[0] if isinstance(state, (tuple, list)) else state
    return hidden.reshape(-1, hidden.shape[-1])


@dataclass(frozen=True)
class _Unrolled:
    """A call of a recurrent module.

    rows    of its input, packed: [positions, columns]
    sizes   how many samples each step has, int64 [steps], falling
    states  initial states [layers * directions, samples, ...]: hidden ones, of an LSTM cells' too
    """

    module: Any
    rows: Tensor
    sizes: Tensor
    states: tuple[Tensor, ...]

    @classmethod
    def of(cls, module: Any, x: Tensor | PackedSequence, state: Any) -> _Unrolled:
        given = None if state is None else (tuple(state) if isinstance(state, (tuple, list)) else (state,))
        if isinstance(x, PackedSequence):
            rows, sizes = x.data, x.batch_sizes
            if given is not None and x.sorted_indices is not None:
                given = tuple(one.index_select(1, x.sorted_indices) for one in given)
        else:
            if x.ndim == 2:
                x = x.unsqueeze(0 if module.batch_first else 1)
                given = None if given is None else tuple(one.unsqueeze(1) for one in given)
            x = x.transpose(0, 1) if module.batch_first else x
            rows, sizes = x.reshape(-1, x.shape[-1]), torch.full((x.shape[0],), x.shape[1], dtype=torch.int64)
        if given is None:
            count = module.num_layers * (2 if module.bidirectional else 1)
            hidden = rows.new_zeros(count, int(sizes[0]), module.proj_size or module.hidden_size)
            cells = rows.new_zeros(count, int(sizes[0]), module.hidden_size)
            given = (hidden, cells) if isinstance(module, nn.LSTM) else (hidden,)
        return cls(module, rows, sizes, given)

    def inputs(self, weight: str) -> Tensor:
        """The inputs of a weight, whose layers below run first."""
        kind, _, place = weight.removeprefix("weight_").partition("_l")
        number, _, reverse = place.partition("_")
        rows = self.rows
        for layer in range(int(number)):
            rows = torch.cat([self._outputs(rows, layer, back) for back in self._directions], 1)
        if kind == "ih":
            return rows
        back = reverse == "reverse"
        before = self._before(self._forwards(self._outputs(rows, int(number), back), back), int(number), back)
        return before if kind == "hh" else self._gated(self._forwards(rows, back), before, int(number), back)

    @property
    def _directions(self) -> tuple[bool, ...]:
        return (False, True) if self.module.bidirectional else (False,)

    def _weights(self, layer: int, back: bool) -> list[Tensor]:
        suffix = f"_l{layer}{'_reverse' if back else ''}"
        kinds = ["weight_ih", "weight_hh", *(["bias_ih", "bias_hh"] if self.module.bias else [])]
        kinds += ["weight_hr"] if self.module.proj_size else []
        return [getattr(self.module, kind + suffix) for kind in kinds]

    def _start(self, layer: int, back: bool) -> tuple[Tensor, ...]:
        place = layer * len(self._directions) + back
        return tuple(one[place : place + 1] for one in self.states)

    def _outputs(self, rows: Tensor, layer: int, back: bool) -> Tensor:
        """What one direction of a layer gives for its inputs, rows as they come."""
        run: dict[str, Any] = {
            "LSTM": torch.lstm,
            "GRU": torch.gru,
            "RNN_TANH": torch.rnn_tanh,
            "RNN_RELU": torch.rnn_relu,
        }
        start: Any = self._start(layer, back)
        start = start if isinstance(self.module, nn.LSTM) else start[0]
        weights = self._weights(layer, back)
        found = run[self.module.mode](
            self._forwards(rows, back), self.sizes, start, weights, self.module.bias, 1, 0.0, False, False
        )
        return self._forwards(found[0], back)

    @property
    def _offsets(self) -> Tensor:
        return self.sizes.cumsum(0) - self.sizes

    @property
    def _places(self) -> tuple[Tensor, Tensor]:
        """Of each row its step and its sample."""
        steps = torch.arange(len(self.sizes)).repeat_interleave(self.sizes)
        return steps, torch.arange(len(steps)) - self._offsets[steps]

    def _forwards(self, rows: Tensor, back: bool) -> Tensor:
        """The rows, of every sample from its last step to its first where `back`; its own inverse."""
        if not back:
            return rows
        steps, samples = self._places
        lengths = (self.sizes.unsqueeze(1) > torch.arange(int(self.sizes[0]))).sum(0)
        return rows[(self._offsets[lengths[samples] - 1 - steps] + samples).to(rows.device)]

    def _before(self, hidden: Tensor, layer: int, back: bool) -> Tensor:
        """The hidden state that each step begins with, from those that it ends with."""
        start = self._start(layer, back)[0][0]
        steps, samples = self._places
        earlier = torch.where(steps > 0, self._offsets[(steps - 1).clamp_min(0)] + samples + len(start), samples)
        return torch.cat([start, hidden])[earlier.to(hidden.device)]

    def _gated(self, rows: Tensor, before: Tensor, layer: int, back: bool) -> Tensor:
        """What an LSTM projects: its output gate times the tangent of its cells."""
        forward, recurrent, *rest = self._weights(layer, back)
        gates = rows @ forward.T + before @ recurrent.T + (sum(rest[:2]) if self.module.bias else 0.0)
        take, forget, new, give = gates.chunk(4, 1)
        cells = self._start(layer, back)[1][0]
        found, place = [], 0
        for size in self.sizes.tolist():
            here = slice(place, place + size)
            cells = forget[here].sigmoid() * cells[:size] + take[here].sigmoid() * new[here].tanh()
            found.append(give[here].sigmoid() * cells.tanh())
            place += size
        return torch.cat(found)
