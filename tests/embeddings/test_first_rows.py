"""First weights: a function of seed, table, row and column only."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from embeddings.first_rows import FirstWeights, initial_rows_, initial_rows_at_, table_seed


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.integers(1, 12), st.data())
def test_a_shard_holds_what_the_whole_table_holds(
    seed: int, rows: int, columns: int, data: st.DataObject
) -> None:
    first = FirstWeights(data.draw(st.sampled_from(["uniform", "normal"])), 0.5)
    whole = initial_rows_(torch.empty(rows, columns), seed, first)
    row, column = data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, columns - 1))
    shard = initial_rows_(torch.empty(rows - row, columns - column), seed, first, row, column)
    assert torch.equal(shard, whole[row:, column:])
    some = torch.tensor(sorted(data.draw(st.sets(st.integers(0, rows - row - 1)))), dtype=torch.int64)
    again = initial_rows_at_(torch.full_like(shard, 9), some, seed, first, row, column)
    assert torch.equal(again[some], shard[some]) and int((again == 9).all(1).sum()) == len(shard) - len(some)


def test_values_are_uniform_and_unrelated_between_tables() -> None:
    a = initial_rows_(torch.empty(4000, 16), table_seed(1, "a"), FirstWeights(scale=0.5))
    b = initial_rows_(torch.empty(4000, 16), table_seed(1, "b"), FirstWeights(scale=0.5))
    assert a.abs().max() <= 0.5 and abs(float(a.mean())) < 0.005
    assert abs(float(a.std()) - 1 / 12**0.5) < 0.005
    assert abs(float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])) < 0.01
    columns = torch.corrcoef(a.T) - torch.eye(16)
    assert columns.abs().max() < 0.08


def test_rows_beyond_32_bits_differ() -> None:
    low = initial_rows_(torch.empty(4, 4), 7, FirstWeights(), row_offset=5)
    high = initial_rows_(torch.empty(4, 4), 7, FirstWeights(), row_offset=5 + 2**32)
    assert not torch.equal(low, high)


def test_normal_weights_have_the_deviation_asked_for() -> None:
    weight = initial_rows_(torch.empty(4000, 16), 3, FirstWeights("normal", 0.01)) / 0.01
    assert abs(float(weight.mean())) < 0.02 and abs(float(weight.std()) - 1) < 0.02
    assert abs(float((weight**4).mean()) - 3) < 0.2 and weight.isfinite().all()
