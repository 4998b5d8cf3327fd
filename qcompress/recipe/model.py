"""The one model of a recipe: its sections from types/, and rules that are made from the registry."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeAlias

from annotated_types import MinLen
from pydantic import Field, GetCoreSchemaHandler

from qcompress.registry import DEFAULT_METHOD, METHODS, Method
from qcompress.registry.regularizers import REGULARIZERS
from qcompress.registry.targets import TARGETS, Target
from qcompress.types.config import MethodConfig
from qcompress.types.plan import ROLE_MARK, ROLE_NAMES, Exempt, Keep, Sections, Widths
from qcompress.types.settings import Training
from qcompress.types.words import quoted, suggest
from qcompress.types.written import ONE_OR_MORE, Form, Given, OneOf, Refused, later, read, reader, shown_as

if TYPE_CHECKING:
    from pydantic_core import CoreSchema


def takes_budget(method: Method) -> bool:
    """Whether a budget decides the bits of a method's config."""
    return method.family == "quantize" and not method.rates


@dataclass(frozen=True)
class Asked:
    """What a recipe says beside its rules that decides options of theirs.

    budget  whether it has one
    """

    budget: bool = False
    target: Target | None = None


@dataclass(frozen=True, eq=False)
class MethodOptions:
    """The options of a method, some of which a budget or a target decides: `known` is what is Asked of all rules."""

    method: Method

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return later(self.read, lambda: (self.method.config,))

    def read(self, options: object, known: Any) -> Any:
        """The config, or under a budget the one at each width that takes the options. Raises Refused."""
        asked = known if isinstance(known, Asked) else Asked()
        if not isinstance(options, dict):
            return read(self.method.config, options)
        if asked.target is not None and (why := asked.target.refuse_method(self.method)) is not None:
            raise Refused(why)
        if not (asked.budget and takes_budget(self.method)):
            return self._config(options, asked.target)
        if "bits" in options:
            raise Refused("the budget decides the bits; take `bits` out, or the budget", "bits")
        part: Any = self.method.config
        bits = reader(part).json_schema()["properties"]["bits"]
        configs: dict[int, MethodConfig] = {}
        refused: list[ValueError] = []
        for width in range(bits["minimum"], bits["maximum"] + 1):
            if asked.target is None or width in asked.target.widths():
                try:
                    configs[width] = self._config({"bits": width, **options}, asked.target)
                except ValueError as error:
                    refused.append(error)
        if not configs:
            raise refused[-1]
        return Widths(configs)

    def _config(self, options: Mapping[str, object], target: Target | None) -> Any:
        """The config, for a target where there is one. Raises ValidationError, Refused."""
        if target is None:
            return read(self.method.config, options)
        config = read(self.method.config, target.filled(self.method, options))
        if (why := target.refuse(config)) is not None:
            raise Refused(why)
        return config


def method_part(method: Method) -> Any:
    """What pydantic reads as the options of a method."""
    return Annotated[method.config, MethodOptions(method)]


def _refuse_unknown_role(match: str) -> str:
    known = [f"{ROLE_MARK}{role}" for role in ROLE_NAMES]
    if match.startswith(ROLE_MARK) and match not in known:
        raise Refused(f"there is no role {quoted(match)}; {suggest(match, known)}")
    return match


_ROLE = Form(after=_refuse_unknown_role)
_ROLE_PATTERN = f"^([^{ROLE_MARK}]|{ROLE_MARK}({'|'.join(ROLE_NAMES)})$)"
Pattern: TypeAlias = Annotated[
    str, MinLen(1), _ROLE, shown_as("*.weight", title="glob over tensor names", pattern=_ROLE_PATTERN)
]
"""* is any text, ? a character, [abc] one of them; @embedding is every tensor of that role."""
Match: TypeAlias = Annotated[tuple[Pattern, ...], MinLen(1), ONE_OR_MORE]

_ACTIONS = {"keep": Keep} | {name: method_part(one) for name, one in METHODS.items()}
_PENALTIES = {"keep": Exempt} | {name: one.config for name, one in REGULARIZERS.items()}

MethodRule: TypeAlias = Annotated[
    Mapping[str, Any],
    OneOf("method", _ACTIONS, {"match": Match}),
    shown_as({"match": "*.weight", DEFAULT_METHOD: {"bits": 4}}),
]
PenaltyRule: TypeAlias = Annotated[
    Mapping[str, Any],
    OneOf("regularizer", _PENALTIES, {"match": Match}),
    shown_as({"match": "*.weight", "dsmm": {"strength": 0.01}}),
]
"""The rules of the registry's methods and regularizers: `match` and exactly one of them, or `keep`."""


@dataclass(frozen=True, kw_only=True)
class WrittenFinetune(Training):
    """How `finetune-reg` trains, and its regularizers.

    regularize  the first rule that matches a weight's name decides
    """

    regularize: tuple[PenaltyRule, ...] = field(default_factory=tuple)


TargetName: TypeAlias = Literal[tuple(TARGETS)]  # type: ignore[valid-type]


@dataclass(frozen=True, kw_only=True)
class WrittenRecipe(Sections):
    """A recipe as it is written.

    rules     the first rule that matches a tensor's name decides; what none matches is kept
    finetune  how `finetune-reg` trains, and its regularizers
    """

    example: ClassVar = {"version": 1}

    version: Literal[1] = field()
    target: Annotated[Given[TargetName], Field(alias="for")] = None
    rules: Annotated[tuple[MethodRule, ...], MinLen(1)] = field(default_factory=tuple)
    finetune: Given[WrittenFinetune] = None
