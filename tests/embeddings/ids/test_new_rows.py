"""Rows that are given to new ids; that real shards get them too is shown in `tests.programs.forked_rows`."""

from __future__ import annotations

import numpy as np
import torch

from embeddings.first_rows import FirstWeights, initial_rows_, table_seed
from embeddings.groups import EmbeddingSet, TableGroup, TableSpec
from embeddings.ids.new_rows import NewRows
from embeddings.lookup.touched import ShardKey

SEED = 3


def test_rows_of_lanes_begin_as_zeros_and_keys_of_their_own_are_apart() -> None:
    """A row shard and a column shard of main tables, a lane, and a table that another map's rows are for."""
    lanes = TableGroup(
        "lanes", (TableSpec("item", 40, 4),), first=FirstWeights("normal", 0.3),
        sets=(EmbeddingSet(losses=("click", "buy")),),
    )  # fmt: skip
    small = TableGroup("small", (TableSpec("item", 9, 4, apart="item@small"),))
    main, lane = (lanes.table_name(table) for table in lanes.all_tables)
    keys = [ShardKey(main, 10, 0), ShardKey(main, 0, 2), ShardKey(lane, 0, 0), ShardKey("small__item", 0, 0)]
    sizes = [(30, 4), (40, 2), (40, 4), (9, 4)]
    parts = {key: (torch.ones(size), torch.ones(size[0])) for key, size in zip(keys, sizes, strict=True)}
    NewRows([lanes, small], SEED, parts).begin(
        {"item": np.array([2, 10, 39]), "item@small": np.array([5]), "other": np.array([1])}
    )
    first = initial_rows_(torch.empty(40, 4), table_seed(SEED, main), lanes.first)
    own = initial_rows_(torch.empty(9, 4), table_seed(SEED, "small__item"), small.first)
    expected = [
        (first[10:], [0, 29]),
        (first[:, 2:], [2, 10, 39]),
        (torch.zeros(40, 4), [2, 10, 39]),
        (own, [5]),
    ]
    for key, (new, rows) in zip(keys, expected, strict=True):
        weight, state = parts[key]
        others = np.setdiff1d(np.arange(len(weight)), rows)
        assert torch.equal(weight[rows], new[rows]) and (weight[others] == 1).all(), key
        assert (state[rows] == 0).all() and (state[others] == 1).all(), key


def test_no_new_rows_change_nothing() -> None:
    group = TableGroup("g", (TableSpec("item", 5, 2),))
    parts = {ShardKey("g__item", 0, 0): (torch.ones(5, 2), torch.ones(5))}
    NewRows([group], SEED, parts).begin({"item": np.zeros(0, dtype=np.int64)})
    assert all((part == 1).all() for part in parts[ShardKey("g__item", 0, 0)])
