"""Baselines that any trained model must beat, from the same log and on the same candidates."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from embeddings.errors import DataError
from trainer.data.blocks import visible_ends
from trainer.data.reader import SequenceLogReader
from trainer.data.rows import Columns, UserRows, read_rows
from trainer.data.schema import read_manifest
from trainer.metrics import auc, group_keys, grouped_auc

Floats = npt.NDArray[np.float64]


def baselines(reader: SequenceLogReader, feature: str) -> Mapping[str, Mapping[str, float]]:
    """AUC and GAUC of scores that need no training.

    `popularity`: how often the candidate's item occurred before the validation period. `category_count`:
    how often the user's own visible history holds the candidate's value of `feature`; `item_count`: how
    often it holds the very item. None is a probability, so none has a logloss.

    Args:
        reader: of the split to score; its whole histories are used, whatever the window.
        feature: the log feature that `category_count` counts, with one id a behavior and candidate.
    """
    popularity = item_counts(reader.config.log)
    manifest = read_manifest(reader.config.log)
    columns = Columns.of(manifest, {name: manifest.features[name].rows for name in ("item_id", feature)})
    parts: dict[str, list[Floats]] = {"popularity": [], "category_count": [], "item_count": []}
    labels, keys = [], []
    for place in reader.row_groups:
        rows = read_rows(place.file, place.row_group, columns)
        parts["popularity"].append(popularity[rows.candidates["item_id"].values])
        for name, counted in (("category_count", feature), ("item_count", "item_id")):
            parts[name].append(_past_counts(rows, counted, reader.config.ingestion_delay))
        labels.append(rows.labels[:, 0].astype(np.float64))
        requests = np.repeat(np.arange(rows.request_id.size), np.diff(rows.candidate_offsets))
        users = np.repeat(rows.user_id, np.diff(rows.request_offsets))
        keys.append(np.stack([users[requests], rows.request_id[requests]], axis=1))
    label, key = np.concatenate(labels), np.concatenate(keys)
    groups = group_keys(key[:, 0], key[:, 1])
    table = {}
    for name, values in parts.items():
        score = np.concatenate(values)
        table[name] = {"auc": auc(score, label), "gauc": grouped_auc(score, label, groups)[0]}
    return table


def item_counts(log: Path) -> Floats:
    """Occurrences of every item id before the validation period, from the log's vocabulary."""
    file = log / "vocab" / "item_id.parquet"
    try:
        table = pq.read_table(file, columns=["id", "count"])
    except (FileNotFoundError, pa.ArrowException) as error:
        raise DataError(f"the popularity baseline needs the log's vocabulary: {error}", file=file) from None
    ids, counts = table.column("id").to_numpy(), table.column("count").to_numpy()
    dense = np.zeros(int(ids.max(initial=0)) + 1)
    dense[ids] = counts
    return dense


def _past_counts(rows: UserRows, feature: str, delay: int) -> Floats:
    history, candidates = rows.history[feature].values, rows.candidates[feature].values
    counts = np.zeros(candidates.size)
    for row in range(rows.user_id.size):
        base = int(rows.history_offsets[row])
        first, last = int(rows.request_offsets[row]), int(rows.request_offsets[row + 1])
        for request, end in zip(range(first, last), visible_ends(rows, row, first, last, delay), strict=True):
            part = slice(int(rows.candidate_offsets[request]), int(rows.candidate_offsets[request + 1]))
            values, found = np.unique(history[base : base + int(end)], return_counts=True)
            place = np.searchsorted(values, candidates[part]).clip(max=max(values.size - 1, 0))
            if values.size:
                counts[part] = np.where(values[place] == candidates[part], found[place], 0)
    return counts
