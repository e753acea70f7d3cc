"""Ids that several tables look up travel once.

TorchRec gives every table its own copy of its feature's ids before they are exchanged: `input_dist` of
`ShardedEmbeddingBagCollection` (1.8) permutes the ids with a feature's index as often as tables look it up.
With M sets each id would travel M times in the one exchange. Here the exchange is made for some of the tables
only, such that every rank gets each feature that it needs once, and each rank repeats what it got.

What a rank gets of a feature does not depend on the table: all of it (whole tables and column shards), or the
ids of one block of rows (row-wise types), which is the same for tables of as many rows, as those of one
feature are in a group. So neither a vector nor an update changes, to the bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torchrec.distributed.embedding_types import KJTList
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.distributed.types import ShardingEnv
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embeddings.private import exchanging_by, features_on


class Placed(NamedTuple):
    """A table of a group, the feature that it looks up, and the ranks of its shards."""

    table: str
    feature: str
    ranks: tuple[int, ...]


def senders(placed: Sequence[Placed], device: str) -> list[str]:
    """The tables for which ids are sent, so that all tables have theirs.

    Where the tables of a rank do not look up its features in turn, repeating ids takes a permutation, for
    which the host must know how many there are. It does not wait for a GPU to say so: all tables are named.

    Args:
        placed: tables of one group that are sharded in one way, in their order; device: `cpu` or `cuda`.
    """
    if device != "cpu" and not _in_turn(placed):
        return [each.table for each in placed]
    reached: dict[str, set[int]] = {}
    sending = []
    # Those on most ranks first, for they may spare others.
    for each in sorted(placed, key=lambda each: -len(each.ranks)):
        ranks = reached.setdefault(each.feature, set())
        if not ranks.issuperset(each.ranks):
            sending.append(each.table)
            ranks.update(each.ranks)
    return sending


def _in_turn(placed: Sequence[Placed]) -> bool:
    """Whether each rank has tables of all its features in one order, then again, and so on."""
    features: dict[int, list[str]] = {}
    for each in placed:
        for rank in each.ranks:
            features.setdefault(rank, []).append(each.feature)
    return all(found == _turns(list(dict.fromkeys(found)), found) for found in features.values())


def _turns(once: list[str], wanted: list[str]) -> list[str]:
    """As many times `once` as `wanted` has room for."""
    return once * (len(wanted) // max(len(once), 1))


class SharedIds:
    """Makes the exchange of ids of a sharded collection whose tables share features.

    Args:
        collection: newly made; env, device, codecs: what it was made with.
    """

    def __init__(
        self, collection: ShardedEmbeddingBagCollection, env: ShardingEnv, device: torch.device, codecs: Any
    ) -> None:
        self._collection = collection
        self._shardings, self._wanted = [], []
        for infos in collection.sharding_type_to_sharding_infos.values():
            placed = [
                Placed(info.embedding_config.name, feature, tuple(info.param_sharding.ranks))
                for info in infos
                for feature in info.embedding_config.feature_names
            ]
            sending = set(senders(placed, device.type))
            make = collection.create_embedding_bag_sharding
            given: dict[str, Any] = {"permute_embeddings": True, "qcomm_codecs_registry": codecs}
            self._wanted.append(features_on(make(infos, env, device, **given), env.rank))
            chosen = [info for info in infos if info.embedding_config.name in sending]
            self._shardings.append(make(chosen, env, device, **given))

    def exchanging(self) -> AbstractContextManager[None]:
        """Within this context the collection exchanges each feature once."""
        return exchanging_by(self._collection, self._shardings)

    def repeated(self, received: KJTList) -> KJTList:
        """What this rank got, with the ids of each feature as often as its tables look it up."""
        return KJTList([_repeated(ids, wanted) for ids, wanted in zip(received, self._wanted, strict=True)])


def _repeated(ids: KeyedJaggedTensor, wanted: list[str]) -> KeyedJaggedTensor:
    keys = ids.keys()
    if keys == wanted:
        return ids
    if wanted != _turns(keys, wanted):
        return ids.permute([keys.index(feature) for feature in wanted])
    times, lengths = len(wanted) // len(keys), ids.length_per_key_or_none()
    return KeyedJaggedTensor(
        keys=wanted,
        values=ids.values().repeat(times),
        lengths=ids.lengths().repeat(times),
        stride=ids.stride(),
        length_per_key=None if lengths is None else lengths * times,
    )
