"""Does a request see the future? Noise in place of all that happens at or after it must change nothing.

    python -m benchmarks.leaks log --log LOG [--split test] [--delay 86400] [--search a_id --search b_id]
    python -m benchmarks.leaks ingest --events EVENTS --config CONFIG --cut 2017-11-17 [--new-words]

`log` draws a request of each user and replaces the user's history from the request's time on by other ids at
other times, and what is offered in later requests by other candidates. Then it compares what the reader
delivers: whole batches, bit for bit, with each request alone in its block, and request by request with all
requests of the user in shared blocks. `ingest` replaces the raw events from `--cut` on by events of other
users, items and times, ingests both tables and compares every request before the cut.

Each prints one row of a table; a control, where the noise begins with the newest behavior that the request
does see, has to differ, or nothing was compared at all.
"""

from __future__ import annotations

import argparse
import hashlib
import tempfile
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from pipelines.ingest.config import IngestConfig
from pipelines.ingest.ingest import ingest, load_ingest_config
from trainer.config.sections import DataConfig, SearchConfig
from trainer.data.batch import RequestBatch
from trainer.data.reader import SequenceLogReader
from trainer.log.schema import FeatureInfo, LogManifest, read_manifest, schema_of
from trainer.log.writer import write_manifest, write_split

Row = dict[str, Any]
Key = tuple[int, int]  # user, request
Ints = npt.NDArray[np.int64]
LAYOUT = (64, 64 * 64)


@dataclass(frozen=True)
class View:
    """What the reader delivers of one request, as digests of the bytes.

    Attributes:
        history: its window, or with a hard search what each candidate retrieved; together with the context.
        times: the window in no order within a second, where asked for.
        candidates: ids, labels, weights and numbers in their order; positives: ids whose first label is 1.
    """

    time: int
    history: bytes
    times: bytes
    candidates: bytes
    positives: bytes


@dataclass
class Outcome:
    """Counts of a comparison; `examples` names the first requests that differ."""

    requests: int = 0
    replaced: int = 0
    differ: int = 0
    batches: int = 0
    batches_differ: int = 0
    examples: list[Key] = field(default_factory=list)


# ---------------------------------------------------------------------------- what a reader delivers


@dataclass(frozen=True)
class Which:
    """Which requests are looked at, and how.

    Attributes:
        before: only older ones; every: only of users whose number is divisible by it.
        words: feature -> what its ids are translated to; loose: also digest windows unordered in a second.
    """

    before: int = 2**62
    every: int = 1
    words: Mapping[str, Ints] = field(default_factory=dict)
    loose: bool = False


def views(data: DataConfig, split: str, which: Which) -> dict[Key, View]:
    """The requests of a split."""
    found = {}
    for step in SequenceLogReader(data, split, None).steps():
        seen = _Seen(step.batch, which)
        names = zip(step.batch.user_id.tolist(), step.batch.request_id.tolist(), strict=True)
        for r, (time, key) in enumerate(zip(step.batch.request_time.tolist(), names, strict=True)):
            if time < which.before and key[0] % which.every == 0:
                found[key] = seen.view(r, time)
    return found


class _Seen:
    """A batch as numpy arrays."""

    def __init__(self, batch: RequestBatch, which: Which) -> None:
        self.batch, self.n, self.loose = batch, batch.behaviors, which.loose
        self.features = _bags(batch.features, which.words)
        self.context = {} if batch.context is None else _bags(batch.context, which.words)
        self.time = batch.behavior_time.numpy()
        self.start, self.end = batch.window_start.tolist(), batch.window_end.tolist()
        owner = batch.candidate_request.numpy()
        self.first = np.searchsorted(owner, np.arange(batch.requests + 1))
        self.numbers = [batch.labels.numpy(), batch.weight.numpy()[:, None], batch.numeric.numpy()]

    def view(self, r: int, time: int) -> View:
        low, high = int(self.first[r]), int(self.first[r + 1])
        parts = [bags.part(r, r + 1) for bags in self.context.values()]
        retrieval = self.batch.retrieval
        times = b""
        if retrieval is None:
            start, end = self.start[r], self.end[r]
            ids = [bags.part(start, end) for bags in self.features.values()]
            history = digest([self.time[start:end], *ids, *parts])
            times = digest(self._unordered(start, end)) if self.loose else b""
        else:
            index = retrieval.index[low:high].numpy()
            there = index[index >= 0]
            ids = [bags.take(there) for bags in self.features.values()]
            level, rank = retrieval.level[low:high].numpy(), retrieval.rank[low:high].numpy()
            history = digest([index >= 0, level, rank, self.time[there], *ids, *parts])
        offered = [bags.part(self.n + low, self.n + high) for bags in self.features.values()]
        numbers = [values[low:high] for values in self.numbers]
        bought = np.nonzero(self.batch.labels[low:high, 0].numpy() == 1)[0]
        item = next(iter(self.features.values()))
        positives = np.sort(item.take(self.n + low + bought))
        return View(time, history, times, digest([*offered, *numbers]), digest([positives]))

    def _unordered(self, start: int, end: int) -> list[npt.NDArray[Any]]:
        single = [bags.part(start, end) for bags in self.features.values() if bags.single]
        columns = [*reversed([part for part in single if part.size == end - start]), self.time[start:end]]
        order = np.lexsort(columns)
        return [column[order] for column in columns]


@dataclass(frozen=True)
class _Bags:
    values: Ints
    offsets: Ints
    single: bool

    def part(self, begin: int, end: int) -> Ints:
        """Ids of consecutive bags; where bags vary in size these sizes come first."""
        ids = self.values[self.offsets[begin] : self.offsets[end]]
        return ids if self.single else np.r_[np.diff(self.offsets[begin : end + 1]), ids]

    def take(self, chosen: Ints) -> Ints:
        if self.single:
            return self.values[chosen]
        return np.concatenate([np.zeros(0, np.int64), *(self.part(int(i), int(i) + 1) for i in chosen)])


def _bags(kjt: KeyedJaggedTensor, words: Mapping[str, Ints]) -> dict[str, _Bags]:
    found = {}
    for key in kjt.keys():  # noqa: SIM118 - no dict
        values, lengths = kjt[key].values().numpy(), kjt[key].lengths().numpy()
        values = words[key][values] if key in words else values
        found[key] = _Bags(values, np.r_[0, np.cumsum(lengths, dtype=np.int64)], bool((lengths == 1).all()))
    return found


def digest(parts: Sequence[npt.NDArray[Any]]) -> bytes:
    total = hashlib.blake2b(digest_size=16)
    for part in parts:
        total.update(f"{part.shape}{part.dtype}".encode())
        total.update(np.ascontiguousarray(part).tobytes())
    return total.digest()


def same_batch(one: RequestBatch, other: RequestBatch) -> bool:
    """Whether two batches are equal bit for bit, tensor by tensor."""
    return all(same(getattr(one, part.name), getattr(other, part.name)) for part in fields(one))


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, KeyedJaggedTensor):
        parts = [(kjt.keys(), kjt.stride(), kjt.values(), kjt.lengths()) for kjt in (one, other)]
        return all(same(a, b) for a, b in zip(*parts, strict=True))
    if hasattr(one, "__dataclass_fields__"):
        return all(same(getattr(one, part.name), getattr(other, part.name)) for part in fields(one))
    return bool(one == other)


# ---------------------------------------------------------------------------- noise in a log


@dataclass(frozen=True)
class Noise:
    """Noise in the rows of a log, the same each time a row is asked for.

    Attributes:
        delay: the reader's ingestion delay; alone: rows hold the drawn request only.
        early: begin with the newest behavior that the request may see, and compare it alone (the control).
    """

    manifest: LogManifest
    seed: int
    delay: int
    alone: bool
    early: bool = False

    def pair(self, row: Row, number: int) -> tuple[Row, Row, list[Key], int] | None:
        """-> (row, row with noise, requests to compare, behaviors replaced); None if no event is to come."""
        rng = np.random.default_rng([self.seed, number])
        times, asked = row["history_timestamp"], row["request_timestamp"]
        fit = [r for r, time in enumerate(asked) if times and times[-1] >= time - self.delay]
        if self.early:
            fit = [r for r in fit if bisect_left(times, asked[r] - self.delay) > 0]
        if not fit:
            return None
        drawn = fit[rng.integers(len(fit))]
        cut = asked[drawn] - self.delay
        if self.early:
            cut = times[bisect_left(times, cut) - 1]
        if self.alone:
            row = only_request(row, drawn)
            drawn = 0
        keys = [
            (row["user_id"], name)
            for name, time in zip(row["request_id"], row["request_timestamp"], strict=True)
            if time <= row["request_timestamp"][drawn]
        ]
        if self.early:
            keys = [(row["user_id"], row["request_id"][drawn])]
        noisy = self._with_noise(row, cut, row["request_timestamp"][drawn], rng)
        return row, noisy, keys, len(times) - bisect_left(times, cut)

    def _with_noise(self, row: Row, cut: int, now: int, rng: np.random.Generator) -> Row:
        times, asked = row["history_timestamp"], row["request_timestamp"]
        first = bisect_left(times, cut)
        count = len(times) - first
        span = max(times[-1], asked[-1]) - cut + 2
        new = {
            **row,
            "history_timestamp": times[:first] + np.sort(rng.integers(cut, cut + span, count)).tolist(),
        }
        for name, info in self.manifest.features.items():
            if info.of_behaviors:
                new[f"history_{name}"] = row[f"history_{name}"][:first] + _random_ids(info, count, rng)
            if info.of_candidates:
                new[f"candidate_{name}"] = [
                    old if time <= now else _random_ids(info, len(old), rng)
                    for old, time in zip(row[f"candidate_{name}"], asked, strict=True)
                ]
        for task in self.manifest.tasks:
            new[f"label_{task}"] = [
                old if time <= now else rng.integers(0, 2, len(old)).astype(float).tolist()
                for old, time in zip(row[f"label_{task}"], asked, strict=True)
            ]
        new["request_history_end"] = [
            end if time < cut else bisect_left(new["history_timestamp"], time)
            for end, time in zip(row["request_history_end"], asked, strict=True)
        ]
        return new


def only_request(row: Row, at: int) -> Row:
    """The row with one of its requests."""
    per_request = ("request_", "candidate_", "context_", "numeric_", "label_")
    new = {
        name: [value[at]] if name.startswith(per_request) or name == "weight" else value
        for name, value in row.items()
    }
    return {**new, "num_requests": 1, "num_candidates": row["request_num_candidates"][at]}


def _random_ids(info: FeatureInfo, count: int, rng: np.random.Generator) -> list[Any]:
    if not info.multi:
        found: list[Any] = rng.integers(0, info.rows, count).tolist()
        return found
    return [rng.integers(0, info.rows, int(n)).tolist() for n in rng.integers(0, 4, count)]


def stored_rows(log: Path, manifest: LogManifest, split: str, limit: int) -> Iterator[tuple[int, Row]]:
    """The first `limit` rows of a split, numbered."""
    number = 0
    for entry in manifest.splits[split].files:
        with pq.ParquetFile(log / entry.path) as parquet:
            for group in range(parquet.num_row_groups):
                if number >= limit:
                    return
                for row in parquet.read_row_group(group).slice(0, limit - number).to_pylist():
                    yield number, row
                    number += 1


def write_pair(log: Path, split: str, noise: Noise, limit: int, folder: Path) -> tuple[set[Key], int]:
    """Writes folder/plain and folder/noisy; -> (requests to compare, behaviors replaced)."""
    schema, compared, replaced = schema_of(noise.manifest), set[Key](), 0

    def batches(which: int) -> Iterator[pa.RecordBatch]:
        nonlocal replaced
        for number, row in stored_rows(log, noise.manifest, split, limit):
            pair = noise.pair(row, number)
            if pair is not None:
                if which:
                    compared.update(pair[2])
                    replaced += pair[3]
                yield from pa.Table.from_pylist([pair[which]], schema=schema).to_batches()

    for which, name in enumerate(("plain", "noisy")):
        (folder / name).mkdir(parents=True)
        info = write_split(batches(which), folder / name, split, schema, LAYOUT)
        write_manifest(folder / name, noise.manifest.model_copy(update={"splits": {split: info}}))
    return compared, replaced


def compare_log(
    data: DataConfig, split: str, limit: int, folder: Path, early: bool = False, seed: int = 0
) -> Outcome:
    """Noise at and after a request of each of the first `limit` rows, delivered alone and in shared blocks.

    Args:
        data: how the log `data.log` is read; folder: where the logs with noise are written.
        early: the control; its batches are expected to differ.
    """
    manifest, outcome = read_manifest(data.log), Outcome()
    for alone in (True, False):
        noise = Noise(manifest, seed, data.ingestion_delay, alone, early)
        where = folder / ("alone" if alone else "together")
        compared, replaced = write_pair(data.log, split, noise, limit, where)
        plain, noisy = (data.model_copy(update={"log": where / name}) for name in ("plain", "noisy"))
        if alone:
            single = [at.model_copy(update={"batch_candidates": 1}) for at in (plain, noisy)]
            pairs = zip(*(batches_of(at, split) for at in single), strict=True)
            equal = [same_batch(a, b) for a, b in pairs]
            outcome.batches, outcome.batches_differ = len(equal), equal.count(False)
        one, other = views(plain, split, Which()), views(noisy, split, Which())
        wrong = sorted(key for key in compared if one[key] != other[key])
        outcome.requests += len(compared)
        outcome.replaced += replaced
        outcome.differ += len(wrong)
        outcome.examples += wrong[:3]
    return outcome


def batches_of(data: DataConfig, split: str) -> Iterator[RequestBatch]:
    return (step.batch for step in SequenceLogReader(data, split, None).steps())


# ---------------------------------------------------------------------------- noise in raw events


@dataclass(frozen=True)
class Tail:
    """How the events at or after `cut` are replaced: by as many random ones.

    So that every item keeps its id, there is also one event of each that would be gone; `new_words` brings
    new items instead, and ids shift. Features are those of any other event, so that items change in them.

    Attributes:
        before: requests older than this are compared; 0 = the cut. A later one makes a control.
    """

    cut: int
    seed: int = 0
    new_words: bool = False
    before: int = 0

    def replaced(self, events: pa.Table, config: IngestConfig) -> pa.Table:
        """Users and times are drawn evenly, items evenly among all, baskets are new ones."""
        rng, columns = np.random.default_rng(self.seed), config.events
        time = events[columns.timestamp].to_numpy()
        head, size = (
            events.filter(pc.less(events[columns.timestamp], self.cut)),
            int((time >= self.cut).sum()),
        )
        items = events[columns.item].to_numpy()
        values, first = np.unique(items, return_index=True)
        gone = first[~np.isin(values, head[columns.item].to_numpy())]
        chosen = rng.choice(first, size) if self.new_words else np.r_[gone, rng.choice(first, size)]
        tail = events.take(pa.array(chosen))
        users = np.unique(events[columns.user].to_numpy())
        drawn: dict[str, npt.NDArray[Any]] = {
            columns.user: rng.choice(users, chosen.size),
            columns.timestamp: rng.integers(self.cut, max(time.max(), self.cut) + 1, chosen.size),
        }
        if columns.request:
            last = pc.max(events[columns.request]).as_py()
            drawn[columns.request] = last + 1 + rng.integers(0, 1 + chosen.size // 8, chosen.size)
        if self.new_words:
            drawn[columns.item] = rng.integers(items.min(), items.max() + 1, chosen.size)
        other = events.take(pa.array(rng.integers(0, events.num_rows, chosen.size)))
        for feature in config.all_features:
            if feature.name != "item_id" and feature.side != "candidate":
                at = tail.schema.get_field_index(feature.source)
                tail = tail.set_column(at, tail.schema.field(at), other[feature.source])
        for name, column in drawn.items():
            at = tail.schema.get_field_index(name)
            tail = tail.set_column(at, tail.schema.field(at), pa.array(column, tail.schema.field(at).type))
        return pa.concat_tables([head, tail])


@dataclass
class Ingested:
    """What two ingests say of the requests before a cut, split by split added up.

    Attributes:
        requests: that the first log holds; missing, extra: keys that only one of them holds.
        straddling: baskets with events on both sides of the cut, which are not compared.
        history, ties, positives, candidates: how many requests differ in that part; `ties` counts those whose
            window differs by more than the order within a second (looked at with new words only).
    """

    events: int = 0
    replaced: int = 0
    requests: int = 0
    missing: int = 0
    extra: int = 0
    straddling: int = 0
    history: int = 0
    ties: int = 0
    positives: int = 0
    candidates: int = 0


def compare_ingest(
    events: Path,
    config: IngestConfig,
    tail: Tail,
    data: DataConfig,
    folder: Path,
    plain: Path | None = None,
    every: int = 1,
    shown: Path | None = None,
) -> Ingested:
    """Ingests the events with and without noise from the cut on, and compares all requests before it.

    Args:
        data: how the logs are read; plain: an existing log of `events` and `config`.
        every: look only at users whose number is divisible by it; shown: the impressions, left as they are.
    """
    table = pq.read_table(events)
    noisy = tail.replaced(table, config)
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(noisy, folder / "events.parquet")
    one, other = plain or folder / "plain", folder / "noisy"
    if plain is None:
        ingest(events, one, config, impressions=shown)
    ingest(folder / "events.parquet", other, config, impressions=shown)
    outcome = Ingested(events=table.num_rows)
    outcome.replaced = int(pc.sum(pc.greater_equal(table[config.events.timestamp], tail.cut)).as_py() or 0)
    across = straddling(table, config, tail.cut)
    first = Which(tail.before or tail.cut, every, loose=tail.new_words)
    second = replace(first, words=translation(one, other))
    for split in read_manifest(one).splits:
        a = requests_of(data.model_copy(update={"log": one}), split, first)
        b = requests_of(data.model_copy(update={"log": other}), split, second)
        outcome.straddling += len(across & a.keys())
        for key in across:
            a.pop(key, None)
            b.pop(key, None)
        outcome.missing += len(a.keys() - b.keys())
        outcome.extra += len(b.keys() - a.keys())
        outcome.requests += len(a)
        for key in a.keys() & b.keys():
            outcome.history += a[key].history != b[key].history
            outcome.ties += a[key].times != b[key].times
            outcome.positives += a[key].positives != b[key].positives
            outcome.candidates += a[key].candidates != b[key].candidates
    return outcome


def requests_of(data: DataConfig, split: str, which: Which) -> dict[Key, View]:
    return views(data, split, which) if read_manifest(data.log).splits[split].requests else {}


def straddling(events: pa.Table, config: IngestConfig, cut: int) -> set[Key]:
    """Baskets that begin before the cut and end after it: noise rightly changes what was bought."""
    columns = config.events
    if not columns.request:
        return set()
    known = events.filter(pc.is_valid(events[columns.request]))
    spans = known.group_by([columns.user, columns.request]).aggregate(
        [(columns.timestamp, "min"), (columns.timestamp, "max")]
    )
    both = pc.and_(
        pc.less(spans[f"{columns.timestamp}_min"], cut),
        pc.greater_equal(spans[f"{columns.timestamp}_max"], cut),
    )
    found = spans.filter(both)
    return set(zip(found[columns.user].to_pylist(), found[columns.request].to_pylist(), strict=True))


def translation(one: Path, other: Path) -> dict[str, Ints]:
    """feature -> id in the other log -> id in the first; values that the first lacks become negative."""
    found = {}
    manifest = read_manifest(one)
    for name in [*manifest.features, *manifest.context]:
        file = name if name in manifest.features else f"context_{name}"
        tables = [pq.read_table(log / "vocab" / f"{file}.parquet") for log in (one, other)]
        known = dict(zip(tables[0]["value"].to_pylist(), tables[0]["id"].to_pylist(), strict=True))
        ids = np.zeros(tables[1].num_rows + 1, dtype=np.int64)
        for value, place in zip(tables[1]["value"].to_pylist(), tables[1]["id"].to_pylist(), strict=True):
            ids[place] = known.get(value, -place)
        found[name] = ids
    return found


# ---------------------------------------------------------------------------- command line


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.leaks")
    verbs = parser.add_subparsers(dest="verb", required=True)
    one = verbs.add_parser("log")
    one.add_argument("--log", type=Path, required=True)
    one.add_argument("--split", default="train")
    one.add_argument("--rows", type=int, default=10**9, help="users at most")
    two = verbs.add_parser("ingest")
    two.add_argument("--events", type=Path, required=True)
    two.add_argument("--config", type=Path, required=True)
    two.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    two.add_argument("--plain", type=Path, help="a log that these events and this config gave")
    two.add_argument("--cut", required=True, help="first day (UTC) of the noise")
    two.add_argument("--every", type=int, default=1, help="only users whose number it divides")
    two.add_argument("--new-words", action="store_true", help="noise has items of its own")
    for verb in (one, two):
        verb.add_argument("--search", action="append", default=[], help="a level of the hard search")
        verb.add_argument("--history-length", type=int, default=500)
        verb.add_argument("--delay", type=int, default=0, help="ingestion delay, seconds")
    given = parser.parse_args()
    data = DataConfig(
        log=getattr(given, "log", Path()),
        history_length=given.history_length,
        ingestion_delay=given.delay,
        search=SearchConfig(levels=tuple(given.search)),
    )
    with tempfile.TemporaryDirectory() as folder:
        if given.verb == "log":
            _print_log(data, given.split, given.rows, Path(folder))
        else:
            cut = int(datetime.fromisoformat(given.cut).replace(tzinfo=UTC).timestamp())
            tail = Tail(cut, new_words=given.new_words)
            config = load_ingest_config(given.config, given.set)
            where = Path(folder) / "logs"
            found = compare_ingest(given.events, config, tail, data, where, given.plain, given.every)
            print("| " + " | ".join(part.name for part in fields(found)) + " |")
            print("| " + " | ".join(f"{getattr(found, part.name):,}" for part in fields(found)) + " |")


def _print_log(data: DataConfig, split: str, rows: int, folder: Path) -> None:
    print(
        "| noise from | requests compared | behaviors replaced | requests differ | batches | batches differ |"
    )
    for early, name in ((False, "the request on"), (True, "the newest visible behavior on (control)")):
        found = compare_log(data, split, rows, folder / str(early), early)
        print(
            f"| {name} | {found.requests:,} | {found.replaced:,} | {found.differ:,} "
            f"| {found.batches:,} | {found.batches_differ:,} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
