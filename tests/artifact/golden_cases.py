"""What the files under tests/golden were made of, and how they are made: new ones are added, old ones never change."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from artifact import given_method, unbounded_method
from artifact.educational_decoder import Dense
from artifact.examples import recipe, rtn, rule, run, save, save_folder
from artifact.given_method import GivenConfig
from artifact.unbounded_method import RoundedConfig
from qcompress.types.plan import KeepCoding, Recipe, Rule

GOLDEN = Path(__file__).parent.parent / "golden"
A, B = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def weights(*shape: int, levels: int = 64, dtype: torch.dtype = torch.float32) -> Tensor:
    """Multiples of 1/16 in a fixed order, exact in every dtype."""
    count = int(np.prod(shape))
    return (
        torch.tensor([((index * 37 + 11) % levels - levels // 2) / 16 for index in range(count)])
        .reshape(shape)
        .to(dtype)
    )


def skewed(*shape: int) -> Tensor:
    """Mostly one value, so that entropy coding has something to do."""
    return torch.where(weights(*shape) > 1.5, weights(*shape), torch.tensor(0.25))


class Case(NamedTuple):
    tensors: dict[str, Tensor]
    recipe: Recipe
    choice: str = "packed"
    compact: bool = False


def one(tensor: Tensor, method: str, choice: str = "packed", **options: Any) -> Case:
    return Case({"w": tensor}, recipe(rule("w", method, **options)), choice)


def unbounded_tensors(tensors: dict[str, Tensor], choice: str, **options: Any) -> Case:
    """Every tensor of two dimensions or more in unbounded codes, with `d` on a grid beside them."""
    rounded = Rule("*", "rounded", RoundedConfig(**options), "rule *")
    return Case(tensors, recipe(*([rule("d", "rtn", bits=3)] if "d" in tensors else []), rounded), choice)


def unbounded(choice: str, **options: Any) -> Case:
    """Two tensors of unbounded codes that share a pool, a kept tensor, and a grid."""
    tensors = {"a": weights(6, 4, 3, 3), "b": skewed(9, 20), "c": weights(5), "d": weights(3, 5)}
    return unbounded_tensors(tensors, choice, **options)


def given(tensor: Tensor, choice: str = "packed", **options: Any) -> Case:
    """A weight in a form that no method gives by itself."""
    return Case({"w": tensor}, recipe(Rule("w", "given", GivenConfig(**options), "rule w")), choice)


def mixed(choice: str) -> Case:
    """A compact file of tensors of every form, of kept ones and of one that is stored as F16."""
    tensors = {
        "affine": skewed(9, 40),
        "bias": weights(5),
        "blocked": weights(3, 22),
        "codebook": weights(6, 16, levels=9),
        "constant": torch.full((3, 40), 0.5),
        "half": weights(7, dtype=torch.float16),
        "shared.a": weights(6, 8),
        "shared.b": weights(4, 8),
        "steps": torch.arange(3),
        "table": weights(3, 10),
        "unbounded.a": skewed(9, 20),
        "unbounded.b": weights(6, 4, 3, 3),
        "w": weights(4, 6),
    }
    rules = [
        rule("affine", "mse", bits=2),
        Rule("blocked", "given", GivenConfig(form="blocked", group_size=4, sub_blocks=3, offsets=True), "rule blocked"),
        rule("codebook", "kmeans", bits=3, dim=2, codebook="int8"),
        Rule("constant", "given", GivenConfig(form="constant", granularity="tensor"), "rule constant"),
        rule("shared.*", "kmeans", bits=3, share="model"),
        Rule("table", "given", GivenConfig(form="table", group_size=4, row_exponents=True, table="f16"), "rule table"),
        Rule("unbounded.*", "rounded", RoundedConfig(), "rule unbounded"),
        rule("w", "rtn", bits=3),
        rule("*"),
    ]
    return Case(tensors, replace(recipe(*rules), keep_dtype="f16"), choice, compact=True)


def coded(coding: KeepCoding, *, compact: bool = False) -> Case:
    """Kept tensors of every dtype that can be coded, one of bits that nothing makes shorter, beside a weight."""
    noise = torch.tensor([(index * 40503 + 17) % 65521 - 32768 for index in range(2100)], dtype=torch.int16)
    tensors = {
        "brain": weights(40, 60, dtype=torch.bfloat16),
        "double": weights(520, dtype=torch.float64),
        "half": skewed(2100).half(),
        "nan": torch.full((1100,), float("nan"), dtype=torch.bfloat16).repeat(2),
        "noise": noise.view(torch.bfloat16),
        "single": skewed(30, 40),
        "small": weights(5),
        "w": weights(3, 5),
    }
    asked = replace(recipe(rule("w", "rtn", bits=3), rule("*")), keep_coding=coding)
    return Case(tensors, replace(asked, keep_dtype="f16") if compact else asked, "ans", compact)


CASES: dict[str, Case] = {
    **{f"zero-point-{bits}": one(weights(3, 5), "rtn", bits=bits) for bits in range(1, 9)},
    "zero-point-group": one(weights(3, 6), "rtn", bits=3, group_size=2),
    "zero-point-tensor": one(weights(3, 6), "rtn", bits=3, granularity="tensor"),
    "offset-2": one(weights(4, 8, levels=4), "mse", bits=2),
    "offset-group": one(weights(4, 8, levels=8), "mse", bits=3, group_size=4),
    "full-4": one(weights(3, 5), "rtn", bits=4, symmetric=True),
    "narrow-4": one(weights(3, 5), "rtn", bits=4, symmetric=True, convention="narrow"),
    "mid-rise-1": one(weights(3, 5), "rtn", bits=1, symmetric=True),
    "mid-rise-2": one(weights(3, 5), "rtn", bits=2, symmetric=True, convention="mid-rise"),
    "zstd-2": one(skewed(32, 9), "rtn", "zstd", bits=2),
    "zstd-3": one(skewed(32, 9), "rtn", "zstd", bits=3),
    "zstd-5": one(skewed(32, 9), "rtn", "zstd", bits=5),
    "ans-1": one(skewed(32, 9), "rtn", "ans", bits=1),
    "ans-3": one(skewed(32, 9), "rtn", "ans", bits=3),
    "ans-8": one(skewed(32, 9), "rtn", "ans", bits=8, granularity="tensor"),
    "ans-constant": one(torch.zeros(8, 9), "rtn", "ans", bits=2),
    "codebook-2": one(weights(6, 8), "kmeans", bits=2),
    "codebook-distinct": one(weights(4, 8, levels=4), "kmeans", bits=4),
    "codebook-shared": Case(
        {
            "b.0.k.weight": weights(4, 8),
            "b.0.v.weight": weights(6, 8, dtype=torch.bfloat16),
            "b.1.k.weight": weights(4, 6),
            "head.weight": weights(4, 8, levels=8),
        },
        recipe(rule("b.*", "kmeans", bits=3, share="layer"), rule("*", "kmeans", bits=3)),
    ),
    "codebook-shared-int8": Case(
        {"a.weight": weights(4, 8), "b.weight": weights(6, 8)},
        recipe(rule("*", "kmeans", bits=3, dim=2, share="model", codebook="int8")),
    ),
    "codebook-f32": one(weights(6, 8), "kmeans", bits=3, codebook="f32"),
    "codebook-int8": one(weights(6, 8), "kmeans", bits=3, codebook="int8"),
    "codebook-group": one(weights(6, 8), "kmeans", bits=2, group_size=2),
    "codebook-int8-channel": one(weights(6, 8), "kmeans", bits=1, granularity="channel", codebook="int8"),
    # Means that float16 holds, and no weight between two of them: sums in another order give the same.
    "codebook-vector-exact": one(weights(6, 16, levels=9), "kmeans", bits=3, dim=2),
    "codebook-vector-group": one(weights(8, 12), "kmeans", bits=2, dim=2, group_size=4),
    "codebook-vector-axis": one(weights(5, 8, 3), "kmeans", bits=3, dim=4, axis=1),
    "codebook-10-all": one(weights(64, 64, levels=4093), "kmeans", bits=10, dim=2),
    "codebook-10-distinct-zstd": one(skewed(40, 64), "kmeans", "zstd", bits=10, dim=2),
    "codebook-ans": one(skewed(32, 9), "kmeans", "ans", bits=3),
    "axis-1": one(weights(4, 6), "rtn", bits=4, axis=1),
    "axis-0-2": one(weights(2, 3, 4), "rtn", bits=4, axis=(0, 2)),
    "axis-2-0": one(weights(2, 3, 4), "rtn", bits=4, axis=(2, 0)),
    "vector": one(weights(7), "rtn", bits=4),
    "scalar": one(torch.tensor(1.5), "rtn", bits=4),
    "f64": one(weights(3, 5, dtype=torch.float64), "rtn", bits=4),
    "f16": one(weights(3, 5, dtype=torch.float16), "rtn", bits=4),
    "bf16": one(weights(3, 5, dtype=torch.bfloat16), "rtn", bits=4),
    "large": one(weights(3, 5) * 2.0**90, "rtn", bits=4),
    "tiny": one(weights(3, 5) * 2.0**-120, "rtn", bits=4),
    "unbounded-ans": unbounded("ans"),
    "unbounded-auto": unbounded("auto"),
    "unbounded-zstd": unbounded("zstd"),
    "unbounded-packed": unbounded("packed"),
    "unbounded-trellis": unbounded("ans", trellis=True),
    "unbounded-fine": unbounded("ans", step=0.01),
    "unbounded-factors": unbounded("ans", columns=True),
    "unbounded-axis": unbounded_tensors({"w": weights(4, 6, 5)}, "ans", axis=1, columns=True),
    "ragged-offset": given(weights(3, 10), form="offset", group_size=4),
    "ragged-zero-point": given(weights(3, 10), form="zero-point", group_size=4, bits=3),
    "ragged-full-ans": given(skewed(32, 9), "ans", form="symmetric", group_size=5),
    "row-exponents": given(weights(5, 8), form="offset", granularity="channel", row_exponents=True),
    "row-exponents-group": given(weights(5, 8), form="symmetric", group_size=3, row_exponents=True),
    "table-nf4": given(weights(3, 10), form="table", group_size=4),
    "table-iq4_nl": given(weights(3, 8), "zstd", form="table", group_size=4, table="iq4_nl"),
    "table-e2m1": given(weights(3, 8), form="table", granularity="channel", table="e2m1", row_exponents=True),
    "table-e4m3": given(weights(3, 8), form="table", granularity="tensor", table="e4m3", bits=8),
    "table-e5m2": given(weights(3, 8), "ans", form="table", granularity="tensor", table="e5m2", bits=8),
    "table-f16": given(weights(3, 8), form="table", group_size=2, table="f16", bits=3),
    "table-f32": given(weights(3, 8), "ans", form="table", granularity="channel", table="f32", bits=2),
    "table-int8": given(weights(3, 8), form="table", granularity="channel", table="int8", bits=5),
    "blocked-offset": given(weights(3, 22), form="blocked", group_size=4, sub_blocks=3, offsets=True),
    "blocked-full": given(weights(2, 5, 4), form="blocked", group_size=4, subzero=32, bits=3, axis=1),
    "blocked-exponents": given(weights(4, 9), "ans", form="blocked", group_size=2, bits=2, row_exponents=True),
    **{
        f"constant-{name}": given(torch.full((3, 1500), 1.1, dtype=dtype), form="constant", granularity="tensor")
        for name, dtype in (("f64", torch.float64), ("f32", torch.float32), ("bf16", torch.bfloat16))
    },
    "filled-ans": one(torch.zeros(5, 8000), "rtn", "ans", bits=2, granularity="tensor"),
    "filled-auto": one(torch.zeros(5, 8000), "rtn", "auto", bits=3),
    "unbounded-filled": unbounded_tensors({"w": torch.zeros(5, 8000)}, "ans"),
    **{f"compact-{choice}": mixed(choice) for choice in ("packed", "auto", "ans")},
    "coded": coded("ans"),
    "coded-compact": coded("ans", compact=True),
    "coded-zstd": coded("zstd"),
    **{
        f"coded-small{'-compact' * compact}": Case(
            {"a": skewed(24, 25).bfloat16(), "b": skewed(300), "c": weights(5)},
            replace(recipe(rule("*")), keep_coding="ans"),
            "ans",
            compact,
        )
        for compact in (False, True)
    },
    "halved": Case(
        {
            "a": weights(4),
            "b": weights(3, dtype=torch.float64),
            "h": weights(3, dtype=torch.float16),
            "w": weights(3, 5),
        },
        replace(rtn(3, "w"), keep_dtype="f16"),
    ),
    "kept": Case(
        {
            "f8": weights(4).to(torch.float8_e4m3fn),
            "flags": torch.tensor([True, False]),
            "none": torch.empty(0, 3),
            "steps": torch.arange(3),
            "ünï\n\"code\"": weights(2, 2),
            "w": weights(3, 5),
        },
        recipe(rule("w", "rtn", bits=3), rule("*")),
        "auto",
    ),
}  # fmt: skip


def make_folder(folder: Path) -> Path:
    """A sharded checkpoint whose head is tied to its embedding."""
    shards = {
        A: {"embed_tokens.weight": weights(6, 4), "norm.weight": weights(4)},
        B: {"lm_head.weight": weights(6, 4)},
    }
    return save_folder(folder, shards, {"tie_word_embeddings": True})


def write_case(name: str, folder: Path, version: Callable[[str], None]) -> Path:
    """Write one golden artifact into `folder`; `version` sets what the program calls its own version."""
    version("golden")
    if name == "folder":
        run(make_folder(folder / "in"), folder / "folder", rtn(3))
        return folder / "folder"
    case = CASES[name]
    with pytest.MonkeyPatch.context() as patch:
        unbounded_method.register(patch)
        given_method.register(patch)
        return _write(case, name, folder)


def _write(case: Case, name: str, folder: Path) -> Path:
    source = save(folder / "in.safetensors", case.tensors, {"format": "pt", "note": "golden"})
    run(source, folder / f"{name}.safetensors", case.recipe, case.choice, compact=case.compact)
    return folder / f"{name}.safetensors"


def write_new(name: str, folder: Path) -> None:
    """Add a case to tests/golden: its file and what it decodes to. Never called by a test."""
    from artifact.educational_decoder import expand

    with pytest.MonkeyPatch.context() as patch:
        path = write_case(name, folder, lambda version: patch.setattr("qcompress.plan.files.VERSION", version))
    if (GOLDEN / path.name).is_dir():
        shutil.rmtree(GOLDEN / path.name)
    path.rename(GOLDEN / path.name)
    values = {tensor: as_text(dense) for tensor, dense in expand(GOLDEN / path.name).items()}
    (GOLDEN / f"{name}.json").write_text(json.dumps(values, indent=1, sort_keys=True, ensure_ascii=False) + "\n")


def as_text(dense: Dense) -> dict[str, Any]:
    """dtype, shape, and the values: numbers where numpy has the dtype, else the bytes in hexadecimal."""
    dtypes = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8"}
    if dense.dtype in dtypes:
        values: Any = " ".join(repr(value) for value in np.frombuffer(dense.data, dtypes[dense.dtype]).tolist())
    else:
        values = dense.data.hex()
    return {"dtype": dense.dtype, "shape": list(dense.shape), "values": values}
