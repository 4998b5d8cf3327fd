"""The HTML page as a browser's parser sees it: well formed, closed to the outside, every figure defined."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompress.errors import printable
from qcompress.report.document import AccuracyFigures, LayerFigures, Report
from qcompress.report.glossary import FIGURES
from qcompress.report.html.render_html import render_html
from qcompress.report.render import render
from report.examples import conv_figures, full_report, kept, layer, make_report, small_report

VOID = {"meta", "link", "path", "circle"}
"""Elements without an end tag: of HTML, and those that the templates close at once as SVG allows."""
DEFINITIONS = {term.line for term in FIGURES.values()}


@dataclass
class Element:
    tag: str
    attributes: dict[str, str]
    children: list[Element] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)

    def all(self, tag: str, kind: str = "") -> list[Element]:
        """Every element below this one of this tag, and of this class."""
        found = [self] if self.tag == tag and kind in ("", *self.attributes.get("class", "").split()) else []
        return found + [one for child in self.children for one in child.all(tag, kind)]

    def every(self) -> list[Element]:
        return [self, *(one for child in self.children for one in child.every())]

    @property
    def text(self) -> str:
        """Its own text and that of what is in it."""
        return " ".join(" ".join([*self.texts, *(child.text for child in self.children)]).split())


class Reader(HTMLParser):
    """Builds the tree, and fails where an end tag does not close the element that is open."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.root = Element("", {})
        self.open = [self.root]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), f"{tag} has an attribute twice"
        element = Element(tag, {name: value or "" for name, value in attrs})
        self.open[-1].children.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in VOID
        self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop().tag == tag

    def handle_data(self, data: str) -> None:
        self.open[-1].texts.append(data)

    def handle_comment(self, data: str) -> None:
        pytest.fail("a comment")


def page_of(*reports: Report) -> Element:
    """The tree of the page of these reports, of which all that is true of every page has been asserted."""
    return tree_of(render_html(list(reports)))


def tree_of(text: str) -> Element:
    """The tree of a page's text: well formed, closed to the outside, all of its figures defined."""
    reader = Reader()
    reader.feed(text)
    reader.close()
    assert reader.open == [reader.root]
    assert_closed_to_the_outside(text, reader.root)
    assert_links_lead_somewhere(reader.root)
    assert_figures_are_defined(reader.root)
    return reader.root


def assert_closed_to_the_outside(text: str, root: Element) -> None:
    assert text.startswith("<!doctype html>\n")
    tags = {one.tag for one in root.every()}
    assert not tags & {"script", "iframe", "img", "object", "embed", "form", "base", "audio", "video", "image", "use"}
    policy = next(one for one in root.all("meta") if one.attributes.get("http-equiv") == "Content-Security-Policy")
    assert policy.attributes["content"] == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    for one in root.every():
        for name, value in one.attributes.items():
            assert not name.startswith("on"), name
            assert name not in ("src", "srcset", "action", "xlink:href")
            assert name != "href" or value == "data:," or value.startswith("#"), value
            assert name != "style" or re.fullmatch(r"(--w|width):\d+(\.\d)?%", value), value
    (style,) = root.all("style")
    assert not re.search(r"url\s*\(|@import|expression", style.text)
    assert "<" not in style.text


def assert_links_lead_somewhere(root: Element) -> None:
    places = [one.attributes["id"] for one in root.every() if "id" in one.attributes]
    assert len(set(places)) == len(places)
    targets = {one.attributes["href"] for one in root.all("a")}
    assert targets <= {f"#{place}" for place in places}


def assert_figures_are_defined(root: Element) -> None:
    """Every heading of a column and every name of a figure says in one line what it is, and so does each chart."""
    words = root.all("dl", "words")[0].every()
    named = [one for one in root.all("th") if one.attributes["scope"] == "col"] + root.all("dt")
    assert named
    for one in named:
        assert one.attributes["title"] in DEFINITIONS, one.text
        # What cannot be hovered over is on the page.
        assert one.attributes["title"] in {word.text for word in words}, one.text
    assert all(chart.all("title")[0].text for chart in root.all("svg"))


def rows_of(root: Element, heading: str) -> list[dict[str, Element]]:
    """The rows of the table under a heading, each by the titles of its columns."""
    section = next(one for one in root.all("section") if [h.text for h in one.all("h2")] == [heading])
    titles = [one.text for one in section.all("thead")[0].all("th")]
    rows = [[one for one in row.children if one.tag in ("th", "td")] for row in section.all("tbody")[0].all("tr")]
    assert all(len(row) == len(titles) for row in rows)
    return [dict(zip(titles, row, strict=True)) for row in rows]


def cards_of(root: Element) -> dict[str, str]:
    return {card.children[0].text: " ".join(one.text for one in card.children[1:]) for card in root.all("dl", "card")}


def bar_of(cell: Element) -> float:
    (bar,) = cell.all("b")
    return float(bar.attributes["style"].removeprefix("--w:").removesuffix("%"))


def many(count: int) -> Report:
    return make_report(
        *(
            replace(layer(f"model.layers.{i}.self_attn.out_proj.weight", conv_figures()), bytes=40 + i)
            for i in range(count)
        )
    )


def test_the_headline_figures() -> None:
    cards = cards_of(page_of(full_report()))
    assert cards["size"].startswith("248 B ")
    assert cards["ratio"] == "4.58x"
    assert cards["bits per weight"] == "3.000 whole file 7.515 entropy of the codes 0.750"
    assert cards["worst SQNR"] == "20.0 dB in conv.weight"
    assert cards["top1"] == (
        "0.74 interval 95 %: 0.7119 to 0.7662 checkpoint 0.75 (95 %: 0.7222 to 0.7758) "
        "drop 0.01 (95 %: 0.002 to 0.018) samples 1,000"
    )
    assert cards_of(page_of(small_report()))["accuracy"] == "not measured"


def test_gates_warnings_and_the_run() -> None:
    page = page_of(full_report())
    good, bad = (one.text for kind in ("good", "bad") for one in page.all("li", kind))
    assert (good, bad) == ("passed max-size 248 <= 1,000", "FAILED min-sqnr 20 dB < 20.5")
    assert "conv.bias is kept" in page.text
    run = page.all("dl", "run")[0].text
    for fact in ("1.23 s", "2.5 s", "1.00 GB", "cpu", "a 1, torch 2", "ab" * 32, "cd" * 32, "ef" * 32):
        assert fact in run


def test_every_layer_has_a_row_and_every_compressed_one_its_histogram() -> None:
    report = full_report()
    page = page_of(report)
    rows = rows_of(page, "Layers")
    assert [row["layer"].text for row in rows] == [one.name for one in report.layers]
    drawn = page.all("figure", "layer")
    assert [one.all("h3")[0].text for one in drawn] == [one.name for one in report.compressed]
    assert [len(one.all("svg")) for one in drawn] == [1, 0]
    paths = [path.attributes["class"] for path in drawn[0].all("path")]
    assert paths == ["o", "b", "a", "l"]
    assert drawn[0].all("div", "ends")[0].text == "-1.5 2"
    assert "entropy 1.5 of 2 bits" in drawn[0].text
    linked = {row["layer"].text: row["layer"].all("a") for row in rows}
    assert [bool(linked[name]) for name in linked] == [one.compressed for one in report.layers]


def test_bars_are_shares_of_the_largest_and_entropy_of_its_width() -> None:
    errors = {"a": 0.04, "b": 0.01, "c": math.inf, "d": math.nan, "e": 0.0}
    layers = [
        replace(layer(name, LayerFigures(relative_error=error, entropy=0.5 * index)), bytes=20 * (index + 1))
        for index, (name, error) in enumerate(errors.items())
    ]
    rows = rows_of(page_of(make_report(*layers, kept("k"))), "Layers")
    assert [bar_of(row["rel. error"]) for row in rows[:5]] == [100, 25, 100, 0, 0]
    assert [bar_of(row["bytes"]) for row in rows] == [20, 40, 60, 80, 100, 32]
    assert [bar_of(row["entropy"]) for row in rows[:5]] == [0, 25, 50, 75, 100]
    assert not rows[5]["rel. error"].all("b")


def test_sensitivities_have_a_column_where_they_were_measured() -> None:
    figures = LayerFigures(relative_error=0.1)
    layers = [replace(layer(name, figures), sensitivity=cost) for name, cost in (("a", 0.5), ("b", 2.0), ("c", None))]
    rows = rows_of(page_of(make_report(*layers, kept("k"))), "Layers")
    assert [row["sensitivity"].text for row in rows] == ["0.5", "2", "-", "-"]
    assert [bar_of(row["sensitivity"]) for row in rows[:2]] == [25, 100]
    table = render([make_report(*layers)], "table")
    assert "sensitivity" in table
    without = make_report(layer("a", figures))
    assert "sensitivity" not in rows_of(page_of(without), "Layers")[0]
    assert "sensitivity" not in render([without], "table")


def test_the_bytes_by_owner_fill_the_whole() -> None:
    page = page_of(full_report())
    shares = [float(re.findall(r"[\d.]+", one.attributes["style"])[0]) for one in page.all("div", "stack")[0].children]
    assert sum(shares) == pytest.approx(100, abs=0.5)
    keys = [one.text for one in page.all("ul", "key")[0].children]
    assert keys == ["codes 64 bytes", "side information 32 bytes", "kept 32 bytes", "header 120 bytes"]


def test_what_each_rule_decided() -> None:
    small = replace(layer("a", LayerFigures(relative_error=0.1)), reason="r.yaml:3: rules[0].rtn; axis 1")
    other = replace(small, name="b", reason="r.yaml:3: rules[0].rtn", figures=LayerFigures(relative_error=0.01))
    large = replace(small, name="c", bits=4, bytes=500, reason="r.yaml:4: rules[1].rtn", figures=None)
    rows = rows_of(page_of(make_report(small, other, large, kept("k"))), "What each rule decided")
    assert [
        [row[key].text for key in ("decided by", "bits", "tensors", "weights", "bytes", "worst SQNR")] for row in rows
    ] == [
        ["r.yaml:4: rules[1].rtn", "4", "1", "128", "500 B", "-"],
        ["r.yaml:3: rules[0].rtn", "2", "2", "256", "96 B", "10.0 dB"],
        ["one dimension", "-", "1", "8", "32 B", "-"],
    ]
    assert rows[1]["b/weight"].text == "3.000"


@pytest.mark.parametrize("count", [20, 1000])
@pytest.mark.slow
def test_a_large_network_is_shown_whole_and_stays_small(count: int) -> None:
    report = many(count)
    text = render_html([report])
    assert len(text.encode()) < 5_000 * max(count, 200)
    page = page_of(report)
    assert len(page.all("figure", "layer")) == count
    assert len(rows_of(page, "Layers")) == count


HOSTILE = '<script>alert("x")</script>&amp;\'</style></title>\x1b[2J{{ 7*7 }}{% raw %}'


def test_nothing_of_a_report_file_becomes_markup() -> None:
    report = full_report()
    assert report.accuracy is not None and report.run is not None
    bad = HOSTILE
    hostile = replace(
        report,
        artifact=replace(report.artifact, name=bad, sha256=bad),
        recipe_hash=bad,
        input_sha256=bad,
        layers=tuple(replace(one, name=one.name + bad, method=bad, reason=bad, dtype=bad) for one in report.layers),
        accuracy=tuple(replace(one, metric=bad) for one in report.accuracy),
        gates=tuple(replace(one, name=f"max-drop {bad}") for one in report.gates),
        warnings=(bad,),
        run=replace(report.run, device=bad, versions={bad: bad}),
    )
    plain = [[one.tag for one in page_of(*reports).every()] for reports in ([report], [report, report])]
    for reports, tags in zip(([hostile], [hostile, hostile]), plain, strict=True):
        page = page_of(*reports)
        assert [one.tag for one in page.every()] == tags
        shown = page.text
        assert "\x1b" not in shown
        assert printable(bad) in shown
        assert "49" not in {one.text for one in page.every()}


numbers = st.floats() | st.none()


@settings(max_examples=40)
@given(numbers, st.floats(0, 2) | st.none(), numbers, st.text(st.characters(codec="utf-8"), max_size=20))
@pytest.mark.slow
def test_any_figures_make_a_page(error: float | None, entropy: float | None, value: float | None, name: str) -> None:
    figures = LayerFigures(
        relative_error=None if error is None else abs(error), entropy=entropy, kurtosis=value, max_error=value
    )
    item = AccuracyFigures(metric=name or "m", baseline=value, artifact=error, drop=entropy, samples=1)
    report = replace(make_report(layer(name, figures), kept("k")), accuracy=(item,))
    page_of(report)
    page_of(report, report)


def measured(name: str, header_bytes: int, value: float, error: float = 0.1) -> Report:
    item = AccuracyFigures(
        metric="top1",
        baseline=0.9,
        artifact=value,
        drop=0.9 - value,
        samples=100,
        artifact_interval=(value - 0.1, 0.95),
    )
    own = make_report(layer("w", LayerFigures(relative_error=error)), name=name, header_bytes=header_bytes)
    return replace(own, accuracy=(item,))


def test_several_artifacts_have_a_scatter_with_its_front_and_a_table_of_differences() -> None:
    reports = [measured("big", 900, 0.8), measured("small", 100, 0.7, 0.01), measured("poor", 500, 0.6, 0.1)]
    page = page_of(*reports)
    (chart,) = page.all("svg", "scatter")
    assert len(chart.all("circle")) == 3
    assert len(chart.all("circle", "on")) == 2
    assert [one.text for one in chart.all("text") if one.text in "ABC"] == ["A", "B", "C"]
    titles = [group.all("title")[0].text for group in chart.all("g")]
    assert titles == ["A big: 948 B, 0.8", "B small: 148 B, 0.7", "C poor: 548 B, 0.6"]
    files = rows_of(page, "Artifacts")
    assert [row["top1"].text for row in files] == ["0.8", "0.7", "0.6"]
    assert ["front" in row["top1"].attributes.get("class", "").split() for row in files] == [True, True, False]
    assert [bar_of(row["size"]) for row in files] == [100, 15.6, 57.8]
    (row,) = rows_of(page, "Differences by layer")
    assert [row[key].text for key in ("layer", "dB A", "dB B", "change B", "change C")] == [
        "w",
        "10.0",
        "20.0",
        "+10.0 dB",
        "+0.0 dB",
    ]
    assert "better" in row["change B"].attributes.get("class", "").split()


def test_all_differences_are_there_the_largest_first() -> None:
    first = many(60)
    changed = tuple(
        replace(one, figures=LayerFigures(relative_error=1e-9)) if index in (7, 33) else one
        for index, one in enumerate(first.layers)
    )
    rows = rows_of(page_of(first, replace(first, layers=changed)), "Differences by layer")
    assert len(rows) == 60
    assert [row["layer"].text.split(".")[2] for row in rows[:2]] == ["7", "33"]
    assert [bar_of(row["change B"]) for row in rows[:2]] == [100, 100]
    assert not rows[2]["change B"].attributes.get("class", "").endswith(("worse", "better"))


def test_a_page_suits_small_screens_dark_ones_and_paper() -> None:
    page = page_of(small_report())
    (viewport,) = [one for one in page.all("meta") if one.attributes.get("name") == "viewport"]
    assert viewport.attributes["content"] == "width=device-width, initial-scale=1"
    css = page.all("style")[0].text
    root, dark = (
        re.search(pattern, css) for pattern in (r":root \{(.*?)\}", r"prefers-color-scheme: dark\) \{ :root \{(.*?)\}")
    )
    assert root is not None and dark is not None
    light_colours, dark_colours = (dict(re.findall(r"(--[\w]+): (#\w+)", one[1])) for one in (root, dark))
    used = set(re.findall(r"var\((--\w+)\)", css)) - {"--w"}
    assert used <= set(light_colours)
    assert set(dark_colours) == set(light_colours)
    # A table wider than a phone scrolls within its own box, and a spare column is not there.
    assert all("scroll" in holder_of(page, table).attributes.get("class", "").split() for table in page.all("table"))
    assert re.search(r"@media \(max-width: 40rem\) \{ \.s \{ display: none; \}", css)
    for colours in (light_colours, dark_colours):
        assert contrast(colours["--text"], colours["--ground"]) > 7
        assert contrast(colours["--soft"], colours["--panel"]) > 4.5
        for name in ("--good", "--bad"):
            assert contrast(colours[name], colours["--ground"]) > 4.5


def holder_of(root: Element, wanted: Element) -> Element:
    return next(one for one in root.every() if any(child is wanted for child in one.children))


def contrast(one: str, other: str) -> float:
    """The contrast ratio of two colours (WCAG 2, relative luminance)."""

    def luminance(colour: str) -> float:
        digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
        parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)
