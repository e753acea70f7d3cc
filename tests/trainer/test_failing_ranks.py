"""A rank that fails, dies or is slow where others wait for it. All runs share one process."""

from __future__ import annotations

from typing import Any

import pytest

from embeddings.errors import CheckpointError, DataError, RankError, TandemError
from tests.helpers.launching import reported
from tests.programs.failing_runs import PLACES

Report = dict[str, Any]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    return reported("tests.programs.failing_runs", tmp_path_factory.mktemp("failing"))


@pytest.mark.parametrize("place", PLACES)
def test_whatever_rank_0_raises_ends_all_ranks_with_its_line(report: Report, place: str) -> None:
    error, found = PLACES[place][2], report[place]
    text = f": {error}" if str(error) else ""
    assert found["codes"] == [1, 1]
    assert f"rank 0 failed with {type(error).__name__}{text}\n" in found["said"]
    assert "lost the connection" not in found["said"] and "in vain" not in found["said"]


def test_a_full_disk_under_the_metrics_ends_all_ranks_and_names_the_file(report: Report) -> None:
    found = report["write metrics"]
    assert found["codes"] == [1, 1]
    assert "OSError: [Errno 28] No space left on device: '/dev/full'" in found["said"]
    assert "lost the connection to another rank, whose own error tells why" in found["said"]


def test_ranks_wait_for_slow_ones_as_long_as_these_live(report: Report) -> None:
    """Rank 0 unshards for longer than a collective waits; and a rank dies at its work."""
    assert report["slow"]["codes"] == [0, 0] and "weights from " in report["slow"]["said"]
    dead = report["dead"]
    assert dead["codes"] == [1, 1, -9]
    assert dead["got"][0] == (
        "RankError: rank 0: waited in vain for rank 2, which hangs, is dead or cut off; see train.timeout_s"
    )
    # Rank 0 holds the store here, so that rank 1 may lose that first.
    assert dead["got"][1].startswith(("RankError", "DistNetworkError"))


def test_a_failure_is_told_at_once_and_raised_as_it_was_where_it_happened(report: Report) -> None:
    own, told = "KeyError: 'surprise'", "RankError: rank {} failed with KeyError: 'surprise'"
    assert report["broken"] == {"codes": [1, 1, 1], "got": [own, told.format(0), told.format(0)]}
    assert report["one broken"] == {"codes": [1, 1, 1], "got": [told.format(1), own, told.format(1)]}
    assert report["unshard"]["codes"] == [1, 1]
    assert "RankError: rank 0 failed with KeyError: 'surprise'" in report["unshard"]["said"]


def test_a_value_or_an_error_that_cannot_be_pickled_is_a_failure_that_all_ranks_hear_of(
    report: Report,
) -> None:
    for name, failed in (("no answer", 0), ("one no answer", 1)):
        found = report[name]
        own = found["got"][failed]
        assert found["codes"] == [1, 1, 1] and "pickle" in own and "lambda" in own
        told = f"RankError: rank {failed} failed with {own}"
        assert [found["got"][rank] for rank in range(3) if rank != failed] == [told, told]
    told = "RankError: rank 0 failed with ConfigError: surprise"
    assert report["local error"] == {"codes": [1, 1, 1], "got": ["ConfigError: surprise", told, told]}


def test_a_run_that_skips_row_groups_resumes_inside_an_epoch_on_any_ranks(report: Report) -> None:
    """The bad row group is one that rank 1 tries; the order that a position refers to is that of all."""
    skipped = "[rank 1] skipped: "
    assert report["skipped"]["codes"] == [0, 0] and skipped in report["skipped"]["said"]
    assert report["skipped again"]["codes"] == [0, 0]
    assert report["skipped on one"]["codes"] == [0]
    assert len(report["skipped on one"]["losses"]) == 8


@pytest.mark.parametrize(
    "error",
    [
        TandemError("a"),
        RankError("b"),
        CheckpointError("some/path", "is torn"),
        DataError("bad", file="f.parquet", row_group=3, column="c", row=1),
    ],
)
def test_an_error_travels_whole(error: TandemError) -> None:
    kind, (own, args, fields) = error.__reduce__()
    again = kind(own, args, fields)
    assert type(again) is type(error) and str(again) == str(error) and vars(again) == vars(error)
