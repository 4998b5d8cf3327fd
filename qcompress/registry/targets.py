"""Targets are formats of other tools that weights are quantized for: which grids their files hold exactly. No torch.

A target fills what a rule leaves open, refuses what it cannot hold, and has the plan keep weights that do not fit. What
`qcompress export` then writes decodes to the very weights of the artifact. A new target is an entry here, and an
exporter that writes it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Literal

from qcompress.registry.calibrated import DfqConfig, TrainedConfig
from qcompress.registry.contract import Method
from qcompress.registry.grids import GridConfig, HqqConfig
from qcompress.types.config import Form, MethodConfig, ScaleDtype
from qcompress.types.plan import Role, TensorInfo, row_shape

WORD_BITS = 32
FLOAT_BITS: Mapping[str, int] = {"F16": 16, "BF16": 16}
"""Of a scale in the checkpoint's dtype; in any other 32."""
DTYPE_SCALES: Mapping[str, ScaleDtype] = {"F16": "f16", "BF16": "bf16"}

TABLES: tuple[Role, ...] = ("embedding", "head")


@dataclass(frozen=True)
class Kind:
    """Grids of one form that a target's file holds.

    bits   of a code, those that it takes
    form   `symmetric` with whole codes about zero, or `offset` with a real lowest level
    roles  that may have them; empty: all that the target takes
    """

    bits: tuple[int, ...]
    form: Literal["symmetric", "offset"]
    roles: tuple[Role, ...] = ()


@dataclass(frozen=True)
class Target:
    """The format of another tool that weights are quantized for.

    exporter  of the registry that writes it
    kinds     of grids that it holds; those of the first are what rules get that leave them open
    groups    sizes of groups that it takes, the first of which rules get that leave them open
    roles     of weights that it holds in codes; all others are kept
    axes      the channel axes that a weight may have
    channels  whether it takes a scale a channel too
    dtype     that scales and offsets are stored in: float16, or that of the weight in the checkpoint
    linked    whether weights that the tool computes as one, as q, k and v, must have one kind of grid
    offsets   whether it stores an offset beside every scale, that of a symmetric grid too
    more_bits  that each weight takes beside codes, scales and offsets
    """

    name: str
    exporter: str
    kinds: tuple[Kind, ...]
    groups: tuple[int, ...]
    roles: tuple[Role, ...]
    axes: tuple[tuple[int, ...], ...] = ((0,),)
    channels: bool = False
    dtype: Literal["f16", "checkpoint"] = "checkpoint"
    linked: bool = False
    offsets: bool = False
    more_bits: int = 0

    def kinds_of(self, role: Role | None) -> tuple[Kind, ...]:
        """The kinds that a weight of a role may have; of a role that is not known, all."""
        return tuple(kind for kind in self.kinds if role is None or not kind.roles or role in kind.roles)

    def widths(self, role: Role | None = None) -> list[int]:
        """The bits that a code may have."""
        return sorted({bits for kind in self.kinds_of(role) for bits in kind.bits})

    @property
    def only_bits(self) -> int | None:
        """The bits that rules get which leave them open; None where there is a choice."""
        return self.kinds[0].bits[0] if len(self.kinds[0].bits) == 1 else None

    def decides_bits(self, method: Method) -> bool:
        """Whether a rule of the method needs no bits: they are decided, or it is refused whatever they are."""
        return self.only_bits is not None or self.refuse_method(method) is not None

    def filled(self, method: Method, given: Mapping[str, object]) -> dict[str, object]:
        """The options of a method with those that `given` leaves open and the target decides."""
        options = dict(given)
        known = {one.name for one in fields(method.config)}
        options |= {} if "bits" in options or self.only_bits is None else {"bits": self.only_bits}
        kind = next((kind for kind in self.kinds if options.get("bits") in kind.bits), self.kinds[0])
        wanted: dict[str, object] = {"symmetric": kind.form == "symmetric"}
        if "granularity" not in options or options["granularity"] == "group":
            wanted |= {"granularity": "group", "group_size": self.groups[0]}
        if kind.form == "offset" and not options.get("symmetric"):
            wanted["zero_point"] = "real"
            if issubclass(method.config, DfqConfig):
                # The others' usual range has an offset already.
                wanted["range"] = "mse"
        return {name: value for name, value in wanted.items() if name in known} | options

    def refuse_method(self, method: Method) -> str | None:
        """Why a method gives nothing that the target holds, and what would: "what; hint"; or None."""
        symmetric = self.kinds[0].form == "symmetric"
        others = "rtn, mse, squant, gptq or adaround" if symmetric else "rtn, mse, squant, hqq, gptq or adaround"
        if method.family == "cluster":
            return f"{method.name} makes codebooks, and {self.name} holds grids; quantize with {others}"
        if not issubclass(method.config, GridConfig):
            return f"{method.name} has no widths, and {self.name} holds codes of so many bits; use {others}"
        if issubclass(method.config, TrainedConfig):
            return f"{method.name} trains its scales, and {self.name} rounds them; use {others}"
        if issubclass(method.config, HqqConfig) and symmetric:
            return f"{method.name} fits an offset, and {self.name} holds none; use {others}"
        return None

    def refuse(self, config: MethodConfig, role: Role | None = None) -> str | None:
        """Why a config is none that the target holds, for weights of a role or of any: "what; hint"; or None."""
        takes = f"{self.name} takes {self._takes(role)}"
        kinds = [kind for kind in self.kinds_of(role) if config.bits in kind.bits]
        if config.bits is not None and not kinds:
            bits = f"{config.bits} bit{'s' if config.bits > 1 else ''}"
            return f"{bits} a code, and {takes}; change `bits`, or leave it out"
        if config.form not in [kind.form for kind in kinds or self.kinds_of(role)]:
            return f"{_FORMS.get(config.form, config.form)}, and {takes}; leave open how zero lies on the grid"
        if config.form == "symmetric" and config.stored_convention == "mid-rise":
            return f"codes around a half, and {takes}; use rtn at so few bits, or more bits"
        if config.unit == "tensor" or (config.unit == "channel" and not self.channels):
            return f"a scale a {config.unit}, and {takes}; leave `granularity` out"
        if config.unit == "group" and config.group_size not in self.groups:
            return f"groups of {config.group_size}, and {takes}; leave `group_size` out"
        if config.scales is not None:
            return f"scales: {config.scales}, which {self.name} decides; leave `scales` out"
        return None

    def _takes(self, role: Role | None) -> str:
        """What it takes, in words."""
        kinds = self.kinds_of(role or "matrix")
        bits, forms = self.widths(role or "matrix"), dict.fromkeys(_FORMS[kind.form] for kind in kinds)
        groups = f"groups of {either(sorted(self.groups))}{' or channels' if self.channels else ''}"
        return f"{either(bits)} bits, {' or '.join(forms)}, {groups}"

    def refuse_weight(self, tensor: TensorInfo, role: Role, axis: tuple[int, ...], config: MethodConfig) -> str | None:
        """Why a weight cannot be held in codes whatever its bits, or None."""
        if role not in self.roles:
            return f"it holds no {role} in codes"
        if len(tensor.shape) != 2 or axis not in self.axes or not tensor.name.endswith(".weight"):
            return "it holds weights of linear layers alone"
        _, columns = row_shape(tensor.shape, axis)
        size = config.group_size
        if config.unit == "group" and size is not None and columns % size:
            others = [other for other in sorted(self.groups) if columns % other == 0]
            return f"groups of {size} do not divide rows of {columns}" + (f", of {either(others)} do" if others else "")
        return None

    def scales_of(self, tensor: TensorInfo) -> ScaleDtype | None:
        """The dtype that scales of a weight must be numbers of; None where the tool stores them in float32."""
        return "f16" if self.dtype == "f16" else DTYPE_SCALES.get(tensor.dtype)

    def stored_bits(self, tensor: TensorInfo, axis: tuple[int, ...], config: MethodConfig) -> int:
        """What a weight takes in the tool's file, all that belongs to it counted."""
        rows, columns = row_shape(tensor.shape, axis)
        groups = columns // config.group_size if config.unit == "group" and config.group_size else 1
        scale = 16 if self.dtype == "f16" else FLOAT_BITS.get(tensor.dtype, 32)
        values = 1 if config.form == "symmetric" and not self.offsets else 2
        codes = -(-columns * config.code_bits // WORD_BITS) * WORD_BITS
        return rows * (codes + groups * values * scale) + self.more_bits


def either(numbers: Sequence[int]) -> str:
    """Numbers of which one is to be chosen: "32, 64 or 128"."""
    *first, last = (str(number) for number in numbers)
    return f"{', '.join(first)} or {last}" if first else last


_FORMS: Mapping[Form, str] = {
    "symmetric": "symmetric grids",
    "offset": "grids with a real offset",
    "zero-point": "grids with an integer zero point",
}


def _gguf(name: str, bits: int, form: Literal["symmetric", "offset"], *others: int) -> Target:
    """Blocks of 32 of one of ggml's types; tables may have those of others."""
    return Target(
        f"gguf-{name}",
        "gguf",
        (Kind((bits,), form), Kind(others, "symmetric", TABLES)) if others else (Kind((bits,), form),),
        (32,),
        ("matrix", *TABLES),
        axes=((0,), (1,)),
        dtype="f16",
    )


TARGETS: Mapping[str, Target] = {
    target.name: target
    for target in (
        Target(
            "compressed-tensors",
            "compressed-tensors",
            (Kind((2, 3, 4, 5, 6, 7, 8), "symmetric"),),
            (64, 32, 128),
            ("matrix", "expert", "head"),
            channels=True,
            linked=True,
            more_bits=128,
        ),
        _gguf("q4_0", 4, "symmetric", 5, 8),
        _gguf("q4_1", 4, "offset", 8),
        _gguf("q5_0", 5, "symmetric", 4, 8),
        _gguf("q5_1", 5, "offset", 8),
        _gguf("q8_0", 8, "symmetric"),
        Target(
            "mlx",
            "mlx",
            (Kind((2, 3, 4, 5, 6, 8), "offset"), Kind((2, 3, 4, 5, 6, 8), "symmetric")),
            (64, 32, 128),
            ("matrix", *TABLES),
            offsets=True,
        ),
    )
}
