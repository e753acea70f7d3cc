"""Hot rows: the same bits as without, the rows that are asked for most, and no more memory than given."""

from __future__ import annotations

from collections import Counter, defaultdict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import embeddings.lookup.hot_rows as hot_rows_module
from embeddings.groups import TableGroup, TableSpec
from embeddings.lookup.hot_rows import HotRows, keep_hot_rows, total
from embeddings.lookup.plain import PlainBagCollection
from embeddings.lookup.stored import WIDTHS, Dtype, PatchedRows, StoredTable, rows_at, sum_bags, to_stored
from tests.helpers.models import drawing

_ROWS, _DIM = 300, 6
# Of which a few are named again and again.
_IDS = st.lists(st.one_of(st.integers(0, _ROWS - 1), st.integers(0, 7)), max_size=60)


def table_of(dtype: Dtype, patched: bool) -> StoredTable:
    rows = torch.randn(_ROWS, _DIM, generator=drawing(1))
    rows[5, 0] = -0.0
    stored = to_stored(rows, dtype)
    if not patched:
        return stored
    whole = to_stored(torch.randn(_ROWS - 10, _DIM, generator=drawing(2)), dtype)
    changed = torch.tensor([3, 7, *range(_ROWS - 10, _ROWS)])
    return PatchedRows(_ROWS, whole, [(changed, stored[changed])])


def same(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    """To the bit: zero has two forms."""
    return found.dtype == wanted.dtype and found.numpy().tobytes() == wanted.numpy().tobytes()


@settings(max_examples=30)
@given(
    dtype=st.sampled_from(WIDTHS),
    patched=st.booleans(),
    size=st.integers(0, 12_000),
    calls=st.lists(_IDS, min_size=1, max_size=6),
    kept=st.lists(st.integers(-3, _ROWS + 3), max_size=200),
)
def test_rows_and_sums_are_the_same_bits_whatever_is_hot(
    dtype: Dtype, patched: bool, size: int, calls: list[list[int]], kept: list[int]
) -> None:
    table = table_of(dtype, patched)
    hot = HotRows(table, size)
    assert (hot.shape, hot.dtype) == (table.shape, table.dtype)
    hot.keep(np.array(kept, dtype=np.int64).repeat(2))
    for call in calls:
        ids = torch.tensor(call, dtype=torch.int64)
        assert same(hot.index_select(ids), rows_at(table, ids))
        offsets = torch.tensor([0, len(call) // 3, len(call) // 3, len(call)])
        assert same(sum_bags(hot, ids, offsets), sum_bags(table, ids, offsets))
        hot.wait()


@settings(max_examples=25)
@given(ids=st.lists(st.integers(-2, 400), max_size=300), sets=st.integers(1, 5))
def test_the_rows_that_were_named_most_are_kept(ids: list[int], sets: int) -> None:
    """Against plain counting: of each set the most frequent above one, of equal ones the smallest ids."""
    table = table_of("fp32", patched=False)
    hot = HotRows(table, sets * 8 * (4 * _DIM + 24))
    hot.keep(np.array(ids, dtype=np.int64))
    of_set: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for known, count in Counter(each for each in ids if 0 <= each < _ROWS).items():
        if count < 2:
            continue
        of_set[(((known * 5_700_357_409_661_599_241) >> 32) & 0x7FFF_FFFF) % sets].append((-count, known))
    expected = {known for each in of_set.values() for _, known in sorted(each)[:8]}
    assert hot._kept is not None and hot.counts.kept == len(expected)
    keys, rows = hot._kept.keys.flatten(), hot._kept.rows
    real = keys != torch.iinfo(torch.int64).min
    assert sorted(keys[real].tolist()) == sorted(expected)
    assert same(rows[real], rows_at(table, keys[real]))
    # Those that are kept already need be named but once more.
    hot.keep(np.array([*expected, *range(_ROWS - 5, _ROWS)]))
    kept = set(hot._kept.keys.flatten().tolist()) - {torch.iinfo(torch.int64).min}
    assert expected <= kept <= expected | set(ids)


def test_what_is_asked_for_becomes_hot_and_memory_is_bounded() -> None:
    table = torch.randn(5_000, 16, generator=drawing(3))
    size = 40_000
    hot = HotRows(table, size)
    rng = np.random.default_rng(0)
    favorites = torch.from_numpy(rng.permutation(5_000)[:100])
    for _ in range(30):
        few = favorites[torch.from_numpy(rng.integers(0, 100, 90))]
        many = torch.from_numpy(rng.integers(0, 5_000, 10))
        hot.index_select(torch.cat([few, many]))
        hot.wait()
    before = hot.counts
    assert before.looked_up == 3_000 and before.kept > 100
    hot.index_select(favorites)
    # A set may have more favorites than places.
    assert hot.counts.hot - before.hot >= 95
    kept = hot._kept
    assert kept is not None and kept.rows.nbytes + kept.keys.nbytes + hot._notes.nbytes <= size
    assert set(hot.noted().tolist()) <= set(range(5_000)) and hot.noted().size <= hot._notes.size


@pytest.mark.parametrize("size", [0, 10, 100_000])
@pytest.mark.parametrize("wrong", [-1, _ROWS, torch.iinfo(torch.int64).min])
def test_an_id_outside_of_the_table_is_an_error(size: int, wrong: int) -> None:
    hot = HotRows(table_of("fp32", patched=False), size)
    hot.keep(np.arange(-5, _ROWS + 5).repeat(2))
    with pytest.raises((IndexError, RuntimeError)):
        hot.index_select(torch.tensor([1, wrong]))
    assert hot.index_select(torch.zeros(0, dtype=torch.int64)).shape == (0, _DIM)


def test_large_tables_of_collections_share_the_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    group = TableGroup("g", (TableSpec("a", 40, 4), TableSpec("b", 400, 4), TableSpec("c", 800, 4)))
    weights: dict[str, StoredTable] = {
        group.table_name(table): torch.randn(table.rows, table.dim, generator=drawing(table.rows))
        for table in group.tables
    }
    collection = PlainBagCollection(group, weights)
    assert keep_hot_rows([collection], 0) == {} and total({}) == (0, 0, 0)
    assert keep_hot_rows([collection], 9_000) == {}
    monkeypatch.setattr(hot_rows_module, "SMALL", 1_000)
    found = keep_hot_rows([collection], 9_000)
    assert [(name, table.size) for name, table in found.items()] == [("g__b", 3_000), ("g__c", 6_000)]
    assert collection.tables() == {"g__a": collection.g__a, **found}
    assert isinstance(collection.g__a, torch.Tensor) and torch.equal(collection.g__a, weights["g__a"])
    for table in found.values():
        table.index_select(torch.arange(3))
    assert total(found).looked_up == 6
    with pytest.raises(AttributeError):
        collection.put("other", weights["g__a"])
