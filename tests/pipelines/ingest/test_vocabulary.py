"""A log with an older log's ids: known values keep theirs, new ones are unknown or appended."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embeddings.errors import ConfigError, DataError
from launch.cli import main
from pipelines.ingest.config import load_ingest_config
from pipelines.ingest.ingest import ingest, report_lines
from tests.helpers.rawlogs import (
    DAY,
    EVENT,
    SHOWN,
    START,
    Log,
    Row,
    config,
    events,
    ids_of_values,
    impressions,
    rows,
    write,
)
from trainer.log.schema import FeatureInfo, LogManifest, read_manifest

pytestmark = pytest.mark.filterwarnings("ignore:fetch_arrow_table:DeprecationWarning")
RAW = {"category_id": "category", "context_city": "city", "context_page": "page"}


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Log(tmp_path_factory.mktemp("old"), "impressions", 0).folder


def infos(manifest: LogManifest) -> dict[str, FeatureInfo]:
    return manifest.features | {f"context_{name}": info for name, info in manifest.context.items()}


def values(log: Path, name: str) -> list[Any]:
    """In the order of their ids."""
    return sorted(ids_of_values(log, name), key=ids_of_values(log, name).__getitem__)


def raw_values(log: Log, name: str) -> Counter[Any]:
    found = [row[RAW.get(name, name)] for row in (*log.raw, *log.raw_shown) if RAW.get(name, name) in row]
    flat = [one for value in found for one in (value or [])] if name == "tags" else found
    return Counter(one for one in flat if one is not None)


@settings(max_examples=3, deadline=None)
@given(seed=st.integers(0, 10_000), extend=st.booleans())
def test_known_values_keep_their_ids(
    old: Path, seed: int, extend: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    vocabulary = {"log": str(old), "extend": extend}
    log = Log(tmp_path_factory.mktemp("new"), "impressions", seed, renewed=True, vocabulary=vocabulary)
    before, after = infos(read_manifest(old)), infos(log.manifest)
    assert before.keys() == after.keys()
    for name, info in after.items():
        theirs, counts = values(old, name), raw_values(log, name)
        new = {value: count for value, count in counts.items() if value not in theirs}
        expected = [*theirs, *(sorted(new) if extend else [])]
        assert values(log.folder, name) == expected and info.rows == len(expected) + 1
        text = "".join(f"{value}\n" for value in expected)
        assert info.vocabulary == hashlib.sha256(text.encode()).hexdigest()
        assert extend or info == before[name]
        told = {"values": len(new), "occurrences": sum(new.values())}
        assert log.manifest.report["new_values"][name] == told
    assert log.manifest.report["new_values"]["item_id"]["values"] > 0
    # Log.words are the new log's: what it does not have is 0, or no member of a list.
    log.check_histories()
    names = ("candidate_item_id", "candidate_slot", "label_click", "label_buy", "numeric_price")
    source = ("item_id", "slot", "click", "buy", "price")
    for key, request in log.requests().items():
        shown = [row for row in log.shown if (row["user_id"], row["request"]) == key]
        assert Counter(zip(*(request[name] for name in names), strict=True)) == Counter(
            tuple(row[name] for name in source) for row in shown
        )
        assert request["context_page"] == max(row["context_page"] for row in shown)


def test_an_unknown_item_is_forgotten_only_when_written(tmp_path: Path) -> None:
    first = Log(tmp_path, "time-split", 1)
    shutil.move(first.folder, tmp_path / "old")
    made = {}
    for extend in (False, True):
        changes = {
            "vocabulary": {"log": str(tmp_path / "old"), "extend": extend},
            "files": {"layout": "request"},
        }
        made[extend] = Log(tmp_path, "time-split", 2, renewed=True, **changes)
    limit = first.manifest.features["item_id"].rows
    assert made[True].manifest.features["item_id"].rows > limit
    assert len(made[True].rows) == len(made[False].rows) > 0
    dropped = made[False].manifest.report["dropped"]
    assert dropped == made[True].manifest.report["dropped"]
    for some, every in zip(made[False].rows, made[True].rows, strict=True):
        for name in ("history_timestamp", "request_id", "label_click"):
            assert some[name] == every[name]
        assert some["history_item_id"] == [i if i < limit else 0 for i in every["history_item_id"]]
        clipped = [[i if i < limit else 0 for i in one] for one in every["candidate_item_id"]]
        assert some["candidate_item_id"] == clipped
    assert 0 in {i for row in made[False].rows for one in row["candidate_item_id"] for i in one}


def test_unknown_items_have_attributes_of_their_own(old: Path, tmp_path: Path) -> None:
    empty: Row = dict.fromkeys(EVENT)
    raw = [
        empty | {"user_id": 1, "item_id": 1 + i, "timestamp": START, "category": f"c{i}"} for i in (0, 1, 3)
    ]
    shown = [row | {"user_id": 1, "request": 1, "timestamp": START + DAY} for row in impressions()[:3]]
    shown = [row | {"item_id": 1 + i} for row, i in zip(shown, (0, 1, 3), strict=True)]
    plan = config("impressions", vocabulary={"log": str(old)})
    source, given = write(tmp_path / "e.parquet", raw), write(tmp_path / "i.parquet", shown, SHOWN)
    manifest = ingest(source, tmp_path / "log", plan, impressions=given)
    (row,) = rows(tmp_path / "log")
    known = ids_of_values(old, "category_id")
    assert row["candidate_item_id"] == [[0, 0, 0]] and row["history_item_id"] == [0, 0, 0]
    assert sorted(row["candidate_category_id"][0]) == sorted(known[f"c{i}"] for i in (0, 1, 3))
    line = f"item_id: 3 values in 6 places unknown to the vocabulary of {old}"
    assert line in report_lines(manifest)


def test_an_extended_log_is_extended_again_in_place(tmp_path: Path) -> None:
    raw = [row | {"item_id": str(row["item_id"])} for row in events(3)]
    log, path = tmp_path / "log", tmp_path / "e.csv"
    names = ("user_id", "item_id", "timestamp", "category")
    (tmp_path / "c.toml").write_text(
        'protocol = "time-split"\n[events]\ntaxonomy = ["category"]\n[requests]\nmin_history = 1\n'
        '[split]\nvalidation = 2017-01-06\ntest = 2017-01-09\n[engine]\nmemory_limit = "500MB"\n'
    )
    given = ["ingest", "--events", str(path), "--config", str(tmp_path / "c.toml"), "--out", str(log)]
    seen: list[list[Any]] = []
    for day in range(3):
        part = [{**row, "item_id": f"9{2 - day}{row['item_id']}"} for row in raw] if day else raw
        lines = [",".join(str(row[name] or "") for name in names) for row in (*raw, *part)]
        path.write_text("\n".join([",".join(names), *lines]))
        more = ["--vocabulary", str(log), "--extend-vocabulary", "--overwrite"] if day else []
        assert main([*given, *more]) == 0
        seen.append(values(log, "item_id"))
    assert seen[2][: len(seen[1])] == seen[1] and seen[1][: len(seen[0])] == seen[0]
    assert len(seen[2]) == len(set(seen[2])) == 3 * len(seen[0])


def sign(log: Path, change: Callable[[dict[str, Any]], None]) -> None:
    tree = json.loads((log / "manifest.json").read_text())
    change(tree)
    text = json.dumps(tree)
    (log / "manifest.json").write_text(text)
    (log / "manifest.sha256").write_text(hashlib.sha256(text.encode()).hexdigest())


def rewrite(log: Path, name: str, change: Callable[[pa.Table], pa.Table], signed: bool = False) -> None:
    path = log / "vocab" / f"{name}.parquet"
    table = change(pq.read_table(path))
    pq.write_table(table, path)
    if signed:
        text = "".join(f"{value}\n" for value in table["value"].to_pylist())
        info = {"vocabulary": hashlib.sha256(text.encode()).hexdigest(), "rows": table.num_rows + 1}
        sign(log, lambda tree: tree["features"][name].update(info))


def of_value(table: pa.Table, values: list[Any]) -> pa.Table:
    return table.set_column(0, "value", pa.array(values, table["value"].type))


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no log": (lambda log: (log / "manifest.json").unlink(), r"manifest\.json: .*not a sequence log"),
    "manifest": (
        lambda log: (log / "manifest.json").write_text("{}"),
        r"manifest\.json: does not match manifest\.sha256",
    ),
    "missing": (lambda log: (log / "vocab/tags.parquet").unlink(), r"vocab/tags\.parquet: missing, so"),
    "cut": (
        lambda log: (log / "vocab/tags.parquet").write_bytes(b"PAR1"),
        r"vocab/tags\.parquet: unreadable",
    ),
    "columns": (
        lambda log: rewrite(log, "tags", lambda table: table.rename_columns(["word", "id", "count"])),
        r"vocab/tags\.parquet: has the columns word, id, count",
    ),
    "swapped": (
        lambda log: rewrite(log, "tags", lambda table: of_value(table, table["value"].to_pylist()[::-1])),
        r"vocab/tags\.parquet: is not the vocabulary in the log's manifest.*take another copy",
    ),
    "shorter": (lambda log: rewrite(log, "tags", lambda table: table[:-1]), "is not the vocabulary"),
    "ids": (lambda log: rewrite(log, "tags", lambda table: table[::-1]), "ids do not count from 1"),
    "twice": (
        lambda log: rewrite(log, "tags", lambda table: of_value(table, ["x"] * len(table)), signed=True),
        "has a value twice",
    ),
    "unsigned": (
        lambda log: sign(log, lambda tree: tree["features"]["tags"].update(vocabulary="")),
        r"has no digest of this vocabulary.*name a log that",
    ),
    "type": (
        lambda log: rewrite(
            log,
            "item_id",
            lambda table: table.set_column(0, "value", table["value"].cast("string")),
            signed=True,
        ),
        r"vocab/item_id\.parquet: column value: holds text, the raw tables hold integers; cast item_id",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_older_log_is_refused(old: Path, case: str, tmp_path: Path) -> None:
    damage, message = DAMAGE[case]
    shutil.copytree(old, tmp_path / "old")
    damage(tmp_path / "old")
    source = write(tmp_path / "e.parquet", events())
    given = write(tmp_path / "i.parquet", impressions(), SHOWN)
    plan = config("impressions", vocabulary={"log": str(tmp_path / "old")})
    with pytest.raises(DataError, match=message):
        ingest(source, tmp_path / "log", plan, impressions=given)
    assert not (tmp_path / "log").exists()


TAGS, ACTION = {"name": "tags", "multi": True}, {"name": "action", "side": "history"}
SLOT = {"name": "slot", "side": "candidate"}
CITY, PAGE = {"name": "city", "table": "events"}, {"name": "page"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"features": [ACTION, SLOT]},
            r"has the feature 'tags', which this config does not ingest; ingest with",
        ),
        (
            {"features": [TAGS, ACTION, SLOT, {"name": "brand"}]},
            "lacks the feature 'brand', which this config",
        ),
        ({"context": [CITY]}, "has the context 'page', which this config does not ingest"),
        ({"context": [CITY, PAGE, {"name": "site"}]}, "lacks the context 'site'"),
        (
            {"features": [{"name": "tags"}, ACTION, SLOT]},
            "'tags' as multi-valued .*, this config as single-v",
        ),
        (
            {"features": [TAGS, {"name": "action"}, SLOT]},
            r"'action' as .*side 'history'\), .* \(side 'both'\)",
        ),
    ],
)
def test_other_features_than_the_older_log_has_are_refused(
    old: Path, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    plan = config("impressions", **changes, vocabulary={"log": str(old)})
    source = write(tmp_path / "e.parquet", events())
    with pytest.raises(DataError, match=rf"manifest\.json: .*{message}"):
        ingest(source, tmp_path / "log", plan, impressions=source)


def test_extending_nothing_is_refused(tmp_path: Path) -> None:
    ready = Path(__file__).parents[3] / "configs" / "ingest_leave_last.toml"
    with pytest.raises(ConfigError, match=r"extend needs an older log: give vocabulary\.log"):
        load_ingest_config(ready, ["vocabulary.extend=true"])
