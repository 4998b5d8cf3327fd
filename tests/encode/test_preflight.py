"""What values decide of a plan before its files are laid out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from artifact.examples import gaussian, recipe, rule, run, save

from qcompress.artifact.reader import read_artifact
from qcompress.compress.load import load_state_dict
from qcompress.types.plan import Recipe

POWERS = torch.tensor([0, 0, -40, -7, -90, 1, 0, -125])
METHODS = [
    *(("rtn", {"bits": bits}) for bits in (1, 4, 8)),
    ("rtn", {"bits": 4, "symmetric": True}),
    ("mse", {"bits": 4}),
    ("mse", {"bits": 3, "granularity": "group", "group_size": 24}),
    ("squant", {"bits": 4}),
    ("squant", {"bits": 2, "symmetric": True}),
    ("hqq", {"bits": 4}),
]


def asked(method: str, options: dict[str, object]) -> Recipe:
    return recipe(rule("*", method, **options))


@pytest.mark.parametrize(("method", "options"), METHODS)
@pytest.mark.parametrize("choice", ["packed", "auto"])
def test_rows_that_differ_by_any_power_of_two_keep_their_bits(
    tmp_path: Path, method: str, options: dict[str, object], choice: str
) -> None:
    """Each row, times a power of two, becomes what it becomes without it, times that power."""
    plain = gaussian(8, 4, 3, 3, seed=3)
    factors = 2.0 ** POWERS.view(-1, 1, 1, 1).double()
    tensors = {"plain": plain, "spread": (plain.double() * factors).float()}
    source = save(tmp_path / "m.safetensors", tensors)
    report = run(source, tmp_path / "o.safetensors", asked(method, options), choice)
    found = load_state_dict(tmp_path / "o.safetensors")
    # The last row's errors, near 2**-130, are below those that float32 tells exactly.
    expected = (found["plain"].double() * factors)[:-1]
    assert torch.equal(found["spread"][:-1].double(), expected)
    last = (found["spread"][-1].double() - tensors["spread"][-1].double()).norm()
    assert last <= 1.01 * (found["plain"][-1] - plain[-1]).double().norm() * factors[-1]
    reasons = {layer.name: layer.reason for layer in report.layers}
    assert "an exponent a row" in reasons["spread"] and "an exponent a row" not in reasons["plain"]
    entries = read_artifact(tmp_path / "o.safetensors").files[0].manifest.tensors
    assert [entries[name].row_exponents for name in ("plain", "spread")] == [False, True]


def test_an_exponent_a_row_takes_a_byte_a_row(tmp_path: Path) -> None:
    """Beside what the plan foretells, which knows no values."""
    weight = gaussian(16, 64, seed=0)
    weight[3] *= 1e-20
    source = save(tmp_path / "m.safetensors", {"w": weight})
    report = run(source, tmp_path / "o.safetensors", asked("mse", {"bits": 4}))
    parts = report.size.parts
    assert parts.codes == 16 * 32
    assert parts.side_information == 16 * (2 + 2 + 1)
    assert (tmp_path / "o.safetensors").stat().st_size == report.size.artifact_bytes


@pytest.mark.parametrize("ratio", [0.0, 1e-7, 1.0])
def test_rows_that_one_exponent_holds_have_one(tmp_path: Path, ratio: float) -> None:
    """Rows of zeros among them."""
    weight = gaussian(16, 64, seed=0)
    weight[3] *= ratio
    source = save(tmp_path / "m.safetensors", {"w": weight})
    run(source, tmp_path / "o.safetensors", asked("mse", {"bits": 4}))
    assert not read_artifact(tmp_path / "o.safetensors").files[0].manifest.tensors["w"].row_exponents


def test_compact_files_and_stacked_experts_have_them_too(tmp_path: Path) -> None:
    weight = gaussian(16, 64, seed=0)
    weight[3] *= 1e-20
    experts = gaussian(3, 32, 16, seed=1)
    experts[1, :, 5] *= 1e-25
    source = save(tmp_path / "m.safetensors", {"w": weight, "experts.down_proj": experts})
    rules = recipe(rule("experts*", "mse", bits=4, axis=(0, 2)), rule("*", "mse", bits=4))
    run(source, tmp_path / "o.safetensors", rules, compact=True)
    found = load_state_dict(tmp_path / "o.safetensors")
    for row, other in ((weight[3], found["w"][3]), (experts[1, :, 5], found["experts.down_proj"][1, :, 5])):
        assert float((row - other).double().norm()) < 0.15 * float(row.double().norm())


@pytest.mark.parametrize("codebook", ["f16", "int8", "f32"])
def test_codebooks_of_rows_that_one_exponent_does_not_hold_are_float32(tmp_path: Path, codebook: str) -> None:
    """Each row keeps its bits; where one exponent holds all rows nothing changes."""
    plain = gaussian(8, 64, seed=3)
    spread = plain.clone()
    spread[2] *= 2.0**-40
    source = save(tmp_path / "m.safetensors", {"plain": plain, "spread": spread})
    wanted = asked("kmeans", {"bits": 4, "granularity": "channel", "codebook": codebook})
    report = run(source, tmp_path / "o.safetensors", wanted, "auto")
    found = load_state_dict(tmp_path / "o.safetensors")
    errors = (found["spread"] - spread).double().norm(dim=1) / spread.double().norm(dim=1)
    assert float(errors[2]) < 1.5 * float(errors.median())
    entries = read_artifact(tmp_path / "o.safetensors").files[0].manifest.tensors
    assert (entries["spread"].values == "F32" and entries["plain"].values != "F32") or codebook == "f32"
    reasons = {layer.name: layer.reason for layer in report.layers}
    assert ("codebooks as F32" in reasons["spread"]) is (codebook != "f32") and "as F32" not in reasons["plain"]
