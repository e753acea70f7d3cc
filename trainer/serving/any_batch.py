"""A batch of any requests, laid side by side as training lays the rows of a log: without Parquet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from trainer.config.sections import DataConfig
from trainer.data.batch import RequestBatch
from trainer.data.blocks import Block, LazyRows, with_windows
from trainer.data.collate import collate
from trainer.data.files import RowGroup
from trainer.data.row_group import FeatureIds
from trainer.data.rows import Columns, UserRows
from trainer.log.bags import Bags, Ints
from trainer.log.schema import FeatureInfo
from trainer.serving.request import Request

# A feature beside the others where an answer explains: each behavior's place in the request's history.
PLACE = "history place"


def any_batch(
    requests: Sequence[Request], columns: Columns, data: DataConfig, places: bool = False
) -> RequestBatch:
    """Requests as the reader would have laid them; with `places` under a key of their own."""
    if places:
        columns = replace(columns, features={**columns.features, PLACE: FeatureInfo(rows=1)})
    rows = _user_rows(requests, columns)
    windowed = with_windows(rows, data.history_length, data.ingestion_delay)
    blocks = []
    for r, request in enumerate(requests):
        lazy = LazyRows(RowGroup(Path("request"), r), lambda: windowed)
        blocks.append(Block((), r, r + 1, int(request.history.time.size), request.count, lazy))
    return collate(blocks, data, columns, int(rows.candidate_offsets[-1]))


def _user_rows(requests: Sequence[Request], columns: Columns) -> UserRows:
    """Every request as a user row of its own."""
    histories = [request.history for request in requests]
    behaviors = np.array([history.time.size for history in histories])
    counts = np.array([request.count for request in requests])
    behavior_features = [history.features for history in histories]
    if PLACE in columns.features:
        behavior_features = [{**h.features, PLACE: Bags(np.arange(h.time.size))} for h in histories]
    clusters: dict[str, Ints] = {}
    if columns.chunk:
        for name in ("cluster_size", "cluster_time"):
            clusters[name] = np.concatenate([getattr(history, name) for history in histories])
    numeric = [[request.numeric[name] for request in requests] for name in columns.numeric]
    candidates = _joined_features([request.candidates for request in requests], counts, columns.features)
    context = _joined_features([r.context for r in requests], np.ones_like(counts), columns.context)
    return UserRows.of_counts(
        behaviors=behaviors,
        requests=np.ones_like(counts),
        candidate_counts=counts,
        user_id=np.array([request.user_id for request in requests]),
        history=_joined_features(behavior_features, behaviors, columns.features),
        history_time=np.concatenate([history.time for history in histories]),
        request_time=np.array([request.time for request in requests]),
        history_end=np.array([np.searchsorted(request.history.time, request.time) for request in requests]),
        candidates=candidates,
        context=context,
        labels=np.zeros((int(counts.sum()), len(columns.tasks)), dtype=np.float32),
        numeric=np.stack([np.concatenate(each) for each in numeric], axis=1) if numeric else None,
        domain=columns.domain.of_candidates(candidates, context, counts) if columns.domain else None,
        **clusters,
    )


def _joined_features(
    parts: Sequence[Mapping[str, Bags]], sizes: Ints, names: Mapping[str, FeatureInfo]
) -> FeatureIds:
    """Ids of all requests; a feature that some request lacks has empty bags there."""
    none = np.zeros(0, dtype=np.int64)
    empty = [Bags.of_lengths(none, np.zeros(size, dtype=np.int64)) for size in sizes.tolist()]
    single: list[str] = []
    several: dict[str, Bags] = {}
    for name in names:
        if all(name in part and part[name].offsets is None for part in parts):
            single.append(name)
        elif any(name in part for part in parts):
            bags = [part.get(name, lacking) for part, lacking in zip(parts, empty, strict=True)]
            values = np.concatenate([each.values for each in bags])
            several[name] = Bags.of_lengths(values, np.concatenate([each.lengths for each in bags]))
    ids = np.empty((len(single), int(sizes.sum())), dtype=np.int64)
    for row, name in zip(ids, single, strict=True):
        np.concatenate([part[name].values for part in parts], out=row)
    return FeatureIds(single, ids, several)
