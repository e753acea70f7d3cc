"""Bad logs: one clear error that names file, row group, column and row; nothing silently wrong."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embeddings.errors import DataError
from tests.helpers.logs import FEATURES, Row, manifest_of, random_rows, write_log
from trainer.config.sections import DataConfig
from trainer.data.reader import SequenceLogReader
from trainer.data.row_group import FeatureIds
from trainer.data.rows import Columns, UserRows, read_rows
from trainer.log.bags import Bags
from trainer.log.schema import schema_of

COLUMNS = Columns.of(manifest_of())


def good_rows() -> list[Row]:
    rows = random_rows(11)
    wanted = [row for row in rows if row["num_behaviors"] > 5 and max(row["request_history_end"]) > 2]
    return wanted[:4]


def write(path: Path, rows: list[Row]) -> Path:
    table = pa.Table.from_pylist(rows, schema=schema_of(manifest_of()))
    pq.write_table(table, path, row_group_size=2, write_page_checksum=True)
    return path


def broken(**change: object) -> list[Row]:
    rows = good_rows()
    rows[3] = {**rows[3], **change}
    return rows


def fails(path: Path, rows: list[Row], column: str, text: str, row: int | None = 1) -> None:
    with pytest.raises(DataError, match=text) as caught:
        read_rows(write(path, rows), 1, COLUMNS)
    error = caught.value
    assert (error.file, error.row_group, error.column) == (str(path), 1, column)
    if row is not None:
        assert error.row == row


@pytest.mark.parametrize("bad", [-1, 60, 2**63 - 1])
def test_ids_outside_the_table(tmp_path: Path, bad: int) -> None:
    history = good_rows()[3]["history_item_id"]
    fails(
        tmp_path / "a",
        broken(history_item_id=[*history[:-1], bad]),
        "history_item_id",
        f"id {bad} lies outside",
    )
    candidates = [list(part) for part in good_rows()[3]["candidate_item_id"]]
    candidates[0][0] = bad
    fails(
        tmp_path / "b",
        broken(candidate_item_id=candidates),
        "candidate_item_id",
        f"id {bad} lies outside",
        None,
    )


def test_history_out_of_order(tmp_path: Path) -> None:
    times = good_rows()[3]["history_timestamp"]
    times = [times[-1] + 1, *times[1:]]
    fails(tmp_path / "a", broken(history_timestamp=times), "history_timestamp", "not in time order")


def test_a_request_that_could_see_itself(tmp_path: Path) -> None:
    row = good_rows()[3]
    ends, times = list(row["request_history_end"]), list(row["request_timestamp"])
    at = int(np.argmax(ends))
    times[at] = row["history_timestamp"][ends[at] - 1]
    fails(tmp_path / "a", broken(request_timestamp=times), "request_history_end", "at or after its own time")


@pytest.mark.parametrize("end", [-1, 10_000])
def test_history_end_outside_the_history(tmp_path: Path, end: int) -> None:
    ends = [end, *good_rows()[3]["request_history_end"][1:]]
    fails(tmp_path / "a", broken(request_history_end=ends), "request_history_end", "outside the history")


def test_lists_of_unequal_length(tmp_path: Path) -> None:
    short = good_rows()[3]["history_category_id"][:-1]
    fails(tmp_path / "a", broken(history_category_id=short), "history_category_id", "differ in length")
    labels = [[*part, 1.0] for part in good_rows()[3]["label_click"]]
    fails(tmp_path / "b", broken(label_click=labels), "label_click", "differ in length", None)


def test_labels_that_are_not_numbers(tmp_path: Path) -> None:
    labels = [[float("nan")] * len(part) for part in good_rows()[3]["label_click"]]
    fails(tmp_path / "a", broken(label_click=labels), "label_click", "NaN", None)


@pytest.mark.parametrize("bad", [-1.0, 1.5, 4.0])
def test_labels_outside_0_to_1(tmp_path: Path, bad: float) -> None:
    labels = [[bad, *part[1:]] for part in good_rows()[3]["label_click"]]
    fails(tmp_path / "a", broken(label_click=labels), "label_click", "and a label is 0 to 1; ingest", None)


def test_missing_column_wrong_type_and_null(tmp_path: Path) -> None:
    table = pa.Table.from_pylist(good_rows(), schema=schema_of(manifest_of()))
    pq.write_table(table.drop_columns(["history_item_id"]), tmp_path / "a")
    with pytest.raises(DataError, match="column history_item_id: no such column"):
        read_rows(tmp_path / "a", 0, COLUMNS)
    text = pa.array([[str(x) for x in row["history_item_id"]] for row in good_rows()])
    at = table.schema.get_field_index("history_item_id")
    pq.write_table(table.set_column(at, "history_item_id", text), tmp_path / "b")
    with pytest.raises(DataError, match="history_item_id: has type string"):
        read_rows(tmp_path / "b", 0, COLUMNS)
    null = pa.array([None, *(row["history_item_id"] for row in good_rows()[1:])], pa.list_(pa.int64()))
    pq.write_table(table.set_column(at, "history_item_id", null), tmp_path / "c")
    with pytest.raises(DataError, match="history_item_id: holds nulls"):
        read_rows(tmp_path / "c", 0, COLUMNS)


def test_missing_empty_and_truncated_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        read_rows(tmp_path / "none", 0, COLUMNS)
    whole = write(tmp_path / "whole", good_rows()).read_bytes()
    for name, content in {"empty": b"", "half": whole[: len(whole) // 2]}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=f"{name}.*unreadable"):
            read_rows(tmp_path / name, 0, COLUMNS)


def same(a: UserRows, b: UserRows) -> bool:
    parts = ("user_id", "history_offsets", "request_offsets", "history_time", "request_id", "request_time")
    more = ("history_end", "candidate_offsets", "labels")
    plain = all(np.array_equal(getattr(a, name), getattr(b, name)) for name in parts + more)
    return plain and all(
        np.array_equal(x[f].values, y[f].values)
        for f in FEATURES
        for x, y in [(a.history, b.history), (a.candidates, b.candidates)]
    )


def test_a_flipped_bit_is_an_error_or_changes_nothing(tmp_path: Path) -> None:
    path = write(tmp_path / "log.parquet", good_rows())
    content, rng = path.read_bytes(), np.random.default_rng(0)
    truth = [read_rows(path, group, COLUMNS) for group in range(2)]
    refused = 0
    for position in rng.choice(len(content) * 8, 300, replace=False):
        flipped = bytearray(content)
        flipped[position // 8] ^= 1 << (position % 8)
        path.write_bytes(flipped)
        try:
            assert all(same(read_rows(path, group, COLUMNS), truth[group]) for group in range(2)), position
        except DataError:
            refused += 1
    assert refused > 100


def test_a_file_that_differs_from_the_manifest(tmp_path: Path) -> None:
    log = write_log(tmp_path / "log", {"train": random_rows(1)})
    file = next((log / "train").glob("*.parquet"))
    pq.write_table(pq.read_table(file).slice(1), file)
    with pytest.raises(DataError, match=f"{file.name}: does not match its SHA-256"):
        SequenceLogReader(DataConfig(log=log), "train", FEATURES)
    with pytest.raises(DataError, match=r"holds \d+ rows, the manifest says \d+"):
        SequenceLogReader(DataConfig(log=log, verify=False), "train", FEATURES)


def test_1000_flipped_bits_over_a_log_are_all_detected(tmp_path: Path) -> None:
    log = write_log(tmp_path / "log", {"train": random_rows(1)})
    files = [*sorted((log / "train").iterdir()), log / "manifest.json", log / "manifest.sha256"]
    rng = np.random.default_rng(0)
    for _ in range(1000):
        file = files[rng.integers(len(files))]
        content = file.read_bytes()
        flipped = bytearray(content)
        flipped[rng.integers(len(content))] ^= 1 << int(rng.integers(8))
        file.write_bytes(flipped)
        with pytest.raises(DataError, match=str(log)):
            SequenceLogReader(DataConfig(log=log), "train", FEATURES)
        file.write_bytes(content)
    assert SequenceLogReader(DataConfig(log=log), "train", FEATURES).row_groups


def test_bad_row_groups_are_skipped_up_to_a_cap_and_reported(tmp_path: Path) -> None:
    rows = random_rows(2)
    rows[7]["history_item_id"] = [61] * rows[7]["num_behaviors"]
    log = write_log(tmp_path / "log", {"train": rows})
    allowed = DataConfig(log=log, on_bad="skip", max_bad=0.3, prefetch=0)
    reader = SequenceLogReader(allowed, "train", FEATURES)
    assert len(reader.row_groups) == 3
    assert [(error.row_group, error.column) for error in reader.skipped] == [(0, "history_item_id")]
    read = {int(user) for step in reader.steps() for user in step.batch.user_id}
    assert read == {row["user_id"] for row in rows} - {6, 7, 8}
    with pytest.raises(DataError, match=r"1 of 4 row groups are bad, data.max_bad allows 0.10%; id 61"):
        SequenceLogReader(DataConfig(log=log, on_bad="skip"), "train", FEATURES)
    with pytest.raises(DataError, match="id 61 lies outside"):
        list(SequenceLogReader(DataConfig(log=log), "train", FEATURES).steps())
    # Two ranks try half of the row groups each, and agree.
    shared = SequenceLogReader(
        allowed,
        "train",
        FEATURES,
        rank=1,
        world_size=2,
        share=lambda mine: [max(a, b) for a, b in zip(mine, [0, 0, 1, 0], strict=True)],
    )
    assert shared.row_groups == reader.row_groups and not shared.skipped
    assert shared.order == reader.order, "a position means other rows on each rank"


def test_rows_made_of_counts_are_those_of_a_file(tmp_path: Path) -> None:
    read = read_rows(write(tmp_path / "a", good_rows()), 1, COLUMNS)
    total = int(read.candidate_offsets[-1])
    rows = UserRows.of_counts(
        np.diff(read.history_offsets),
        np.diff(read.request_offsets),
        np.diff(read.candidate_offsets),
        **{
            name: getattr(read, name)
            for name in ("user_id", "history", "history_time", "request_time", "history_end", "candidates")
        },
        labels=read.labels,
    )
    for name in ("history_offsets", "request_offsets", "candidate_offsets", "weight", "numeric"):
        np.testing.assert_array_equal(getattr(rows, name), getattr(read, name), err_msg=name)
    assert rows.weight.shape == (total,) and rows.numeric.shape == (total, 0) and not rows.context
    assert rows.request_id.tolist() == list(range(read.request_id.size))


def test_a_part_of_bags_is_a_copy_with_the_same_ids() -> None:
    ids = np.arange(10, dtype=np.int32)
    bags = Bags.of_lengths(ids, [2, 0, 3, 5])
    assert (bags.size, bags.lengths.tolist(), Bags(ids).size) == (4, [2, 0, 3, 5], 10)
    part = bags.part(slice(1, 3))
    assert (part.values.tolist(), part.lengths.tolist()) == ([2, 3, 4], [0, 3])
    for features in (FeatureIds(["a"], ids[None], {}), FeatureIds([], ids[:0][None], {"a": bags})):
        part = features["a"].part(slice(0, 2))
        assert part.values.dtype == np.int64 and not np.shares_memory(part.values, ids)
        assert "a" in features and "b" not in features
    assert Bags.of_lengths(ids[:0], []).size == 0
