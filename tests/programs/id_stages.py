"""Script: the same streams of ids by one rank and by two, three and four, compared step by step.

python -m tests.programs.id_stages

Ends with 1 where a rank got other rows than one rank alone does.
"""

from __future__ import annotations

import sys
from functools import partial

import numpy as np

from embeddings.ids.bucket_map import Sightings
from embeddings.ids.parts import MapPart, part_for
from embeddings.ids.rules import IdRules
from embeddings.ids.stage import IdStage
from tests.helpers.forked import fork_ranks, one_thread
from tests.helpers.slow_ids import Seen, SmallRules, merged, sightings_of
from trainer.ranks.process_group import Ranks

FEATURES, STEPS = ("item", "shop", "tag", "city"), 12
ITEM = SmallRules(40, admission="count", eviction="lfu_decay", half_life=60, ttl=300, protected_rows=9)
RULES: dict[str, IdRules] = {
    "item": ITEM,
    "item@small": ITEM.part("item", 20),
    "shop": SmallRules(13, 3, admission="count", counter="sketch", sketch_cells=90),
    "tag": SmallRules(7, 2, admission="chance", admit_chance=0.4, eviction="lfu", ttl=90),
    # Fewer buckets than ranks.
    "city": SmallRules(5, 1, eviction="never"),
}


def part_of(step: int, rank: int) -> tuple[dict[str, dict[int, Seen]], int]:
    """What a rank sees of each feature, and its newest request. Now and then it sees nothing."""
    rng = np.random.default_rng([step, rank])
    now, seen = 1000 + step * int(rng.integers(1, 60)), {}
    for place, name in enumerate(FEATURES):
        ids = rng.choice(
            60 - 10 * place, int(rng.integers(0, 25)) * int(rng.integers(0, 4) > 0), replace=False
        )
        seen[name] = {
            int(each) * 0x1234567: Seen(int(rng.integers(0, 3)), now - int(rng.choice([0, 5, 200])))
            for each in ids
        }
    return seen, now


def compare(parts: int, ranks: Ranks) -> None:
    """Train with this rank's part of each step, and with all of it alone."""
    mine, alone = IdStage(RULES, ranks.rank, ranks.world_size), IdStage(RULES)
    for step in range(STEPS):
        given = [part_of(step, part) for part in range(parts)]
        own = [given[part] for part in range(parts) if part % ranks.world_size == ranks.rank]
        seen = {name: sightings_of(merged([each[0][name] for each in own])) for name in FEATURES}
        whole = {name: sightings_of(merged([each[0][name] for each in given])) for name in FEATURES}
        newest = max((each[1] for each in own), default=np.iinfo(np.int64).min)
        keep = step % 3 == 0
        taken = mine.take(seen, int(newest), keep)
        expected = alone.take(whole, max(each[1] for each in given), keep)
        if keep:
            # As a pipeline that has read ahead of a save.
            taken.swap()
            expected.swap()
            check(mine, alone, seen)
            taken.swap()
            expected.swap()
        for name in RULES:
            feature = name.partition("@")[0]
            rows = dict(zip(whole[feature].ids.tolist(), expected.rows[name].tolist(), strict=True))
            assert taken.rows[name].tolist() == [rows[id_] for id_ in seen[feature].ids.tolist()], (
                step,
                name,
            )
            assert taken.new_rows[name].tolist() == expected.new_rows[name].tolist(), (step, name)
        check(mine, alone, seen)


def check(mine: IdStage, alone: IdStage, seen: dict[str, Sightings]) -> None:
    """Whether this rank has its part of the whole map, and finds what it has not."""
    assert mine.clock.tolist() == alone.clock.tolist()
    wanted = {name: np.concatenate([each.ids, each.ids[:2], [-7]]) for name, each in seen.items()}
    found, expected = mine.look_up(wanted), alone.look_up(wanted)
    for name, rules in RULES.items():
        assert found[name].tolist() == expected[name].tolist(), name
        whole, buckets = alone.maps[name], mine.maps[name].buckets
        part = part_for(buckets, [MapPart(whole.buckets, dict(whole.state()))], rules, rules)
        state = mine.maps[name].state()
        assert state.keys() == part.keys() and all(np.array_equal(state[key], part[key]) for key in part), (
            name
        )


def main() -> int:
    one_thread()
    failed = [
        fork_ranks(world_size, partial(compare, 4), timeout_s=20, seconds=60) for world_size in (2, 3, 4)
    ]
    return int(any(code for codes in failed for code in codes))


if __name__ == "__main__":
    sys.exit(main())
