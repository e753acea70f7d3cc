"""Saving beside training: signals, the clock, failures, other world sizes. All runs share one process."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embeddings.errors import CheckpointError
from tests.helpers.launching import reported
from tests.trainer.test_ranks import parameters_of
from trainer.checkpoint.compatible import check_reshardable

Report = dict[str, Any]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("saving")


@pytest.fixture(scope="module")
def report(root: Path) -> Report:
    return reported("tests.programs.saving_runs", root)


def test_a_stop_signal_on_one_rank_stops_all_at_one_step(report: Report) -> None:
    """Sent twice to rank 1 within step 7: both ranks end with 0 after step 9, the next they agree at."""
    stopped, whole = report["stopped"], report["whole"]
    assert stopped["codes"] == [0, 0] and stopped["left"] == ["step-00000009"]
    assert "stopped after step 9 as asked" in stopped["said"]
    assert len(whole["losses"]) > 9 and stopped["losses"] == whole["losses"][:9]


def test_what_was_stopped_continues_bit_for_bit(report: Report) -> None:
    assert report["continued"]["codes"] == [0, 0]
    assert report["continued"]["losses"] == report["whole"]["losses"]
    # Tensors, fused and dense optimizer state; and saving beside the steps takes what they stood at.
    assert report["same tensors"] is True
    # With more ranks than two the order in which gradients are added up counts, too.
    assert report["same tensors on 4"] is True
    assert report["sync"]["losses"] == report["whole"]["losses"]


def test_training_draws_nothing_from_global_generators(report: Report) -> None:
    """Hence a checkpoint has no generator's state to keep: all draws are seeded by position."""
    assert report["generators"] == "same"


def test_the_clock_of_rank_0_counts_where_ranks_agree(report: Report) -> None:
    steps = [int(name[-8:]) for name in report["minutes"]["left"]]
    last = len(report["whole"]["losses"])
    assert steps == sorted({*range(3, last, 3), last})


def test_no_step_is_saved_twice(report: Report) -> None:
    last = len(report["whole"]["losses"])
    assert report["once"]["codes"] == [0, 0] and report["once"]["left"] == [f"step-{last:08d}"]
    assert report["once"]["said"].count("validation after step") == 1
    assert report["over"]["codes"] == [0, 0] and "nothing left to train" in report["over"]["said"]
    assert report["saves"] == f"{last}\n" and report["lines again"] is True


def test_a_failed_save_stops_all_ranks_where_it_is_noticed(report: Report) -> None:
    full = report["full, stop"]
    assert full["codes"] == [1, 1] and full["left"] == []
    said = full["said"]
    assert (
        len(re.findall(r"CheckpointError: .*step-00000004: rank 1 could not save: writing .* MB", said)) == 2
    )
    assert "No space left on device" in said


def test_a_failed_save_may_be_tried_again_later(report: Report) -> None:
    on = report["full, continue"]
    assert on["codes"] == [0, 0] and on["losses"] == report["whole"]["losses"]
    assert "not saved, training goes on: " in on["said"]
    assert "step-00000004" not in on["left"] and on["left"][0] == "step-00000008"


def test_the_last_save_must_not_fail(report: Report) -> None:
    assert report["full at the end"]["codes"] == report["full at the end, sync"]["codes"] == [1, 1]


def test_a_rank_that_is_lost_in_a_save_that_training_waits_for_is_missed_as_in_a_step(report: Report) -> None:
    """After `train.timeout_s` (3 s) and not `checkpoint.timeout_minutes`; a save that takes 7 s goes on."""
    assert report["slow"]["codes"] == [0, 0] and report["slow"]["left"] == ["step-00000004"]
    frozen = report["frozen"]
    assert frozen["codes"] == [1, -9]
    assert "rank 0, after step 4: waited in vain for rank 1" in frozen["said"]


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_resharding_keeps_every_row_bit_for_bit(root: Path, report: Report, ranks: int) -> None:
    saved = parameters_of(root / "four" / "checkpoints" / "step-00000005")
    found: dict[str, list[np.ndarray]] = {}
    for rank in range(ranks):
        for key, part in np.load(root / f"loaded-{ranks}-{rank}.npz").items():
            name, place = key.rsplit("@", 1)
            whole = saved[name].numpy()
            if place:
                start = [int(offset) for offset in place.split(",")]
                whole = whole[tuple(slice(a, a + n) for a, n in zip(start, part.shape, strict=True))]
            assert np.array_equal(part, whole), f"{name} at {place} on rank {rank}"
            found.setdefault(name, []).append(part)
    assert found.keys() == saved.keys()
    assert sum("momentum1" in name for name in found) == 4
    for name, parts in found.items():
        if "embedding_bags" in name:
            assert sum(part.size for part in parts) == saved[name].numel(), name
    resumed, same = report[f"4 to {ranks}"], report["on 4"]
    assert resumed["codes"] == [0] * ranks
    assert resumed["losses"][:5] == same["losses"][:5] and len(resumed["losses"]) == 8
    # The ranks add up in another order.
    assert np.allclose(resumed["losses"], same["losses"], atol=1e-6, rtol=0)
    if ranks == 4:
        assert resumed["losses"] == same["losses"]


def test_rowwise_state_is_not_loaded_into_columns(report: Report) -> None:
    refused = report["to columns"]
    assert refused["codes"] == [1, 1] and len(refused["losses"]) == 4
    message = r"table representation__\w+ lay table_wise in whole rows, now column_wise in 2 pieces: row-wise"
    assert re.search(message, refused["said"])


def plan(*shards: tuple[list[int], list[int]], kind: str = "row_wise") -> dict[str, Any]:
    entries = [{"offsets": offsets, "sizes": sizes} for offsets, sizes in shards]
    return {"modules": {"module": {"a__item": {"sharding_type": kind, "shards": entries}}}}


ROWS = plan(([0, 0], [5, 8]), ([5, 0], [5, 8]))
WHOLE = plan(([0, 0], [10, 8]), kind="table_wise")
COLUMNS = plan(([0, 0], [10, 4]), ([0, 4], [10, 4]), kind="column_wise")


@pytest.mark.parametrize(
    ("before", "after", "optimizer", "fine"),
    [
        (ROWS, WHOLE, "rowwise_adagrad", True),
        (WHOLE, ROWS, "rowwise_adagrad", True),
        (COLUMNS, COLUMNS, "rowwise_adagrad", True),
        (COLUMNS, WHOLE, "rowwise_adagrad", False),
        (ROWS, COLUMNS, "rowwise_adagrad", False),
        (COLUMNS, WHOLE, "adagrad", True),
        (None, COLUMNS, "rowwise_adagrad", True),
    ],
)
def test_which_plans_can_follow_which(before: Any, after: Any, optimizer: str, fine: bool) -> None:
    state = {"config": {"groups": {"a": {"optimizer": optimizer}}}} | ({"plan": before} if before else {})
    if fine:
        check_reshardable(Path("x"), state, after)
    else:
        with pytest.raises(CheckpointError, match="x: table a__item lay"):
            check_reshardable(Path("x"), state, after)
