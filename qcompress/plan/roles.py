"""A tensor's role says what it is in its network: one table of how each is recognised, and of what then happens.

Names, shapes, tensors of the same module, config.json and, where there is one, the network itself tell a role. The rows
of `ROLES` are asked in their order, and the first that fits a tensor is its role. Imports no torch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache

from qcompress.plan.network import Network, Seen
from qcompress.types.plan import WEIGHT_DTYPES, Role

VOCABULARY = re.compile(r"(.*_)?vocab_size|n_vocab|n_words|n_token")
STACK_SIDE = 16
"""The least side of the matrices of a stack: a convolution's kernel is seldom so long."""

LEAST_VOCABULARY = 16
"""A table of fewer rows is no vocabulary, unless config.json says so."""

_INTEGERS = frozenset({"I64", "U64", "I32", "U32", "I16", "U16", "I8", "U8", "BOOL", "C64"})

_SCALES = re.compile(
    r"(\w+_)?(weight|input|output|activation|act|scaling)_(scale(_inv|_2)?|scales|zero_point|zero_points|factor)|"
    r"(\w+_)?scaling_factor|scales(_and_zeros)?|qweight|qzeros|g_idx|weight_(packed|shape|g_idx|format|integer)|SCB|SCBt|"
    r"(\w+_)?absmax|(\w+_)?quant_map|quant_state\w*|bitsandbytes__\w+|[kvq]_scale|(\w+_)?(blocks|scales)|"
    r"(fake_quant|observer)_enabled|min_val|max_val|x_min|x_max|bias_integer"
)
_PLAIN_SCALES = re.compile(r"scale|zero_point|eps")
_MASKS = re.compile(
    r"(\w+_)?mask|masked_bias|(\w+_)?tril|(\w+_)?inv_freq|freqs(_cis|_cos|_sin)?|(sin|cos)(_cached)?|"
    r"((stft|fft|hann|analysis|synthesis)_)?window|"
    r"mel_filters|filterbank|mel_fb|fb|(\w+_)?basis|embed_avg|cluster_size|inited|anchors?|anchor_grid|valid_mask|"
    r"(\w+_)?relative_position_index|(\w+_)?position_ids|(\w+_)?token_type_ids|dummy\w*"
)
_STATES = re.compile(
    r"A_logs?|dt_bias|Lambda(_\w+)?|log_(dt|step|A\w*)|A_(imag|real)|(nu|theta|gamma)_log|recurrent_param|"
    r"time_(decay|first|faaaa|state|maa|mix|mixing|shift)\w*|(\w+_)?decay|slope_rate"
)
_STATE_SIBLINGS = ("A_log", "A_logs", "dt_bias", "log_dt", "log_step", "Lambda", "Lambda_re", "nu_log")
_STATE_BLOCKS = frozenset({"A_log", "A_logs", "dt_bias", "dt_proj", "rg_lru", "recurrent_param"})
_SHORT_CONVOLUTIONS = re.compile(r"([qkv]_)?conv_?1d|(\w+_)?short_conv(olution)?|conv")
_RELATIVE = re.compile(
    r"(\w+_)?rel(ative)?_(attention_|attn_)?(pos(ition)?(al)?_)?(\w_|[12]d_)?(bias|biases|embed)(_table|_mlp|_layer)?|"
    r"rel(ative)?_(pos(ition)?s?(_[hwtxy])?|height|width|coords_table)|(height|width)_rel|(continuous_position_bias|cpb)_mlp|"
    r"(\w+_)?position_bias(_table)?|attention_biases|rpb|distance_embedding|(\w+_)?relative_position_embed\w*"
)
_TOKENS = re.compile(
    r"(\w+_)?(tokens?|queries|latents?|query|probe)(_\d+)?|(\w+_)?(cls|class|mask|masked|pad|no_mem|not_a_point|sep|seg|level)"
    r"_(pos_)?(emb|embed|embeds|embedding|embeddings)(_\w+)?|cls|no_\w+_embedding|(masked_)?spec_embed|image_newline|"
    r"(\w+_)?(queries|query)_(feat|features|embed|embeds|embedding|embeddings|pos)"
)
_POSITIONS = re.compile(
    r"w?pe|(\w*_)?pos(ition|itional|itions)?(_\w+)?_?(emb|embed|embeds|embedding|embeddings|enc|encoding|encodings|table|"
    r"tables)(_\w+|\d+)?|(emb|embed|embedding)s?_pos(itions?)?|positions?_embed|(\w+_)?pos|(row|col|column|time|temporal|"
    r"spatial)_(embed|embeds|embedding|embeddings)|rel_embeddings|positional_embedding\w*|(pe|emb_rel)_[kv]"
)
_TABLES_OF_TOKENS = re.compile(
    r"(\w+_)?quer(y|ies)_(embed|embedding|embeddings|feat|features|embedder|tokens?|position_embeddings|pos)|"
    r"queries_(embedder|features)|(row|col|column)_embed(der|ding|dings)?s?|"
    r"(\w+_)?(level|mask|prompt|point)_embed\w*|embed_global|"
    r"(\w+_)?(mask|iou|hf|register|obj_score|cls|prompt)_tokens?|query_embed"
)
_GATES = re.compile(r"gate|wg|gating|(\w+_)?router(_\w+)?|routers|(\w+_)?shared_experts?_gate")
_ROUTERS = re.compile(r"(\w+_)?router(_\w+)?|routers|shared_experts?_gate")
_BIASES = re.compile(r"(\w+_)?bias(_\w+)?|beta|(\w+_)?biases")
_GAINS = re.compile(
    r"weight_g|original0|gamma\w*|(\w+_)?scale(_\w+)?|lambda\w*|ls\d*|(\w+_)?temperature|alpha|running_(mean|var)|"
    r"num_batches_tracked|(\w+_)?gain"
)
_NORMS = re.compile(
    r"(\w+_)?(layer|batch|group|rms|instance|frozen)?_?norm(alization)?\w{0,3}|(\w+_)?ln_?\w{0,3}|bn\d*"
)
_EXPERT = re.compile(r"(\w+_)?experts?(_?\d+)?")
_HEADS = re.compile(r"(\w+_)?lm_heads?|embed_out|unembed(ding)?|generator_lm_head|lm_head_\w+")
_EMBEDDINGS = re.compile(
    r"(\w+_)?(embed|embeds|embedding|embeddings|embedder|emb|wte|lut)(_?\d+|_\w+)?|shared|w?te|codebook"
)
_NO_EMBEDDINGS = re.compile(r"patch|proj|linear|pixel|dense|conv")
_SMALL_TABLES = re.compile(r"type|segment|lang|label|class|speaker|position|task|style|codebook|level|time|age")


def is_quantizer_scale(seen: Seen) -> bool:
    if _PLAIN_SCALES.fullmatch(seen.leaf):
        return "fake_quant_enabled" in seen.siblings or "observer_enabled" in seen.siblings
    if not _SCALES.fullmatch(seen.leaf):
        return (
            seen.info.dtype in ("I8", "U8")
            and seen.is_weight
            and {"SCB", "weight_scale"} & seen.siblings.keys() != set()
        )
    if seen.leaf.endswith(("scales", "blocks", "scale")) and len(seen.siblings) < 2:
        # What has nothing beside it scales nothing here.
        return bool({"weight", "original0"} & seen.around()) or seen.info.dtype not in WEIGHT_DTYPES
    return True


def is_mask(seen: Seen) -> bool:
    shape = seen.shape
    causal = seen.leaf == "bias" and len(shape) == 4 and shape[:2] == (1, 1) and shape[2] == shape[3]
    integers = seen.info.dtype in _INTEGERS and not seen.is_weight and seen.leaf != "num_batches_tracked"
    return causal or integers or _MASKS.fullmatch(seen.leaf) is not None


def is_state_space(seen: Seen) -> bool:
    if _STATES.fullmatch(seen.leaf):
        return True
    if seen.leaf in ("D", "Ds") and len(seen.shape) == 1:
        return True
    if seen.leaf in ("D", "Ds", "B", "C", "A"):
        return any(name in seen.siblings for name in _STATE_SIBLINGS)
    shape = seen.shape
    short = len(shape) == 3 and shape[1] == 1 and shape[2] <= STACK_SIDE
    if not (short and seen.is_weight and _SHORT_CONVOLUTIONS.fullmatch(seen.owner)):
        return False
    around = seen.around()
    return bool(_STATE_BLOCKS & around) or seen.owner != "conv" or {"in_proj", "out_proj"} <= around


def is_relative_bias(seen: Seen) -> bool:
    return _RELATIVE.fullmatch(seen.owner if seen.is_weight else seen.leaf) is not None and not is_product(seen)


def is_position(seen: Seen) -> bool:
    if not seen.is_weight:
        return (_TOKENS.fullmatch(seen.leaf) or _POSITIONS.fullmatch(seen.leaf)) is not None
    if len(seen.shape) != 2 or "bias" in seen.siblings or is_product(seen) or _NO_EMBEDDINGS.search(seen.owner):
        return False
    return (_POSITIONS.fullmatch(seen.owner) or _TABLES_OF_TOKENS.fullmatch(seen.owner)) is not None


def is_product(seen: Seen) -> bool:
    """Whether a network says that it is a matrix product's weight."""
    return seen.fact is not None and seen.fact.kind == "product" and "Embedding" not in seen.fact.module


def is_router(seen: Seen) -> bool:
    if len(seen.shape) != 2 or seen.leaf == "bias":
        return False
    if any(_ROUTERS.fullmatch(part) for part in (*seen.parts, seen.leaf)):
        return True
    return bool(_GATES.fullmatch(seen.owner)) and (
        any(map(_EXPERT.fullmatch, seen.around() | seen.around(2))) or seen.shape[0] in seen.network.expert_counts
    )


def is_bias(seen: Seen) -> bool:
    return _BIASES.fullmatch(seen.leaf) is not None


def is_norm(seen: Seen) -> bool:
    shape = seen.shape
    if len(shape) < 2 or seen.leaf in ("weight_g", "original0"):
        return True
    if seen.is_weight:
        inner = len(shape) > 3 and seen.info.numel == shape[-1]
        return inner or (len(shape) == 2 and _NORMS.fullmatch(seen.owner) is not None and not is_product(seen))
    spread = seen.info.numel == max(shape) and (len(shape) > 2 or shape[1] == 1)
    return spread or _GAINS.fullmatch(seen.leaf) is not None


def is_expert(seen: Seen) -> bool:
    if any(_EXPERT.fullmatch(part) and "shared" not in part for part in (*seen.parts, seen.leaf)):
        return True
    if len(seen.shape) != 3 or seen.shape[0] not in seen.network.expert_counts:
        return False
    return is_stack(seen) or any(map(_ROUTERS.fullmatch, seen.around() | seen.around(2)))


def is_head(seen: Seen) -> bool:
    if len(seen.shape) != 2 or not seen.is_weight:
        return False
    if _HEADS.fullmatch(seen.owner):
        return True
    numbered = any(part.isdigit() for part in seen.parts)
    return not numbered and seen.shape[0] in vocabulary(seen.network) and not is_embedding(seen)


def is_embedding(seen: Seen) -> bool:
    if len(seen.shape) != 2 or is_product(seen):
        return False
    if seen.fact is not None and seen.fact.kind == "table":
        return True
    name = seen.owner if seen.is_weight else seen.leaf
    if "bias" in seen.siblings or _NO_EMBEDDINGS.search(name):
        return False
    if name == "w":
        return seen.shape[0] in seen.network.counts(VOCABULARY.fullmatch)
    return _EMBEDDINGS.fullmatch(name) is not None


@lru_cache(maxsize=2)
def vocabulary(network: Network) -> frozenset[int]:
    """The numbers of rows that tables of a vocabulary have."""
    found = set(network.counts(VOCABULARY.fullmatch))
    for seen in network.seen():
        small = len(seen.shape) != 2 or seen.shape[0] < LEAST_VOCABULARY or _SMALL_TABLES.search(seen.owner)
        if not small and is_embedding(seen) and not is_position(seen):
            found.add(seen.shape[0])
    return frozenset(found)


@lru_cache(maxsize=2)
def routed_widths(network: Network) -> frozenset[int]:
    """How many values routers take."""
    return frozenset(seen.shape[1] for seen in network.seen() if len(seen.shape) == 2 and is_router(seen))


def is_depthwise(seen: Seen) -> bool:
    shape = seen.shape
    return is_convolution(seen) and shape[1] == 1 and shape[0] > 1 and seen.info.numel > shape[0]


def is_convolution(seen: Seen) -> bool:
    if seen.fact is not None and "Conv" in seen.fact.module and len(seen.shape) > 2:
        return True
    return len(seen.shape) > 3 or (len(seen.shape) == 3 and seen.is_weight and not is_stack(seen))


def is_stack(seen: Seen) -> bool:
    """Whether three dimensions are a pile of matrices, rather than a convolution over one dimension, by the shape."""
    if len(seen.shape) != 3:
        return False
    count, rows, columns = seen.shape
    bias = seen.siblings.get("bias")
    return min(rows, columns) >= max(count, STACK_SIDE) and (bias is None or bias.shape != (count,))


@dataclass(frozen=True, slots=True)
class RoleRow:
    """A row of the table.

    fits  whether a tensor has this role, if none of the rows before fits
    kept  whether it is kept unless a rule names it
    what  what tensors of this role are, for people
    told  how they are recognised, for people
    """

    role: Role
    fits: Callable[[Seen], bool]
    kept: bool
    what: str
    told: str


ROLES: Mapping[Role, RoleRow] = {
    row.role: row
    for row in (
        RoleRow(
            "quantizer-scale",
            is_quantizer_scale,
            True,
            "scales, zero points and codes of another quantizer",
            "names such as `weight_scale`, `qzeros`, `SCB`, `absmax`, beside what they scale",
        ),
        RoleRow(
            "mask",
            is_mask,
            True,
            "masks, indices and other buffers",
            "names such as `attn_mask`, `position_ids`, `inv_freq`; integers; `bias` [1, 1, n, n]",
        ),
        RoleRow(
            "state-space",
            is_state_space,
            True,
            "what a recurrence is made of: its decays, steps and short convolutions",
            "`A_log`, `D` and `dt_bias`, RWKV's `time_*`, `conv1d` [channels, 1, taps] beside them",
        ),
        RoleRow(
            "relative-bias",
            is_relative_bias,
            True,
            "tables of biases by relative position, and the small networks that compute them",
            "`relative_attention_bias`, `relative_position_bias_table`, `rel_pos_h`, `cpb_mlp`",
        ),
        RoleRow(
            "position",
            is_position,
            True,
            "position tables, learned tokens and object queries",
            "`wpe`, `pos_embed`, `cls_token`, `mask_token`, `query_tokens`",
        ),
        RoleRow(
            "router",
            is_router,
            True,
            "what chooses experts",
            "`router`; `gate` beside `experts`, or with as many rows as config.json has experts",
        ),
        RoleRow("bias", is_bias, True, "biases, whatever their shape", "names that say so, `gate_up_proj_bias` too"),
        RoleRow(
            "norm",
            is_norm,
            True,
            "gains: of norms, of weight norm, of layers; running statistics; single vectors",
            "one dimension, or one value a channel; `weight_g`, `original0`, a norm's `weight`",
        ),
        RoleRow(
            "expert",
            is_expert,
            False,
            "an expert's matrix, or all experts' in one tensor",
            "`experts` in the name; three dimensions, the first as many as config.json has experts, beside a router",
        ),
        RoleRow(
            "head",
            is_head,
            False,
            "the matrix whose outputs are a vocabulary's",
            "`lm_head`; as many rows as an embedding, and outside of numbered layers",
        ),
        RoleRow(
            "embedding",
            is_embedding,
            False,
            "a table that rows are looked up in",
            "a module named for it that has no bias; an Embedding of the network",
        ),
        RoleRow(
            "depthwise",
            is_depthwise,
            False,
            "a convolution with one input channel a group",
            "[channels, 1, kernel]",
        ),
        RoleRow(
            "convolution",
            is_convolution,
            False,
            "any other convolution",
            "three dimensions and more, but stacks of matrices",
        ),
        RoleRow("matrix", lambda _: True, False, "any other weight: a matrix product's", "all that is left"),
    )
}


def find_roles(network: Network) -> dict[str, Role]:
    """Name -> role."""
    return {seen.info.name: role_of(seen) for seen in network.seen()}


def role_of(seen: Seen) -> Role:
    return next(role for role, row in ROLES.items() if row.fits(seen))
