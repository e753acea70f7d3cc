"""Rows of sequences that ranks ask each other for once: where that is done, and the kernel it needs.

What it does to training: `tests/embeddings/lookup/test_tables_on_ranks.py`.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from embeddings.groups import TableGroup, TableSpec
from embeddings.lookup.rounding import Comms
from embeddings.lookup.sharded import Exchange, SequenceSharder
from embeddings.lookup.sharding import sharders
from embeddings.optimizers import FusedOptimizer
from tests.programs.unique_indices import unique_indices

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
# Of three features; the last two are of one table.
ROWS = (4, 0, 6)
CUMSUM, GROUPS = torch.tensor([0, 4, 4, 10]), torch.tensor([0, 1, 3, 3])


@pytest.mark.parametrize(
    ("device", "ranks", "max_gradient", "comms", "expected"),
    [
        (GPU, 2, 0.0, Comms(), True),
        (GPU, 2, 0.0, Comms("fp16", "bf16"), True),
        # Nobody else to ask; no kernel; a bound or a scale that is each gradient's own.
        (GPU, 1, 0.0, Comms(), False),
        (CPU, 2, 0.0, Comms(), False),
        (GPU, 2, 1.0, Comms(), False),
        (GPU, 2, 0.0, Comms("fp32", "fp16"), False),
    ],
)
def test_rows_travel_once_between_gpus(
    device: torch.device, ranks: int, max_gradient: float, comms: Comms, expected: bool
) -> None:
    optimizer = FusedOptimizer(max_gradient=max_gradient)
    group = TableGroup("g", (TableSpec("item", 9, 8),), optimizer, kind="sequence")
    for told, found in ((None, expected), (True, True), (False, False)):
        (sharder,) = (s for s in sharders(comms, Exchange(told)) if isinstance(s, SequenceSharder))
        assert sharder.distinct(group, device, ranks) is found


def bags_of(ids: list[tuple[int, ...]]) -> tuple[torch.Tensor, torch.Tensor]:
    """One id a bag -> offsets and ids, feature by feature."""
    values = torch.tensor(ids, dtype=torch.int64).reshape(-1, len(ROWS)).T.reshape(-1)
    return torch.arange(values.numel() + 1), values


drawn = given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=20)
)


@drawn
def test_each_id_of_a_table_is_there_once(ids: list[tuple[int, ...]]) -> None:
    offsets, values = bags_of(ids)
    lengths, begins, distinct, place = unique_indices(CUMSUM, GROUPS, offsets, values)
    assert torch.equal(distinct[place], values) and torch.equal(begins.diff(), lengths)
    first, both = set(values[: len(ids)].tolist()), set(values[len(ids) :].tolist())
    assert distinct.tolist() == [*sorted(first), *sorted(both)]
    parts = lengths[: len(ids)], lengths[len(ids) :]
    assert [int(part.sum()) for part in parts] == [len(first), len(both)]
    assert all(int(part.max() - part.min()) <= 1 for part in parts)


@pytest.mark.gpu
@drawn
def test_fbgemms_kernel_is_what_the_tests_take_it_for(ids: list[tuple[int, ...]]) -> None:
    given = (CUMSUM, GROUPS, *bags_of(ids))
    found = torch.ops.fbgemm.jagged_unique_indices(*(tensor.cuda() for tensor in given))
    assert all(torch.equal(a.cpu(), b) for a, b in zip(found, unique_indices(*given), strict=True))
