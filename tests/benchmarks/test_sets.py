"""`bench sets`: one set and several are as wide, look the same bags up, and a way measures what it says."""

from __future__ import annotations

import torch

from benchmarks.sets import GROUP, SetsBench, config_with_sets, kept_bags, lookup_way, steps_of
from trainer.assemble import resolve_groups
from trainer.ranks.process_group import process_group


def test_sets_are_as_wide_together_as_one_and_look_up_the_same() -> None:
    settings = SetsBench(items=500, length=20, users=2, steps=1)
    widths, bags = {}, {}
    with process_group() as ranks:
        for sets in (1, 4):
            config = config_with_sets(settings, 16, sets)
            steps, manifest = steps_of(settings, config)
            group = resolve_groups(config, manifest)[GROUP]
            widths[sets] = group.width, len(group.sets)
            (bags[sets],) = kept_bags(steps, config.model.k, settings.seed)
            assert lookup_way(config, manifest, [bags[sets]], ranks)().cpu > 0
    assert widths == {1: (32, 1), 4: (32, 4)}
    assert torch.equal(bags[1].values(), bags[4].values()) and bags[1].stride() > 2 * 19 * 3
