"""1,000 generated logs, written by the log's writer and read back: every request as a slow reference says.

Hypothesis draws the structure (features, rows, lengths, ties, layout, how it is read) and a seed; the ids
and numbers inside come from numpy with that seed, which is what makes 1,000 logs affordable. Ids, times and
numbers are drawn over their whole ranges, so that nothing may pass through a narrower type on its way.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embeddings.errors import DataError
from trainer.config.sections import DataConfig
from trainer.data.batch import RequestBatch
from trainer.data.reader import SequenceLogReader
from trainer.log.schema import FeatureInfo, LogManifest, schema_of
from trainer.log.writer import write_manifest, write_split

Row = dict[str, Any]
Key = tuple[int, int]  # user, request
# A request as plain values; two are equal if every bit that matters is.
View = tuple[Any, ...]

SIDES = ("both", "history", "candidate")
TABLES = (1, 2, 60, 2**31, 2**63 - 1)


@dataclass(frozen=True)
class UserShape:
    """What one row is like.

    Attributes:
        behaviors: length of the history; span: its times lie in [start, start + span], so small means ties.
        requests: candidates of each request.
        cut: requests see less than all that is strictly older, as a log may say.
        ordered: requests are stored by time.
    """

    behaviors: int
    span: int
    requests: tuple[int, ...]
    cut: bool
    ordered: bool


USERS = st.builds(
    UserShape,
    behaviors=st.one_of(st.just(0), st.integers(1, 6), st.integers(7, 40)),
    span=st.sampled_from([0, 3, 40, 10**9]),
    requests=st.lists(st.sampled_from([1, 0, 2, 5]), max_size=5).map(tuple),
    cut=st.booleans(),
    ordered=st.booleans(),
)
FEATURES = st.lists(
    st.builds(FeatureInfo, rows=st.sampled_from(TABLES), multi=st.booleans(), side=st.sampled_from(SIDES)),
    min_size=1,
    max_size=4,
)
CONTEXT = st.lists(st.builds(FeatureInfo, rows=st.sampled_from(TABLES), multi=st.booleans()), max_size=2)


@dataclass(frozen=True)
class Table:
    """A whole log: what its manifest declares, and the shape of its rows."""

    features: list[FeatureInfo]
    context: list[FeatureInfo]
    tasks: int
    numbers: int
    weighted: bool
    users: list[UserShape]
    seed: int


TABLE = st.builds(
    Table,
    features=FEATURES,
    context=CONTEXT,
    tasks=st.integers(1, 3),
    numbers=st.integers(0, 2),
    weighted=st.booleans(),
    users=st.lists(USERS, min_size=1, max_size=5),
    seed=st.integers(0, 2**32 - 1),
)


@st.composite
def readings(draw: st.DrawFn) -> dict[str, Any]:
    """How a log is laid out and read: rows a group, groups a file, ranks, seed, and the reader's config."""
    return {
        "rows_per_group": draw(st.integers(1, 3)),
        "groups_per_file": draw(st.integers(1, 2)),
        "world_size": draw(st.sampled_from([1, 1, 2, 3])),
        "seed": draw(st.sampled_from([None, 1])),
        "config": {
            "history_length": draw(st.sampled_from([1, 3, 8, 40, 1000])),
            "requests_per_block": draw(st.sampled_from([1, 2, 8])),
            "behaviors_per_block": draw(st.sampled_from([0, 1, 20])),
            "batch_candidates": draw(st.sampled_from([1, 8, 1000])),
            "batch_behaviors": draw(st.sampled_from([0, 10])),
            "sharding": draw(st.sampled_from(["steps", "row_groups"])),
            "shuffle_row_groups": draw(st.sampled_from([1, 2, 64])),
            "ingestion_delay": draw(st.sampled_from([0, 0, 1, 7])),
            "workers": draw(st.sampled_from([0, 0, 2])),
            "prefetch": draw(st.sampled_from([0, 0, 1])),
        },
    }


class Maker:
    """Values for a table's shape."""

    def __init__(self, table: Table) -> None:
        self.table, self.rng = table, np.random.default_rng(table.seed)

    def rows(self) -> list[Row]:
        # A user may have several rows, as in a log of one request a row; its request ids stay distinct.
        users = self.rng.integers(-3, 3, len(self.table.users)).tolist()
        return [self.row(user, number) for number, user in enumerate(users)]

    def row(self, user: int, number: int) -> Row:
        shape, rng = self.table.users[number], self.rng
        start = int(rng.choice([-(10**6), 0, 2**40]))
        times = np.sort(rng.integers(start, start + shape.span, shape.behaviors, endpoint=True)).tolist()
        asked = rng.integers(start - 2, start + shape.span + 3, len(shape.requests)).tolist()
        asked = sorted(asked) if shape.ordered else asked
        ends = [sum(t < time for t in times) for time in asked]
        if shape.cut:
            ends = [int(rng.integers(0, end + 1)) for end in ends]
        names = (int(rng.choice([0, -(2**62), 2**62])) + 100 * number + np.arange(len(asked))).tolist()
        counts = list(shape.requests)
        row: Row = {
            "user_id": user,
            "history_timestamp": times,
            "request_id": names,
            "request_timestamp": asked,
            "request_history_end": ends,
            "request_num_candidates": counts,
            "num_behaviors": len(times),
            "num_requests": len(asked),
            "num_candidates": sum(counts),
        }
        for at, info in enumerate(self.table.features):
            if info.of_behaviors:
                row[f"history_f{at}"] = self.ids(info, len(times))
            if info.of_candidates:
                row[f"candidate_f{at}"] = [self.ids(info, count) for count in counts]
        for at, info in enumerate(self.table.context):
            row[f"context_c{at}"] = self.ids(info, len(asked))
        for at in range(self.table.numbers):
            row[f"numeric_n{at}"] = [self.numbers(count) for count in counts]
        for at in range(self.table.tasks):
            row[f"label_t{at}"] = [rng.integers(0, 2, count).astype(float).tolist() for count in counts]
        if self.table.weighted:
            row["weight"] = [[abs(x) for x in self.numbers(count)] for count in counts]
        return row

    def ids(self, info: FeatureInfo, count: int) -> list[Any]:
        if info.multi:
            return [self.some(info.rows, int(n)) for n in self.rng.integers(0, 4, count)]
        return self.some(info.rows, count)

    def some(self, rows: int, count: int) -> list[int]:
        """Ids of a table, its first and last among them."""
        ids = self.rng.integers(0, rows, count)
        edge = self.rng.integers(0, 6, count)
        found: list[int] = np.where(edge == 0, 0, np.where(edge == 1, rows - 1, ids)).tolist()
        return found

    def numbers(self, count: int) -> list[float]:
        """Any finite float32, subnormal ones included."""
        bits = self.rng.integers(0, 2**32, count, dtype=np.uint32).view(np.float32)
        found: list[float] = np.where(np.isfinite(bits), bits, np.float32(0.1)).tolist()
        return found


def write(path: Path, table: Table, rows: list[Row], layout: tuple[int, int]) -> None:
    path.mkdir(exist_ok=True)
    manifest = LogManifest(
        features={f"f{at}": info for at, info in enumerate(table.features)},
        context={f"c{at}": info for at, info in enumerate(table.context)},
        numeric=[f"n{at}" for at in range(table.numbers)],
        weighted=table.weighted,
        tasks=[f"t{at}" for at in range(table.tasks)],
        taxonomy=[],
        splits={},
        ingest={},
        report={},
    )
    schema = schema_of(manifest)
    batches = pa.Table.from_pylist(rows, schema=schema).to_batches()
    split = write_split(batches, path, "train", schema, layout)
    write_manifest(path, manifest.model_copy(update={"splits": {"train": split}}))


def expected(table: Table, rows: list[Row], config: DataConfig) -> Iterator[tuple[Key, View]]:
    """Every request from the rows themselves, one behavior at a time."""
    for row in rows:
        for r, name in enumerate(row["request_id"]):
            time, times = row["request_timestamp"][r], row["history_timestamp"]
            seen = [
                i for i in range(row["request_history_end"][r]) if times[i] < time - config.ingestion_delay
            ][-config.history_length :]
            candidates = range(row["request_num_candidates"][r])
            history, target = [], []
            for at, info in enumerate(table.features):
                past = [row[f"history_f{at}"][i] if info.of_behaviors else [] for i in seen]
                offered = [row[f"candidate_f{at}"][r][c] if info.of_candidates else [] for c in candidates]
                history.append([listed(ids) for ids in past])
                target.append([listed(ids) for ids in offered])
            yield (
                (row["user_id"], name),
                (
                    time,
                    [times[i] for i in seen],
                    history,
                    target,
                    [[row[f"label_t{at}"][r][c] for at in range(table.tasks)] for c in candidates],
                    [[row[f"numeric_n{at}"][r][c] for at in range(table.numbers)] for c in candidates],
                    [row["weight"][r][c] if table.weighted else 1.0 for c in candidates],
                    [listed(row[f"context_c{at}"][r]) for at in range(len(table.context))],
                ),
            )


def listed(ids: int | list[int]) -> list[int]:
    return ids if isinstance(ids, list) else [ids]


def found(batch: RequestBatch) -> Iterator[tuple[Key, View]]:
    """Every request of a batch."""
    features = bags(batch.features)
    context = [] if batch.context is None else bags(batch.context)
    times, owners = batch.behavior_time.tolist(), batch.candidate_request.tolist()
    labels, numeric, weight = batch.labels.tolist(), batch.numeric.tolist(), batch.weight.tolist()
    for r, time in enumerate(batch.request_time.tolist()):
        window = slice(int(batch.window_start[r]), int(batch.window_end[r]))
        mine = [c for c, owner in enumerate(owners) if owner == r]
        yield (
            (int(batch.user_id[r]), int(batch.request_id[r])),
            (
                time,
                times[window],
                [bag[: batch.behaviors][window] for bag in features],
                [[bag[batch.behaviors + c] for c in mine] for bag in features],
                [labels[c] for c in mine],
                [numeric[c] for c in mine],
                [weight[c] for c in mine],
                [bag[r] for bag in context],
            ),
        )


def bags(kjt: KeyedJaggedTensor) -> list[list[list[int]]]:
    """Key by key, the ids of every bag."""
    values, lengths = kjt.values().tolist(), kjt.lengths().tolist()
    ends = np.cumsum([0, *lengths]).tolist()
    flat = [values[begin:end] for begin, end in pairwise(ends)]
    stride = kjt.stride()
    return [flat[at * stride : (at + 1) * stride] for at in range(len(kjt.keys()))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("round")


@settings(max_examples=1000, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(table=TABLE, reading=readings())
def test_1000_generated_logs_arrive_as_they_were_written(
    folder: Path, table: Table, reading: dict[str, Any]
) -> None:
    rows = Maker(table).rows()
    # One folder for all: what an earlier log left there is in no manifest, and removing it takes time.
    log = folder / "log"
    rows_per_group = reading["rows_per_group"]
    write(log, table, rows, (rows_per_group, rows_per_group * reading["groups_per_file"]))
    config = DataConfig(log=log, **reading["config"])
    world_size = reading["world_size"]

    def reader(rank: int) -> SequenceLogReader:
        return SequenceLogReader(
            config, "train", None, rank=rank, world_size=world_size, seed=reading["seed"]
        )

    if not any(row["num_candidates"] for row in rows):
        with pytest.raises(DataError, match="no request of split 'train' has a candidate"):
            reader(0)
        return
    wanted = dict(expected(table, rows, config))
    times: Counter[Key] = Counter()
    ranks = [list(reader(rank).steps()) for rank in range(world_size)]
    for together in zip(*ranks, strict=True):
        total = 0
        for step in together:
            assert step.batch.step_candidates == together[0].batch.step_candidates
            if step.counted:
                total += step.batch.candidates
                for key, view in found(step.batch):
                    times[key] += 1
                    assert view == wanted[key]
        assert total == together[0].batch.step_candidates
    # A request without candidates is left out, or comes along in the block of one that has some.
    assert all(n == 1 for n in times.values())
    asked = {key for key, view in wanted.items() if view[4]}
    assert asked <= set(times)
    assert sum(len(wanted[key][4]) for key in times) == sum(row["num_candidates"] for row in rows)
