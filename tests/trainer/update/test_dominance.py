"""Which rows are looked at to tell whose task moves tables."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from embeddings.groups import EmbeddingSet, TableGroup, TableSpec
from tests.helpers.steps import drawn
from trainer.update.dominance import Dominance


def test_a_table_with_a_map_of_its_own_is_looked_at_in_its_own_rows() -> None:
    """Where a group holds some of a feature's ids, they have other rows there than in other groups."""
    table = TableSpec("item", 8, 2, apart="item@attention")
    group = TableGroup("attention", (table,), sets=(EmbeddingSet(losses=("click", "buy")),))
    names = [group.table_name(each) for each in group.all_tables]
    weights = {f"x.{name}.weight": torch.zeros(8, 2) for name in names}
    plan = {"": {name: SimpleNamespace(compute_kernel="fused") for name in names}}
    model: Any = SimpleNamespace(plan=SimpleNamespace(plan=plan), state_dict=lambda: weights)
    optimizer: Any = SimpleNamespace(squares={})
    dominance = Dominance(model, {"attention": group}, optimizer, 1, 0)
    batch = drawn(0, 2, 1).step().batch
    ids, lengths = torch.tensor([1, 2, 5, 6]), torch.ones(4, dtype=torch.int64)
    features = KeyedJaggedTensor(["item", "item@attention"], ids, lengths=lengths, stride=2)
    dominance.before(replace(batch, features=features, sizes=None), 1)
    # One task moves what the batch has in this group, the other what it has elsewhere.
    weights[f"x.{names[0]}.weight"][[5, 6]] = 1
    weights[f"x.{names[1]}.weight"][[1, 2]] = 1
    dominance.after()
    assert dominance.entry()["dominance"]["mean"]["groups.attention"] == {"click": 1.0, "buy": 0.0}
