"""Items before the model: each as a behavior and as a candidate, in a request that sees no history.

So the vectors of items come from the very modules that score requests, and no formula is written twice.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from trainer.data.batch import Clusters, RequestBatch
from trainer.log.bags import Bags, Ints
from trainer.snapshot.loading import Snapshot

_NONE: Ints = np.zeros(0, dtype=np.int64)


def item_batch(snapshot: Snapshot, items: Mapping[str, Bags], count: int) -> RequestBatch:
    """`count` items: N = C = `count`, behavior n and candidate n are item n; one request, an empty window.

    What is no property of an item is missing or zero: features of behaviors alone, the context, numbers,
    similarities with a history. Ids that come and go are rows of the tables already.

    Args:
        items: feature of the log -> ids of the items, or codes of numbers; only those of items are needed.
    """
    manifest = snapshot.manifest
    bags = _table_bags(snapshot, items)
    values: list[Ints] = []
    lengths: list[Ints] = []
    for key in manifest.recorded_features:
        given = manifest.table_inputs.get(key)
        own = bags.get(key)
        for wanted in (given is not None and given.of_behaviors, given is None or given.of_candidates):
            there = own is not None and wanted
            values.append(own.values.astype(np.int64) if own is not None and there else _NONE)
            lengths.append(own.lengths if own is not None and there else np.zeros(count, dtype=np.int64))
    features = KeyedJaggedTensor(
        keys=list(manifest.recorded_features),
        values=torch.from_numpy(np.concatenate([_NONE, *values])),
        lengths=torch.from_numpy(np.concatenate([_NONE, *lengths]).astype(np.int32)),
        stride=2 * count,
    )
    return snapshot.with_rows(_around(snapshot, features, count))


def _table_bags(snapshot: Snapshot, items: Mapping[str, Bags]) -> dict[str, Bags]:
    """The same by the features that tables have: an encoded number becomes its parts."""
    found: dict[str, Bags] = {}
    for name, bags in items.items():
        given = snapshot.manifest.inputs.get(name)
        if given is None or given.encoder is None:
            found[name] = bags
            continue
        lengths = bags.lengths
        for suffix, part in given.encoder.encode(bags.values.astype(np.int64)).items():
            spread = lengths.copy()
            spread[lengths > 0] = part.lengths
            found[f"{name}{suffix}"] = Bags.of_lengths(part.values, spread)
    return found


def _around(snapshot: Snapshot, features: KeyedJaggedTensor, count: int) -> RequestBatch:
    """A batch of these bags whose one request has all candidates and sees none of the behaviors."""
    manifest = snapshot.manifest
    zero, one = torch.zeros(1, dtype=torch.int64), torch.zeros(count, dtype=torch.int64)
    clusters = Clusters(one, one, one, zero) if manifest.config.data.clusters else None
    return RequestBatch(
        features=features,
        behavior_time=one,
        request_time=zero,
        window_start=zero,
        window_end=zero,
        seen=zero,
        user_id=zero,
        request_id=zero,
        candidate_request=one,
        labels=torch.full((count, len(manifest.tasks)), torch.nan),
        weight=torch.ones(count),
        numeric=torch.zeros(count, len(snapshot.numeric_names())),
        context=_no_context(manifest.recorded_context),
        retrieval=None,
        step_candidates=count,
        clusters=clusters,
        domain=one if manifest.config.data.domain else None,
    )


def _no_context(names: tuple[str, ...]) -> KeyedJaggedTensor | None:
    """One request without context: empty bags."""
    if not names:
        return None
    empty = torch.zeros(len(names), dtype=torch.int32)
    return KeyedJaggedTensor(list(names), torch.zeros(0, dtype=torch.int64), lengths=empty, stride=1)


@torch.no_grad()
def looked_up(snapshot: Snapshot, group: str, batch: RequestBatch) -> Tensor:
    """The vectors of a table group for behaviors and candidates, float32 [N + C, width]."""
    model = snapshot.model
    vectors: Tensor = model.lookups({group: model.collections[group](batch.features)})[group]
    return vectors
