"""What a report's folder holds: the page, and for each figure its picture and its unrounded numbers."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any, TypeGuard

import pytest
from matplotlib.figure import Figure as Canvas
from matplotlib.text import Text
from PIL import Image

from embeddings.errors import ConfigError
from pipelines.analyze.report import write
from pipelines.analyze.report.draw import svgs_of, write_png
from pipelines.analyze.report.model import (
    Bars,
    Figure,
    Finding,
    HeatMap,
    Interval,
    Intervals,
    Report,
    Section,
    Table,
)
from pipelines.analyze.report.palette import looks_of
from pipelines.analyze.report.write import write_report
from tests.helpers.reports import HOSTILE, every_chart, small_report


def read(file: Path) -> Any:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(file.read_text(), parse_constant=refuse)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of `small_report`."""
    folder = tmp_path_factory.mktemp("reports") / "out"
    page = write_report(small_report(), folder)
    assert page == folder / "index.html" and page.is_file()
    return folder


def empty(title: str) -> Report:
    return Report(title, Table("runs", "Runs", "None.", ("run",), ()), ())


def test_every_figure_has_its_picture_and_its_numbers(out: Path) -> None:
    figures = {file.name for file in (out / "figures").iterdir()}
    assert figures == {"every-chart.png", "every-chart.json", "numbers.json", "runs.json"}
    with Image.open(out / "figures" / "every-chart.png") as picture:
        assert picture.width > 1000 and picture.height > 500 and len(picture.getcolors(1 << 24)) > 50
    numbers = read(out / "figures" / "every-chart.json")
    lines, bars, _, heat, points, intervals = numbers["charts"]
    assert lines["kind"] == "lines" and lines["lines"][0]["y"] == [1 / 3, None, 0.5, 2.0]
    assert bars["bars"]["a"] == [1.0, None] and bars["low"] == {"a": [0.0, None]}
    assert [len(row) for row in heat["values"]] == [3, 3] and points["points"]["b"] == [[], []]
    assert intervals["rows"][1] == {
        "kind": "interval",
        "name": "warm",
        "value": None,
        "low": None,
        "high": None,
        "series": "",
    }
    assert read(out / "figures" / "numbers.json")["rows"][3] == ["c", -1, 12345.678, True]
    facts = read(out / "report.json")
    assert [finding["level"] for finding in facts["findings"]] == ["alarm", "notice"]
    assert facts["sections"][0] == {
        "name": "first",
        "title": "First",
        "figures": ["every-chart", "numbers"],
        "skipped": ["A part is left out."],
    }


def test_a_report_is_the_same_each_time_and_replaces_an_older_one(out: Path, tmp_path: Path) -> None:
    write_report(empty("An older one"), tmp_path / "again")
    write_report(small_report(), tmp_path / "again")
    files = sorted(file.relative_to(out) for file in out.rglob("*.*"))
    assert len(files) == 6
    assert all((out / file).read_bytes() == (tmp_path / "again" / file).read_bytes() for file in files)
    assert [file.name for file in tmp_path.iterdir()] == ["again"]


def test_what_is_no_report_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "report.json").write_text("[]")
    (tmp_path / "file").write_text("text")
    for out in ("notes", "file"):
        with pytest.raises(ConfigError, match="is there and is no report"):
            write_report(empty("New"), tmp_path / out)
    assert (tmp_path / "notes" / "report.json").read_text() == "[]"
    before = write_report(empty("Before"), tmp_path / "out").read_text()

    def full(*_: Any) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(write, "page_of", full)
    with pytest.raises(ConfigError, match=r"out: cannot be written: No space left"):
        write_report(empty("After"), tmp_path / "out")
    assert (tmp_path / "out" / "index.html").read_text() == before
    assert {file.name for file in tmp_path.iterdir()} == {"notes", "file", "out"}


def test_names_of_users_are_text_in_the_page_and_in_drawings(out: Path) -> None:
    page = (out / "index.html").read_text()
    assert "<img" not in page and "&lt;img src=x" in page
    assert "http://" not in page.replace("http://www.w3.org/", "") and "https://" not in page
    lying = svgs_of(every_chart())[2]
    assert "&lt;img src=x " in lying and '$a_b$ &amp; "c"' in lying
    assert HOSTILE not in page


def test_ids_of_a_page_are_unique(out: Path) -> None:
    page = (out / "index.html").read_text()
    ids = [part.split('"')[0] for part in page.split(' id="')[1:]]
    assert len(ids) > 50 and len(set(ids)) == len(ids)


def test_charts_without_any_value_are_drawn(tmp_path: Path) -> None:
    nothing = Figure("nothing", "Nothing", "Empty.", (Bars("Bars", "share", (), {"a": []}),))
    runs = Table("runs", "Runs", "None.", ("run",), ())
    write_report(Report("Empty", runs, (Section("s", "S", "I", (nothing,)),)), tmp_path / "out")
    assert (tmp_path / "out" / "figures" / "nothing.png").stat().st_size > 1000


def test_names_that_are_long_leave_room_for_their_charts(tmp_path: Path) -> None:
    """Drawings have both ends of a long name, and any other as it is."""
    names = ["long-" + "x" * 180 + "-1", 'font: 9px red; id="here"']
    charts = (
        HeatMap("names", "x", "y", tuple(names), tuple(names), [[1, 2], [3, 4]]),
        Bars(names[0], names[1], tuple(names), {name: [1, 2] for name in names}),
        Intervals("rows", names[0], tuple(Interval(name, 1, 0, 2) for name in names)),
        Intervals("no row", "x", ()),
    )
    figure = Figure("names", names[0], "What is drawn.", charts)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawn = svgs_of(figure)
        write_png(figure, tmp_path / "names.png")
    for svg in drawn[:3]:
        assert "long-xxx" in svg and "xxx-1<" in svg and "x" * 40 not in re.sub(r"<!--.*?-->", "", svg)
        assert f">{names[1]}<" in svg


def test_titles_are_not_cut_off(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Texts of a picture lie in it, and titles of charts in the column of their chart."""
    words = "how well the pooled vectors of long_name_of_a_config tell positives from negatives"
    rows = tuple("a name that is long " + str(number) for number in range(3))
    maps = tuple(HeatMap(f"{words} {number}", "x", "y", rows, rows, [[1, 2, 3]] * 3) for number in range(3))
    saved = list[Canvas]()
    monkeypatch.setattr(Canvas, "savefig", lambda canvas, *_, **__: saved.append(canvas))
    for charts in (maps[:1], maps):
        write_png(Figure("titles", f"{words} {'x' * 300}", "What is drawn.", charts), tmp_path / "no.png")
    for canvas, across in zip(saved, (1, 3), strict=True):
        canvas.draw_without_rendering()
        (title, *_) = canvas.texts
        assert title.get_window_extent().x1 <= canvas.bbox.x1
        own = [axes for axes in canvas.axes if axes.get_title(loc="left")]
        assert len(own) == across
        for number, axes in enumerate(own):
            (text,) = (each for each in axes.get_children() if is_title(each, axes.get_title(loc="left")))
            left, right = (place * canvas.bbox.width / across for place in (number, number + 1))
            assert left <= text.get_window_extent().x0 < text.get_window_extent().x1 <= right


def is_title(child: object, title: str) -> TypeGuard[Text]:
    return isinstance(child, Text) and child.get_text() == title


def test_references_and_configs_can_be_told_apart() -> None:
    names = ("newest", "random", "same")
    rows = (Interval("cold, a", 1, 0, 2, "a"), Interval("cold, b", 1, 0, 2, "b"))
    charts = (Bars("NDCG", "NDCG", ("x",), {name: [1] for name in names}), Intervals("AUC", "AUC", rows))
    looks = looks_of(Figure("f", "F", "C", charts, names))
    assert len({looks[name].dash for name in names}) == len({looks[name].marker for name in names}) == 3
    assert looks["a"].colour != looks["b"].colour and not looks["a"].reference


def test_comparisons_come_first_among_notices() -> None:
    findings = (Finding("notice", "n"), Finding("notice", "c", compares=True), Finding("alarm", "a"))
    report = Report("T", empty("E").runs, (Section("s", "S", "I", (), findings),))
    assert [finding.text for finding in report.findings] == ["a", "c", "n"]


def test_a_report_is_refused_where_names_would_meet() -> None:
    table = Table("runs", "Runs", "None.", ("run",), ())
    with pytest.raises(ValueError, match="are called runs"):
        Report("T", table, (Section("s", "S", "I", (table,)),))
    with pytest.raises(ValueError, match="is no name of a figure"):
        Table("../runs", "Runs", "None.", ("run",), ())
    with pytest.raises(ValueError, match="different lengths"):
        Table("t", "T", "None.", ("a", "b"), ((1,),))
