"""The section ids: what of it contradicts itself, and what the id stage is given."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from embeddings.ids.rules import IdRules
from trainer.config.ids import IdsConfig


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"admission": "coin"}, "no admission is called that; they are all, count, chance"),
        ({"eviction": "fifo"}, "no eviction is called that; they are lru, lfu, lfu_decay, never"),
        ({"protected_rows": 2000, "ttl_days": 1}, "protected_rows is larger than capacity"),
        ({"protected_rows": 5}, "protects from ttl_days, which is 0"),
        (
            {"admission": "count", "counter": "sketch", "sketch_cells": 249},
            "sketch_cells = 249 are too few for capacity = 1000: .* use 250 or more",
        ),
        ({"groups": {"small": 14}}, "groups.small = 14 must lie between 15, a row for each bucket, and"),
        ({"groups": {"small": 1001}}, "groups.small = 1001 must lie between"),
    ],
)
def test_contradictions_are_named(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        IdsConfig.model_validate({"capacity": 1000, **given})


def test_a_sketch_that_does_not_count_may_be_of_any_size() -> None:
    for given in ({"counter": "exact", "admission": "count"}, {"counter": "sketch", "admission": "all"}):
        assert IdsConfig.model_validate({"capacity": 10**7, "sketch_cells": 64, **given})


def test_days_become_seconds_and_groups_become_maps_within_the_features() -> None:
    config = IdsConfig(capacity=1000, ttl_days=0.5, half_life_days=2, groups={"small": 100})
    rules = config.rules("item", seed=3)
    assert list(rules) == ["item", "item@small"]
    assert rules["item"] == IdRules(1000, ttl=43_200, half_life=172_800, seed=3)
    assert rules["item@small"].within == "item" and rules["item@small"].buckets == rules["item"].buckets == 15
    assert rules["item@small"].rows == 64 + 15 * 6 and rules["item"].rows == 64 + 15 * 66
