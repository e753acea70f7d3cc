"""`tandemrec windows`: a log becomes a stream, and a log of what lies before."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest

from embeddings.errors import ConfigError
from pipelines import windows as job
from pipelines.windows import WINDOWS, WindowOptions, second_of, seconds_of, window_name, windows
from tests.helpers.logs import Row, small_log
from trainer.data.rows import Columns, read_rows
from trainer.log.schema import read_manifest

SPLITS = ("train", "validation", "test")


def rows_of(log: Path, split: str) -> list[Row]:
    return [
        row for file in sorted((log / split).glob("*.parquet")) for row in pq.read_table(file).to_pylist()
    ]


def names_of(rows: list[Row]) -> list[tuple[int, int, int]]:
    """User, request and time of each request."""
    return [
        (row["user_id"], request, time)
        for row in rows
        for request, time in zip(row["request_id"], row["request_timestamp"], strict=True)
    ]


def test_windows_and_the_log_before_hold_each_request_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(job, "_BUFFER", 100)  # so that rows of a window wait in several files
    log, stream, before = small_log(tmp_path / "log"), tmp_path / "stream", tmp_path / "before"
    options = WindowOptions(every=20, first=50, splits=("train", "test"))
    manifest = windows(log, stream, options, before)
    assert read_manifest(stream) == manifest
    assert manifest.splits == {} and manifest.features == read_manifest(log).features
    assert manifest.ingest["windows"]["first"] == 50
    source = [name for split in options.splits for name in names_of(rows_of(log, split))]
    found = names_of([row for split in options.splits for row in rows_of(before, split)])
    assert all(time < 50 for _, _, time in found) and found
    assert not read_manifest(before).splits["validation"].files
    for file in sorted((stream / WINDOWS).iterdir()):
        begin = int(datetime.strptime(file.stem, "%Y%m%dT%H%M%S").replace(tzinfo=UTC).timestamp())
        footer = pq.read_metadata(file)
        for group in range(footer.num_row_groups):  # as the trainer reads and checks them
            read_rows(file, group, Columns.of(manifest), footer)
        here = names_of(pq.read_table(file).to_pylist())
        assert here and all(begin <= time < begin + 20 for _, _, time in here)
        found += here
    assert sorted(found) == sorted(source)
    assert "requests before the first window (train" in capsys.readouterr().out


def test_the_same_log_gives_the_same_bytes(tmp_path: Path) -> None:
    log, options = small_log(tmp_path / "log"), WindowOptions(every=30)
    for name in ("one", "two"):
        windows(log, tmp_path / name, options)
    first, second = (
        {f.name: f.read_bytes() for f in (tmp_path / n / WINDOWS).iterdir()} for n in ("one", "two")
    )
    assert first == second and len(first) > 2
    assert min(first) == "19700101T000000.parquet"  # the oldest request's time, rounded down


def test_with_a_pace_windows_appear_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    stream = tmp_path / "stream"

    def sleep(_: float) -> None:
        seen.append(sorted(file.name for file in (stream / WINDOWS).iterdir()))

    # The name in this module alone: threads of other libraries sleep, too.
    monkeypatch.setattr(job, "time", SimpleNamespace(sleep=sleep))
    windows(small_log(tmp_path / "log"), stream, WindowOptions(every=30, pace=1.0))
    there = sorted(file.name for file in (stream / WINDOWS).iterdir())
    assert seen == [there[:count] for count in range(1, len(there))]
    assert sorted(path.name for path in stream.iterdir()) == [
        "manifest.json",
        "manifest.sha256",
        "vocab",
        "windows",
    ]


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (WindowOptions(every=20, splits=("trian",)), "--splits trian: no such split"),
        (WindowOptions(every=20, first=10**9), "--from"),
    ],
)
def test_what_cannot_be_cut_is_refused(tmp_path: Path, options: WindowOptions, word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        windows(small_log(tmp_path / "log"), tmp_path / "stream", options)
    assert not (tmp_path / "stream").exists()


def test_times() -> None:
    assert [seconds_of(text, "--every") for text in ("1d", "6h", "30m", "90s")] == [86_400, 21_600, 1_800, 90]
    assert second_of("1970-01-02", "--from") == 86_400
    assert second_of("1970-01-01T02:00:00+01:00", "--from") == 3_600
    assert window_name(1_512_086_400) == "20171201T000000.parquet"
    for wrong in ("", "1", "0d", "1w"):
        with pytest.raises(ConfigError, match="--every"):
            seconds_of(wrong, "--every")
    with pytest.raises(ConfigError, match="--from"):
        second_of("yesterday", "--from")
