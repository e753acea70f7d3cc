"""The labels, sample weights and domains of tasks, from the log's columns to batches."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from embeddings.errors import ConfigError, DataError
from tests.helpers.logs import IN_PART, Row, enrich, manifest_of, observed_in_part, random_rows, write_log
from trainer.config.sections import DataConfig
from trainer.config.tasks import TaskConfig, resolve_tasks
from trainer.data.batch import RequestBatch, Sizes
from trainer.data.reader import SequenceLogReader
from trainer.data.rows import Columns, UserRows, read_rows
from trainer.log.schema import read_manifest, schema_of

# Tasks in another order than the labels, one label twice, masks over a task's own label and another's.
TASKS = resolve_tasks(
    {
        "bought": TaskConfig(label="buy"),
        "click": TaskConfig(),
        "bought_after_click": TaskConfig(label="buy", mask="click == 1"),
        "clicked_unsold": TaskConfig(label="click", mask="not buy == 1"),
    },
    ["click", "buy"],
)
Key = tuple[int, int, int]


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return observed_in_part(enrich(random_rows(21), 21), 21)


@pytest.fixture(scope="module")
def log(rows: list[Row], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("partial") / "log"
    return write_log(path, {"train": rows}, rich=True, **IN_PART)


def reference(rows: list[Row], domain: str) -> dict[Key, tuple[list[float | None], list[float], int]]:
    """(user, request, place) -> labels and weights of TASKS, and the domain, value by value."""
    found = {}
    for row in rows:
        for r, request in enumerate(row["request_id"]):
            for c in range(row["request_num_candidates"][r]):
                click, buy = row["label_click"][r][c], row["label_buy"][r][c]
                buy = None if buy is None or math.isnan(buy) else buy
                labels = [buy, click, buy if click == 1 else None, click if buy == 0 else None]
                own = row["weight_buy"][r][c]
                place = row["context_city"][r] if domain == "city" else row["candidate_band"][r][c]
                found[row["user_id"], request, c] = labels, [own, 1.0, own, 1.0], place
    return found


def by_key(batch: RequestBatch) -> dict[Key, tuple[list[float | None], list[float], int]]:
    assert batch.task_weight is not None and batch.domain is not None
    assert (
        batch.labels.dtype == batch.task_weight.dtype == torch.float32 and batch.domain.dtype == torch.int64
    )
    found: dict[Key, tuple[list[float | None], list[float], int]] = {}
    before, place = -1, 0
    for c, r in enumerate(batch.candidate_request.tolist()):
        place = place + 1 if r == before else 0
        before = r
        labels = [None if math.isnan(label) else label for label in batch.labels[c].tolist()]
        weights = batch.task_weight[c].tolist()
        found[int(batch.user_id[r]), int(batch.request_id[r]), place] = labels, weights, int(batch.domain[c])
    return found


@settings(max_examples=25, deadline=None)
@given(
    candidates=st.integers(1, 60),
    per_block=st.integers(1, 7),
    world=st.integers(1, 3),
    seed=st.sampled_from([None, 1]),
    domain=st.sampled_from(["city", "band"]),
)
def test_a_candidate_has_the_labels_of_its_tasks_in_any_batch_and_on_any_rank(
    log: Path, rows: list[Row], candidates: int, per_block: int, world: int, seed: int | None, domain: str
) -> None:
    sizes = {"batch_candidates": candidates, "requests_per_block": per_block}
    config = DataConfig(log=log, domain=domain, prefetch=0, workers=0, **sizes)
    found, observed = {}, [0] * len(TASKS)
    for rank in range(world):
        reader = SequenceLogReader(
            config, "train", {"item_id": 60}, tasks=TASKS, rank=rank, world_size=world, seed=seed
        )
        assert reader.columns.tasks == ["bought", "click", "bought_after_click", "clicked_unsold"]
        for step in reader.steps():
            # The domain has no table here, so that it is no feature of the batch.
            assert step.batch.features.keys() == ["item_id"] and step.batch.context is None
            assert step.batch.sizes == Sizes.of(step.batch)
            if step.counted:
                part = by_key(step.batch)
                assert not part.keys() & found.keys()
                found |= part
                assert step.batch.sizes is not None
                observed = [a + b for a, b in zip(observed, step.batch.sizes.observed, strict=True)]
    wanted = reference(rows, domain)
    assert found == wanted
    counts = [sum(labels[t] is not None for labels, _, _ in wanted.values()) for t in range(len(TASKS))]
    assert observed == counts and len(set(counts)) == len(TASKS)


def test_every_label_is_a_task_where_none_is_named(log: Path) -> None:
    reader = SequenceLogReader(DataConfig(log=log), "train", None)
    batch = next(iter(reader.steps())).batch
    assert reader.columns.tasks == ["click", "buy"] and batch.domain is None
    assert not batch.labels[:, 0].isnan().any() and batch.labels[:, 1].isnan().any()
    assert batch.sizes is not None and not batch.sizes.labelled


def test_only_what_the_tasks_need_is_read(log: Path) -> None:
    def labels(*names: str, **given: Any) -> list[str]:
        tasks = resolve_tasks({name: TaskConfig(**given) for name in names}, ["click", "buy"])
        columns = Columns.of(read_manifest(log), {}, tasks)
        return [name for name in columns.names() if name.startswith(("label_", "weight_"))]

    assert labels("click") == ["label_click"]
    assert labels("buy") == ["label_buy", "weight_buy"]
    assert labels("click", mask="buy == 0") == ["label_click", "label_buy"]


def test_a_log_without_labels_can_be_read(rows: list[Row], tmp_path: Path) -> None:
    log = write_log(tmp_path / "log", {"train": rows}, rich=True, **IN_PART)
    manifest = read_manifest(log).model_copy(update={"tasks": [], "partial": [], "label_weights": []})
    columns = Columns.of(manifest, {"item_id": 60}, TASKS)
    assert not [name for name in columns.names() if name.startswith("label_")]
    found = read_rows(next((log / "train").iterdir()), 0, columns)
    assert found.labels.shape[1] == len(TASKS) and (found.labels != found.labels).all()
    assert found.task_weight is None


def changed(path: Path, rows: list[Row], column: str, change: Callable[[list[Any]], list[Any]]) -> Path:
    """A file whose last row group has other values in a column."""
    row = {**rows[3], column: [change(part) for part in rows[3][column]]}
    table = pa.Table.from_pylist(rows[:4], schema=schema_of(manifest_of(rich=True, partial=["buy"])))
    # Of a type that takes nulls, whatever the label is.
    at = table.schema.get_field_index(column)
    free = pa.array([each[column] for each in [*rows[:3], row]], pa.list_(pa.list_(pa.float32())))
    pq.write_table(table.set_column(at, column, free), path, row_group_size=2)
    return path


@pytest.mark.parametrize("value", [None, math.nan])
def test_a_label_that_is_not_partial_is_refused_where_it_is_missing(
    rows: list[Row], tmp_path: Path, value: float | None
) -> None:
    file = changed(tmp_path / "file", rows, "label_click", lambda part: [value, *part[1:]])
    with pytest.raises(DataError, match=r"nulls or NaN.*does not say that the label is partial") as caught:
        read_rows(file, 1, Columns.of(manifest_of(rich=True, partial=["buy"])))
    assert (caught.value.file, caught.value.row_group, caught.value.column) == (str(file), 1, "label_click")
    found = read_rows(file, 1, Columns.of(manifest_of(rich=True, partial=["buy", "click"])))
    assert (found.labels[:, 0] != found.labels[:, 0]).sum() == rows[3]["num_requests"]


@pytest.mark.parametrize("value", [math.inf, -math.inf, 1.5, -0.1])
def test_a_partial_label_is_0_to_1_where_it_was_observed(
    rows: list[Row], tmp_path: Path, value: float
) -> None:
    file = changed(tmp_path / "file", rows, "label_buy", lambda part: [*part[1:], value])
    with pytest.raises(DataError, match=r"column label_buy: holds .* and a label is 0 to 1"):
        read_rows(file, 1, Columns.of(manifest_of(rich=True, partial=["buy"])))


def test_a_label_that_nobody_observed_is_no_error(rows: list[Row], tmp_path: Path) -> None:
    file = changed(tmp_path / "file", rows, "label_buy", lambda part: [None for _ in part])
    found: UserRows = read_rows(file, 1, Columns.of(manifest_of(rich=True, partial=["buy"])))
    last = int(found.request_offsets[1])
    assert (found.labels[found.candidate_offsets[last] :, 1] != 1).all()


@pytest.mark.parametrize(
    ("value", "problem"),
    [(math.nan, "NaN or infinity"), (math.inf, "NaN or infinity"), (-1.0, "is negative"), (None, "nulls")],
)
def test_sample_weights_of_a_label_are_finite_and_not_negative(
    rows: list[Row], tmp_path: Path, value: float | None, problem: str
) -> None:
    table = pa.Table.from_pylist(
        rows[:4], schema=schema_of(manifest_of(rich=True, partial=["buy"], label_weights=["buy"]))
    )
    weights = [[[value, *part[1:]] for part in row["weight_buy"]] for row in rows[:4]]
    at = table.schema.get_field_index("weight_buy")
    table = table.set_column(at, "weight_buy", pa.array(weights, pa.list_(pa.list_(pa.float32()))))
    pq.write_table(table, tmp_path / "file")
    columns = Columns.of(manifest_of(rich=True, **IN_PART))
    with pytest.raises(DataError, match=f"column weight_buy: .*{problem}"):
        read_rows(tmp_path / "file", 0, columns)


@pytest.mark.parametrize(
    ("domain", "message"),
    [
        ("bend", r"data\.domain = 'bend': the log has no such feature; did you mean 'band'\?"),
        ("xyz", r"data\.domain = 'xyz': .*have item_id, category_id, tags, band, city, segments"),
        ("action", r"data\.domain = 'action': only behaviors have this feature"),
        ("tags", r"data\.domain = 'tags': a candidate has any number of its ids"),
        ("segments", r"data\.domain = 'segments': a candidate has any number of its ids"),
    ],
)
def test_a_domain_is_one_id_of_candidates_or_requests(log: Path, domain: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SequenceLogReader(DataConfig(log=log, domain=domain), "train", None)


def test_a_domain_that_the_model_reads_is_the_same(log: Path) -> None:
    def domains(rows: dict[str, int] | None, domain: str) -> list[list[int]]:
        config = DataConfig(log=log, domain=domain, order="stored", prefetch=0)
        return [s.batch.domain.tolist() for s in SequenceLogReader(config, "train", rows).steps()]  # type: ignore[union-attr]

    for domain in ("band", "city", "item_id"):
        alone = domains({"category_id": 9}, domain)
        assert alone == domains(None, domain) and len({one for part in alone for one in part}) > 3
    with pytest.raises(DataError, match=r"candidate_band, row 0: id \d lies outside the table of 3 rows"):
        domains({"category_id": 9, "band": 3}, "band")


def test_ids_of_a_domain_without_a_table_are_checked(log: Path, tmp_path: Path) -> None:
    manifest = read_manifest(log)
    info = manifest.features["band"].model_copy(update={"rows": 2})
    small = manifest.model_copy(update={"features": {**manifest.features, "band": info}})
    with pytest.raises(DataError, match=r"candidate_band, row 0: id \d lies outside the table of 2 rows"):
        read_rows(next((log / "train").iterdir()), 0, Columns.of(small, {"item_id": 60}, None, "band"))
