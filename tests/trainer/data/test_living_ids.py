"""Raw ids of batches, for features whose ids come and go."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embeddings.ids.frozen import FrozenIds
from embeddings.ids.rules import IdRules
from tests.helpers.steps import drawn
from trainer.data.batch import RequestBatch
from trainer.data.living_ids import looking_up, rules_for, seen_ids
from trainer.log.schema import FeatureInfo, Side

RULES = IdRules(capacity=12, shared_rows=3, counts="candidates")
BEHAVIORS, CANDIDATES = 2, 3


def batch_of(name: str, bags: list[list[int]]) -> RequestBatch:
    """A batch of one feature: bags of two behaviors, then of three candidates."""
    batch = drawn(0, CANDIDATES, 1).step().batch
    lengths = torch.tensor([len(bag) for bag in bags])
    values = torch.tensor([id_ for bag in bags for id_ in bag], dtype=torch.int64)
    features = KeyedJaggedTensor([name], values, lengths=lengths, stride=len(bags))
    return replace(batch, features=features, behavior_time=torch.arange(BEHAVIORS), sizes=None)


@pytest.mark.parametrize("side", ["both", "history"])
@pytest.mark.parametrize("of_candidates", [[[5], [], []], [[], [], []]])
def test_which_sightings_count_does_not_depend_on_what_a_batch_holds(
    side: Side, of_candidates: list[list[int]]
) -> None:
    """A rank's part of a step may have candidates whose lists are all empty, and the whole step others."""
    rules = rules_for({"tags": RULES}, {"tags": FeatureInfo(rows=9, multi=True, side=side)})
    seen = seen_ids(batch_of("tags", [[7], [8, 7], *of_candidates]), rules)["tags"].sightings
    found = dict(zip(seen.ids.tolist(), seen.counts.tolist(), strict=True))
    behaviors = {7: 2, 8: 1} if side == "history" else {7: 0, 8: 0}
    assert found == {**behaviors, **({5: 1} if of_candidates[0] else {})}


def test_a_part_of_a_map_counts_as_the_map() -> None:
    given = {"type": RULES, "type@attention": RULES.part("type", 6)}
    found = rules_for(given, {"type": FeatureInfo(rows=9, side="history")})
    assert {name: each.counts for name, each in found.items()} == {"type": "all", "type@attention": "all"}


def test_who_names_candidates_gets_ids_and_no_rows() -> None:
    """Those go to the files of scores, in which rows would mean nothing."""
    raw = batch_of("item_id", [[7], [-8], [1 << 62], [7], [-8]])
    finder = FrozenIds(RULES, np.array([-8, 7]), np.array([5, 9]))
    prepare = looking_up({"item_id": finder}, None)
    assert prepare is not None
    found = prepare(raw)
    assert found.features.values().tolist()[3:] == [9, 5]
    assert raw.items is None and raw.candidate_items is not None and found.candidate_items is not None
    assert found.candidate_items.tolist() == raw.candidate_items.tolist() == [1 << 62, 7, -8]
