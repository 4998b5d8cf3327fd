"""Names of tensors that belong together tell what is run as one, and which norm stands around a weight. No torch.

A norm takes the scale of a weight out again: w and s * w are the same network where the statistics behind, or the gain
before, have the factor too. Only pairs that names, shapes and the norm's own tensors make certain are told.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

from qcompress.types.plan import TensorInfo

RUNNING = "running_var"
BEHIND = (("conv", "bn"), ("convs", "bns"), ("conv", "batch_norm"), ("convs", "batch_norms"))
"""What a part of a weight's name has in place of which the batch norm behind it has another."""
SUFFIXES = ("_bn", "_norm", "_batch_norm")
BEFORE: Mapping[str, tuple[str, ...]] = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.qkv_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj", "mlp.gate_up_proj"),
    "attention_norm": ("attention.wq", "attention.wk", "attention.wv"),
    "ffn_norm": ("feed_forward.w1", "feed_forward.w3"),
    "ln_1": ("attn.c_attn",),
    "ln_2": ("mlp.c_fc",),
    "norm1": ("attn.qkv",),
    "norm2": ("mlp.fc1",),
}
"""Norm -> the weights beside it that read what it gives, and nothing else does in networks of these names."""
ELSEWHERE = ("pre_feedforward_layernorm", "post_feedforward_layernorm", "post_mlp_layernorm")
"""Norms beside which those of the same names stand at other places."""
LINKED = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("wq", "wk", "wv"),
    ("q_lin", "k_lin", "v_lin"),
    ("q", "k", "v"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("wi_0", "wi_1"),
)
"""Modules that other tools store or run as one, so that their widths must be equal, wherever all of them are there."""


def linked_names(name: str, known: Collection[str]) -> list[str]:
    """The tensors that are stored or run as one with a tensor, itself included, in the order of the links."""
    parts = name.split(".")
    for links in LINKED:
        for place, part in enumerate(parts):
            if part in links:
                names = [".".join([*parts[:place], link, *parts[place + 1 :]]) for link in links]
                if all(partner in known for partner in names):
                    return names
    return [name]


def batch_norms_behind(tensors: Mapping[str, TensorInfo]) -> dict[str, str]:
    """Weight -> the running variance of the batch norm behind it, one value a row, where one name alone can be it."""
    found = {}
    for name, info in tensors.items():
        if len(info.shape) < 2 or not name.endswith(".weight"):
            continue
        fits = []
        for norm in _behind(name.removesuffix(".weight")):
            variance = tensors.get(f"{norm}.{RUNNING}")
            if variance is not None and variance.shape == (info.shape[0],) and f"{norm}.running_mean" in tensors:
                fits.append(variance.name)
        if len(set(fits)) == 1:
            found[name] = fits[0]
    return found


def _behind(module: str) -> Iterator[str]:
    """The names that a batch norm behind a module may have."""
    parent, _, last = module.rpartition(".")
    prefix = f"{parent}." if parent else ""
    if last.isdigit():
        yield f"{prefix}{int(last) + 1}"
        above, _, holder = parent.rpartition(".")
        for old, new in BEHIND:
            if holder == old:
                yield f"{above}.{new}.{last}".lstrip(".")
        return
    for old, new in BEHIND:
        if last.rstrip("0123456789") == old:
            yield prefix + last.replace(old, new)
    for suffix in SUFFIXES:
        yield f"{module}{suffix}"


def norms_before(tensors: Mapping[str, TensorInfo]) -> dict[str, str]:
    """Weight -> the gain of the norm that its inputs come from, one value an input, where names make it certain."""
    found = {}
    for gain, info in tensors.items():
        parent, _, last = gain.removesuffix(".weight").rpartition(".")
        if not gain.endswith(".weight") or last not in BEFORE or len(info.shape) != 1:
            continue
        if any(f"{parent}.{other}.weight" in tensors for other in ELSEWHERE):
            continue
        for reader in BEFORE[last]:
            weight = tensors.get(f"{parent}.{reader}.weight")
            if weight is not None and len(weight.shape) == 2 and info.shape[0] in weight.shape:
                found[weight.name] = gain
    return found
