"""What a column holds is decided over all cells of all files, and no id is merged, changed or lost."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embeddings.errors import DataError
from tests.helpers.opening import GOOD, Door, csv_events, parquet, text
from tests.helpers.rawlogs import START

pytestmark = pytest.mark.filterwarnings("ignore:fetch_arrow_table:DeprecationWarning")
CAT: dict[str, Any] = {"features": [{"name": "cat"}]}
TAGS: dict[str, Any] = {"features": [{"name": "tags", "multi": True}]}


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    with Door(tmp_path_factory.mktemp("engine")) as opened:
        yield opened


@pytest.mark.parametrize(
    "odd",
    [
        "01",
        "007",
        "+5",
        " 5",
        "5 ",
        "1e3",
        "-0",
        "1.0",
        "0x1",
        "9223372036854775808",
        "1_000",
        "NA",
        "1,5",
        "٣",
    ],
)
def test_text_stays_text_where_numbers_would_merge(odd: str, door: Door, tmp_path: Path) -> None:
    items = ["1", "7", "5", "1000", "0", f'"{odd}"']
    # The odd one comes last, in another file, long after a look at the first megabyte would have ended.
    files = [
        text(tmp_path / f"{place}.csv", *csv_events(part))
        for place, part in enumerate((items[:5], items[5:]))
    ]
    assert sorted(door.column(files, "item_id")) == sorted(["1", "7", "5", "1000", "0", odd])
    (told,) = [column for column in door.survey.columns if column.column == "item_id"]
    assert told.read_as == "text" and repr(odd) in told.note
    assert {column.column: column.read_as for column in door.survey.columns} | {"item_id": ""} == {
        "user_id": "integers",
        "timestamp": "unix seconds",
        "item_id": "",
    }


def test_plain_integers_of_csv_are_integers(door: Door, tmp_path: Path) -> None:
    items = [0, -1, 7, 10, 2**63 - 1, -(2**63)]
    path = text(tmp_path / "e.csv", *csv_events([str(item) for item in items]))
    assert door.column(path, "item_id") == items
    assert door.column(path, "item_id", text_columns=["item_id"]) == [str(item) for item in items]


def test_a_reason_is_told_where_text_looks_like_numbers(door: Door, tmp_path: Path) -> None:
    for items, note in (
        (["a", "b"], ""),
        (["1.0", "2.0"], "2 cells such as '1.0' are no plain spelling of a 64-bit integer"),
        (["1", "a"], "1 cells such as 'a' are no plain spelling of a 64-bit integer"),
    ):
        assert door.column(text(tmp_path / "e.csv", *csv_events(items)), "item_id") == items
        assert door.survey.columns[2].note == note


def test_users_requests_and_members_of_lists_are_not_merged_either(door: Door, tmp_path: Path) -> None:
    lines = [
        "user_id,item_id,timestamp,basket,tags",
        f"01,1,{START},007,1|01",
        f"1,1,{START + 1},7,|7| 007 |",
    ]
    path = text(tmp_path / "e.csv", *lines)
    features = [{"name": "tags", "multi": True, "separator": "|"}]
    rows = door.events(path, features=features, events={"request": "basket"})
    assert [(row["user_id"], row["request_id"], row["tags"]) for row in rows] == [
        ("01", "007", ["1", "01"]),
        ("1", "7", ["7", "007"]),
    ]


@pytest.mark.parametrize("sign", ["|", ".", "^", "$", "[", "\\", "||", "a+", " "])
def test_a_separator_stands_for_itself(sign: str, door: Door, tmp_path: Path) -> None:
    path = parquet(tmp_path / "e.parquet", tags=[f"x{sign}y", "z", None])
    features = [{"name": "tags", "multi": True, "separator": sign}]
    assert door.column(path, "tags", features=features) == [["x", "y"], ["z"], None]


def test_an_empty_cell_is_nothing_quoted_or_not(door: Door, tmp_path: Path) -> None:
    lines = csv_events(["a", "b", "c", "d"], "user_id,item_id,timestamp,cat")
    cells = ["", '""', '"x"', "NULL"]
    path = text(
        tmp_path / "e.csv", lines[0], *(f"{line},{cell}" for line, cell in zip(lines[1:], cells, strict=True))
    )
    assert door.column(path, "cat", **CAT) == [None, None, "x", "NULL"]
    assert door.column(path, "cat", **CAT, csv={"nulls": ["NULL", "NA"]}) == [None, None, "x", None]


TEXT, WHOLE = pa.array(["b", "a", None]), pa.array([3, 1, None])
ENCODED = {
    "dictionary of text": (TEXT.dictionary_encode(), ["b", "a", None]),
    "dictionary of integers": (WHOLE.dictionary_encode(), [3, 1, None]),
    "large text": (TEXT.cast(pa.large_string()), ["b", "a", None]),
    "text view": (TEXT.cast(pa.string_view()), ["b", "a", None]),
    "uint8": (WHOLE.cast(pa.uint8()), [3, 1, None]),
    "uint64": (WHOLE.cast(pa.uint64()), [3, 1, None]),
    "uint64 that int64 cannot hold": (
        pa.array([2**64 - 1, 1, None], pa.uint64()),
        ["18446744073709551615", "1", None],
    ),
    "whole floats": (pa.array([3.0, float("nan"), None]), [3, None, None]),
    "whole float32": (pa.array([3.0, 1.0, None], pa.float32()), [3, 1, None]),
    "decimals": (pa.array([Decimal(3), Decimal(1), None], pa.decimal128(38, 0)), [3, 1, None]),
    "decimals beyond int64": (
        pa.array([Decimal(10**30), Decimal(1), None], pa.decimal128(38, 0)),
        [str(10**30), "1", None],
    ),
    "booleans": (pa.array([True, False, None]), ["true", "false", None]),
    "nulls": (pa.nulls(3), [None, None, None]),
}


@pytest.mark.parametrize("case", ENCODED)
def test_ids_of_every_arrow_type_are_read(case: str, door: Door, tmp_path: Path) -> None:
    values, expected = ENCODED[case]
    assert door.column(parquet(tmp_path / "e.parquet", cat=values), "cat", **CAT) == expected


def test_nan_is_found_where_the_statistics_of_a_file_leave_it_out(door: Door, tmp_path: Path) -> None:
    """DuckDB takes isnan() for false where Parquet states a greatest value."""
    nan, later = float("nan"), [START + 9.5, float("nan"), START + 20]
    for kind in (pa.float64(), pa.float32()):
        values = pa.array([3.0, nan, 1.0], kind)
        assert door.column(parquet(tmp_path / "e.parquet", cat=values), "cat", **CAT) == [3, None, 1]
    with pytest.raises(DataError, match="column timestamp: null in 1 of 3 rows"):
        door.events(parquet(tmp_path / "t.parquet", timestamp=later))
    with pytest.raises(DataError, match=r"column cat: row 1: 'inf' is not a whole number"):
        door.events(parquet(tmp_path / "i.parquet", cat=[1.0, float("inf"), 2.0]), **CAT)


def test_words_for_nothing_are_told(door: Door, tmp_path: Path) -> None:
    csv = text(tmp_path / "e.csv", *csv_events(["NULL", "7", "NULL"]))
    assert door.column(csv, "item_id") == ["NULL", "7", "NULL"]
    said = "raw events: item_id: 2 cells such as 'NULL' are values like others; name such words in csv.nulls"
    assert any(note.startswith(said) for note in door.survey.notes)
    assert door.column(parquet(tmp_path / "e.parquet", cat=["nan", "a", "b"]), "cat", **CAT)[0] == "nan"
    assert any("cat: 1 cells such as 'nan'" in note for note in door.survey.notes)


@pytest.mark.parametrize("cell", ["1e400", "-1e400", "9223372036854775808", "1e30"])
def test_a_time_out_of_reach_is_told_with_its_line(cell: str, door: Door, tmp_path: Path) -> None:
    lines = ["user_id,item_id,timestamp", f"1,7,{START}", f"1,7,{cell}"]
    with pytest.raises(DataError, match=rf"column timestamp: line 3: '{cell}' is not unix seconds"):
        door.events(text(tmp_path / "e.csv", *lines))
    far = parquet(tmp_path / "e.parquet", timestamp=[float(START), float(cell), float(START)])
    with pytest.raises(DataError, match=r"column timestamp: row 1: .* is not unix seconds"):
        door.events(far)


L = [[2, 1], [], None]
LISTS = {
    "list": pa.array(L, pa.list_(pa.int64())),
    "large list": pa.array(L, pa.large_list(pa.int32())),
    "list view": pa.array(L, pa.list_view(pa.int64())),
    "large list view": pa.array(L, pa.large_list_view(pa.int64())),
    "list of uint64": pa.array(L, pa.list_(pa.uint64())),
    "list of dictionary": pa.array([["x"], [], None], pa.list_(pa.dictionary(pa.int8(), pa.string()))),
    "list of text views": pa.array([["x"], [], None], pa.list_(pa.string_view())),
}


@pytest.mark.parametrize("case", LISTS)
def test_lists_of_every_arrow_type_are_read(case: str, door: Door, tmp_path: Path) -> None:
    expected = [["x"], [], None] if "dictionary" in case or "text" in case else L
    assert door.column(parquet(tmp_path / "e.parquet", tags=LISTS[case]), "tags", **TAGS) == expected
    fixed = pa.array([[1, 2], [3, 4], None], pa.list_(pa.int64(), 2))
    assert door.column(parquet(tmp_path / "f.parquet", tags=fixed), "tags", **TAGS) == [[1, 2], [3, 4], None]


def test_files_of_different_types_meet_without_loss(door: Door, tmp_path: Path) -> None:
    big = 5_000_000_000
    kinds: list[tuple[Any, Any, list[Any]]] = [
        (pa.array([1, 2, 3], pa.int32()), pa.array([big] * 3), [1, 2, 3] + [big] * 3),
        (pa.array([big] * 3), pa.array([1, 2, 3], pa.int8()), [big] * 3 + [1, 2, 3]),
        (pa.array([1, 2, 3]), pa.array([1.0, None, float("nan")]), [1, 2, 3, 1, None, None]),
        (pa.array([1, 2, 3]), pa.array([2**64 - 1] * 3, pa.uint64()), ["1", "2", "3"] + [str(2**64 - 1)] * 3),
        (TEXT.cast(pa.large_string()), TEXT.dictionary_encode(), ["b", "a", None] * 2),
        (pa.nulls(3), pa.array(["x"] * 3), [None] * 3 + ["x"] * 3),
        (pa.array([None] * 3, pa.int64()), pa.nulls(3), [None] * 6),
    ]
    for place, (one, other, expected) in enumerate(kinds):
        files = [parquet(tmp_path / f"{place}.parquet", cat=one)]
        later = [value + 10 for value in GOOD["timestamp"]]
        files.append(parquet(tmp_path / f"{place}b.parquet", cat=other, timestamp=later))
        assert door.column(files, "cat", **CAT) == expected
        assert door.column(files[::-1], "cat", **CAT) == expected
    files = [
        parquet(tmp_path / "i.parquet", cat=WHOLE),
        parquet(tmp_path / "s.parquet", cat=TEXT, timestamp=later),
    ]
    with pytest.raises(
        DataError, match=r"s\.parquet: column cat: holds text \(string\), but .*i\.parquet holds int"
    ):
        door.events(files, **CAT)
    assert door.column(files, "cat", **CAT, text_columns=["cat"]) == ["3", "1", None, "b", "a", None]


MOMENT = datetime(2017, 1, 1, 0, 0, 5, tzinfo=UTC)
TIMES: dict[str, Any] = {
    unit: pa.array([MOMENT.replace(microsecond=0)] * 3, pa.timestamp(unit))
    for unit in ("s", "ms", "us", "ns")
}
TIMES |= {
    "zone": pa.array([MOMENT] * 3, pa.timestamp("us", "Asia/Tokyo")),
    "whole floats": pa.array([float(START + 5)] * 3),
    "uint32": pa.array([START + 5] * 3, pa.uint32()),
    "decimal": pa.array([Decimal(START + 5)] * 3, pa.decimal128(20, 0)),
    "text": pa.array(["2017-01-01T00:00:05Z", "2017-01-01 02:00:05+02:00", str(START + 5)]),
    "fractions": pa.array([START + 5.75] * 3),
    "fractions of a moment": pa.array([MOMENT.replace(microsecond=700_000)] * 3, pa.timestamp("us")),
}


@pytest.mark.parametrize("case", TIMES)
def test_times_of_every_type_are_unix_seconds(
    case: str, door: Door, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TZ", "America/New_York")
    assert door.column(parquet(tmp_path / "e.parquet", timestamp=TIMES[case]), "timestamp") == [START + 5] * 3
    note = next(column.note for column in door.survey.columns if column.column == "timestamp")
    assert note == ("3 times lost a part of a second" if "fractions" in case else "")


def test_dates_are_midnight_of_utc(door: Door, tmp_path: Path) -> None:
    days = pa.array([date(2017, 1, 1)] * 3)
    assert door.column(parquet(tmp_path / "e.parquet", timestamp=days), "timestamp") == [START] * 3


@pytest.mark.parametrize(
    ("cell", "seconds"),
    [
        (f"{START}", 0),
        (f" {START} ", 0),
        (f"{START}.0", 0),
        ("1.4832288e9", 0),
        ("2017-01-01", 0),
        ("2017-01-01 00:01", 60),
        ("2017-01-01T00:01:02", 62),
        ("2017-01-01 00:00:09.999999999", 9),
        ("2017-01-01T00:00:09Z", 9),
        ("2017-01-01 00:00:09 UTC", 9),
        ("2017-01-01T01:00:00+01:00", 0),
        ("2017-01-01T01:30:00+0130", 0),
        ("2016-12-31T22:00:00-02", 0),
        ("2017-01-01T01:00+01:00", 0),
    ],
)
def test_a_time_of_csv_may_be_iso(cell: str, seconds: int, door: Door, tmp_path: Path) -> None:
    path = text(tmp_path / "e.csv", "user_id,item_id,timestamp", f"1,7,{cell}")
    assert door.column(path, "timestamp") == [START + seconds]


def test_the_unit_of_times_that_are_numbers_is_declared(door: Door, tmp_path: Path) -> None:
    for unit, size in (("ms", 1000), ("us", 10**6), ("ns", 10**9)):
        path = parquet(tmp_path / "e.parquet", timestamp=[(START + place) * size + 1 for place in range(3)])
        with pytest.raises(DataError, match=r"too large for unix seconds.*timestamp_unit"):
            door.events(path)
        assert door.column(path, "timestamp", events={"timestamp_unit": unit}) == GOOD["timestamp"]
        assert door.survey.columns[1].note == "3 times lost a part of a second"
        lines = [f"1,7,{(START + 1) * size}"]
        path = text(tmp_path / "e.csv", "user_id,item_id,timestamp", *lines)
        assert door.column(path, "timestamp", events={"timestamp_unit": unit}) == [START + 1]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"item_id": [1.0, 2.5, 3.0]}, r"column item_id: row 1: '2\.5' is not a whole number"),
        ({"user_id": [1.0, 1e17, 3.0]}, r"column user_id: row 1: .* is not a whole number"),
        ({"item_id": [b"a", b"b", b"c"]}, r"column item_id: type is binary.*cast the column to string where"),
        ({"item_id": [date(2017, 1, 1)] * 3}, r"column item_id: type is date32.*cast the column to text"),
        ({"user_id": [[1]] * 3}, r"column user_id: type is list<.*expected an integer or a string"),
        (
            {"timestamp": ["2017-01-01", "yesterday", "1"]},
            r"column timestamp: row 1: 'yesterday' is not unix seconds or ISO",
        ),
        (
            {"timestamp": ["2017-02-30"] * 3},
            r"column timestamp: row 0: '2017-02-30' is not unix seconds.*\(3 such cells\)",
        ),
        ({"timestamp": [True] * 3}, r"column timestamp: type is bool, expected unix seconds"),
    ],
)
def test_what_cannot_be_read_is_explained(
    columns: dict[str, Any], message: str, door: Door, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=r"e\.parquet: " + message):
        door.events(parquet(tmp_path / "e.parquet", **columns))


def shown(path: Path, clicks: list[Any], end: str = "\n") -> Path:
    lines = [f"{place},7,{START},{click}" for place, click in enumerate(clicks)]
    return text(path, "user_id,item_id,timestamp,click", *lines, end=end)


def test_labels_of_csv_are_read_in_every_spelling(door: Door, tmp_path: Path) -> None:
    for clicks, expected in (
        (["0", "1"], [0, 1]),
        (["0.0", "1.0"], [0, 1]),
        (["true", "false"], [1, 0]),
        (["True", "FALSE"], [1, 0]),
        (["1", "0.25"], [1, 0.25]),
        ([" 1", "1e-1"], [1, 0.1]),
        (['"1"', "+0"], [1, 0]),
    ):
        labels = {"click": {"column": "click", "kind": "probability"}}
        rows = door.shown(shown(tmp_path / "i.csv", clicks), impressions={"labels": labels})
        rows.sort(key=lambda row: row["user_id"])
        assert [row["label_click"] for row in rows] == pytest.approx(expected)
    one = shown(tmp_path / "a.csv", ["0", "1"])
    other = shown(tmp_path / "b.csv", ["1", "x", "y"], "\r\n")
    with pytest.raises(
        DataError, match=r"b\.csv: column click: line 3: 'x' is not a number.*\(2 such cells\)"
    ):
        door.shown([one, other])
    with pytest.raises(
        DataError, match=r"2 problems: .*timestamp: line 2: 'soon'.*click: line 2: '0,5' is not"
    ):
        door.shown(text(tmp_path / "c.csv", "user_id,item_id,timestamp,click", '1,7,soon,"0,5"'))


def test_a_column_may_have_two_roles(door: Door, tmp_path: Path) -> None:
    path = text(tmp_path / "e.csv", *csv_events(["1"]))
    features = [{"name": "who", "column": "user_id"}, {"name": "day", "column": "timestamp"}]
    (row,) = door.events(path, features=features)
    assert (row["who"], row["day"], row["timestamp"]) == (0, START, START)


def test_pandas_tables_are_read(door: Door, tmp_path: Path) -> None:
    columns = {**GOOD, "cat": pa.array(["x", "y", None]).dictionary_encode(), "__index_level_0__": [5, 6, 7]}
    columns["user_id"] = pa.array([1.0, 2.0, 3.0])
    columns["timestamp"] = pa.array([second * 10**9 for second in GOOD["timestamp"]], pa.timestamp("ns"))
    pq.write_table(pa.table(columns), tmp_path / "e.parquet")
    rows = door.events(tmp_path / "e.parquet", **CAT)
    assert [(row["user_id"], row["timestamp"], row["cat"]) for row in rows] == [
        (1, START, "x"),
        (2, START + 1, "y"),
        (3, START + 2, None),
    ]
    assert door.survey.notes == ["raw events: nothing uses the column __index_level_0__"]
