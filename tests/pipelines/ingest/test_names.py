"""Users and requests may be text, and tables that say no types agree with those that do."""

from __future__ import annotations

import csv
import gzip
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from embeddings.errors import DataError
from launch.cli import main
from pipelines.ingest.config import IngestConfig
from pipelines.ingest.ingest import ingest, preview, report_lines
from tests.helpers.rawlogs import (
    DAY,
    EVENT,
    SHOWN,
    START,
    Row,
    as_parquet,
    config,
    events,
    ids_of_values,
    impressions,
    rows,
    write,
)
from trainer.log.schema import LogManifest, read_manifest

pytestmark = pytest.mark.filterwarnings("ignore:fetch_arrow_table:DeprecationWarning")
SEPARATED: dict[str, Any] = {
    "features": [
        {"name": "action", "side": "history"},
        {"name": "tags", "multi": True, "separator": "|"},
        {"name": "slot", "side": "candidate"},
    ]
}
Cell = Callable[[Any], str]


def spelled(value: Any) -> str:
    if isinstance(value, list):
        return "|".join(one for one in value if one)
    return "" if value is None else str(value)


def as_text(
    path: Path, raw: Sequence[Row], names: Sequence[str], sign: str = ",", cell: Cell = spelled
) -> Path:
    opener = gzip.open if path.suffix == ".gz" else open
    path.parent.mkdir(exist_ok=True)
    with opener(path, "wt", newline="", encoding="utf-8") as file:
        lines = csv.writer(file, delimiter=sign)
        lines.writerow(names)
        lines.writerows([cell(row[name]) for name in names] for row in raw)
    return path


def with_text(raw: Sequence[Row], **names: str) -> list[Row]:
    return [row | {name: f"{prefix}{row[name]}" for name, prefix in names.items()} for row in raw]


def test_every_format_gives_the_same_log(tmp_path: Path) -> None:
    raw, shown = events(), impressions()
    plan = config("impressions", **SEPARATED)
    parts = [as_text(tmp_path / f"e{place}.csv.gz", raw[place::2], EVENT) for place in (0, 1)]
    half = len(shown) // 2
    turned = [*reversed(SHOWN)]
    (tmp_path / "shown").mkdir()
    numbers = as_text(tmp_path / "i.csv", shown, SHOWN, cell=lambda value: spelled(value).lower())
    as_text(tmp_path / "shown" / "a.tsv", shown[:half], SHOWN, "\t")
    as_text(tmp_path / "shown" / "b.csv.gz", shown[half:], turned, ";")
    parquet = ingest(
        write(tmp_path / "e.parquet", raw),
        tmp_path / "parquet",
        config("impressions"),
        impressions=write(tmp_path / "i.parquet", shown, SHOWN),
    )
    labels = {row["label_buy"][0][0] for row in rows(tmp_path / "parquet")}
    assert labels == {0.0, 1.0}
    for place, (given, asked) in enumerate(((parts, numbers), (f"{tmp_path}/e*.gz", tmp_path / "shown"))):
        made = ingest(given, tmp_path / str(place), plan, impressions=asked)
        assert made.splits == parquet.splits and made.features == parquet.features
        assert made.report == parquet.report


@pytest.mark.parametrize("protocol", ["next-basket", "leave-last"])
def test_every_protocol_reads_text(protocol: str, tmp_path: Path) -> None:
    raw = events()
    plan = config(protocol, features=[SEPARATED["features"][1]])
    given = as_text(tmp_path / "e.tsv.gz", raw, EVENT, "\t")
    parquet = write(tmp_path / "e.parquet", raw)
    like = config(protocol, features=[{"name": "tags", "multi": True}])
    made = [ingest(given, tmp_path / "text", plan), ingest(parquet, tmp_path / "parquet", like)]
    assert made[0].splits == made[1].splits and made[0].report == made[1].report


def test_users_and_requests_of_text_are_numbered_in_their_order(tmp_path: Path) -> None:
    raw, shown = events(), impressions()
    plain = ingest(
        write(tmp_path / "e.parquet", raw),
        tmp_path / "plain",
        config("impressions"),
        impressions=write(tmp_path / "i.parquet", shown, SHOWN),
    )
    assert plain.named == {} and not (tmp_path / "plain" / "vocab" / "user_id.parquet").exists()
    named, asked = with_text(raw, user_id="u"), with_text(shown, user_id="u", request="s")
    manifest = ingest(
        as_text(tmp_path / "e.csv", named, EVENT),
        tmp_path / "log",
        config("impressions", **SEPARATED),
        impressions=as_text(tmp_path / "i.csv", asked, SHOWN),
    )
    users, requests = (
        ids_of_values(tmp_path / "log", "user_id"),
        ids_of_values(tmp_path / "log", "request_id"),
    )
    assert users == {f"u{user}": user for user in range(1, 8)}
    assert requests == {f"s{request}": request + 1 for request in range(6)}
    assert {name: info.rows for name, info in manifest.named.items()} == {"user_id": 8, "request_id": 7}
    assert read_manifest(tmp_path / "log") == manifest

    def histories(log: str, less: int) -> dict[tuple[int, int], Any]:
        return {
            (row["user_id"], request - less): (row["request_timestamp"][place], row["history_item_id"])
            for row in rows(tmp_path / log)
            for place, request in enumerate(row["request_id"])
        }

    assert {key: value[0] for key, value in histories("log", 1).items()} == {
        key: value[0] for key, value in histories("plain", 0).items()
    }
    assert manifest.report == plain.report


def next_days(
    log: str, tmp_path: Path, raw: Sequence[Row], names: Sequence[str], **changes: Any
) -> LogManifest:
    source = as_text(tmp_path / "e.csv", raw, names)
    return ingest(source, tmp_path / log, small(**changes), overwrite=True)


def small(**changes: Any) -> IngestConfig:
    return config("time-split", features=[], context=[], **changes)


NAMES = ("user_id", "item_id", "timestamp", "category")


def test_numbers_of_users_go_on_from_an_older_log(tmp_path: Path) -> None:
    raw = events()
    next_days("old", tmp_path, with_text(raw, user_id="u"), NAMES)
    vocabulary = {"vocabulary": {"log": str(tmp_path / "old")}}
    new = with_text(raw, user_id="t") + with_text(raw[::2], user_id="u")
    manifest = next_days("new", tmp_path, new, NAMES, **vocabulary)
    before, after = ids_of_values(tmp_path / "old", "user_id"), ids_of_values(tmp_path / "new", "user_id")
    assert list(after.values()) == list(range(1, len(after) + 1))
    assert after.items() >= before.items() and sorted(after)[: len(after) - len(before)] == [
        name for name in after if name not in before
    ]
    assert manifest.features == read_manifest(tmp_path / "old").features
    with pytest.raises(DataError, match=r"user_id\.parquet: column value: the older log's are text, the raw"):
        ingest(write(tmp_path / "e.parquet", raw), tmp_path / "x", small(**vocabulary))
    # All of these users look like numbers, and are text since those of the older log are.
    numbers = next_days("new", tmp_path, raw, NAMES, **vocabulary)
    assert numbers.named["user_id"].rows == 13
    assert "user_id of the events is text, as it is elsewhere" in report_lines(numbers)


def test_an_older_log_of_text_keeps_csv_text(tmp_path: Path) -> None:
    raw = events()
    old = next_days("old", tmp_path, [row | {"item_id": f"0{row['item_id']}"} for row in raw], NAMES)
    vocabulary = {"vocabulary": {"log": str(tmp_path / "old"), "extend": True}}
    new = next_days("new", tmp_path, raw, NAMES, **vocabulary)
    assert new.features["item_id"].rows == 2 * old.features["item_id"].rows - 1
    assert {type(value) for value in ids_of_values(tmp_path / "new", "item_id")} == {str}
    assert "users are text" not in " ".join(new.notes)
    shutil.rmtree(tmp_path / "old")
    next_days("old", tmp_path, raw, NAMES)
    named = next_days("new", tmp_path, with_text(raw, user_id="u"), NAMES, **vocabulary)
    assert "users are text here and integers in the older log" in " ".join(named.notes)
    with pytest.raises(
        DataError, match=r"item_id\.parquet: column value: holds integers, the raw tables hold text"
    ):
        next_days(
            "new", tmp_path, [row | {"item_id": f"0{row['item_id']}"} for row in raw], NAMES, **vocabulary
        )


def test_an_older_log_is_opened_by_its_exact_path(tmp_path: Path) -> None:
    for folder, shift in (("id=5[1]", 0), ("id=51", 500)):
        (tmp_path / folder).mkdir()
        next_days(
            f"{folder}/old", tmp_path, [row | {"item_id": row["item_id"] + shift} for row in events()], NAMES
        )
    vocabulary = {"vocabulary": {"log": str(tmp_path / "id=5[1]" / "old")}}
    manifest = next_days("new", tmp_path, events(), NAMES, **vocabulary)
    assert manifest.features == read_manifest(tmp_path / "id=5[1]" / "old").features
    assert ids_of_values(tmp_path / "new", "item_id") == ids_of_values(
        tmp_path / "id=5[1]" / "old", "item_id"
    )
    assert len({item for row in rows(tmp_path / "new") for item in row["history_item_id"]}) > 20


def test_impressions_of_csv_follow_the_events(tmp_path: Path) -> None:
    raw, shown = events(), impressions()
    items = [*range(1001, 1031)]
    plan = config("impressions", **SEPARATED)
    asked = as_text(tmp_path / "i.csv", shown, SHOWN)
    named = as_text(tmp_path / "e.csv", [*raw, raw[0] | {"item_id": "01001"}], EVENT)
    ingest(named, tmp_path / "log", plan, impressions=asked)
    assert set(map(str, items)) | {"01001"} <= set(ids_of_values(tmp_path / "log", "item_id"))
    told = as_parquet(tmp_path / "e.parquet", with_text(raw, item_id=""), EVENT[:4])
    small_plan = config("impressions", features=[], context=[])
    ingest(told, tmp_path / "log", small_plan, impressions=asked, overwrite=True)
    assert set(ids_of_values(tmp_path / "log", "item_id")) >= set(map(str, items))
    strict = write(tmp_path / "i.parquet", shown, SHOWN)
    with pytest.raises(DataError, match="item_id is string in the events and int64 in the impressions"):
        ingest(told, tmp_path / "log", small_plan, impressions=strict, overwrite=True)
    told = as_parquet(tmp_path / "e.parquet", with_text(raw, user_id="u"), EVENT[:4])
    with pytest.raises(DataError, match=r"user_id: text in the events and integers in the impressions"):
        ingest(told, tmp_path / "log", small_plan, impressions=strict, overwrite=True)


def test_ids_of_domains_keep_their_spelling(tmp_path: Path) -> None:
    for name, users in (("ads", ["7", "8"]), ("content", ["07", "7"])):
        lines = [f"{user},{item},{START + day * DAY},{kind}" for user in users for item, day, kind in EVENTS]
        (tmp_path / f"{name}[1].csv").write_text("\n".join(["user_id,item_id,timestamp,kind", *lines]))
    (tmp_path / "map?.csv").write_text("category;kind\none;1\nnull-one;01\n")
    domain = {"key": "kind", "mapping": str(tmp_path / "map?.csv")}
    tree: dict[str, Any] = {
        "protocol": "time-split",
        "events": {"taxonomy": ["category"]},
        "domains": [
            {"name": name, "files": [str(tmp_path / f"{name}[1].csv")], **domain}
            for name in ("ads", "content")
        ],
        "requests": {"min_history": 1, "negatives": 1, "exclude": "request"},
        "split": {"validation": "2017-01-06", "test": "2017-01-09"},
        "engine": {"threads": 1, "memory_limit": "500MB"},
    }
    ingest(None, tmp_path / "log", IngestConfig.model_validate(tree))
    assert set(ids_of_values(tmp_path / "log", "item_id")) == {
        f"{name}/{item}" for name in ("ads", "content") for item, _, _ in EVENTS
    }
    assert ids_of_values(tmp_path / "log", "category_id") == {"null-one": 1, "one": 2}
    assert ids_of_values(tmp_path / "log", "user_id") == {"07": 1, "7": 2, "8": 3}


EVENTS = [("01", 0, "01"), ("1", 1, "1"), ("1e0", 2, ""), ("5", 6, "1"), ("5", 9, "1")]


def test_preview_shows_every_column(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [f"u{place % 3},0{place % 9},2017-01-0{1 + place % 9}T00:00:00Z,x" for place in range(30)]
    (tmp_path / "e.csv").write_text("\n".join(["user_id,item_id,timestamp,note", *lines, "u1,7,2017-01-01,"]))
    (tmp_path / "c.toml").write_text(
        'protocol = "time-split"\n[split]\nvalidation = 2017-01-06\ntest = 2017-01-09\n'
    )
    given = ["ingest", "--events", str(tmp_path / "e.csv"), "--config", str(tmp_path / "c.toml")]
    assert main([*given, "--preview"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[0] == "raw events: 31 rows"
    day = "2017-01-0{} 00:00:00"
    assert [re.split(r"  +", line.strip()) for line in told[1:5]] == [
        ["column", "named by", "type", "read as", "nulls", "from", "to"],
        ["user_id", "events.user", "CSV", "text", "0", "'u0'", "'u2'"],
        ["timestamp", "events.timestamp", "CSV", "unix seconds", "0", day.format(1), day.format(9)],
        ["item_id", "events.item", "CSV", "text", "0", "'00'", "'7'"],
    ]
    assert told[5:] == [
        "raw events: item_id is read as text: "
        "30 cells such as '00' are no plain spelling of a 64-bit integer",
        "raw events: nothing uses the column note",
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.toml", "e.csv"]
    more = ["--set", 'text_columns=["item", "user_id"]', "--preview"]
    assert main([*given, *more]) == 0
    assert "text_columns names 'item', a column that no other setting names" in capsys.readouterr().out
    assert main(given) == 2
    assert "name the log to write with --out, or ask for --preview" in capsys.readouterr().err


def test_preview_shows_what_is_then_refused(tmp_path: Path) -> None:
    path = as_parquet(tmp_path / "e.parquet", [row | {"item_id": None} for row in events()], EVENT[:4])
    told: list[str] = []
    with pytest.raises(DataError, match="column item_id: null in"):
        preview(path, small(), told.append)
    (line,) = [line.split() for line in told if line.startswith("  item_id")]
    assert line[:4] == ["item_id", "events.item", "null", "text"]
