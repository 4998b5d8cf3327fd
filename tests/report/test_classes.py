"""Scale classes and the distance to the bound, of lattices as they were made and as they lie on the disk."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qcompress.artifact.reader import read_artifact
from qcompress.checkpoint.checkpoint import read_checkpoint
from qcompress.cli.app import run
from qcompress.report.document import LayerFigures, LayerReport
from qcompress.report.document_json import report_path
from qcompress.report.gather import gather_report
from report.examples import layer

FEWEST = 5000


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Gaussian matrix, rows and columns of different scales, and a matrix with a pool of its own."""
    generator = torch.manual_seed(5)
    plain = torch.randn(128, 256, generator=generator)
    scaled = torch.randn(64, 200, generator=generator) * torch.logspace(-1.5, 1.5, 64).unsqueeze(1)
    large = torch.randn(600, 512, generator=generator)
    path = tmp_path_factory.mktemp("classes") / "m.safetensors"
    save_file({"plain.weight": plain, "scaled.weight": scaled, "large.weight": large}, path)
    return path


@pytest.fixture(scope="module", params=["normal", "high"])
def artifact(request: pytest.FixtureRequest, source: Path) -> Path:
    path = source.with_name(f"{request.param}.safetensors")
    words = ["--bpw", "3", "--effort", request.param, "--coding", "ans"]
    assert run(["quantize", str(source), *words, "-o", str(path)]) == 0
    return path


def test_classes_add_up_to_the_payload(artifact: Path) -> None:
    found = read_artifact(artifact)
    report = gather_report(artifact)
    for one in report.compressed:
        assert one.figures is not None
        assert one.figures.classes is not None
        assert sum(use.count for use in one.figures.classes) == one.weights
        assert all(0 <= use.ideal_bits <= use.table_bits for use in one.figures.classes)
        bits = sum(use.count * use.table_bits for use in one.figures.classes)
        payload = found.files[0].parts_of(one.name)["codes"].n_bytes - one.side_information_bytes
        assert payload * 8 == pytest.approx(bits, rel=0.005)
        # Classes of one magnitude each: a code in the next class is larger by half an octave.
        states = {use.context // 32 for use in one.figures.classes}
        for state in states:
            own = [use for use in one.figures.classes if use.context // 32 == state and use.count >= FEWEST]
            assert [use.magnitude for use in own] == sorted(use.magnitude for use in own)
        assert states == ({1, 2} if artifact.stem == "high" else {0})
    scaled = next(one for one in report.compressed if one.name == "scaled.weight").figures
    assert scaled is not None
    assert len(scaled.classes or ()) > 1


def test_magnitudes_and_ideal_bits_are_those_of_the_codes(artifact: Path) -> None:
    """Of a matrix whose codes share one class: counted one by one. A code of 16 and more has its raw bits besides."""
    file = read_artifact(artifact).files[0]
    alone = 0
    for name in file.manifest.tensors:
        tensor = file.tensor(name)
        codes = tensor.read().codes.numpy()
        counter = tensor.uses_of_classes()
        assert counter is not None
        for rows, columns, part in tensor.unbounded_tiles():
            counter.add(rows, columns, part)
        uses = counter.result()
        sizes = sum(use.count * use.magnitude for use in uses)
        assert sizes == pytest.approx(float(abs(codes.astype(float)).sum()), rel=1e-9)
        if len(uses) == 1:
            bits = 0.0
            for token, count in Counter(map(_token, codes.reshape(-1).tolist())).items():
                bits += count * (math.log2(codes.size / count) + token[2])
            assert uses[0].ideal_bits == pytest.approx(bits / codes.size, rel=1e-9)
            assert uses[0].ideal_bits < uses[0].table_bits
            alone += 1
    # On a trellis there are two tables at least.
    assert (alone > 0) == (artifact.stem == "normal")


def _token(code: int) -> tuple[bool, int, int]:
    """The sign, the leading bits and the number of open bits of a code: a quarter of an octave from 16 on."""
    size = abs(code)
    n_open = 0 if size < 16 else size.bit_length() - 3
    return code < 0, size >> n_open, n_open


def test_the_same_is_read_from_the_bytes(artifact: Path, source: Path) -> None:
    written = {one.name: one for one in gather_report(artifact).compressed}
    beside = report_path(artifact)
    kept = beside.read_bytes()
    beside.unlink()
    try:
        stored = {one.name: one for one in gather_report(artifact).compressed}
    finally:
        beside.write_bytes(kept)
    measured = {one.name: one for one in gather_report(artifact, read_checkpoint(source)).compressed}
    for name, one in written.items():
        assert one.figures is not None
        for other in (stored[name], measured[name]):
            assert other.figures is not None
            for left, right in zip(one.figures.classes or (), other.figures.classes or (), strict=True):
                assert (left.context, left.count) == (right.context, right.count)
                assert left.ideal_bits == pytest.approx(right.ideal_bits, rel=1e-5, abs=1e-9)
                assert left.table_bits == pytest.approx(right.table_bits, rel=1e-5, abs=1e-9)
        assert one.bound_gap_db == pytest.approx(measured[name].bound_gap_db, rel=1e-4)
        assert stored[name].bound_gap_db is None


def test_a_gaussian_matrix_is_as_far_from_its_bound_as_its_quantizer(artifact: Path) -> None:
    # A uniform grid with an ideal coder is 1.53 dB off at high rates; a trellis less, but never below the bound.
    gap = next(one.bound_gap_db for one in gather_report(artifact).compressed if one.name == "large.weight")
    assert gap is not None
    assert 0 < gap < 1.1 if artifact.stem == "high" else 1.2 < gap < 1.8


@pytest.mark.slow
def test_packed_lattices_have_no_classes(source: Path, tmp_path: Path) -> None:
    path = tmp_path / "packed.safetensors"
    assert run(["quantize", str(source), "--bpw", "4", "--coding", "packed", "-o", str(path)]) == 0
    for one in gather_report(path).compressed:
        assert one.figures is not None
        assert one.figures.classes is None


def test_pages_show_the_tables(artifact: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    assert run(["report", str(artifact), "--format", "html", "-o", str(page)]) == 0
    text = page.read_text()
    assert text.count("<details>") == 3
    assert "distance to the bound" in text
    document = json.loads(report_path(artifact).read_text())
    use = document["layers"][0]["figures"]["classes"][0]
    assert f"{use['count']:,}" in text


@pytest.mark.parametrize(
    ("relative_error", "gap"),
    [(2.0**-6, 0.0), (2.0**-4, 20 * math.log10(2)), (0.0, -math.inf), (None, None)],
)
def test_the_distance_is_from_six_decibels_a_bit(relative_error: float | None, gap: float | None) -> None:
    made = layer("w", LayerFigures(relative_error=relative_error))
    assert made.bits_per_weight == 3
    assert made.bound_gap_db == (None if gap is None else pytest.approx(gap, abs=1e-9))


def test_kept_tensors_have_no_distance() -> None:
    made = LayerReport(name="b", shape=(8,), dtype="F32", bytes=32, baseline_bytes=32, reason="one dimension")
    assert made.bound_gap_db is None
