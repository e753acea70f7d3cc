"""The reader: every candidate once, the same steps at any world size, exact positions, and no future."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import trainer.data.reader as module
from embeddings.errors import DataError
from tests.helpers.logs import CONTEXT, FEATURES, RICH, Row, Shape, enrich, random_rows, write_log
from trainer.config.sections import DataConfig
from trainer.data.batch import RequestBatch
from trainer.data.cursor import Cursor
from trainer.data.reader import SequenceLogReader, Step
from trainer.data.row_group import read_footer
from trainer.data.rows import PlanRows, UserRows, read_plan, read_rows
from trainer.log.schema import read_manifest
from trainer.log.writer import write_manifest

Sample = tuple[Any, ...]


def config(log: Path, **changes: Any) -> DataConfig:
    base = {"history_length": 8, "requests_per_block": 2, "batch_candidates": 12, "shuffle_row_groups": 2}
    return DataConfig(log=log, **{**base, "prefetch": 0, **changes})


def reader(
    log: Path, rank: int = 0, world_size: int = 1, seed: int | None = 5, **changes: Any
) -> SequenceLogReader:
    return SequenceLogReader(
        config(log, **changes), "train", FEATURES, rank=rank, world_size=world_size, seed=seed
    )


def samples(batch: RequestBatch) -> Iterator[Sample]:
    """Each candidate with all that it may see, as plain values."""
    n = batch.behaviors
    ids = {key: batch.features[key].values() for key in batch.features.keys()}  # noqa: SIM118 - no dict
    for c, r in enumerate(batch.candidate_request.tolist()):
        window = slice(int(batch.window_start[r]), int(batch.window_end[r]))
        yield (
            int(batch.user_id[r]),
            int(batch.request_id[r]),
            int(batch.request_time[r]),
            tuple(int(ids[key][n + c]) for key in ids),
            float(batch.labels[c, 0]),
            tuple(batch.behavior_time[window].tolist()),
            tuple(tuple(ids[key][:n][window].tolist()) for key in ids),
        )


def expected(rows: list[Row], history_length: int, delay: int = 0) -> Counter[Sample]:
    """The same from the rows themselves, one request at a time."""
    found: Counter[Sample] = Counter()
    for row in rows:
        for r, time in enumerate(row["request_timestamp"]):
            seen = [i for i, t in enumerate(row["history_timestamp"]) if t < time - delay][-history_length:]
            for c, label in enumerate(row["label_click"][r]):
                target = tuple(row[f"candidate_{f}"][r][c] for f in FEATURES)
                times = tuple(row["history_timestamp"][i] for i in seen)
                ids = tuple(tuple(row[f"history_{f}"][i] for i in seen) for f in FEATURES)
                found[row["user_id"], row["request_id"][r], time, target, label, times, ids] += 1
    return found


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    history_length=st.integers(1, 50),
    per_block=st.integers(1, 7),
    limit=st.integers(0, 40),
    delay=st.sampled_from([0, 1, 10]),
    world_size=st.sampled_from([1, 2, 4]),
    sharding=st.sampled_from(["steps", "row_groups"]),
    behaviors=st.sampled_from([0, 30, 200]),
)
def test_an_epoch_is_every_candidate_once_with_its_own_window(
    tmp_path_factory: pytest.TempPathFactory,
    seed: int,
    history_length: int,
    per_block: int,
    limit: int,
    delay: int,
    world_size: int,
    sharding: str,
    behaviors: int,
) -> None:
    rows = random_rows(seed)
    log = write_log(tmp_path_factory.mktemp("log") / "log", {"train": rows})
    changes = {
        "history_length": history_length,
        "requests_per_block": per_block,
        "behaviors_per_block": limit,
        "ingestion_delay": delay,
        "sharding": sharding,
        "batch_behaviors": behaviors,
        "workers": seed % 3,
    }
    found: Counter[Sample] = Counter()
    ranks = [list(reader(log, rank, world_size, **changes).steps()) for rank in range(world_size)]
    assert len({len(steps) for steps in ranks}) == 1
    for step in (step for steps in ranks for step in steps if step.counted):
        found.update(samples(step.batch))
    assert found == expected(rows, history_length, delay)


def global_steps(
    log: Path,
    world_size: int,
    cursor: Cursor = Cursor(),  # noqa: B008 - frozen
    seed: int = 5,
    **changes: Any,
) -> list[Counter[Sample]]:
    ranks = [reader(log, rank, world_size, seed, **changes).steps(cursor) for rank in range(world_size)]
    return [
        sum((Counter(samples(s.batch)) for s in steps if s.counted), Counter())
        for steps in zip(*ranks, strict=True)
    ]


def test_steps_are_the_same_at_any_world_size(tmp_path: Path) -> None:
    log = write_log(tmp_path / "log", {"train": random_rows(1)})
    one = global_steps(log, 1)
    assert one == global_steps(log, 2) == global_steps(log, 4) == global_steps(log, 7)
    for workers in (0, 3):
        assert one == global_steps(log, 2, sharding="row_groups", workers=workers)


@pytest.mark.parametrize(("before", "after"), [(1, 1), (2, 1), (1, 4), (4, 2)])
def test_a_cursor_continues_exactly_at_another_world_size(tmp_path: Path, before: int, after: int) -> None:
    log = write_log(tmp_path / "log", {"train": random_rows(2)})
    steps = list(reader(log, 0, before).steps())
    whole = global_steps(log, before)
    for stop in (0, 1, len(steps) // 2, len(steps)):
        cursor = steps[stop - 1].after if stop else Cursor()
        assert whole[:stop] + global_steps(log, after, cursor) == whole


def test_epochs_and_seeds_differ_in_order_but_not_in_content(tmp_path: Path) -> None:
    log = write_log(tmp_path / "log", {"train": random_rows(3)})
    first, second = global_steps(log, 1), global_steps(log, 1, Cursor(epoch=1))
    assert first != second
    assert sum(first, Counter()) == sum(second, Counter())


def test_prefetching_changes_nothing_and_stops_early_without_a_thread_left(tmp_path: Path) -> None:
    log = write_log(tmp_path / "log", {"train": random_rows(4)})
    plain = [Counter(samples(s.batch)) for s in reader(log).steps()]
    ahead = [Counter(samples(s.batch)) for s in reader(log, prefetch=2).steps()]
    assert plain == ahead
    steps = reader(log, prefetch=1).steps()
    next(steps)
    steps.close()  # type: ignore[attr-defined]
    assert not steps._thread.is_alive()  # type: ignore[attr-defined]


def test_errors_reach_the_consumer_through_the_prefetching_thread(tmp_path: Path) -> None:
    rows = random_rows(5)
    rows[7]["candidate_item_id"][0][0] = 60
    log = write_log(tmp_path / "log", {"train": rows})
    with pytest.raises(DataError, match="id 60 lies outside the table of 60 rows"):
        list(reader(log, prefetch=2).steps())


def test_row_groups_are_counted_by_the_manifest_or_in_older_logs_by_the_footers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = write_log(tmp_path / "log", {"train": random_rows(5)}, layout=(2, 4))
    opened: list[str] = []

    def spy(file: Path) -> Any:
        opened.append(file.name)
        return read_footer(file)

    monkeypatch.setattr("trainer.data.files.read_footer", spy)
    places = reader(log, verify=False).row_groups
    assert len(places) > 2 and not opened
    manifest = read_manifest(log)
    split = manifest.splits["train"]
    uncounted = [file.model_copy(update={"row_groups": 0}) for file in split.files]
    older = split.model_copy(update={"files": uncounted})
    write_manifest(log, manifest.model_copy(update={"splits": {"train": older}}))
    assert reader(log, verify=False).row_groups == places
    assert sorted(opened) == sorted({place.file.name for place in places})


def test_ranks_share_a_step_evenly(tmp_path: Path) -> None:
    log = write_log(tmp_path / "log", {"train": random_rows(6, Shape(users=40))})
    ranks = [list(reader(log, r, 2, batch_candidates=120).steps()) for r in range(2)]
    loads = np.array([[s.batch.behaviors + s.batch.candidates for s in steps] for steps in ranks])
    full = loads[:, :-1]
    assert (np.abs(full[0] - full[1]) / full.sum(0)).mean() < 0.1


def with_noise_after(rows: list[Row], delay: int) -> list[Row]:
    """Replace every behavior that no request may see by another item, far in the future of nothing."""
    changed = []
    for row in rows:
        last = max(row["request_timestamp"]) - delay
        new = {**row}
        for feature, size in FEATURES.items():
            new[f"history_{feature}"] = [
                value if time < last else (value + 1) % size
                for value, time in zip(row[f"history_{feature}"], row["history_timestamp"], strict=True)
            ]
        changed.append(new)
    return changed


@pytest.mark.parametrize("delay", [0, 20])
def test_behaviors_at_or_after_a_request_never_reach_a_batch(tmp_path: Path, delay: int) -> None:
    rows = [{**row} for row in random_rows(8)]
    changed = with_noise_after(rows, delay)
    assert rows != changed

    def read(name: str, content: list[Row]) -> list[Counter[Sample]]:
        log = write_log(tmp_path / name, {"train": content})
        return [Counter(samples(s.batch)) for s in reader(log, ingestion_delay=delay).steps()]

    assert read("a", rows) == read("b", changed)


def test_a_missing_split_is_named(tmp_path: Path) -> None:
    log = write_log(tmp_path / "log", {"train": random_rows(9)})
    with pytest.raises(DataError, match="no split 'test'; it has train"):
        SequenceLogReader(config(log), "test", FEATURES)


def watch_decoding(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """The (file, row group) of everything that is decoded from now on."""
    decoded: list[tuple[str, int]] = []

    def spy(file: Path, row_group: int, *more: Any) -> UserRows:
        decoded.append((file.name, row_group))
        return read_rows(file, row_group, *more)

    monkeypatch.setattr(module, "read_rows", spy)
    return decoded


def test_row_group_sharding_decodes_no_row_group_on_all_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = write_log(tmp_path / "log", {"train": random_rows(12, Shape(users=24))}, layout=(2, 8))
    decoded = watch_decoding(monkeypatch)
    counts = []
    for rank in range(3):
        steps = list(reader(log, rank, 3, sharding="row_groups", batch_candidates=60).steps())
        counts.append(sum(step.counted for step in steps))
    assert len(steps) == max(counts)
    # Two of three ranks have each, and who has no block of a step repeats another's.
    assert len(decoded) < 12 * 2.5 and len(set(decoded)) == 12


def watch_planning(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """The (file, row group) of everything that is opened for its lengths from now on."""
    planned: list[tuple[str, int]] = []

    def spy(file: Path, row_group: int, *more: Any) -> PlanRows:
        planned.append((file.name, row_group))
        return read_plan(file, row_group, *more)

    monkeypatch.setattr(module, "read_plan", spy)
    return planned


@pytest.mark.parametrize("workers", [0, 1])
def test_windows_before_the_cursor_are_not_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    log = write_log(tmp_path / "log", {"train": random_rows(12, Shape(users=24))}, layout=(2, 8))
    decoded, planned = watch_decoding(monkeypatch), watch_planning(monkeypatch)
    steps = list(reader(log, workers=workers).steps())
    assert len(decoded) == len(set(decoded)) == len(planned) == 12
    decoded.clear()
    planned.clear()
    rest = list(reader(log, workers=workers).steps(steps[-2].after))
    assert [Counter(samples(s.batch)) for s in rest] == [Counter(samples(steps[-1].batch))]
    # Windows are two row groups; a step may begin in the last but one.
    assert 0 < len(set(decoded)) <= 4 and set(planned) == set(decoded)


def test_a_cursor_of_an_older_checkpoint_or_another_plan_is_found_by_planning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = write_log(tmp_path / "log", {"train": random_rows(12, Shape(users=24))}, layout=(2, 8))
    whole = global_steps(log, 1)
    after = [step.after for step in reader(log).steps()][-2]
    planned = watch_planning(monkeypatch)
    assert global_steps(log, 1, Cursor.of_state({"epoch": 0, "blocks": after.blocks})) == whole[-1:]
    assert len(planned) == 12
    # Another seed cuts the same blocks into other windows, in which this one means nothing.
    old = Cursor(0, after.epoch, after.blocks)
    assert global_steps(log, 1, after, seed=6) == global_steps(log, 1, old, seed=6)
    assert len(planned) == 3 * 12


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    window=st.integers(1, 13),
    before=st.sampled_from([1, 2, 5]),
    after=st.sampled_from([1, 3, 4]),
    shardings=st.tuples(*[st.sampled_from(["steps", "row_groups"])] * 2),
    order=st.sampled_from(["shuffled", "stored"]),
    epoch=st.integers(0, 2),
    data=st.data(),
)
def test_a_resumed_epoch_is_the_rest_of_an_uninterrupted_one(
    tmp_path_factory: pytest.TempPathFactory,
    seed: int,
    window: int,
    before: int,
    after: int,
    shardings: tuple[str, str],
    order: str,
    epoch: int,
    data: st.DataObject,
) -> None:
    rows = random_rows(seed, Shape(users=12))
    log = write_log(tmp_path_factory.mktemp("log") / "log", {"train": rows}, layout=(1, 4))
    same = {"shuffle_row_groups": window, "order": order, "workers": seed % 2}
    changes = {"sharding": shardings[0], **same}
    whole = global_steps(log, before, Cursor(epoch=epoch), **changes)
    cursors = [step.after for step in reader(log, 0, before, **changes).steps(Cursor(epoch=epoch))]
    stop = data.draw(st.integers(1, len(whole)))
    # As a checkpoint keeps it.
    cursor = Cursor.of_state(json.loads(json.dumps(asdict(cursors[stop - 1]))))
    with pytest.MonkeyPatch.context() as patch:
        planned = watch_planning(patch)
        rest = global_steps(log, after, cursor, **{**same, "sharding": shardings[1]})
    assert whole[:stop] + rest == whole
    assert len(planned) == after * (12 - cursor.place * window)
    without = Cursor(0, cursor.epoch, cursor.blocks)
    assert global_steps(log, after, without, **{**same, "sharding": shardings[1]}) == rest


def test_a_step_stays_below_its_behaviors(tmp_path: Path) -> None:
    log = write_log(tmp_path / "log", {"train": random_rows(13)})
    sizes = [
        (step.batch.behaviors, len(set(step.batch.user_id.tolist())))
        for step in reader(log, batch_candidates=1000, batch_behaviors=20).steps()
    ]
    assert max(n for n, users in sizes if users > 1) <= 20
    assert sum(n for n, _ in sizes) > 100


def test_stored_order_is_the_order_of_the_rows(tmp_path: Path) -> None:
    rows = random_rows(14)
    log = write_log(tmp_path / "log", {"train": rows})
    found = [int(u) for step in reader(log, order="stored").steps() for u in step.batch.user_id]
    assert found == [row["user_id"] for row in rows for _ in row["request_id"]]


def test_everything_a_log_may_hold_arrives_as_it_was_written(tmp_path: Path) -> None:
    rows = enrich(random_rows(15), seed=1)
    log = write_log(tmp_path / "log", {"train": rows}, rich=True)
    by_request = {
        (row["user_id"], row["request_id"][r]): (row, r) for row in rows for r in range(row["num_requests"])
    }
    rich = SequenceLogReader(config(log), "train", None, seed=3)
    assert rich.numeric_names() == ["price"]
    seen = 0
    for step in rich.steps():
        batch, within = step.batch, 0
        bags = {key: batch.features[key].to_dense() for key in RICH}
        context = {key: batch.context[key].to_dense() for key in CONTEXT}  # type: ignore[index]
        for c, r in enumerate(batch.candidate_request.tolist()):
            within = within + 1 if c and r == int(batch.candidate_request[c - 1]) else 0
            row, at = by_request[int(batch.user_id[r]), int(batch.request_id[r])]
            target = {key: bags[key][batch.behaviors + c].tolist() for key in RICH}
            assert target["tags"] == row["candidate_tags"][at][within]
            assert target["band"] == [row["candidate_band"][at][within]] and target["action"] == []
            assert batch.labels[c].tolist() == [row["label_click"][at][within], row["label_buy"][at][within]]
            assert batch.weight[c] == row["weight"][at][within]
            assert batch.numeric[c].tolist() == [row["numeric_price"][at][within]]
            assert context["city"][r].tolist() == [row["context_city"][at]]
            assert context["segments"][r].tolist() == row["context_segments"][at]
            window = range(int(batch.window_start[r]), int(batch.window_end[r]))
            past = slice(row["request_history_end"][at] - len(window), row["request_history_end"][at])
            assert [bags["tags"][i].tolist() for i in window] == row["history_tags"][past]
            assert [bags["action"][i].tolist() for i in window] == [[x] for x in row["history_action"][past]]
            assert all(bags["band"][i].numel() == 0 for i in window)
            seen += 1
    assert seen == sum(row["num_candidates"] for row in rows)


def test_fewer_blocks_than_ranks_still_match_step_for_step(tmp_path: Path) -> None:
    rows = random_rows(10, Shape(users=1, requests=1))
    log = write_log(tmp_path / "log", {"train": rows})
    steps: list[list[Step]] = [list(reader(log, r, 3).steps()) for r in range(3)]
    assert [[s.counted for s in part] for part in steps] == [[True], [False], [False]]
