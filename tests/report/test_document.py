from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompress.errors import ReportError, ResourceError
from qcompress.report.document import (
    AccuracyFigures,
    ArtifactFile,
    GateResult,
    LayerFigures,
    LayerReport,
    Report,
    SizeFigures,
    SizeParts,
    sqnr_db,
)
from qcompress.report.document_json import REPORT, read_report, report_text, write_report
from qcompress.report.glossary import schema_text
from qcompress.report.size import make_size
from qcompress.types.document import json_text
from qcompress.types.run import RunFigures
from report.examples import conv_figures, full_report, kept, layer, make_report, small_report

VALIDATOR = jsonschema.Draft202012Validator(REPORT.json_schema())
DOCS = Path(__file__).parents[2] / "docs"
SCHEMA_FILE = Path(__file__).parents[2] / "qcompress" / "report" / "schema.json"


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    for report in (small_report(), full_report(), make_report()):
        path = tmp_path / "a.report.json"
        write_report(report, path)
        assert report_text(read_report(path)) == path.read_text() == report_text(report)
        assert list(tmp_path.iterdir()) == [path]


def test_an_exact_tensor_is_null_in_json_and_infinite_again_when_read() -> None:
    text = report_text(small_report())
    assert json.loads(text)["layers"][2]["figures"]["sqnr_db"] is None
    assert REPORT.parse(text, "x").layers[2].sqnr_db == math.inf


numbers = st.floats() | st.none()


@settings(deadline=None, max_examples=60)
@given(numbers, numbers, st.floats(), st.integers(0, 10**15), st.text(st.characters(codec="utf-8")))
def test_any_figures_make_a_valid_document(
    error: float | None, share: float | None, seconds: float, n_bytes: int, name: str
) -> None:
    figures = LayerFigures(relative_error=abs(error) if error is not None else None, kurtosis=share)
    report = replace(
        make_report(replace(layer(name, figures), bytes=n_bytes + 16)),
        gates=(GateResult(name="max-bpw", limit=1, value=share, passed=False),),
        accuracy=(AccuracyFigures(metric="m", baseline=error, artifact=share, drop=None, samples=1),),
    )
    document = REPORT.plain(report)
    assert VALIDATOR.is_valid(document)
    text = json_text(document)
    assert json.loads(text, parse_constant=pytest.fail) == document
    assert report_text(REPORT.parse(text, "x")) == text


def test_the_schema_file_is_fresh_and_holds_for_every_key() -> None:
    schema = json.loads(SCHEMA_FILE.read_text())
    assert SCHEMA_FILE.read_text() == schema_text(REPORT), "write it anew: python docs/tables.py"
    jsonschema.Draft202012Validator.check_schema(schema)
    for report in (small_report(), full_report()):
        jsonschema.validate(REPORT.plain(report), schema)
    wrong = REPORT.plain(small_report())
    wrong["layers"][0]["bytes"] = "many"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(wrong, schema)
    assert set(REPORT.plain(full_report())) == set(schema["properties"])


def test_every_key_is_defined_in_the_docs() -> None:
    text = (DOCS / "report.md").read_text() + (DOCS / "glossary.md").read_text()
    nouns = (
        Report,
        ArtifactFile,
        SizeFigures,
        SizeParts,
        AccuracyFigures,
        GateResult,
        RunFigures,
        LayerReport,
        LayerFigures,
    )
    assert [f.name for noun in nouns for f in fields(noun) if f"`{f.name}`" not in text] == []


def test_the_json_is_the_same_each_time_and_ordered() -> None:
    assert report_text(full_report()) == report_text(full_report())
    run = json.loads(report_text(full_report()))["run"]
    assert list(run["versions"]) == ["torch", "a"]
    assert run["seconds"] == 1.23457


def test_gates_are_written_in_full() -> None:
    gate = GateResult(name="max-bpw", limit=2.2, value=2.2000000001, passed=False)
    assert REPORT.plain(replace(small_report(), gates=(gate,)))["gates"][0]["value"] == 2.2000000001


@settings(max_examples=50)
@given(
    st.lists(st.tuples(st.integers(0, 1000), st.integers(0, 1000), st.booleans()), max_size=5),
    st.integers(0, 500),
    st.integers(0, 50),
    st.integers(0, 50),
)
def test_parts_sum_to_the_artifact(sizes: list[tuple[int, int, bool]], header: int, index: int, pooled: int) -> None:
    layers = [
        replace(layer("a", None), bytes=codes + side, side_information_bytes=side)
        if compressed
        else replace(kept("b"), bytes=codes)
        for codes, side, compressed in sizes
    ]
    total = sum(one.bytes for one in layers) + header + index + pooled
    size = make_size(10, total, layers, header_bytes=header, index_bytes=index, pooled_bytes=pooled)
    parts = size.parts
    assert (
        parts.codes + parts.side_information + parts.kept + parts.header + parts.index == size.artifact_bytes == total
    )
    assert parts.kept == sum(one.bytes for one in layers if not one.compressed)
    with pytest.raises(ValueError, match="sum to"):
        make_size(10, total + 1, layers, header_bytes=header, index_bytes=index, pooled_bytes=pooled)


def test_bits_per_weight_come_from_bytes() -> None:
    size = small_report().size
    assert size.bits_per_weight == 8 * 96 / 256
    assert size.bits_per_weight_file == 8 * 248 / 264
    # 128 codes of 1.5 bits, and 128 of none.
    assert size.entropy_bound_bytes == 24
    assert size.ratio == size.baseline_bytes / 248


def test_a_tied_copy_is_counted_once() -> None:
    tied = replace(kept("copy"), bytes=0, tied_to="conv.bias")
    size = make_report(layer("w", conv_figures()), kept("conv.bias"), tied).size
    assert size.weights == 128 + 8
    assert tied.bits_per_weight is None


def test_without_compressed_tensors_there_are_no_bits_per_weight() -> None:
    size = make_report(kept("a")).size
    assert size.bits_per_weight is None
    assert size.entropy_bound_bytes is None
    assert make_report(layer("a", None)).size.entropy_bound_bytes is None


def test_sqnr_of_a_relative_error() -> None:
    assert sqnr_db(0.01) == pytest.approx(20)
    assert sqnr_db(0) == math.inf
    assert sqnr_db(math.inf) == -math.inf
    assert math.isnan(sqnr_db(math.nan))


def test_the_worst_layer_is_the_one_of_least_sqnr() -> None:
    errors = {"a": 0.02, "b": 0.5, "c": 0.0}
    report = make_report(
        kept("k"), *(layer(n, LayerFigures(relative_error=e)) for n, e in errors.items()), layer("d", None)
    )
    assert report.worst is not None
    assert report.worst.name == "b"
    nan = make_report(*report.layers, layer("e", LayerFigures(relative_error=math.nan)))
    assert nan.worst is not None
    assert nan.worst.name == "e"
    assert make_report(kept("k")).worst is None


DOCUMENT = REPORT.plain(small_report())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not a JSON document"),
        ("[" * 100_000, "not a JSON document"),
        ('{"schema": NaN}', "not a JSON document (NaN is not JSON)"),
        (report_text(small_report())[:500], "not a JSON document"),
        (json.dumps(DOCUMENT | {"layers": 10**400}), "not a JSON document (an integer of 401 digits is no count)"),
        ("[]", "not a report of qcompress"),
        ('{"schema": "other/1"}', "not a report of qcompress"),
        ('{"schema": "qcompress.report/2"}', "schema qcompress.report/2, this version reads qcompress.report/1"),
        (json.dumps(DOCUMENT | {"size": None}), "damaged report: size:"),
        (json.dumps(DOCUMENT | {"recipe_hash": 3}), "damaged report: recipe_hash:"),
        (
            json.dumps(DOCUMENT | {"size": DOCUMENT["size"] | {"artifact_bytes": "248"}}),
            "damaged report: size.artifact_bytes:",
        ),
        (
            json.dumps(DOCUMENT | {"size": DOCUMENT["size"] | {"artifact_bytes": 1}}),
            "damaged report: size: the parts sum to 248 bytes",
        ),
        (
            json.dumps(DOCUMENT | {"layers": [DOCUMENT["layers"][0] | {"figures": {"histogram_before": [1]}}]}),
            "damaged report: layers.0.figures: a histogram has 64 bins, not 1",
        ),
        (
            json.dumps(
                DOCUMENT | {"layers": [DOCUMENT["layers"][0] | {"figures": {"histogram_after": [-1] + [0] * 63}}]}
            ),
            "damaged report: layers.0.figures.histogram_after.0: Input should be greater than or equal to 0",
        ),
    ],
)
def test_a_damaged_foreign_or_newer_report_is_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.report.json"
    path.write_text(text)
    with pytest.raises(ReportError) as caught:
        read_report(path)
    assert str(caught.value).startswith(f"{path}: {message}")
    assert caught.value.exit_code == 3
    assert len(caught.value.lines()) == 1


def test_keys_that_a_later_version_adds_are_ignored() -> None:
    later = DOCUMENT | {"energy": 3, "size": DOCUMENT["size"] | {"flash": 1}}
    assert report_text(REPORT.parse(json.dumps(later), "x")) == report_text(small_report())


def test_a_report_that_is_no_file_or_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path, tmp_path / "absent", tmp_path / "binary"):
        with pytest.raises(ReportError):
            read_report(path)


def test_a_write_that_fails_leaves_the_old_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.report.json"
    path.write_text("old")

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(ResourceError, match="No space left"):
        write_report(small_report(), path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(ResourceError, match="No such file"):
        write_report(small_report(), tmp_path / "absent" / "a.json")


def test_reading_checking_and_rendering_import_no_torch() -> None:
    code = (
        "import sys, qcompress.report.gates, qcompress.report.render as r;"
        "from qcompress.report.document_json import REPORT;"
        "from qcompress.report.html.render_html import render_html;"
        "report = REPORT.parse(sys.stdin.read(), 'x');"
        "[r.render([report], form) for form in r.FORMATS];"
        "render_html([report]);"
        "assert 'rich' not in sys.modules;"
        "r.render([report], 'table', r.Terminal(80, True));"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], input=report_text(small_report()), text=True, check=True, timeout=60)
