"""Which axes of a weight are its channels, and which tensors are one, as its surroundings tell. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from qcompress.plan.network import Network, Seen
from qcompress.plan.roles import find_roles, is_stack, routed_widths
from qcompress.types.plan import WEIGHT_DTYPES, Axis, Role, TensorInfo

TRANSPOSED_MODELS = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer"})
"""Hugging Face model types whose Conv1D layers store [in, out]."""
_TRANSPOSED_LAYERS = ("c_attn", "c_proj", "c_fc", "q_attn")

TRANSPOSED_EXPERTS = frozenset({"gpt_oss", "llama4", "llama4_text"})
"""Hugging Face model types whose stacked experts are [expert, in, out]; the others store [expert, out, in]."""

_INTO_EXPERTS = re.compile(r"(^|_)(gate|up|w1|w3|wi|input|in|fc1|c_fc)(_|$)")
_OUT_OF_EXPERTS = re.compile(r"(^|_)(down|w2|wo|output|out|fc2|c_proj)(_|$)")
_WIDTHS = ("hidden_size", "d_model", "n_embd", "model_dim")


def find_axes(network: Network, roles: Mapping[str, Role]) -> dict[str, Axis]:
    """Name -> its channel axes and who says so, where they are not the first alone."""
    found = {}
    for seen in network.seen():
        if len(seen.shape) > 1:
            axis = _axis(seen, roles[seen.info.name])
            if axis is not None:
                found[seen.info.name] = axis
    return found


def _axis(seen: Seen, role: Role) -> Axis | None:
    if seen.fact is not None and seen.fact.axis is not None:
        return seen.fact.axis
    if role == "expert" and len(seen.shape) == 3:
        return _expert_axis(seen)
    if role == "matrix" and len(seen.shape) == 2:
        return _conv1d_axis(seen)
    if role in ("convolution", "depthwise"):
        return _transposed_axis(seen)
    if role == "matrix" and len(seen.shape) == 3:
        return _headed_axis(seen) or (Axis((0, 1), "stacked matrices, by the shape") if is_stack(seen) else None)
    return None


def _conv1d_axis(seen: Seen) -> Axis | None:
    """The axis of a matrix that may lie as [in, out]: its bias tells, and config.json where the matrix is square."""
    if seen.fact is not None or not seen.is_weight:
        return None
    rows, columns = seen.shape
    bias = seen.siblings.get("bias")
    told = bias is not None and bias.shape == (columns,) and rows != columns
    if seen.owner in _TRANSPOSED_LAYERS:
        if seen.network.model_types & TRANSPOSED_MODELS:
            return Axis((1,), "config.json: Conv1D, stored transposed")
        if told or (rows == columns and _beside_transposed(seen)):
            return Axis((1,), "Conv1D, stored transposed, as biases tell")
    return Axis((1,), "stored transposed, as its bias tells") if told else None


def _beside_transposed(seen: Seen) -> bool:
    """Whether the layer before this one, in the same module, is seen to be stored transposed."""
    parent = seen.module.rpartition(".")[0]
    for layer in ("c_attn", "q_attn", "c_fc"):
        own = seen.network.modules.get(f"{parent}.{layer}".lstrip("."), {})
        weight, bias = own.get("weight"), own.get("bias")
        if weight is not None and bias is not None and len(weight.shape) == 2:
            return weight.shape[0] != weight.shape[1] and bias.shape == weight.shape[1:]
    return False


def _transposed_axis(seen: Seen) -> Axis | None:
    """The second axis of a convolution whose bias has a value for each place of it and not of the first."""
    bias = seen.siblings.get("bias")
    if seen.fact is not None or bias is None or len(bias.shape) != 1 or not seen.is_weight or seen.shape[1] < 2:
        return None
    outputs = bias.shape[0]
    if outputs == seen.shape[0] or outputs % seen.shape[1]:
        return None
    return Axis((1,), "a transposed convolution, as its bias tells")


def _headed_axis(seen: Seen) -> Axis | None:
    """The outputs of [in, heads, width] in XLNet's and the Funnel transformer's attention, whose `o` has [out, ...]."""
    if {"q", "k", "v", "o", "r"} <= seen.siblings.keys() and seen.leaf in "qkvr":
        return Axis((1, 2), "[in, heads, width]")
    return Axis((1, 2), "[in, heads, width]") if seen.leaf == "r_kernel" else None


def _expert_axis(seen: Seen) -> Axis:
    """Experts and their outputs: of a stack [expert, out, in] the first two axes, of [expert, in, out] first and last.

    Biases tell, then the shapes of the matrices into and out of the experts, then the network's width, then its type.
    """
    for tell, who in (
        (_told_by_bias, "its bias tells"),
        (_told_by_pair, "the experts' shapes tell"),
        (_told_by_width, "the network's width tells"),
    ):
        last = tell(seen)
        if last is not None:
            return _stacked(last, f"as {who}")
    transposed = bool(seen.network.model_types & TRANSPOSED_EXPERTS)
    return _stacked(transposed, "as in config.json's model_type" if transposed else "as nothing says otherwise")


def _stacked(out_last: bool, who: str) -> Axis:
    if out_last:
        return Axis((0, 2), f"stacked experts [expert, in, out], {who}")
    return Axis((0, 1), f"stacked experts [expert, out, in], {who}")


def _told_by_bias(seen: Seen) -> bool | None:
    count, rows, columns = seen.shape
    bias = seen.siblings.get("bias" if seen.is_weight else f"{seen.leaf}_bias")
    if bias is None or rows == columns:
        return None
    return bias.shape == (count, columns) if bias.shape in ((count, rows), (count, columns)) else None


def _pile(seen: Seen) -> dict[str, TensorInfo]:
    """The stacks beside a stack, itself included, by their names there."""
    if not seen.is_weight:
        found = dict(seen.siblings)
    else:
        parent = seen.module.rpartition(".")[0]
        own = ((name, f"{parent}.{name}".lstrip(".")) for name in seen.around())
        modules = seen.network.modules
        found = {name: modules[module][seen.leaf] for name, module in own if seen.leaf in modules.get(module, {})}
    return {name: one for name, one in found.items() if len(one.shape) == 3 and one.shape[0] == seen.shape[0]}


def _told_by_pair(seen: Seen) -> bool | None:
    """Whether outputs are last, by one matrix into the experts and one out of them: the same width lies between."""
    pile = _pile(seen)
    into = next((one.shape[1:] for name, one in pile.items() if _INTO_EXPERTS.search(name)), None)
    out = next((one.shape[1:] for name, one in pile.items() if _OUT_OF_EXPERTS.search(name)), None)
    if into is None or out is None:
        return None
    # A gated layer makes two values for each that the next one takes.
    out_first = into[1] == out[0] and into[0] in (out[1], 2 * out[1])
    out_last = into[0] == out[1] and into[1] in (out[0], 2 * out[0])
    return None if out_first == out_last else out_last


def _told_by_width(seen: Seen) -> bool | None:
    """Whether outputs are last, by the width of the network, which goes into experts and comes out."""
    _, rows, columns = seen.shape
    name = seen.owner if seen.is_weight else seen.leaf
    widths = seen.network.counts(lambda key: key in _WIDTHS) | routed_widths(seen.network)
    if (rows in widths) == (columns in widths):
        return None
    if _INTO_EXPERTS.search(name):
        return rows in widths
    return columns in widths if _OUT_OF_EXPERTS.search(name) else None


def find_tied(network: Network, roles: Mapping[str, Role]) -> dict[str, str]:
    """Head or second table -> the embedding that config.json calls tied to it, where both have one shape and dtype."""
    told = (one["tie_word_embeddings"] for one in network.configs if "tie_word_embeddings" in one)
    if next(told, None) is not True:
        return {}
    tables = [one for one in network.tensors if roles[one.name] == "embedding"]
    tables.sort(key=lambda one: (not one.name.endswith("shared.weight"), one.name))
    second = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
    tied: dict[str, str] = {}
    for one in network.tensors:
        if roles[one.name] == "head" or one.name.endswith(second):
            twin = next((t for t in tables if t.name not in (one.name, *tied) and _same_header(t, one)), None)
            if twin is not None:
                tied[one.name] = twin.name
    return tied


def _same_header(one: TensorInfo, other: TensorInfo) -> bool:
    return (one.shape, one.dtype) == (other.shape, other.dtype)


def stored_roles(tensors: Sequence[TensorInfo], config: Mapping[str, object]) -> frozenset[Role]:
    """The roles of the weights that are stored, and not for being a copy of another left out."""
    network = Network(tensors, config)
    roles = find_roles(network)
    tied = find_tied(network, roles)
    return frozenset(roles[one.name] for one in tensors if one.dtype in WEIGHT_DTYPES and one.name not in tied)
