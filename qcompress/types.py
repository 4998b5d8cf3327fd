"""The nouns of a plan, frozen, in the order in which data meets them; what weights become is in `encoded`.

checkpoint -> TensorInfo -> Recipe of Rules -> Plan of Decisions -> Encoded
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias

from qcompress.settings import ActivationSettings, Companion, DataSettings, ModelSettings, Task, Training

if TYPE_CHECKING:
    pass

Shape: TypeAlias = tuple[int, ...]

DTYPE_BITS: Mapping[str, int] = {
    "F64": 64, "I64": 64, "U64": 64, "C64": 64,
    "F32": 32, "I32": 32, "U32": 32,
    "F16": 16, "BF16": 16, "I16": 16, "U16": 16,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I8": 8, "U8": 8, "BOOL": 8,
    "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip
"""Bits per element of every dtype that a safetensors header may name."""

COMMAND_LINE = "command line"
"""Where a rule is that no file holds."""

WEIGHT_DTYPES = frozenset({"F64", "F32", "F16", "BF16"})
"""The dtypes whose tensors can be compressed; all others are kept."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor as a header describes it: no data."""

    name: str
    shape: Shape
    dtype: str

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def n_bytes(self) -> int:
        return -(-self.numel * DTYPE_BITS[self.dtype] // 8)


def row_shape(shape: Shape, axis: tuple[int, ...]) -> Shape:
    """The shape (rows, ...) of a weight whose channel axes come first and become one; a vector or scalar is one row."""
    if len(shape) < 2:
        return (1, math.prod(shape))
    rest = tuple(size for index, size in enumerate(shape) if index not in axis)
    return (math.prod(shape[index] for index in axis), *rest)


Family: TypeAlias = Literal["quantize", "cluster"]
Granularity: TypeAlias = Literal["tensor", "channel", "group"]

GridForm: TypeAlias = Literal["symmetric", "zero-point", "offset"]
"""What is stored beside the scale: nothing, an unsigned integer zero point, or a real offset."""

Convention: TypeAlias = Literal["narrow", "full", "mid-rise"]
"""Where zero lies on a symmetric grid of b bits: at code 2**(b-1) - 1, at 2**(b-1), or at (2**b - 1) / 2."""


def searched_convention(bits: int) -> Convention:
    """The symmetric grid with the least squared error on bell-shaped weights, one for all blocks of a tensor."""
    return "mid-rise" if bits <= 2 else "full"


@dataclass(frozen=True, slots=True)
class Rule:
    """One line of a recipe: which tensors, and what happens to them.

    `method` None keeps; `config` is the method's config dataclass, or Widths under a budget; of a rule that keeps a
    Keep or None. `where` names the rule in errors ("recipe.yaml:7: rules[0].rtn").
    """

    match: str
    method: str | None
    config: Any
    where: str

    @property
    def names_one_tensor(self) -> bool:
        return not any(character in self.match for character in "*?[")

    @property
    def options(self) -> Any:
        """The config, of open widths the widest: all but the bits, and what follows from them, is the same."""
        return self.config.widest if isinstance(self.config, Widths) else self.config


@dataclass(frozen=True, slots=True)
class Budget:
    """What the compressed weights may take; exactly one of the first three.

    bpw          bits per compressed weight, all side information counted
    size         bytes of the whole artifact
    minimize     the smallest artifact that holds the gates
    sensitivity  a file of what each layer costs at each width, as the recipe names it
    """

    bpw: float | None = None
    size: int | None = None
    minimize: Literal["size"] | None = None
    sensitivity: str | None = None


@dataclass(frozen=True, slots=True)
class Widths:
    """A config whose bits a budget has yet to choose: the config at each width that its method has, ascending."""

    configs: Mapping[int, Any]

    @property
    def widest(self) -> Any:
        return self.configs[max(self.configs)]

    def at(self, bits: int) -> Any:
        return self.configs[bits]


KeepDtype: TypeAlias = Literal["f16"]


@dataclass(frozen=True, kw_only=True)
class Keep:
    """How tensors that are not compressed are stored.

    dtype  f16 stores real numbers of more than 16 bits in 16, where their values bear it; they load in their own dtype
    """

    dtype: KeepDtype | None = None

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid", "strict": True}


@dataclass(frozen=True, slots=True)
class Gates:
    """Limits that turn a finished run into exit code 4. Bytes, bits per weight, decibels."""

    max_size: int | None = None
    max_bpw: float | None = None
    min_sqnr: float | None = None
    min_metric: Mapping[str, float] = field(default_factory=dict)
    max_drop: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Finetune:
    """How a model is trained, and what its weights are pulled to.

    regularize  rules whose methods are regularizers; None exempts
    """

    training: Training
    regularize: tuple[Rule, ...] = ()


@dataclass(frozen=True, slots=True)
class Recipe:
    """What the user asked for, checked but not yet held against any tensor.

    keep_dtype  how tensors that are not compressed are stored, where no rule says it; None: as they are
    source  the recipe's file, whose folder its paths start from
    places  where each section stands, for errors: "model" -> "recipe.yaml:3: model"
    """

    family: Family
    rules: tuple[Rule, ...]
    seed: int = 0
    gates: Gates = Gates()
    model: ModelSettings | None = None
    data: DataSettings | None = None
    task: Task | None = None
    activations: ActivationSettings | None = None
    companions: tuple[Companion, ...] = ()
    budget: Budget | None = None
    finetune: Finetune | None = None
    keep_dtype: KeepDtype | None = None
    source: str = COMMAND_LINE
    places: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Axis:
    """The channel axes of a weight, which become its rows, and who says so."""

    axes: tuple[int, ...]
    reason: str


@dataclass(frozen=True, slots=True)
class Book:
    """What a tensor's codebook is, beyond its settings.

    entries    a table has no more, because no more values differ; None: as many as its codes can name
    shared     what shares it: "model", "type q_proj.weight", "layer model.layers.0"; None: this tensor alone has it
    stored_in  the tensor of the same file that stores it, where that is another one
    """

    entries: int | None = None
    shared: str | None = None
    stored_in: str | None = None


@dataclass(frozen=True, slots=True)
class Decision:
    """What happens to one tensor and why.

    `config` is Widths where a budget has yet to choose. `axis` holds the channel axes: the weight is seen as rows, one
    a channel. `tied_to` names the tensor that is stored in place of this one. `stored` is the dtype in which a kept
    tensor is stored, where that is not its own. `sensitivity` is what the chosen width of this tensor alone costs,
    where that was measured. `book` says more of a codebook, how many values differ once that was counted.
    """

    tensor: TensorInfo
    method: str | None
    config: Any
    reason: str
    axis: tuple[int, ...] = (0,)
    tied_to: str | None = None
    stored: str | None = None
    sensitivity: float | None = None
    book: Book = field(default_factory=Book)

    @property
    def compresses(self) -> bool:
        return self.method is not None

    @property
    def is_open(self) -> bool:
        return isinstance(self.config, Widths)


BookKey: TypeAlias = tuple[str, str | None, Any]
"""What tensors with one codebook have in common: what shares it, their method and their config."""


def book_key(decision: Decision) -> BookKey | None:
    """The key of a codebook that several tensors share; None for a tensor with its own."""
    shared = decision.book.shared
    return None if shared is None else (shared, decision.method, decision.config)


def shared_groups(decisions: Iterable[Decision]) -> dict[BookKey, list[Decision]]:
    """The decisions that share a codebook, by its key, in their order."""
    groups: dict[BookKey, list[Decision]] = {}
    for decision in decisions:
        key = book_key(decision)
        if key is not None and decision.compresses:
            groups.setdefault(key, []).append(decision)
    return groups


@dataclass(frozen=True, slots=True)
class Plan:
    """One decision for each tensor, in the order of the checkpoint."""

    recipe: Recipe
    decisions: tuple[Decision, ...]
