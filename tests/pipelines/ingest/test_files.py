"""The engine opens exactly the files that were named and checked, whatever their paths look like."""

from __future__ import annotations

import gzip
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from embeddings.errors import DataError
from pipelines.ingest.files import find_files
from pipelines.ingest.sections import CsvConfig
from tests.helpers.opening import GOOD, Door, csv_events, parquet, text
from tests.helpers.rawlogs import START

pytestmark = pytest.mark.filterwarnings("ignore:fetch_arrow_table:DeprecationWarning")
ITEMS = [7, 8, 9]
OTHER = {"item_id": [100, 200, 300]}


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    with Door(tmp_path_factory.mktemp("engine")) as opened:
        yield opened


@pytest.mark.parametrize(
    ("named", "decoy"),
    [
        ("day[1].parquet", "day1.parquet"),
        ("what?/e.parquet", "whatX/e.parquet"),
        ("st*r/e.parquet", "star/e.parquet"),
        ("**/e.parquet", "x/e.parquet"),
        ("{a,b}.parquet", "a.parquet"),
        ("[!a].parquet", "b.parquet"),
        ("back\\slash.parquet", "backslash.parquet"),
        ("it's 100%20.parquet", "it's 100 .parquet"),
        ("_marker.parquet", "marker.parquet"),
        ("user_id=7/item_id=5/e.parquet", "user_id=8/e.parquet"),
        ("item_id=5/café.parquet", "item_id=5/cafe.parquet"),
    ],
)
def test_an_exact_path_is_that_file(named: str, decoy: str, door: Door, tmp_path: Path) -> None:
    parquet(tmp_path / decoy, **OTHER)
    rows = door.events(parquet(tmp_path / named))
    assert [row["item_id"] for row in rows] == ITEMS and [row["user_id"] for row in rows] == [1, 2, 3]


def test_csv_is_opened_as_literally(door: Door, tmp_path: Path) -> None:
    text(tmp_path / "a1.csv", *csv_events(["100"]))
    (tmp_path / "item_id=5").mkdir()
    for name in ("a[1].csv", "item_id=5/a*.csv"):
        assert door.column(text(tmp_path / name, *csv_events(["7"])), "item_id") == [7]


def test_a_path_that_no_pattern_can_spell_is_refused(door: Door, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"backslash beside .*; rename the file"):
        door.events(parquet(tmp_path / "a\\b[1].parquet"))


def test_one_file_named_twice_is_read_once(
    door: Door, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = parquet(tmp_path / "a.parquet")
    os.symlink(path, tmp_path / "b.parquet")
    (tmp_path / "d").mkdir()
    os.symlink(tmp_path, tmp_path / "d" / "loop")
    monkeypatch.chdir(tmp_path)
    for names in (
        ["a.parquet", "./a.parquet"],
        ["a.parquet", path],
        ["a.parquet", "d/../a.parquet"],
        ["d/loop/a.parquet", "a.parquet"],
        ["*.parquet"],
        ["a.parquet", "*.parquet"],
    ):
        assert door.column(names, "item_id") == ITEMS
        alike = [note for note in door.survey.notes if "so it is read once" in note]
        assert bool(alike) is (names not in (["a.parquet", "./a.parquet"],)), names


def test_a_folder_is_its_data_files(door: Door, tmp_path: Path) -> None:
    folder = tmp_path / "s"
    parquet(folder / "part-0.parquet")
    parquet(folder / "day=2" / "part-0.parquet", **OTHER)
    parquet(folder / "_temporary" / "part-0.parquet", item_id=[0, 0, 0])
    for name in ("_SUCCESS", ".part-0.parquet.crc", "_metadata", "README.md"):
        (folder / name).write_bytes(b"x")
    assert sorted(door.column(folder, "item_id")) == [*ITEMS, 100, 200, 300]
    assert door.survey.notes == [
        "raw events: 4 files that hold no data were left out "
        "(.part-0.parquet.crc, README.md, _SUCCESS, _metadata)"
    ]
    with pytest.raises(DataError, match=r"README\.md: is no Parquet file"):
        door.events(f"{folder}/*")
    (folder / "README.md").unlink()
    (folder / "day=2" / "above").symlink_to(folder)
    assert find_files(folder, "raw events").files == (
        folder / "part-0.parquet",
        folder / "day=2" / "part-0.parquet",
    )
    (folder / "day=2" / "above").unlink()
    assert sorted(door.column(f"{folder}/*", "item_id")) == [*ITEMS, 100, 200, 300]
    assert door.column(f"{folder}/part*", "item_id") == ITEMS
    assert sorted(door.column(f"{folder}/**/*.parquet", "item_id"))[-1] == 300
    (folder / "day=2" / "_delta_log").mkdir()
    with pytest.raises(DataError, match=r"day=2: is a Delta Lake table.*or name the files"):
        door.events(folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        DataError, match=r"empty: holds no data file; name a Parquet or CSV file of raw events"
    ):
        find_files(tmp_path / "empty", "raw events")


def test_a_folder_names_a_column_only_where_it_is_asked_to(door: Door, tmp_path: Path) -> None:
    for name, items in (
        ("shop=01", [1, 2, 3]),
        ("shop=1", [4, 5, 6]),
        ("shop=__HIVE_DEFAULT_PARTITION__", [7, 8, 9]),
    ):
        parquet(tmp_path / "s" / name / "e.parquet", item_id=items)
    feature: dict[str, Any] = {"features": [{"name": "shop"}]}
    with pytest.raises(DataError, match=r'column shop: no such column.*set partition_columns = \["shop"\]'):
        door.events(tmp_path / "s", **feature)
    rows = door.events(tmp_path / "s", **feature, partition_columns=["shop"])
    assert {row["item_id"]: row["shop"] for row in rows} == dict(
        zip(range(1, 10), ["01"] * 3 + ["1"] * 3 + [None] * 3, strict=True)
    )
    with pytest.raises(DataError, match="the file has this column itself; take it out of partition_columns"):
        door.events(tmp_path / "s", partition_columns=["item_id"])
    with pytest.raises(DataError, match=r"the path has no folder shop="):
        door.events(parquet(tmp_path / "e.parquet"), **feature, partition_columns=["shop"])


def test_columns_are_found_by_name_in_every_file(door: Door, tmp_path: Path) -> None:
    text(tmp_path / "0.csv", "user_id,item_id,timestamp", f"1,7,{START}")
    text(tmp_path / "1.csv", "item_id,x,timestamp,user_id", f"8,u,{START + 1},2")
    text(tmp_path / "2.tsv", "timestamp\titem_id\tuser_id", f"{START + 2}\t9\t3")
    assert [(row["user_id"], row["item_id"]) for row in door.events([*sorted(tmp_path.iterdir())])] == [
        (1, 7),
        (2, 8),
        (3, 9),
    ]
    first = parquet(tmp_path / "0.parquet", a=["x", "y", "z"])
    names = ["timestamp", "user_id", "item_id"]
    second = tmp_path / "1.parquet"
    pa.parquet.write_table(pa.table({name: [value + 10 for value in GOOD[name]] for name in names}), second)
    rows = door.events([first, second])
    assert [(row["user_id"], row["item_id"]) for row in rows[3:]] == [(11, 17), (12, 18), (13, 19)]


def test_names_are_taken_letter_by_letter(door: Door, tmp_path: Path) -> None:
    columns = {"CAT": ["a", "b", "c"], "cat": [1, 2, 3]}
    for place, order in enumerate((["CAT", "cat"], ["cat", "CAT"])):
        path = parquet(tmp_path / f"{place}.parquet", **{name: columns[name] for name in order})
        features = [{"name": "small", "column": "cat"}, {"name": "large", "column": "CAT"}]
        rows = door.events(path, features=features)
        assert [(row["small"], row["large"]) for row in rows] == [(1, "a"), (2, "b"), (3, "c")]
    path = text(tmp_path / "e.csv", *csv_events(["1"], "user_id,Item_ID,timestamp"))
    with pytest.raises(DataError, match=r"column item_id: no such column.*'Item_ID' is spelled otherwise"):
        door.events(path)
    path = text(tmp_path / "e.csv", *csv_events(["1"], "user_id,item_id,item_id"))
    with pytest.raises(
        DataError, match=r"column timestamp: no such.*column item_id: 2 columns have this name"
    ):
        door.events(path)


@pytest.mark.parametrize("name", ["e.tsv", "e.txt", "e.csv", "E.CSV", "e.inter"])
@pytest.mark.parametrize("sign", ["\t", ",", ";", "|"])
def test_a_delimiter_is_known_by_the_header(name: str, sign: str, door: Door, tmp_path: Path) -> None:
    lines = [line.replace(",", sign) for line in csv_events(["7", "8"])]
    assert door.column(text(tmp_path / name, *lines), "item_id") == [7, 8]


def test_a_delimiter_can_be_named(door: Door, tmp_path: Path) -> None:
    path = text(tmp_path / "e.csv", "user_id item_id timestamp a,b,c,d,e", f"1 7 {START} x")
    with pytest.raises(DataError, match="no such column"):
        door.events(path)
    assert door.column(path, "item_id", csv={"delimiter": " "}) == [7]
    path = text(tmp_path / "e.csv", "user_id item_id timestamp", f"1 7 {START}")
    with pytest.raises(DataError, match=r"set csv\.delimiter if another sign parts its cells"):
        door.events(path)


def test_text_is_read_as_other_programs_write_it(door: Door, tmp_path: Path) -> None:
    lines = csv_events(['"a,""b""\n"', "c"])
    for name, content in {
        "mark.csv": "\ufeff" + "\n".join(lines),
        "windows.csv": "\r\n".join(lines) + "\r\n",
        "blank.csv": "\n".join(lines) + "\n\n",
    }.items():
        (tmp_path / name).write_text(content, encoding="utf-8", newline="")
        assert door.column(tmp_path / name, "item_id") == ['a,"b"\n', "c"], name
    packed = tmp_path / "e.tsv.gz"
    packed.write_bytes(gzip.compress("\n".join(csv_events(["7"])).replace(",", "\t").encode()))
    assert door.column(packed, "item_id") == [7]
    recbole = text(tmp_path / "e.inter", *csv_events(["7"], "user_id:token,item_id:token,timestamp:float"))
    assert door.column(recbole, "item_id") == [7]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("e.jsonl", b'{"a": 1}', r"e\.jsonl: JSON is not read; convert it.*COPY"),
        ("e.jsonl.gz", b"", r"JSON is not read"),
        ("e.csv.zst", b"", "packed in a way that is not read"),
        ("e.data", b"user_id,item_id", r"is no Parquet file; name it \.csv"),
        ("e.parquet", b"user_id,item_id", r"e\.parquet: is no Parquet file; name it \.csv"),
        ("e.parquet", b"", r"e\.parquet: is empty"),
        (
            "e.parquet",
            b"PAR1user_id,item_id",
            r"e\.parquet: not readable as one Parquet file.*write it again",
        ),
        ("e.csv", b"PAR1\x15\x04\xc0", r"e\.csv: is a Parquet file; name it \.parquet"),
        ("e.csv", b"user_id,\xe9,timestamp\n", r"e\.csv: the names of the columns are no UTF-8 text"),
        ("e.csv", b"\n \nuser_id,item_id,timestamp\n1,2,3\n", r"e\.csv: begins with a blank line"),
        ("e.csv", b"", "is empty: it has no line with the names"),
        ("e.csv", b"1,52,3,buy,1700633533\n", r"column user_id: .*the first line must hold the names of the"),
        ("e.csv", "user_id,item_id,timestamp\n".encode("utf-16"), "is UTF-16 text; save it as UTF-8"),
        ("e.csv", b"user_id,item_id,timestamp\n", r"e\.csv: has no rows"),
        (
            "e.csv",
            b"user_id,item_id,timestamp\n1,2,3\n4,5\n",
            r"e\.csv: line 3: 2 cells, but the header has 3",
        ),
        ("e.csv", b"user_id,item_id,timestamp\n1,2,3,4\n", r"e\.csv: line 2: 4 cells, but the header has 3"),
        ("e.csv", b"user_id,item_id,timestamp\n1,\xff,3\n", r"e\.csv: after line 1: no UTF-8 text"),
        ("e.csv", b'user_id,item_id,timestamp\n1,"2,3\n', r"e\.csv: after line 1: unexpected end of data"),
        ("e.csv.gz", b"no gzip", r"e\.csv\.gz: not readable as one CSV file"),
    ],
)
def test_a_file_that_cannot_be_read_is_explained(
    name: str, content: bytes, message: str, door: Door, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        door.events(tmp_path / name)


def test_a_fault_of_all_files_names_more_than_the_first(door: Door, tmp_path: Path) -> None:
    good = parquet(tmp_path / "0.parquet")
    bad = parquet(tmp_path / "1.parquet", item_id=[1, None, 3])
    with pytest.raises(DataError, match=r"0\.parquet and 1 more files: column item_id: null in 1 of 6 rows"):
        door.events([good, bad])


def test_all_problems_of_all_files_come_at_once(door: Door, tmp_path: Path) -> None:
    first = parquet(tmp_path / "0.parquet", user_id=[[1], [2], [3]], cat=[1, 2, 3])
    second = parquet(
        tmp_path / "1.parquet", user_id=[1, 2, 3], cat=["a", "b", "c"], item_id=[b"a", b"b", b"c"]
    )
    with pytest.raises(DataError) as caught:
        door.events([first, second], features=[{"name": "cat"}, {"name": "nope"}])
    told = str(caught.value)
    assert told.startswith("5 problems: (1) ")
    for problem in (
        "0.parquet: column user_id: type is list<",
        "1.parquet: column item_id: type is binary",
        f"1.parquet: column cat: holds text (string), but {first} holds integers (int64)",
        "0.parquet: column nope: no such column",
        "1.parquet: column nope: no such column",
    ):
        assert problem in told
    (tmp_path / "bad.csv").write_bytes(b"")
    (tmp_path / "worse.csv").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match=r"2 problems: .*bad\.csv: is empty.*worse\.csv: is UTF-16"):
        door.events(f"{tmp_path}/*.csv")


@pytest.mark.parametrize("sign", ["::", '"', "\n"])
def test_a_delimiter_is_one_sign(sign: str) -> None:
    with pytest.raises(ValueError, match=r"delimiter[^$]*is one sign.*write the files anew"):
        CsvConfig(delimiter=sign)


def test_a_relative_path_that_is_not_there_names_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        DataError, match=rf"items\.parquet: no such file in {tmp_path}; name a Parquet or CSV"
    ):
        find_files("items.parquet", "item table")
    with pytest.raises(DataError, match=r"items\.parquet: no such file; name"):
        find_files(tmp_path / "items.parquet", "item table")
