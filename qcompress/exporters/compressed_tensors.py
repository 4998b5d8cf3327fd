"""An artifact becomes a Hugging Face folder of compressed-tensors' `pack-quantized` format, for transformers and vLLM.

A weight X.weight becomes X.weight_packed, X.weight_scale, X.weight_shape and, of an asymmetric grid,
X.weight_zero_point; config.json says which modules are so. Layout as compressed-tensors 0.20 reads it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from qcompress.artifact.layout import plain_name
from qcompress.artifact.reader import Artifact
from qcompress.artifact.writer import CONFIG_NAME, QUANTIZATION, find_companions
from qcompress.coding.packing import pack
from qcompress.errors import ArtifactError, Subject, raise_all
from qcompress.exporters.matrices import (
    WEIGHT,
    config_text,
    find_tables,
    float_bytes,
    largest_change,
    packed_words,
    read_config,
    refuse_matrix,
    stored_dtype,
    word_bytes,
)
from qcompress.exporters.sources import (
    Source,
    activation_notes,
    find_sources,
    safetensors_file,
    safetensors_index,
)
from qcompress.plan.siblings import linked_names
from qcompress.types.export import ExportOptions, ExportPlan, Target
from qcompress.types.plan import DTYPE_BITS

FORMAT, VERSION = "pack-quantized", "0.20.0"
FOR = "quantize --for compressed-tensors, or write it dense with --keep-unfit"


@dataclass(frozen=True, order=True)
class Scheme:
    """What the codes of a module are, as a config group of compressed-tensors says it; `group` 0 is a row."""

    bits: int
    group: int
    symmetric: bool

    def __str__(self) -> str:
        grouped = f"groups of {self.group}" if self.group else "a scale a channel"
        return f"{self.bits} bits, {grouped}{'' if self.symmetric else ', zero points'}"

    def document(self) -> dict[str, Any]:
        return {
            "num_bits": self.bits,
            "type": "int",
            "symmetric": self.symmetric,
            "strategy": "group" if self.group else "channel",
            "group_size": self.group or None,
            "dynamic": False,
        }


def export(artifact: Artifact, options: ExportOptions) -> ExportPlan:
    """The folder; embeddings and all that is kept are dense.

    raises  Refusals of what the format or, without `mixed`, vLLM cannot hold; ArtifactError without a config.json
    """
    found = find_sources(artifact)
    config = read_config(artifact, "compressed-tensors")
    tied = set(artifact.tied.values())
    every = [source for _, sources in found for source in sources]
    tables = find_tables(every, config)
    linear = {source.name for source in every if len(source.info.shape) == 2 and source.name.endswith(WEIGHT)} - tables
    schemes: dict[str, Scheme] = {}
    notes, errors = activation_notes(artifact), list[ArtifactError]()
    dense: list[str] = []
    for _, sources in found:
        for source in sources:
            if source.entry is None or source.is_copy:
                continue
            why = _refuse(source, tied)
            if source.name in tables or (why is not None and options.keep_unfit):
                dense.append(source.name)
            elif why is not None:
                errors.append(source.refused(*why))
            else:
                schemes[source.name] = _scheme(source)
    if not options.mixed:
        errors += _refuse_mixed(artifact, linear, schemes)
    raise_all(errors)
    files = [
        safetensors_file(
            plain_name(file.path.name),
            [t for source in sources for t in _targets(source, schemes.get(source.name))],
            {"format": "pt"},
        )
        for file, sources in found
    ]
    modules = [name.removesuffix(WEIGHT) for name in linear]
    config[QUANTIZATION] = _quantization(schemes, modules)
    return ExportPlan(
        True,
        tuple(files),
        texts={CONFIG_NAME: config_text(config), **safetensors_index(files)},
        copied=[path for path in find_companions(artifact.path) if path.name != CONFIG_NAME],
        notes=[*notes, *_notes(found, schemes, dense)],
    )


def _refuse(source: Source, tied: set[str]) -> tuple[str, str] | None:
    """Why codes cannot be held: what, and a hint."""
    why, entry = refuse_matrix(source), source.entry
    assert entry is not None
    if why is not None:
        return why
    if entry.grid == "offset":
        return "has an offset grid without an integer zero point, which compressed-tensors needs", FOR
    if entry.grid == "mid-rise":
        return "has codes around a half, and compressed-tensors needs integers", FOR
    if entry.group_size is not None and entry.columns % entry.group_size:
        what = f"has rows of {entry.columns}, which groups of {entry.group_size} do not divide"
        return what, f"choose a --group-size that divides {entry.columns}"
    if source.name in tied:
        return "stands for a tied tensor too, which would lose its weight", "keep it: leave it out of the rules"
    return None


def _scheme(source: Source) -> Scheme:
    entry = source.entry
    assert entry is not None
    grouped = entry.group_size is not None and entry.group_size < entry.columns
    return Scheme(entry.bits, (entry.group_size or 0) if grouped else 0, entry.grid != "zero-point")


def _refuse_mixed(
    artifact: Artifact, linear: Collection[str], schemes: Mapping[str, Scheme]
) -> Iterator[ArtifactError]:
    """Weights that vLLM computes as one and that have different grids."""
    for name in sorted(linear):
        linked = linked_names(name, linear)
        for beside in linked[1:] if linked[0] == name else ():
            one, two = schemes.get(name), schemes.get(beside)
            if one != two:
                other = next(
                    mine for mine, first in zip(beside.split("."), name.split("."), strict=True) if mine != first
                )
                what = f"has {one or 'no codes'} and {other} beside it {two or 'none'}: vLLM makes one weight of them"
                hint = "quantize --for compressed-tensors gives them one grid; --mixed is for transformers alone"
                yield ArtifactError(str(artifact.path), what, hint, Subject(name), what)


def _targets(source: Source, scheme: Scheme | None) -> list[Target]:
    """What a tensor of the checkpoint becomes."""
    if scheme is None:
        return [source.dense_target()]
    entry = source.entry
    assert entry is not None
    rows, columns = entry.shape
    groups = columns // scheme.group if scheme.group else 1
    dtype = stored_dtype(entry.dtype, source.grid.scale)
    # The format's codes are signed, and stored with half of their range more.
    add = 1 if entry.grid == "narrow" else 0
    words = word_bytes(columns, entry.bits)

    def target(part: str, dtype: str, shape: tuple[int, ...], pieces: Callable[[], Iterator[Any]]) -> Target:
        n_bytes, weights = math.prod(shape) * DTYPE_BITS[dtype] // 8, entry.numel if part == "packed" else 0
        return Target(f"{source.name}_{part}", dtype, shape, n_bytes, source.name, str(scheme), weights, pieces)

    shape = np.array([rows, columns], "<i8").tobytes()
    targets = [
        target("packed", "I32", (rows, words // 4), lambda: packed_words(source, entry.bits, add)),
        target("scale", dtype, (rows, groups), lambda: iter([float_bytes(source.grid.scale, dtype)])),
        target("shape", "I64", (2,), lambda: iter([shape])),
    ]
    if not scheme.symmetric:
        down = word_bytes(rows, entry.bits) // 4
        targets.append(target("zero_point", "I32", (down, groups), lambda: iter([_zero_points(source)])))
    return targets


def _zero_points(source: Source) -> bytes:
    """Zero points packed down the rows: the words of a group hold those of neighbouring rows."""
    assert source.entry is not None
    packed = pack(np.ascontiguousarray(source.grid.zero.astype(np.uint8).T), source.entry.bits)
    missing = word_bytes(source.entry.rows, source.entry.bits) - packed.shape[1]
    return np.ascontiguousarray(np.pad(packed, ((0, 0), (0, missing))).view("<i4").T).tobytes()


def _quantization(schemes: Mapping[str, Scheme], modules: list[str]) -> dict[str, Any]:
    """The section of config.json: a group for each scheme, and the linear modules that are none."""
    of = {name.removesuffix(WEIGHT): scheme for name, scheme in schemes.items()}
    groups = {
        f"group_{place}": {
            "targets": _match({module for module, one in of.items() if one == scheme}, {*modules, *of}),
            "format": FORMAT,
            "weights": scheme.document(),
            "input_activations": None,
            "output_activations": None,
        }
        for place, scheme in enumerate(sorted(set(of.values())))
    }
    return {
        "quant_method": "compressed-tensors",
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": sorted({*modules, "lm_head"} - set(of)),
        "version": VERSION,
    }


def _match(wanted: set[str], modules: set[str]) -> list[str]:
    """Names, or patterns over layers' numbers, that match just the wanted ones of some modules."""
    found: list[str] = []
    left = set(wanted)
    for module in sorted(wanted):
        if module not in left:
            continue
        pattern = re.sub(r"(?<=\\\.)\d+(?=\\\.)", r"\\d+", re.escape(module)) + "$"
        alike = {other for other in modules if re.match(pattern, other)}
        if len(alike) > 1 and alike <= wanted:
            found.append(f"re:{pattern}")
            left -= alike
        else:
            found.append(module)
            left.discard(module)
    return found


def _notes(found: Any, schemes: Mapping[str, Scheme], dense: list[str]) -> list[str]:
    """What a user should know of how transformers and vLLM load the folder."""
    notes = []
    if dense:
        notes.append(f"{len(dense)} compressed tensors that the format cannot hold are dense, first {dense[0]!r}")
    if any(not scheme.symmetric for scheme in schemes.values()):
        only = "only with CompressedTensorsConfig(dequantize=True)"
        how = only if len(set(schemes.values())) == 1 else "not at all, for it has several grids"
        notes.append(f"zero points: transformers loads this folder {how}")
    changes = [
        (largest_change(source.grid.scale, source.info.dtype), source)
        for _, sources in found
        for source in sources
        if source.name in schemes
    ]
    change, source = max(changes, key=lambda one: one[0], default=(0.0, None))
    if change and source is not None:
        dtype = {"BF16": "bfloat16", "F16": "float16"}[source.info.dtype]
        rounds = f"a model that is loaded in {dtype} rounds them, by at most {change:.2g} of a scale"
        notes.append(f"scales are no {dtype} numbers: {rounds}")
    return notes
