"""The nouns of a plan, frozen, in the order in which data meets them; `encoded` has what weights become.

checkpoint -> TensorInfo -> Recipe of Rules -> Plan of Decisions -> Encoded
"""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, ClassVar, Final, Generic, Literal, TypeAlias, get_args

from annotated_types import Gt, Interval, MinLen
from typing_extensions import TypeVar

from qcompress.types.config import (
    CodebookDtype,
    Convention,
    Form,
    Granularity,
    MethodConfig,
    PenaltyConfig,
    ScaleDtype,
    Section,
    Shape,
    Share,
    TableValues,
)
from qcompress.types.data_settings import DataSettings
from qcompress.types.settings import ActivationSettings, Companion, ModelSettings, Task, Training
from qcompress.types.words import listed
from qcompress.types.written import DISTINCT, Given, Refused, Size, shown_as

DTYPE_BITS: Mapping[str, int] = {
    "F64": 64, "I64": 64, "U64": 64, "C64": 64,
    "F32": 32, "I32": 32, "U32": 32,
    "F16": 16, "BF16": 16, "I16": 16, "U16": 16,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I8": 8, "U8": 8, "BOOL": 8,
    "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip
"""Bits per element of every dtype that a safetensors header may name."""

VERSION: Final = 1
"""Of the recipe format."""

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

Role: TypeAlias = Literal[
    "matrix", "convolution", "depthwise", "embedding", "head", "router", "expert", "position", "norm", "state-space",
    "relative-bias", "quantizer-scale", "mask", "bias",
]  # fmt: skip
"""What a tensor is in its network; the table of how each is recognised is `plan.roles.ROLES`."""

ROLE_NAMES: tuple[Role, ...] = get_args(Role)

ROLE_MARK: Final = "@"
"""What stands before a role in a rule's `match`."""


def searched_convention(bits: int) -> Convention:
    """The symmetric grid with the least squared error on bell-shaped weights, one for all blocks of a tensor."""
    return "mid-rise" if bits <= 2 else "full"


@dataclass(frozen=True)
class Budget(Section):
    """What the compressed weights may take, exactly one of the first three; the methods' `bits` are then left out.

    bpw          bits per compressed weight, all side information counted
    size         bytes of the whole artifact: 2000000, 2MB (powers of 1000) or 2MiB (powers of 1024)
    minimize     the smallest artifact that holds the gates
    sensitivity  a file of what each layer costs at each width, from `report --sensitivity`; a path from the recipe's
                 folder or from `QCOMPRESS_DATA`
    """

    example: ClassVar = {"bpw": 2.0}
    limits: ClassVar = ("bpw", "size", "minimize")
    paths: ClassVar = ("sensitivity",)

    bpw: Given[Annotated[float, Gt(0)]] = None
    size: Given[Size] = None
    minimize: Given[Literal["size"]] = None
    sensitivity: Given[Annotated[str, MinLen(1)]] = None

    def __post_init__(self) -> None:
        given = [name for name in self.limits if getattr(self, name) is not None]
        if not given:
            raise Refused("names no limit; write `budget: {bpw: 2.0}`, or {size: 1.2MB}")
        if len(given) > 1:
            raise Refused(f"{listed(given)} are given together; keep one of them", given[1])


KeepDtype: TypeAlias = Literal["f16"]
KeepCoding: TypeAlias = Literal["auto", "zstd", "ans"]
"""How what is kept is coded: by what makes it smallest, or by one of these."""
KEEP_CODINGS: tuple[KeepCoding, ...] = get_args(KeepCoding)


@dataclass(frozen=True, kw_only=True)
class Keep(Section):
    """Do not compress the tensors.

    dtype   f16 stores real numbers of more than 16 bits in 16, where their values bear it; they load in their own dtype
    coding  auto stores the bytes of real numbers entropy coded where they take fewer then, by zstd or ans, whichever is
            smaller, or by the one that is named; they load bit for bit
    """

    dtype: KeepDtype | None = None
    coding: KeepCoding | None = None


@dataclass(frozen=True)
class Exempt(Section):
    """Leave the weights as they are."""


def find_matches(match: str, names: Collection[str], roles: Mapping[str, Role] | None = None) -> list[str]:
    """The names that a rule's `match` means, in their order.

    The one that it equals, else those of the role that it names, else all that fit it as a glob.

    names  quick to look a name up in
    roles  of these names
    """
    if match in names:
        return [match]
    if match.startswith(ROLE_MARK):
        return [name for name in names if (roles or {}).get(name) == match[len(ROLE_MARK) :]]
    if not any(character in match for character in "*?["):
        return []
    fits = re.compile(fnmatch.translate(match)).match
    return [name for name in names if fits(name)]


@dataclass(frozen=True, slots=True)
class Rule:
    """One line of a recipe: which tensors, and what happens to them.

    `method` None keeps, and then `config` is a Keep or None; else it is the method's config, Widths under a budget, or
    of a regularizer. `where` names the rule in errors ("recipe.yaml:7: rules[0].rtn").
    """

    match: str
    method: str | None
    config: MethodConfig | PenaltyConfig | Keep | None
    where: str

    def names(self, tensor: str) -> bool:
        """Whether this tensor is meant by its name, and not by a glob or a role that others fit too."""
        return self.match == tensor

    @property
    def by_role(self) -> bool:
        """Whether tensors are meant by their role."""
        return self.match.startswith(ROLE_MARK)

    @property
    def options(self) -> MethodConfig:
        """The config of a rule that compresses."""
        assert isinstance(self.config, MethodConfig)
        return self.config


@dataclass(frozen=True)
class Widths(MethodConfig):
    """A config whose bits a budget has yet to choose: the config at each width that its method has, ascending.

    All but the bits is that of the widest: what follows from them is the same.
    """

    configs: Mapping[int, MethodConfig]

    @property
    def widest(self) -> MethodConfig:
        return self.configs[max(self.configs)]

    def at(self, bits: int) -> MethodConfig:
        return self.configs[bits]

    bits: ClassVar[None] = None

    @property
    def form(self) -> Form:
        return self.widest.form

    @property
    def granularity(self) -> Granularity | None:
        return self.widest.granularity

    @property
    def group_size(self) -> int | None:
        return self.widest.group_size

    @property
    def dim(self) -> int:
        return self.widest.dim

    @property
    def axis(self) -> int | tuple[int, ...] | None:
        return self.widest.axis

    @property
    def stored_convention(self) -> Convention:
        return self.widest.stored_convention

    @property
    def codebook(self) -> CodebookDtype:
        return self.widest.codebook

    @property
    def share(self) -> Share | None:
        return self.widest.share

    @property
    def table(self) -> TableValues:
        return self.widest.table

    @property
    def sub_blocks(self) -> int:
        return self.widest.sub_blocks

    @property
    def subzero(self) -> int:
        return self.widest.subzero

    @property
    def offsets(self) -> bool:
        return self.widest.offsets

    @property
    def row_exponents(self) -> bool:
        return self.widest.row_exponents

    @property
    def scales(self) -> ScaleDtype | None:
        return self.widest.scales


Metrics: TypeAlias = Annotated[Mapping[str, float], shown_as({"top1": 0.1})]


@dataclass(frozen=True)
class Gates(Section):
    """Limits; a run that breaks one exits with code 4.

    max_size    largest artifact, in bytes: 2000000, 2MB (powers of 1000) or 2MiB (powers of 1024)
    max_bpw     most bits per weight
    min_sqnr    least signal-to-noise ratio of any tensor, in decibels
    min_metric  least value of each named metric
    max_drop    most that each named metric may fall below the checkpoint's
    """

    example: ClassVar = {"max_size": "2MB"}

    max_size: Given[Size] = None
    max_bpw: Given[Annotated[float, Gt(0)]] = None
    min_sqnr: Given[float] = None
    min_metric: Metrics = field(default_factory=dict)
    max_drop: Metrics = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Finetune(Training):
    """How a model is trained, and what its weights are pulled to.

    regularize  rules whose methods are regularizers; None exempts
    """

    regularize: tuple[Rule, ...] = ()


KEYS: Final[Mapping[str, str]] = {"target": "for"}
"""The keys of a recipe's sections that are words of Python."""


@dataclass(frozen=True, kw_only=True)
class Sections(Section):
    """What a recipe says beside its rules and how it trains.

    version      of the recipe format
    seed         of everything that is drawn at random
    keep_dtype   store what is not compressed in 16 bits, where its values bear that; it loads in its own dtype
    keep_coding  store what is not compressed entropy coded, where it takes fewer bytes then; it loads bit for bit
    model        the network that the checkpoint's weights belong to
    data         what the network runs on
    task         what the network is measured by
    activations  quantizers at the inputs of the compressed layers
    companions   corrections that go with any method, after it
    target       the format of another tool whose grids the weights get, so that it holds them exactly
    budget       what the compressed weights may take
    gates        limits that turn a finished run into exit code 4
    """

    version: Literal[1] = VERSION
    seed: Annotated[int, Interval(ge=0, le=2**63 - 1)] = 0
    keep_dtype: Given[KeepDtype] = None
    keep_coding: Given[KeepCoding] = None
    model: Given[ModelSettings] = None
    data: Given[DataSettings] = None
    task: Given[Task] = None
    activations: Given[ActivationSettings] = None
    companions: Annotated[tuple[Companion, ...], DISTINCT] = ()
    target: str | None = None
    budget: Given[Budget] = None
    gates: Gates = field(default_factory=Gates)


@dataclass(frozen=True)
class Recipe(Sections):
    """What the user asked for, checked but not yet held against any tensor.

    source  the recipe's file, whose folder its paths start from
    places  where each section stands, for errors: "model" -> "recipe.yaml:3: model"
    """

    family: Family
    rules: tuple[Rule, ...]
    finetune: Finetune | None = None
    source: str = COMMAND_LINE
    places: Mapping[str, str] = field(default_factory=dict)

    @property
    def root(self) -> Path:
        """The folder that its paths start from."""
        source = Path(self.source)
        return source.parent if source.suffix else Path()

    def place(self, section: str) -> str:
        """How errors name a section."""
        return self.places.get(section, section)


@dataclass(frozen=True, slots=True)
class Axis:
    """The channel axes of a weight, which become its rows, and who says so."""

    axes: tuple[int, ...]
    reason: str


WeightKind: TypeAlias = Literal["product", "inner", "table", "idle", "else"]


@dataclass(frozen=True, slots=True)
class TensorFacts:
    """What a network says of one of its tensors.

    module   the type of the module that holds it
    axis     its channel axes, where they are not the first
    tied_to  the earlier tensor that it is
    called   whether a forward pass calls that module, rather than reading the weight alone
    kind     what the module does with it: a matrix `product` with its input, a product `inner` to it, as of recurrent
             layers, attention and stacked experts, a `table` that it looks rows up in, nothing as no forward pass calls
             it (`idle`), or something `else`
    merged   whether the network holds it as a part of another tensor only, as it does the experts of a layer
    stack    that tensor, where its rows are whole matrices of the checkpoint; the facts are then those of the stack
    """

    module: str
    axis: Axis | None = None
    tied_to: str | None = None
    called: bool = True
    kind: WeightKind = "else"
    merged: bool = False
    stack: str | None = None


ModelFacts: TypeAlias = Mapping[str, TensorFacts]
"""What a network says of its tensors, by their names."""


@dataclass(frozen=True, slots=True)
class CodebookSpec:
    """What a tensor's codebook is, beyond its settings.

    entries    a table has no more, because no more values differ; None: as many as its codes can name
    shared     what shares it: "model", "type q_proj.weight", "layer model.layers.0"; None: this tensor alone has it
    stored_in  the tensor of the same file that stores it, where that is another one
    """

    entries: int | None = None
    shared: str | None = None
    stored_in: str | None = None


@dataclass(frozen=True)
class KeptConfig(MethodConfig):
    """The config of what no method encodes."""

    bits: ClassVar[None] = None


KEPT = KeptConfig()

ConfigT = TypeVar("ConfigT", bound=MethodConfig, covariant=True, default=MethodConfig)


@dataclass(frozen=True)
class Decision(Generic[ConfigT]):
    """What happens to one tensor and why.

    `method` is None and `config` KEPT where it is kept; `config` is Widths where a budget has yet to choose. `axis`
    holds the channel axes: the weight is seen as rows, one a channel. `tied_to` names the tensor that is stored in
    place of this one. `stored` is the dtype in which a kept tensor is stored where its values bear it, and that is not
    its own; `coding` is how its bytes are coded, if they are. `sensitivity` is what the chosen width of this tensor
    alone costs, where that was measured. `codebook` says more of a codebook. `role` is what the tensor is in its
    network. `row_exponents` says that each row has an exponent of its own though the config does not ask for it.
    `stack` names the tensor of the network that this one is rows of, where the method compresses that one whole.
    """

    tensor: TensorInfo
    method: str | None
    config: ConfigT
    reason: str
    axis: tuple[int, ...] = (0,)
    tied_to: str | None = None
    stored: str | None = None
    coding: KeepCoding | None = None
    sensitivity: float | None = None
    codebook: CodebookSpec = field(default_factory=CodebookSpec)
    role: Role = "matrix"
    row_exponents: bool = False
    stack: str | None = None

    @property
    def compresses(self) -> bool:
        return self.method is not None

    @property
    def stored_as(self) -> TensorInfo:
        """A kept tensor with the dtype in which it is stored."""
        return self.tensor if self.stored is None else replace(self.tensor, dtype=self.stored)

    @property
    def is_open(self) -> bool:
        return isinstance(self.config, Widths)

    @property
    def widths(self) -> Widths:
        """The config of an open decision."""
        assert isinstance(self.config, Widths)
        return self.config


CodebookKey: TypeAlias = tuple[str, str | None, MethodConfig]
"""What tensors with one codebook have in common: what shares it, their method and their config."""


def codebook_key(decision: Decision) -> CodebookKey | None:
    """The key of a codebook that several tensors share; None for a tensor with its own."""
    shared = decision.codebook.shared
    return None if shared is None else (shared, decision.method, decision.config)


def shared_groups(decisions: Iterable[Decision]) -> dict[CodebookKey, list[Decision]]:
    """The decisions that share a codebook, by its key, in their order."""
    groups: dict[CodebookKey, list[Decision]] = {}
    for decision in decisions:
        key = codebook_key(decision)
        if key is not None and decision.compresses:
            groups.setdefault(key, []).append(decision)
    return groups


STORED_AS_F16 = "; stored as F16"
"""What a reason says of a kept tensor that is stored in half precision if its values bear it."""
CODED = "; entropy coded"
"""What a reason says of a kept tensor whose bytes are."""


@dataclass(frozen=True)
class Outcomes:
    """What came of the conditions in a plan, which only values decide.

    entries   codebook entries that a tensor stores, by its name
    too_wide  kept tensors whose values float16 cannot hold
    adjusted  kept tensors that a method has changed
    aimed     tensors whose codes stand for other weights than the checkpoint's
    spread    tensors whose rows lie too far apart for one exponent
    """

    entries: Mapping[str, int] = field(default_factory=dict)
    too_wide: frozenset[str] = frozenset()
    adjusted: frozenset[str] = frozenset()
    aimed: frozenset[str] = frozenset()
    spread: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Plan:
    """One decision for each tensor, in the order of the checkpoint.

    compact  whether the artifact, one file, takes as few bytes for names and the like as it can
    """

    recipe: Recipe
    decisions: tuple[Decision, ...]
    compact: bool = False
