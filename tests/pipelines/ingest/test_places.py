"""A fault of the raw tables is told with its file and its line or row, and with the setting that mends it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from embeddings.errors import DataError
from pipelines.ingest.report import preview_lines
from pipelines.ingest.sources import Survey
from tests.helpers.opening import GOOD, Door, csv_events, parquet, text
from tests.helpers.rawlogs import START
from trainer.log.schema import ColumnInfo


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    opened = Door(tmp_path_factory.mktemp("engine"))
    yield opened
    opened.engine.close()


def shown(path: Path, clicks: list[Any]) -> Path:
    lines = [f"{place},7,{START},{click},{click}" for place, click in enumerate(clicks)]
    return text(path, "user_id,item_id,timestamp,click,weight", *lines)


def says(*parts: str) -> str:
    return ".*".join(map(re.escape, parts))


def test_words_as_labels_are_to_be_written_as_numbers(door: Door, tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        door.shown(shown(tmp_path / "i.csv", ["yes", "no"]))
    assert "line 3: 'no' is not a number; for a label write 0 and 1, or true and false" in str(caught.value)
    assert "nulls" not in str(caught.value)
    words = parquet(tmp_path / "i.parquet", click=["yes", "no", "no"])
    with pytest.raises(DataError, match=says("type is string", "; write 0 and 1, or true and false")):
        door.shown(words)


def test_labels_and_weights_out_of_range_have_a_place(door: Door, tmp_path: Path) -> None:
    good = shown(tmp_path / "a.csv", ["0", "1"])
    with pytest.raises(DataError, match=says("holds 0 to 3", "is binary", "first is in line 3 of", "b.csv")):
        door.shown([good, shown(tmp_path / "b.csv", ["true", "3"])])
    rows = parquet(tmp_path / "i.parquet", click=[0, 1, 1], weight=[1.0, 0.5, -2.0])
    with pytest.raises(DataError, match=says("column weight: -2 is negative", "first is in row 2")):
        door.shown(rows, impressions={"weight": "weight"})
    with pytest.raises(DataError, match=says("column click: null in 1 of 2 rows", "first is in line 3")):
        door.shown(shown(tmp_path / "n.csv", ["1", "?"]), csv={"nulls": ["?"]})


def test_times_of_another_unit_name_the_setting_and_the_place(door: Door, tmp_path: Path) -> None:
    late = text(tmp_path / "e.csv", *csv_events(["7"]), f"2,7,{START}000")
    with pytest.raises(DataError, match=says('; set events.timestamp_unit = "ms"', "first is in line 3")):
        door.events(late)
    given = parquet(tmp_path / "i.parquet", timestamp=[START, START * 1000, START], click=[0, 1, 1])
    with pytest.raises(DataError, match=says('impressions.timestamp_unit = "ms"', "first is in row 1")):
        door.shown(given)
    micro = parquet(tmp_path / "u.parquet", timestamp=[START * 10**6] * 3)
    with pytest.raises(DataError, match=says('timestamp_unit = "ms" was counted in', 'unit = "us" or "ns"')):
        door.events(micro, events={"timestamp_unit": "ms"})


def test_a_unit_beside_a_type_with_its_own_is_said_to_do_nothing(door: Door, tmp_path: Path) -> None:
    times = pa.array([second * 10**6 for second in GOOD["timestamp"]], pa.timestamp("us"))
    own = parquet(tmp_path / "e.parquet", timestamp=times)
    rows = door.events(own, events={"timestamp_unit": "ms"})
    assert [row["timestamp"] for row in rows] == GOOD["timestamp"]
    (note,) = door.survey.notes
    assert note.startswith(
        'events.timestamp_unit = "ms" has no effect: the column timestamp is timestamp[us]'
    )
    numbers = parquet(tmp_path / "n.parquet", timestamp=[second * 1000 for second in GOOD["timestamp"]])
    door.events(numbers, events={"timestamp_unit": "ms"})
    assert door.survey.notes == []


def test_preview_shows_labels_and_times_as_they_are_meant() -> None:
    keys = {"impressions.labels: click": "numbers", "impressions.timestamp": "unix seconds"}
    columns = [
        ColumnInfo(table="impressions", setting=key, column="c", found="CSV", read_as=read)
        for key, read in keys.items()
    ]
    ranges = [(0, 0.0, 1.0), (2, START, START * 1000)]
    seen = Survey(columns, ranges=dict(zip((("impressions", key) for key in keys), ranges, strict=True)))
    _, _, label, time = (re.split("  +", line.strip()) for line in preview_lines(seen))
    assert label == ["c", "impressions.labels: click", "CSV", "numbers", "0", "0", "1"]
    assert time[-2:] == ["2017-01-01 00:00:00", str(START * 1000)]
