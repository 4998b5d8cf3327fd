from __future__ import annotations

import csv
import io
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcompress.report.compare import compare_reports
from qcompress.report.document import LayerFigures, Report
from qcompress.report.html.render_html import render_html
from qcompress.report.render import FORMATS, Terminal, render
from qcompress.report.words import size_words
from report.examples import full_report, kept, layer, make_report, small_report

# What is no single figure has no column; the range has two.
_LISTS = ("histogram", "range", "fences", "levels", "classes")
GOLDEN = Path(__file__).parent / "golden"
ESCAPE = re.compile(r"\x1b\[[0-9;]*m")


def many(count: int) -> Report:
    """Tensor i of `count` has a relative error of 1/(i + 1): the last is the best."""
    return make_report(*(layer(f"blocks.{i}.weight", LayerFigures(relative_error=1 / (i + 1))) for i in range(count)))


def other_report() -> Report:
    better = layer("conv.weight", LayerFigures(relative_error=0.001))
    return make_report(better, kept("conv.bias"), layer("new.weight", None), name="model-w3.safetensors")


@pytest.mark.parametrize(
    ("name", "reports", "form"),
    [
        ("one.txt", [full_report()], "table"),
        ("one.md", [full_report()], "markdown"),
        ("one.csv", [full_report()], "csv"),
        ("one.json", [full_report()], "json"),
        ("two.txt", [full_report(), other_report()], "table"),
        ("two.md", [full_report(), other_report()], "markdown"),
    ],
)
def test_golden_text(name: str, reports: list[Report], form: str) -> None:
    assert render(reports, form) == (GOLDEN / name).read_text()  # type: ignore[arg-type]


@pytest.mark.parametrize("form", [*FORMATS, "html"])
@pytest.mark.parametrize("reports", [[make_report()], [small_report()], [small_report(), many(3)]])
def test_every_format_of_every_report_ends_its_last_line(form: str, reports: list[Report]) -> None:
    text = render_html(reports) if form == "html" else render(reports, form)  # type: ignore[arg-type]
    assert text.endswith("\n")
    assert not text.endswith("\n\n")


def test_piped_text_has_no_boxes_no_colour_and_whole_names() -> None:
    name = "model.decoder.layers.11.encoder_attn.very_long_module_name_indeed.out_proj.weight" * 2
    text = render([make_report(layer(name, LayerFigures(relative_error=0.1)), kept("b"))], "table")
    assert text.isascii()
    assert "\x1b" not in text
    lines = text.splitlines()
    assert [line for line in lines if line.startswith(name)]
    header = next(line for line in lines if line.startswith("layer"))
    row = next(line for line in lines if line.startswith(name))
    # Numbers end below the end of their title.
    for title in ("bytes", "SQNR dB", "rel. error"):
        assert row[header.index(title) + len(title) - 1].isalnum()
        assert row[: header.index(title) + len(title)].split()[-1] in ("B", "10.0", "0.1")


@pytest.mark.parametrize("width", [40, 80, 200])
def test_a_terminal_table_fits_and_loses_no_tensor(width: int) -> None:
    text = render([many(6)], "table", Terminal(width, color=True))
    assert "\x1b[" in text
    table = [line for line in ESCAPE.sub("", text).splitlines() if "blocks." in line and "worst" not in line]
    assert len(table) == 6
    assert max(map(len, table)) <= width
    assert all(re.search(r"\d+ B .*\d\.\d", line) for line in table)


def test_no_colour_means_no_escape_codes() -> None:
    assert "\x1b" not in render([full_report()], "table", Terminal(100, color=False))


def test_forty_tensors_are_all_shown_and_more_are_cut_to_the_worst() -> None:
    all_shown = render([many(40)], "table")
    assert all(f"blocks.{i}.weight" in all_shown for i in range(40))
    assert "--format csv" not in all_shown
    text = render([many(1000)], "table")
    shown = re.findall(r"^blocks\.(\d+)\.weight", text, re.MULTILINE)
    assert shown == [str(i) for i in range(20)]
    assert "20 of 1,000 tensors, worst SQNR first; all of them: --format csv" in text
    assert re.search(r"^all 1,000 tensors +128,000 +48\.0 KB", text, re.MULTILINE)
    assert len(render([many(1000)], "csv").splitlines()) == 1001


def test_csv_holds_every_figure_of_every_report() -> None:
    reports = [full_report(), other_report()]
    rows = list(csv.DictReader(io.StringIO(render(reports, "csv"))))
    assert [(row["artifact"], row["name"]) for row in rows] == [
        (report.artifact.name, one.name) for report in reports for one in report.layers
    ]
    assert None not in rows[0]
    first = rows[0]
    assert (first["shape"], first["range_low"], first["range_high"]) == ("8x16", "-1.5", "2.0")
    figures = {key for key in LayerFigures.__dataclass_fields__ if not key.startswith(_LISTS)}
    assert figures <= set(first)
    assert [row["sqnr_db"] for row in rows] == ["20.0", "", "inf", "30.0", "", ""]


def test_json_of_several_is_one_document_with_the_whole_reports() -> None:
    document = json.loads(render([full_report(), other_report()], "json"))
    assert document["schema"] == "qcompress.comparison/1"
    assert document["reports"] == [json.loads(render([one], "json")) for one in (full_report(), other_report())]
    assert [file["label"] for file in document["files"]] == ["A", "B"]


def test_a_comparison_holds_every_tensor_once_and_its_changes() -> None:
    comparison = compare_reports([small_report(), other_report()])
    assert [one.name for one in comparison.layers] == ["conv.weight", "conv.bias", "head|fc.weight", "new.weight"]
    conv, bias, head, new = comparison.layers
    assert conv.sqnr_change_db == (0.0, pytest.approx(10.0))
    assert conv.bytes_change == (0, 0)
    assert bias.sqnr_db == (None, None)
    assert (head.bytes, head.bytes_change) == ((48, None), (0, None))
    assert head.sqnr_change_db == (0.0, None)
    assert new.bytes_change == (None, None)
    same = compare_reports([small_report(), small_report()])
    assert all(change in (0.0, None) for one in same.layers for change in one.sqnr_change_db)
    assert [file.bytes_change for file in same.files] == [0, 0]


def test_a_long_comparison_shows_the_largest_changes() -> None:
    first = many(50)
    changed = tuple(
        replace(one, figures=LayerFigures(relative_error=1e-9)) if index in (7, 33) else one
        for index, one in enumerate(first.layers)
    )
    text = render([first, replace(first, layers=changed)], "table")
    shown = re.findall(r"^blocks\.(\d+)\.weight", text, re.MULTILINE)
    assert shown[:2] == ["7", "33"]
    assert len(shown) == 20
    assert "20 of 50 tensors, largest change first" in text


def test_names_cannot_steer_the_terminal_or_the_markup() -> None:
    report = make_report(layer("[red]a|b\x1b[2J\n<b>", LayerFigures(relative_error=0.1)))
    for terminal in (None, Terminal(200, color=False)):
        text = render([report], "table", terminal)
        assert "\x1b" not in text
        assert r"[red]a|b\x1b[2J\n<b>" in text
    row = next(line for line in render([report], "markdown").splitlines() if line.startswith(r"| \[red"))
    assert len(re.findall(r"(?<!\\)\|", row)) == 12
    assert "<b" not in row.replace(r"\<b", "")


def test_no_text_of_a_report_file_steers_the_terminal() -> None:
    bad = "\x1b[2J"
    report = full_report()
    assert report.accuracy is not None
    report = replace(
        report,
        artifact=replace(report.artifact, name=bad),
        layers=tuple(replace(one, name=one.name + bad, method=bad) for one in report.layers),
        accuracy=tuple(replace(one, metric=bad) for one in report.accuracy),
        gates=tuple(replace(one, name=f"max-drop {bad}") for one in report.gates),
        warnings=(bad,),
    )
    for reports in ([report], [report, report]):
        for form in ("table", "markdown"):
            for terminal in (None, Terminal(300, color=False)):
                text = render(reports, form, terminal)
                assert "\x1b" not in text
                assert "2J" in text


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 KB"),
        (9994, "9.99 KB"),
        (9995, "10.0 KB"),
        (99949, "99.9 KB"),
        (999_499, "999 KB"),
        (999_500, "1.00 MB"),
        (1_210_000, "1.21 MB"),
        (12_345_678_901, "12.3 GB"),
    ],
)
def test_sizes_in_words(n_bytes: int, text: str) -> None:
    assert size_words(n_bytes) == text


@given(st.integers(0, 10**17))
def test_sizes_in_words_are_right_to_half_a_unit_of_the_third_digit(n_bytes: int) -> None:
    number, unit = size_words(n_bytes).split()
    value = float(number) * 1000 ** ["B", "KB", "MB", "GB", "TB", "PB"].index(unit)
    assert abs(value - n_bytes) <= 0.0051 * n_bytes
