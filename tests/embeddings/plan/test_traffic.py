"""Bytes that the plan predicts against those that TorchRec's collectives are given on two ranks."""

from __future__ import annotations

import json

import pytest

from embeddings.lookup.rounding import Comms
from embeddings.plan.traffic import Lookup, traffic
from tests.helpers.launching import launched
from tests.programs.count_bytes import COMMS

ROWS, DIM, BAGS = 40, 8, 12


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[int]]:
    out = tmp_path_factory.mktemp("bytes") / "bytes.json"
    done = launched("tests.programs.count_bytes", *map(str, (ROWS, DIM, BAGS)), str(out), ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, list[int]] = json.loads(out.read_text())
    return found


@pytest.mark.parametrize("kind", ["bag", "sequence"])
@pytest.mark.parametrize(("sharding", "shards"), [("table_wise", 1), ("row_wise", 1), ("column_wise", 2)])
@pytest.mark.parametrize("comms", COMMS, ids=str)
def test_the_formulae_are_what_torchrec_sends(
    counted: dict[str, list[int]], kind: str, sharding: str, shards: int, comms: Comms
) -> None:
    table, asked = ((ROWS, DIM), sharding, shards), Lookup(BAGS, BAGS)
    said = traffic(*table, asked, 2, 2, kind == "bag", comms.wire)
    sent = counted[f"{kind} {sharding} {comms.forward} {comms.backward}"]
    assert [said.ids, said.forward, said.backward] == sent


def test_row_wise_bags_grow_with_the_ranks_and_sequences_do_not() -> None:
    table, lookup = ((10**9, 64), "row_wise", 1), Lookup(10**6, 10**6)
    bag = [traffic(*table, lookup, ranks, 8, True).forward for ranks in (8, 16, 64)]
    sequence = [traffic(*table, lookup, ranks, 8, False).forward for ranks in (8, 16, 64)]
    assert [b / s for b, s in zip(bag, sequence, strict=True)] == pytest.approx([8, 16, 64])
    assert sequence[-1] < 10**6 * 64 * 4


def test_a_table_on_one_node_sends_once_around_it_and_once_across() -> None:
    table, lookup = ((10**9, 64), "table_row_wise", 1), Lookup(1000, 1000)
    sent = traffic(*table, lookup, 16, 8, True)
    assert sent.forward == (7 + 1 / 2) * 1000 * 64 * 4
    assert sent.ids == 15 / 16 * (8 * 1000 * 4 + 1000 * 8)
    # Nodes of one rank: the same as a table on one rank.
    assert traffic(*table, lookup, 16, 1, True) == traffic((10**9, 64), "table_wise", 1, lookup, 16, 1, True)


def test_data_parallel_tables_reduce_whole_gradients() -> None:
    sent = traffic((100, 8), "data_parallel", 1, Lookup(5, 5), 4, 4, True)
    assert (sent.ids, sent.forward, sent.backward) == (0, 0, 2 * 3 * 100 * 8 * 4)


def test_one_rank_sends_nothing() -> None:
    for sharding in ("table_wise", "row_wise", "table_row_wise", "column_wise", "data_parallel"):
        for pooled in (True, False):
            assert traffic((100, 8), sharding, 1, Lookup(5, 5), 1, 1, pooled).total == 0
