"""Noise in raw events, from a time on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from benchmarks.leaks.views import Ints, Key, Selection, View, views
from pipelines.ingest.config import IngestConfig
from pipelines.ingest.ingest import ingest
from trainer.config.sections import DataConfig
from trainer.log.schema import read_manifest


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
        """The events with noise: users, times and items are drawn uniformly, and baskets are new."""
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
class IngestComparison:
    """The comparison of two ingests, over all requests before a cut and all splits.

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
) -> IngestComparison:
    """Ingest the events with and without noise from the cut on, and compare all requests before the cut.

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
    outcome = IngestComparison(events=table.num_rows)
    outcome.replaced = int(pc.sum(pc.greater_equal(table[config.events.timestamp], tail.cut)).as_py() or 0)
    across = straddling(table, config, tail.cut)
    first = Selection(tail.before or tail.cut, every, loose=tail.new_words)
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


def requests_of(data: DataConfig, split: str, selection: Selection) -> dict[Key, View]:
    return views(data, split, selection) if read_manifest(data.log).splits[split].requests else {}


def straddling(events: pa.Table, config: IngestConfig, cut: int) -> set[Key]:
    """Baskets that begin before the cut and end after it. Noise changes their positives, as it should."""
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
    """feature -> id in the other log -> id in the first. A value that the first lacks gets a negative id."""
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
