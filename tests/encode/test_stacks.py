"""Small weights of equal rows are encoded in one call, and get the bytes that they get alone."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from artifact.examples import gaussian, recipe, rule, run, save
from torch import Tensor

from qcompress.encode import encode_tensor
from qcompress.report.document import Report
from qcompress.types.plan import Recipe

METHODS: dict[str, Recipe] = {
    "rtn": recipe(rule("*", "rtn", bits=4)),
    "rtn in groups": recipe(rule("*", "rtn", bits=3, symmetric=True, granularity="group", group_size=5)),
    "mse": recipe(rule("*", "mse", bits=2)),
    "squant": recipe(rule("*", "squant", bits=4)),
    "squant clipped": recipe(rule("*", "squant", bits=3, range="clip")),
    "hqq": recipe(rule("*", "hqq", bits=3, granularity="group", group_size=8)),
    "two rules": recipe(rule("*.b", "mse", bits=5), rule("*", "squant", bits=2)),
    "one grid a tensor": recipe(rule("*", "rtn", bits=4, granularity="tensor")),
}


SHAPES = {"a": (6, 24), "b": (4, 3, 3, 3)}


def weights() -> dict[str, Tensor]:
    """Experts in turn of two shapes, of scales far apart, in two dtypes; a large weight, a vector, zeros."""
    made = {}
    for index in range(12):
        scale = 10.0 ** (6 * (index // 2) - 20)
        made[f"experts.{index:02}.a"] = gaussian(6, 24, seed=index) * scale
        made[f"experts.{index:02}.b"] = gaussian(4, 3, 3, 3, seed=100 + index).bfloat16()
        made[f"experts.{index:02}.c"] = gaussian(9, 24, seed=200 + index).half()
    made["experts.05.large"] = gaussian(300, 120, seed=7)
    made["experts.06.bias"] = gaussian(5)
    made["experts.07.zero"] = torch.zeros(3, 24)
    return made


def compressed(folder: Path, asked: Recipe, **options: Any) -> tuple[bytes, Report]:
    source = folder / "m.safetensors"
    if not source.exists():
        save(source, weights())
    report = run(source, folder / "a.safetensors", asked, options.pop("choice", "auto"), force=True, **options)
    return (folder / "a.safetensors").read_bytes(), report


@pytest.mark.parametrize("method", METHODS)
def test_bytes_and_figures_are_those_of_weights_encoded_alone(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stacked = compressed(tmp_path, METHODS[method])
    monkeypatch.setattr(encode_tensor, "STACKED_WEIGHTS", 0)
    alone = compressed(tmp_path, METHODS[method])
    assert stacked[0] == alone[0]
    assert stacked[1].layers == alone[1].layers


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_and_codings_change_nothing(threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for choice in ("packed", "ans"):
        stacked = compressed(tmp_path, METHODS["squant"], threads=threads, choice=choice)[0]
        with monkeypatch.context() as patch:
            patch.setattr(encode_tensor, "STACKED_WEIGHTS", 0)
            assert compressed(tmp_path, METHODS["squant"], threads=threads, choice=choice)[0] == stacked


def test_a_method_is_called_once_for_all_small_weights_of_one_shape(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: Counter[tuple[int, ...]] = Counter()
    encode = encode_tensor.encode_codes

    def counted(rows: Tensor, *args: Any) -> Any:
        calls[tuple(rows.shape[1:])] += 1
        return encode(rows, *args)

    monkeypatch.setattr(encode_tensor, "encode_codes", counted)
    made = {
        f"{index:02}.{kind}": gaussian(*shape).clamp(-2, 3) for index in range(20) for kind, shape in SHAPES.items()
    }
    save(tmp_path / "m.safetensors", made | {"09.large": gaussian(300, 120)})
    compressed(tmp_path, METHODS["rtn"], threads=1)
    # The large weight lies between small ones, which are then encoded before and after it.
    assert calls == {(24,): 2, (3, 3, 3): 2, (120,): 1}
