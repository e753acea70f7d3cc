"""What the rows of a table stand for, and how often and when training has seen that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow.parquet as pq

from embeddings.errors import DataError
from embeddings.ids.rules import IdRules
from pipelines.analyze.runs import AnalysedRun, NamedTable
from trainer.analysis.lookups import NEVER, lookups_of
from trainer.checkpoint.id_files import SavedMaps
from trainer.checkpoint.plain_ids import living_columns
from trainer.log.arrow import PARQUET_ERRORS
from trainer.log.schema import VOCABULARIES, LogManifest
from trainer.quality.ranking import Bools, Ints
from trainer.storage.ranges import parquet_source

# Ids that are read of the training split for all features of a log together, and at least for each.
_MOST, _LEAST = 100_000_000, 5_000_000


@dataclass(frozen=True)
class IdsOfTable:
    """The ids of a table's rows.

    Attributes:
        count: [rows], look-ups; last: [rows], when the id was seen last, seconds, `NEVER` = never.
        owned: [rows], whether a row stands for an id of its own.
        now: time of the newest request. read: the share of the training split that was counted; of rows
            without a look-up, one of a whole split was never seen.
        counted: what `count` counts, in words.
        ids: of rows of ids that come and go, the raw id; None where a row's number is its id.
    """

    count: Ints
    last: Ints
    owned: Bools
    now: int
    read: float
    counted: str
    ids: Ints | None = None

    @property
    def complete(self) -> bool:
        return self.read == 1

    @property
    def seen(self) -> Bools:
        seen: Bools = self.last > NEVER
        return seen


def ids_of(run: AnalysedRun, table: NamedTable) -> IdsOfTable:
    """What the rows of a table stand for.

    Of ids that come and go, the map of the checkpoint says it; of others, the training split.

    Raises:
        DataError: the training split is missing, malformed, or has no such feature.
        CheckpointError: the map cannot be read.
    """
    rows, saved = table.spec.rows, SavedMaps.open(run.checkpoint)
    if (rules := saved.rules().get(table.spec.key)) is not None:
        return _of_map(saved, table.spec.key, rules, rows)
    known = run.manifest.features | run.manifest.context
    feature = table.spec.feature
    if feature not in known or known[feature].encoder is not None:
        raise DataError(f"ids of {feature} are not counted: they are made of numbers while the log is read")
    most = max(_LEAST, _MOST // max(1, len({each.spec.feature for each in run.tables()})))
    found = lookups_of(run.config.data, run.manifest, feature, rows, most)
    owned = np.arange(rows) < known[feature].rows
    counted = "look-ups in the training split"
    return IdsOfTable(found.count, found.last, owned, found.newest, found.read, counted)


def _of_map(saved: SavedMaps, name: str, rules: IdRules, rows: int) -> IdsOfTable:
    columns = living_columns(saved, name)
    own = columns["rows"]
    count, last = np.zeros(rows, dtype=np.int64), np.full(rows, NEVER)
    ids, owned = np.zeros(rows, dtype=np.int64), np.zeros(rows, dtype=np.bool_)
    count[own], last[own], ids[own], owned[own] = columns["uses"], columns["last"], columns["ids"], True
    # Least recently used ids alone need no count: then each counts once.
    counted = f"sightings as the eviction {rules.eviction} counts them"
    return IdsOfTable(count, last, owned, saved.clock[0], 1.0, counted, ids)


def names_of(run: AnalysedRun, feature: str, ids: IdsOfTable, rows: Ints) -> list[str]:
    """What some rows are called: by the log's vocabulary, by their raw ids, or by their numbers."""
    if ids.ids is not None:
        names = {row: str(ids.ids[row]) for row in rows.tolist() if ids.owned[row]}
        return [names.get(row, f"shared row {row}") for row in rows.tolist()]
    return names_by_vocabulary(run, feature, rows)


def names_by_vocabulary(run: AnalysedRun, feature: str, ids: Ints) -> list[str]:
    """What some ids of the log are called: by its vocabulary, or by their numbers; 0 is unknown."""
    values = _values(run.manifest, run, feature, np.sort(ids))
    return ["unknown" if number == 0 else str(values.get(number, number)) for number in ids.tolist()]


def _values(manifest: LogManifest, run: AnalysedRun, feature: str, rows: Ints) -> Mapping[int, object]:
    """Row -> value of the vocabulary, of those that can be read; only row groups with such a row are."""
    info = (manifest.features | manifest.context)[feature]
    if not info.vocabulary:
        return {}
    file, values = run.config.data.log / VOCABULARIES / f"{feature}.parquet", dict[int, object]()
    try:
        with pq.ParquetFile(parquet_source(file), page_checksum_verification=True) as parquet:
            first = 1
            for group in range(parquet.num_row_groups):
                count = parquet.metadata.row_group(group).num_rows
                here = rows[(rows >= first) & (rows < first + count)]
                if here.size:
                    table = parquet.read_row_group(group, columns=["value"])
                    chosen = table.column("value").take((here - first).tolist()).to_pylist()
                    values.update(zip(here.tolist(), chosen, strict=True))
                first += count
    except (*PARQUET_ERRORS, KeyError):
        # Numbers stand for names then: no figure depends on them.
        return values
    return values
