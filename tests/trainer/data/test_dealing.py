"""Who computes and who decodes what: dealing blocks to ranks, and `data.sharding = "auto"`."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipelines.start import open_split
from tests.helpers.logs import FEATURES, Shape, random_rows, write_log
from tests.trainer.data.test_reader import Sample, config, global_steps, samples, watch_decoding
from trainer.config.sections import DataConfig
from trainer.data.blocks import ANYONE, Block, deal, spreads_evenly
from trainer.data.files import RowGroup
from trainer.data.reader import SequenceLogReader, Step
from trainer.ranks.process_group import process_group
from trainer.run_config import Config

WORLD = 3


@given(
    blocks=st.lists(st.tuples(st.integers(0, 30), st.integers(ANYONE, 3)), max_size=25),
    world_size=st.sampled_from([2, 4]),
)
def test_the_costliest_goes_to_the_least_loaded_and_owners_keep_theirs(
    blocks: list[tuple[int, int]], world_size: int
) -> None:
    """Against a loop over all ranks for each block."""
    costs, owners = (
        [cost for cost, _ in blocks],
        [owner % world_size if owner >= 0 else -1 for _, owner in blocks],
    )
    expected, loads = list(owners), [0] * world_size
    for cost, owner in zip(costs, owners, strict=True):
        if owner >= 0:
            loads[owner] += cost
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        if owners[index] == ANYONE:
            least = min(range(world_size), key=lambda rank: (loads[rank], rank))
            expected[index], loads[least] = least, loads[least] + costs[index]
    assert deal(costs, world_size, owners) == expected
    assert deal(costs, world_size) == deal(costs, world_size, [ANYONE] * len(costs))


def blocks_of(loads: list[int], candidates: int = 10) -> list[Block]:
    """So many blocks of each rank, of one cost."""

    class NoRows:
        place = RowGroup(Path("x"), 0)

        def __call__(self) -> Any:
            raise AssertionError("planning needs no rows")

    return [
        Block(rank, 0, 1, 5, candidates, NoRows()) for rank, load in enumerate(loads) for _ in range(load)
    ]


@pytest.mark.parametrize(
    ("loads", "batch_candidates", "batch_behaviors", "expected"),
    [
        ([100, 100], 1000, 0, True),
        # A rank has more than its share, or nothing at all.
        ([160, 80], 1000, 0, False),
        ([100, 0], 1000, 0, False),
        # So few blocks a step that chance would leave ranks behind.
        ([100, 100], 200, 0, False),
        ([100, 100], 1000, 100, False),
        # All of it is less than a step.
        ([100, 100], 10**6, 0, True),
        ([5, 5], 10**6, 0, False),
        ([], 1000, 0, True),
        # More ranks need more blocks each.
        ([25, 25], 10**6, 0, True),
        ([25] * 8, 10**6, 0, False),
        ([75] * 8, 10**6, 0, True),
    ],
)
def test_windows_are_decoded_apart_where_ranks_stay_even(
    loads: list[int], batch_candidates: int, batch_behaviors: int, expected: bool
) -> None:
    config = DataConfig(batch_candidates=batch_candidates, batch_behaviors=batch_behaviors)
    assert spreads_evenly(blocks_of(loads), config, max(len(loads), 2)) is expected


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
