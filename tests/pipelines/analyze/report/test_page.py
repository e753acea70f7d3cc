"""The page in a browser: from disk, without a network, on wide and on narrow screens, in light and dark."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from pipelines.analyze.report.write import write_report
from tests.helpers.browser import CHROMIUM, Browser, browser
from tests.helpers.reports import small_report

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")

DARK = {"name": "prefers-color-scheme", "value": "dark"}
_CARD = "getComputedStyle(document.querySelector('.card')).backgroundColor"
_COLUMN = "[...document.querySelectorAll('#numbers tbody tr')].map(row => row.cells[{}].innerText)"
# Names of runs are as long as people make them.
_LONG = "document.querySelectorAll('.findings li, h3, h4, .caption').forEach(e => e.append('x'.repeat(400)))"
_CLICK = "document.querySelectorAll('#numbers th button')[{}].click()"


def opened(page: Browser, file: Path, width: int, scheme: str) -> None:
    page.call("Emulation.setEmulatedMedia", features=[{**DARK, "value": scheme}])
    page.open(file.as_uri(), width)
    page.wait("document.readyState === 'complete' && document.querySelector('footer') !== null")


def column(page: Browser, place: int) -> list[str]:
    found: list[str] = page.value(_COLUMN.format(place))
    return found


def test_the_page(tmp_path: Path) -> None:
    file = write_report(small_report(), tmp_path / "out")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile, browser(Path(profile)) as page:
        opened(page, file, 1400, "light")
        look_at_the_texts(page)
        look_at_the_figures(page, file.parent)
        sort_the_table(page)
        colours = [page.value("getComputedStyle(document.body).backgroundColor")]
        for width, scheme in ((420, "light"), (1400, "dark")):
            opened(page, file, width, scheme)
            assert page.value("document.documentElement.scrollWidth") == width
            page.value(_LONG)
            assert page.value("document.documentElement.scrollWidth") == width, "long names"
            colours.append(page.value("getComputedStyle(document.body).backgroundColor"))
        assert colours[0] == colours[1] != colours[2]
        page.call("Emulation.setEmulatedMedia", media="print", features=[DARK])
        assert page.value(_CARD) == "rgb(254, 254, 254)", "paper is white"
        assert {url.split(":")[0] for url in page.requested} <= {"file", "data"}
        assert page.errors == []


def look_at_the_texts(page: Browser) -> None:
    assert page.value("document.querySelector('h1').innerText") == "Analysis of a run"
    findings = page.value("[...document.querySelectorAll('.findings li')].map(each => each.className)")
    assert findings == ["alarm", "notice"]
    assert page.value("document.querySelectorAll('img').length") == 0
    links = page.value(
        "[...document.querySelectorAll('a[href^=\"#\"]')].map(each => each.getAttribute('href').slice(1))"
    )
    assert {"summary", "first", "second", "every-chart", "numbers"} == {*links}
    assert page.value(f"{links!r}.every(name => document.getElementById(name) !== null)")
    assert "A part is left out." in page.value("document.getElementById('first').innerText")


def look_at_the_figures(page: Browser, folder: Path) -> None:
    files = page.value(
        "[...document.querySelectorAll('a[href^=figures]')].map(each => each.getAttribute('href'))"
    )
    assert {*files} == {f"figures/{file.name}" for file in (folder / "figures").iterdir()}
    sizes = page.value(
        "[...document.querySelectorAll('.chart svg')].map(each => [each.clientWidth, each.clientHeight])"
    )
    assert len(sizes) == 6 and all(width > 250 and height > 80 for width, height in sizes)
    # Colours of drawings are the page's.
    assert page.value("document.querySelectorAll('.chart [style*=\"var(--series-0)\"]').length") > 5
    assert page.value("[...document.querySelectorAll('.legend li')].map(each => each.innerText).length") == 4
    page.value("document.querySelector('#every-chart details').open = true")
    numbers = page.value("document.querySelector('#every-chart details').innerText")
    assert "a\t0\t0.333\t0\t1\n" in numbers and "\u2013" in numbers


def sort_the_table(page: Browser) -> None:
    """By what a cell is, not by what it shows; cells without a value stay at the end."""
    assert column(page, 2)[3] == "12,346"
    page.value(_CLICK.format(2))
    assert column(page, 2)[:3] == ["1e-09", "0.25", "12,346"] and column(page, 2)[3] == "\u2013"
    page.value(_CLICK.format(2))
    assert column(page, 2)[0] == "12,346" and column(page, 2)[3] == "\u2013"
    page.value(_CLICK.format(1))
    assert column(page, 1) == ["-1", "9", "10", "100"]
    page.value(_CLICK.format(0))
    assert column(page, 0)[1:] == ["a", "b", "c"]
    sorted_by = page.value("[...document.querySelectorAll('#numbers th')].map(each => each.ariaSort)")
    assert sorted_by == ["ascending", None, None, None]
