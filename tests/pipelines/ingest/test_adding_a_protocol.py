"""A new protocol is one class and one entry of the table: docs/architecture.md shows one, which runs here."""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
from pydantic import ValidationError

from pipelines.ingest.ingest import ingest, report_lines
from pipelines.ingest.protocols.table import PROTOCOLS
from tests.helpers.launching import ROOT
from tests.helpers.rawlogs import EVENT, START, Row, config, events, ids_of_values, rows, write

pytestmark = pytest.mark.filterwarnings("ignore:fetch_arrow_table:DeprecationWarning")
INGEST = ROOT / "pipelines/ingest"


def example(folder: Path) -> ModuleType:
    """The file that the page shows, as a module."""
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    section = page.split("\n## Adding an ingest protocol\n")[1].split("\n## ")[0]
    (code,) = re.findall(r"^```python\n(.*?)^```", section, re.DOTALL | re.MULTILINE)
    path = folder / "visits.py"
    path.write_text(code, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("visits", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert re.search(r'`"visits": (\w+)\(\),`', section)[1] == "Visits"  # type: ignore[index]
    return module


@pytest.fixture
def visits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PROTOCOLS, "visits", example(tmp_path).Visits())


@pytest.mark.usefixtures("visits")
def test_the_protocol_of_the_page_makes_a_request_of_every_visit(tmp_path: Path) -> None:
    raw: list[Row] = [
        {**event, "visit": None if place % 5 == 4 else 100 + place}
        for place, event in enumerate(events(3, users=4, items=20))
    ]
    source = write(tmp_path / "events.parquet", raw, (*EVENT, "visit"))
    settings = config("visits", events={"request": "visit"}, requests={"positives": 3})
    manifest = ingest(source, tmp_path / "log", settings)
    items = ids_of_values(tmp_path / "log", "item_id")
    expected = {
        (visit["user_id"], visit["visit"]): (visit["timestamp"], items[visit["item_id"]], len(earlier))
        for visit in raw
        if visit["visit"] is not None
        and (
            earlier := [
                event
                for event in raw
                if event["user_id"] == visit["user_id"] and event["timestamp"] < visit["timestamp"]
            ]
        )
    }
    found = {}
    for row in rows(tmp_path / "log"):
        for place, request in enumerate(row["request_id"]):
            labels, shown = row["label_click"][place], row["candidate_item_id"][place]
            (positive,) = [item for item, label in zip(shown, labels, strict=True) if label]
            theirs = {items[event["item_id"]] for event in raw if event["user_id"] == row["user_id"]}
            assert theirs.intersection(shown) == {positive}
            time, end = row["request_timestamp"][place], row["request_history_end"][place]
            found[row["user_id"], request] = (time, positive, end)
    assert found == expected
    assert manifest.ingest["protocol"] == "visits"
    assert "requests.positives: the protocol visits does not use this setting" in report_lines(manifest)


@pytest.mark.usefixtures("visits")
def test_a_visit_of_several_rows_is_its_first_row_and_is_counted(tmp_path: Path) -> None:
    """Neither the order of the file nor the numbers of the items decide which row is the first."""
    one = {**events(3, users=1)[0], "user_id": 1}
    raw: list[Row] = [
        {**one, "item_id": item, "timestamp": START + 60 * place, "visit": visit}
        for place, (item, visit) in enumerate([(5, 1), (9, 2), (4, 2), (7, 3)])
    ]
    source = write(tmp_path / "events.parquet", raw[::-1], (*EVENT, "visit"))
    manifest = ingest(
        source, tmp_path / "log", config("visits", events={"request": "visit"}, requests={"min_history": 1})
    )
    items = ids_of_values(tmp_path / "log", "item_id")
    asked = {
        request: (time, [item for item, label in zip(shown, labels, strict=True) if label])
        for row in rows(tmp_path / "log")
        for request, time, shown, labels in zip(
            *(row[name] for name in ("request_id", "request_timestamp", "candidate_item_id", "label_click")),
            strict=True,
        )
    }
    assert asked == {2: (START + 60, [items[9]]), 3: (START + 180, [items[7]])}
    assert manifest.report["remarks"]["visits_of_several_rows"] == 1
    assert any(line.startswith("1 visits of several rows (the first row") for line in report_lines(manifest))


@pytest.mark.usefixtures("visits")
def test_the_protocol_of_the_page_checks_its_settings() -> None:
    with pytest.raises(ValidationError, match=r"protocol visits needs the visit's id: .* events\.request"):
        config("visits")
    with pytest.raises(ValidationError, match="protocol visits splits by time: give split"):
        config("visits", split=None)
    with pytest.raises(ValidationError, match=r"'next-basket', .* 'time-split' or 'visits'"):
        config("visit")


def test_nobody_outside_of_the_protocols_compares_their_names() -> None:
    """A protocol's name stands in its table, in words for people, and nowhere in a comparison or as a key."""
    named: list[str] = []
    files = [*INGEST.rglob("*.py"), *(ROOT / "launch").glob("*.py")]
    assert len(files) > 20
    for file in files:
        if file.parent.name == "protocols":
            continue
        tree = ast.parse(file.read_text(encoding="utf-8"))
        named += [
            f"{file.name}:{node.lineno}"
            for node in ast.walk(tree)
            if (isinstance(node, ast.Constant) and node.value in set(PROTOCOLS) - {"impressions"})
            or (
                isinstance(node, ast.Compare)
                and any(
                    isinstance(part, ast.Attribute) and part.attr == "protocol" for part in ast.walk(node)
                )
            )
        ]
    # The one default of the settings.
    assert [place.split(":")[0] for place in named] == ["config.py"]
