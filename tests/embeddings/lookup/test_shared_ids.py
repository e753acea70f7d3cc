"""Ids of a feature that several sets look up travel once, and nothing else changes."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchrec.distributed.embedding_types import KJTList
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection

from embeddings.lookup.jagged import one_id_bags
from embeddings.lookup.sharded import ShardedBags
from embeddings.lookup.shared_ids import Placed, SharedIds, senders
from tests.embeddings.lookup.test_tables import sharded
from tests.helpers.launching import launched
from tests.helpers.tables import FEATURES, sets_of
from tests.programs.shared_ids import SEEDS
from trainer.ranks.process_group import process_group

Places = list[tuple[str, list[int]]]
PLACES = st.tuples(st.sampled_from("fg"), st.lists(st.integers(0, 3), min_size=1, max_size=4))


@given(st.lists(PLACES, max_size=8), st.sampled_from(["cpu", "cuda"]))
def test_every_rank_gets_each_feature_it_needs(places: Places, device: str) -> None:
    placed = [Placed(f"t{i}", feature, tuple(ranks)) for i, (feature, ranks) in enumerate(places)]
    chosen = [each for each in placed if each.table in senders(placed, device)]

    def reached(tables: list[Placed]) -> set[tuple[str, int]]:
        return {(each.feature, rank) for each in tables for rank in each.ranks}

    assert reached(chosen) == reached(placed)
    # Where tables lie alike, one of them is enough.
    if device == "cpu":
        assert len(chosen) <= len({(each.feature, frozenset(each.ranks)) for each in placed})


def test_a_gpu_is_not_waited_for() -> None:
    """Ids are repeated as they are, or all tables have their own: a permutation asks for their number."""
    in_turn = [Placed(f"{s}/{f}", f, (0, 1)) for s in "abc" for f in "fg"]
    assert senders(in_turn, "cuda") == senders(in_turn, "cpu") == ["a/f", "a/g"]
    apart = [*in_turn[:2], Placed("b/f", "f", (1,)), Placed("b/g", "g", (0,))]
    assert senders(apart, "cpu") == ["a/f", "a/g"]
    assert senders(apart, "cuda") == [each.table for each in apart]


@given(st.permutations(["f", "f", "g", "g", "g"]), st.booleans())
def test_ids_are_repeated_in_the_order_of_the_tables(wanted: list[str], whole: bool) -> None:
    """Where all features are wanted equally often in turn, no permutation is needed."""
    shared = SharedIds.__new__(SharedIds)
    shared._wanted = [["f", "g"] * 3 if whole else wanted]
    (found,) = shared.repeated(KJTList([one_id_bags(["f", "g"], torch.tensor([[1, 2, 3], [4, 5, 6]]))]))
    assert found.keys() == shared._wanted[0]
    expected = [{"f": [1, 2, 3], "g": [4, 5, 6]}[key] for key in found.keys()]  # noqa: SIM118 - no dict
    assert found.values().view(-1, 3).tolist() == expected
    assert found.lengths().tolist() == [1] * 3 * len(expected) and found.stride() == 3


def test_what_pipelines_call_gets_ids_for_all_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache is filled ahead with the ids that are then looked up."""
    seen: list[list[str]] = []
    monkeypatch.setattr(
        ShardedEmbeddingBagCollection,
        "prefetch",
        lambda _, dist_input, **__: seen.append(dist_input[0].keys()),
    )
    bags = one_id_bags(list(FEATURES), torch.tensor([[1, 2], [3, 0]]))
    with process_group() as ranks:
        model = sharded(sets_of([[8, 8], [4, 4]]), ranks)
        (module,) = (each for each in model.modules() if isinstance(each, ShardedBags))
        context = module.create_context()
        received = module.input_dist(context, bags).wait().wait()
        assert received[0].keys() == list(FEATURES)
        module.prefetch(dist_input=received, forward_stream=None, ctx=context)
        assert seen == [[*FEATURES, *FEATURES]]
        vectors = module.compute_and_output_dist(context, received).wait().values()
        assert torch.equal(vectors, model(bags))


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Of two ranks."""
    out = tmp_path_factory.mktemp("shared")
    done = launched("tests.programs.shared_ids", str(out), ranks=2, timeout=240)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return [json.loads((out / f"rank{rank}.json").read_text()) for rank in (0, 1)]


def test_two_ranks_train_the_same_bits_and_send_fewer_ids(reports: list[dict[str, Any]]) -> None:
    """Whatever way each table lies by itself."""
    sent = {"once": 0, "each": 0}
    for seed in map(str, SEEDS):
        assert all(report[seed]["different"] == 0 and report[seed]["numbers"] > 4000 for report in reports)
        once, each = (sum(report[seed][way] for report in reports) for way in ("once", "each"))
        assert 0 < once <= each
        sent = {"once": sent["once"] + once, "each": sent["each"] + each}
    assert sent["once"] < 0.8 * sent["each"]


@pytest.mark.parametrize("sharding", ["table_wise", "row_wise", "column_wise"])
def test_the_plan_counts_the_ids_that_are_sent(reports: list[dict[str, Any]], sharding: str) -> None:
    found = reports[0][sharding]
    assert found["said"] == found["sent"] > 0
