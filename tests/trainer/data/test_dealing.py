"""Who computes and who decodes what: dealing blocks to ranks, and `data.sharding = "auto"`."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipelines.start import open_split
from tests.helpers.logs import FEATURES, Shape, random_rows, write_log
from tests.trainer.data.test_reader import Sample, config, global_steps, reader, samples, watch_decoding
from trainer.config.sections import DataConfig
from trainer.data.blocks import Block, cut_blocks, deal, decoders_needed, decoders_of
from trainer.data.files import RowGroup
from trainer.data.reader import SequenceLogReader, Step
from trainer.data.rows import PlanRows
from trainer.ranks.process_group import process_group
from trainer.run_config import Config

WORLD = 3


@given(
    blocks=st.lists(st.tuples(st.integers(0, 30), st.sets(st.integers(0, 3), max_size=3)), max_size=25),
    world_size=st.sampled_from([2, 4]),
)
def test_the_costliest_goes_to_the_least_loaded_that_may_take_it(
    blocks: list[tuple[int, set[int]]], world_size: int
) -> None:
    """Against a loop over all ranks for each block; then no block of the fullest rank can leave it."""
    costs = [cost for cost, _ in blocks]
    owners = [tuple(sorted({rank % world_size for rank in ranks})) for _, ranks in blocks]
    order = sorted(range(len(costs)), key=lambda i: (-costs[i], i))

    def by_hand(among: list[tuple[int, ...]]) -> tuple[list[int], list[int]]:
        taken, loads = [-1] * len(costs), [0] * world_size
        for index in order:
            least = min(among[index] or range(world_size), key=lambda rank: (loads[rank], rank))
            taken[index], loads[least] = least, loads[least] + costs[index]
        return taken, loads

    anyone: list[tuple[int, ...]] = [()] * len(costs)
    assert deal(costs, world_size) == deal(costs, world_size, anyone) == by_hand(anyone)[0]
    taken = deal(costs, world_size, owners)
    assert all(rank in (among or range(world_size)) for rank, among in zip(taken, owners, strict=True))
    loads = [sum(c for c, r in zip(costs, taken, strict=True) if r == rank) for rank in range(world_size)]
    assert max(loads) <= max(by_hand(owners)[1])
    fullest = loads.index(max(loads))
    for cost, rank, among in zip(costs, taken, owners, strict=True):
        others = [other for other in among or range(world_size) if other != fullest]
        if rank == fullest and cost:
            assert all(loads[other] + cost >= loads[fullest] for other in others)


def blocks_of(groups: int, blocks: int, candidates: int = 10) -> list[Block]:
    """So many blocks of each of some row groups, of one cost."""

    class NoRows:
        place = RowGroup(Path("x"), 0)

        def __call__(self) -> Any:
            raise AssertionError("planning needs no rows")

    rows = [NoRows() for _ in range(groups)]
    return [Block((), 0, 1, 5, candidates, each) for each in rows for _ in range(blocks)]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("groups", "blocks", "batch_candidates", "batch_behaviors", "world", "expected"),
    [
        # Two ranks: 100 blocks of a step each; then 25, too few for one decoder each, where two are all.
        (10, 100, 2000, 0, 2, 1),
        (10, 100, 300, 0, 2, 0),
        (10, 100, 2000, 100, 2, 0),
        # All of it is less than a step; nothing; fewer row groups than ranks.
        (10, 20, 10**6, 0, 2, 1),
        (10, 2, 10**6, 0, 2, 0),
        (0, 0, 1000, 0, 2, 0),
        (2, 300, 10**6, 0, 8, 0),
        # 64 blocks of a step for each rank: a choice of two; with 16 of three, with 4 all. Many ranks: four.
        (64, 64, 5120, 0, 8, 2),
        (64, 16, 40960, 0, 64, 4),
        (256, 64, 5120, 0, 8, 2),
        (256, 64, 1280, 0, 8, 3),
        (256, 64, 320, 0, 8, 0),
        # So many blocks that chance alone is even.
        (256, 64, 10**5, 0, 8, 1),
    ],
)
def test_as_many_ranks_decode_a_row_group_as_steps_need(
    groups: int, blocks: int, batch_candidates: int, batch_behaviors: int, world: int, expected: int
) -> None:
    config = DataConfig(batch_candidates=batch_candidates, batch_behaviors=batch_behaviors)
    assert decoders_needed(blocks_of(groups, blocks), config, world) == expected


@given(
    costs=st.lists(st.integers(0, 100), min_size=1, max_size=70),
    world=st.integers(2, 24),
    each=st.integers(1, 9),
)
def test_a_row_group_has_ranks_of_which_none_is_named_twice(costs: list[int], world: int, each: int) -> None:
    found = decoders_of(costs, world, each)
    assert len(found) == len(costs) and {len(ranks) for ranks in found} == {min(each, world)}
    assert all(len(set(ranks)) == len(ranks) and set(ranks) <= set(range(world)) for ranks in found)
    assert [ranks[0] for ranks in found] == deal(costs, world)


def heavy_tailed(groups: int, users: int) -> list[PlanRows]:
    """Histories of 1 to 20,000 behaviors, most of them short; 18 requests a user on average."""
    rng, plans = np.random.default_rng(1), []
    for _ in range(groups):
        lengths = np.minimum(rng.lognormal(np.log(100), 1.5, users), 20_000).astype(int) + 1
        requests = np.minimum(rng.geometric(1 / 18, users), lengths)
        ends = [np.sort(rng.integers(0, n + 1, r)) for n, r in zip(lengths, requests, strict=True)]
        offsets = np.concatenate([[0], np.cumsum(requests)])
        plans.append(PlanRows(offsets, np.concatenate(ends), rng.integers(1, 20, offsets[-1])))
    return plans


@pytest.mark.parametrize(("world", "each"), [(8, 3), (16, 3), (64, 4)])
def test_heavy_tailed_histories_are_dealt_evenly_by_some_ranks(world: int, each: int) -> None:
    """A rank with a row group of its own alone had 1.5 to 1.9 times the mean of these steps."""
    config = DataConfig(history_length=500, batch_candidates=1024 * world)
    plans = heavy_tailed(64, 100)
    blocks = [
        block
        for number, plan in enumerate(plans)
        for block in cut_blocks(plan, (number,), cast(Any, number), config)
    ]
    assert decoders_needed(blocks, config, world) == each
    owners, alone = (decoders_of([plan.cost for plan in plans], world, count) for count in (each, 1))
    order = np.random.default_rng(0).permutation(len(blocks))
    step, uneven = [], {"choice": [], "alone": []}  # type: ignore[var-annotated]
    for place in order.tolist():
        step.append(blocks[place])
        if sum(block.candidates for block in step) >= config.batch_candidates:
            for name, ranks in (("choice", owners), ("alone", alone)):
                costs = [block.cost for block in step]
                taken = deal(costs, world, [ranks[block.owners[0]] for block in step])
                loads = np.bincount(taken, weights=costs, minlength=world)
                uneven[name].append(loads.max() / loads.mean())
            step = []
    assert np.mean(uneven["choice"]) < 1.1 and np.mean(uneven["alone"]) > 1.35


def steps_of(log: Path, rank: int, gpu: bool, seed: int | None = 5, **changes: Any) -> list[Step]:
    given = config(log, **{"batch_candidates": 600, "shuffle_row_groups": 64, "workers": 0, **changes})
    reader = SequenceLogReader(
        given, "train", FEATURES, rank=rank, world_size=WORLD, seed=seed, own_row_groups=gpu
    )
    return list(reader.steps())


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty row groups of like size."""
    rows = random_rows(12, Shape(users=120))
    return write_log(tmp_path_factory.mktemp("dealing") / "log", {"train": rows}, layout=(4, 40))


def test_on_gpus_each_rank_decodes_its_own_row_groups_and_steps_are_the_same(
    log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded = watch_decoding(monkeypatch)
    ranks = [steps_of(log, rank, gpu=True) for rank in range(WORLD)]
    assert len(decoded) == len(set(decoded)) == 30
    found: list[Counter[Sample]] = []
    for step in zip(*ranks, strict=True):
        counted = [sample for part in step if part.counted for sample in samples(part.batch)]
        assert len({part.after for part in step}) == 1
        # The share of the mean that each rank's loss is of, and so the gradient, is that of the whole step.
        assert {part.batch.step_candidates for part in step} == {len(counted)}
        found.append(Counter(counted))
    assert found == global_steps(log, 1, batch_candidates=600, shuffle_row_groups=64)


@pytest.mark.parametrize(
    ("gpu", "changes"),
    [
        (False, {}),
        (True, {"seed": None}),
        (True, {"order": "stored"}),
        (True, {"batch_candidates": 12}),
        (True, {"shuffle_row_groups": 2}),
    ],
)
def test_elsewhere_all_is_as_with_steps(
    log: Path, monkeypatch: pytest.MonkeyPatch, gpu: bool, changes: dict[str, Any]
) -> None:
    """On a CPU, in stored order, with few blocks a step, with fewer row groups than ranks."""
    for rank in range(WORLD):
        auto, even = (
            steps_of(log, rank, gpu, **changes),
            steps_of(log, rank, gpu, sharding="steps", **changes),
        )
        assert [step.counted for step in auto] == [step.counted for step in even]
        for mine, theirs in zip(auto, even, strict=True):
            assert torch.equal(mine.batch.features.values(), theirs.batch.features.values())
            assert mine.after == theirs.after and torch.equal(mine.batch.labels, theirs.batch.labels)
    decoded = watch_decoding(monkeypatch)
    steps_of(log, 0, gpu, **changes)
    # A third would be ten.
    assert len(set(decoded)) > 20


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_runs_read_so_where_they_compute_on_gpus(log: Path, device: str) -> None:
    config = Config(data=DataConfig(log=log, verify=False))
    with process_group() as ranks:
        reader = open_split(config, "train", FEATURES, replace(ranks, device=torch.device(device)))
    assert reader._own_row_groups is (device == "cuda")


def test_no_rank_of_a_small_log_is_left_without_work(tmp_path: Path) -> None:
    """Two row groups for three ranks."""
    log = write_log(tmp_path / "log", {"train": random_rows(3, Shape(users=40))}, layout=(20, 40))
    given = {"batch_candidates": 200}
    work = {
        kind: [
            [s.counted for s in steps_of(log, rank, True, sharding=kind, **given)] for rank in range(WORLD)
        ]
        for kind in ("auto", "row_groups")
    }
    assert np.all(work["auto"]) and not np.any(np.all(np.transpose(work["row_groups"]), axis=1))


@pytest.mark.parametrize(("sharding", "world"), [("steps", 24), ("row_groups", 8), ("row_groups", 64)])
def test_many_ranks_read_one_order_and_every_block_once(tmp_path: Path, sharding: str, world: int) -> None:
    """All ranks of large worlds, one after the other in this process: no candidate is lost or read twice."""
    log = write_log(tmp_path / "log", {"train": random_rows(5, Shape(users=16))}, layout=(2, 8))
    given = {"sharding": sharding, "batch_candidates": 150, "workers": 0, "prefetch": 0}
    ranks = [list(reader(log, rank, world, **given).steps()) for rank in range(world)]
    assert len({len(steps) for steps in ranks}) == 1
    found: list[Counter[Sample]] = []
    for step in zip(*ranks, strict=True):
        assert len({part.after for part in step}) == 1 and len({part.shares for part in step}) == 1
        assert [bool(share) for share in step[0].shares] == [part.counted for part in step]
        found.append(Counter(sample for part in step if part.counted for sample in samples(part.batch)))
    assert found == global_steps(log, 1, batch_candidates=150)
