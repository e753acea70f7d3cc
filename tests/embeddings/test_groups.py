"""Groups with several sets of tables: their names, the columns of each set, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from embeddings.errors import ConfigError
from embeddings.first_rows import FirstWeights, initial_rows_, table_seed
from embeddings.groups import EmbeddingSet, TableGroup, TableName, TableSpec, with_lanes
from embeddings.lookup.compile import make_collection
from embeddings.lookup.jagged import one_id_bags, vectors_in_order
from tests.helpers.tables import FEATURES, sets_of


@given(
    dims=st.lists(st.lists(st.sampled_from([4, 8, 12]), min_size=2, max_size=2), min_size=1, max_size=4),
    fusion=st.sampled_from(["concat", "sum"]),
    seed=st.integers(0, 99),
)
def test_columns_of_a_set_are_what_a_collection_of_that_set_alone_gives(
    dims: list[list[int]], fusion: str, seed: int
) -> None:
    """Whatever their widths; TorchRec names and orders the outputs as the group does."""
    if fusion == "sum":
        dims = [[width, width] for width, _ in dims]
    group = sets_of(dims, fusion=fusion)
    whole = make_collection(group, torch.device("cpu"))
    rng = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randint(0, rows, (6,), generator=rng) for rows in FEATURES.values()])
    bags = one_id_bags(list(FEATURES), ids)
    pooled = whole(bags)
    assert pooled.keys() == group.keys
    vectors = group.fuse(vectors_in_order(pooled, group.keys))
    assert vectors.shape == (6, group.width) and group.width == sum(group.widths())
    for name in group.set_names:
        alone = group.of_set(name)
        collection = make_collection(alone, torch.device("cpu"))
        collection.load_state_dict({key: whole.state_dict()[key] for key in collection.state_dict()})
        expected = alone.fuse(vectors_in_order(collection(bags), alone.keys))
        assert torch.equal(vectors[:, group.columns(name)], expected)
    with pytest.raises(KeyError):
        group.of_set("other")


def test_names_of_tables_say_where_they_belong() -> None:
    one, several = TableGroup("my__group", (TableSpec("shop", 4, 8),)), sets_of([[4, 8], [4, 8]])
    assert one.keys == ["shop"] and one.table_name(one.tables[0]) == "my__group__shop"
    names = [several.table_name(table) for table in several.tables]
    assert names == ["g/0/item", "g/0/shop", "g/1/item", "g/1/shop"]
    assert [TableName.of(name) for name in names] == [
        TableName("g", table.set, table.feature) for table in several.tables
    ]
    assert TableName.of("attention__item_id") == TableName("attention", "", "item_id")
    assert TableName.of("layers") is None
    assert TableName.of("attention__item_id/buy") == TableName("attention", "", "item_id", "buy")
    assert TableName.of("g/0/item/buy") == TableName("g", "0", "item", "buy")
    assert TableName.of("g/0/item/buy/more") is None


@given(
    widths=st.lists(st.sampled_from([4, 8]), min_size=1, max_size=4),
    owners=st.lists(st.sampled_from(["shared", "task:a", "domain:2"]), min_size=4, max_size=4),
    fusion=st.sampled_from(["concat", "sum"]),
    losses=st.fixed_dictionaries(
        {owner: st.lists(st.sampled_from("abc"), unique=True) for owner in ("shared", "task:a", "domain:2")}
    ),
    seed=st.integers(0, 99),
)
def test_lanes_are_columns_of_the_sets_that_several_losses_reach(
    widths: list[int], owners: list[str], fusion: Any, losses: dict[str, list[str]], seed: int
) -> None:
    """A collection gives them behind the main tables; they add up to what one table of sums would give."""
    group = sets_of([[width, width] for width in widths], fusion=fusion)
    named = tuple(replace(each, owner=owner) for each, owner in zip(group.sets, owners, strict=False))
    plain = replace(group, sets=named)
    group = with_lanes({"g": plain}, losses.__getitem__)["g"]
    others = {each.name: losses[each.owner][1:] for each in named}
    assert set(group.lanes) == {task for tasks in others.values() for task in tasks}
    assert {(table.set, table.lane) for table in group.all_tables if table.lane} == {
        (name, task) for name, tasks in others.items() for task in tasks
    }
    count = len(plain.tables) + sum(map(len, others.values())) * len(FEATURES)
    assert len(group.all_tables) == count
    for name in group.set_names:
        assert group.of_set(name).width == plain.of_set(name).width
    looked_up = (plain.of_set(name).width * (1 + len(tasks)) for name, tasks in others.items())
    assert group.looked_up_width == sum(looked_up)
    names = [group.table_name(table) for table in group.all_tables]
    assert len(set(names)) == len(names) and group.tables == plain.tables and group.width == plain.width
    for table, name in zip(group.all_tables, names, strict=True):
        parts = TableName.of(name)
        assert parts == TableName("g", table.set, table.feature, table.lane) and str(parts) == name
        assert str(parts.main) in names and not parts.main.lane
    rng = torch.Generator().manual_seed(seed)
    collection = make_collection(group, torch.device("cpu"))
    rows = {
        name: torch.randn(weight.shape, generator=rng) for name, weight in collection.state_dict().items()
    }
    collection.load_state_dict(rows)
    ids = torch.stack([torch.randint(0, rows, (6,), generator=rng) for rows in FEATURES.values()])
    pooled = collection(one_id_bags(list(FEATURES), ids))
    assert sorted(pooled.keys()) == sorted(group.keys)
    main, lanes = group.fuse_lanes(vectors_in_order(pooled, group.keys))
    assert all(vectors.shape == group.lane_columns(task, main).shape for task, vectors in lanes.items())
    summed = group.add_lanes(main, lanes)
    folded = make_collection(plain, torch.device("cpu"))
    state = {name: rows[name].clone() for name in folded.state_dict()}
    for table, name in zip(group.all_tables, names, strict=True):
        if table.lane:
            main_table = str(TableName("g", table.set, table.feature))
            state[f"embedding_bags.{main_table}.weight"] += rows[f"embedding_bags.{name}.weight"]
    folded.load_state_dict(state)
    expected = plain.fuse(vectors_in_order(folded(one_id_bags(list(FEATURES), ids)), plain.keys))
    assert torch.allclose(summed, expected, atol=1e-5)


@pytest.mark.parametrize("order", [(0, 2, 1, 3), (0, 1, 3, 2), (0, 1, 2), (2, 3, 0, 1)])
def test_tables_that_are_not_whole_sets_are_refused(order: tuple[int, ...]) -> None:
    """Columns are told by the order, so that a manifest in another one would be misread."""
    group = sets_of([[4, 8], [4, 8]])
    with pytest.raises(ConfigError, match=r"groups.g: each of its sets \(0, 1\) must have a table of every"):
        TableGroup("g", tuple(group.tables[place] for place in order), sets=group.sets)


def test_sum_needs_one_width_within_each_set_only() -> None:
    assert sets_of([[4, 4], [8, 8]], fusion="sum").widths() == (4, 8)
    with pytest.raises(ConfigError, match='fusion = "sum" needs tables of one width, not item 4, shop 8'):
        sets_of([[4, 4], [4, 8]], fusion="sum")


def test_first_weights_differ_by_set() -> None:
    """Sets that began alike would get the same gradients from a mean over sets, and stay alike for good."""
    group = sets_of([[8, 8], [8, 8]])
    rows = [
        initial_rows_(torch.empty(t.rows, t.dim), table_seed(3, group.table_name(t)), FirstWeights())
        for t in group.tables
    ]
    for first, second in zip(rows[:2], rows[2:], strict=True):
        assert not (first == second).any(1).any()
    unnamed = TableGroup("g", (TableSpec("item", 9, 8),), sets=(EmbeddingSet(),))
    assert unnamed.table_name(unnamed.tables[0]) == "g__item"


def test_a_group_may_begin_with_the_numbers_of_another() -> None:
    tables = tuple(TableSpec(name, 50, 8) for name in ("item", "category"))
    query = TableGroup("query", tables)
    key = TableGroup("key", tables, first=FirstWeights("uniform", 0.1), like="query")
    for table in tables:
        seeds = [group.first_seed(5, group.table_name(table)) for group in (query, key)]
        first, like = (
            initial_rows_(torch.empty(50, 8), seed, group.first)
            for seed, group in zip(seeds, (query, key), strict=True)
        )
        torch.testing.assert_close(like, first * 2)
    assert len({query.first_seed(5, query.table_name(table)) for table in tables}) == 2
