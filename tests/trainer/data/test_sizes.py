"""Sizes on the host: they travel with a batch, and stand for what its tensors say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.models import batch_of, preset, small_log
from tests.helpers.stand_in import CUDA, StandIn
from trainer.data.batch import Sizes
from trainer.model.windows import Slots, places_in_groups, windows_of


def test_sizes_travel_and_are_counted_where_nobody_did(tmp_path: Path) -> None:
    batch = batch_of(preset("dare", small_log(tmp_path / "log")))
    assert batch.sizes is not None and batch.host_sizes is batch.sizes
    by_hand = replace(batch, sizes=None)
    assert by_hand.host_sizes == batch.sizes and by_hand.host_sizes is by_hand.sizes
    assert batch.sizes.labelled
    some = batch.labels.index_fill(0, torch.tensor([1]), torch.nan)
    assert not replace(batch, labels=some, sizes=None).host_sizes.labelled
    with StandIn() as device:
        there = batch.pin_memory().to(CUDA, non_blocking=True)
        assert there.sizes is batch.sizes
        windows = windows_of(there, 12)
        assert windows.host_counts == batch.sizes.candidates and windows.slots.shape[1] > 1
        # What is computed later on knows them too.
        for part in (there.features, there.features.permute([1, 0]), *there.features.split([1, 1])):
            assert part.length_per_key_or_none() is not None
        assert not [line for line in device.waits if not line.startswith("elsewhere")]
        assert replace(there, sizes=None).host_sizes == batch.sizes
        assert device.waits


@given(counts=st.lists(st.integers(0, 4), max_size=6))
def test_places_in_groups_and_slots(counts: list[int]) -> None:
    group = torch.tensor([g for g, count in enumerate(counts) for _ in range(count)], dtype=torch.int64)
    expected = [place for count in counts for place in range(count)]
    assert places_in_groups(group, len(counts)).tolist() == expected
    values = torch.arange(group.numel()) + 1
    for given_counts in (None, counts):
        slots = Slots(group, len(counts), given_counts)
        assert slots.shape == (len(counts), max([1, *counts]))
        spread = slots.spread(values)
        assert spread.shape == slots.shape and int((spread > 0).sum()) == values.numel()
        assert torch.equal(slots.collect(spread), values)


def test_the_longest_window_counts_what_a_branch_looks_at() -> None:
    sizes = Sizes((4, 9, 0), (0, 4, 13), (1, 1, 1), (1,), one_id=True)
    assert (sizes.longest(), sizes.longest(5), sizes.longest(20)) == (9, 5, 9)
    assert Sizes((), (), (), (), one_id=True).longest() == 0
