"""What the heartbeat takes for a lost rank, and how ranks end that cannot raise: on CPU, where it is off."""

from __future__ import annotations

import faulthandler
import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from embeddings.errors import RankError
from launch import cli
from launch.reporting import OTHER_ERROR
from tests.helpers.launching import launched, reported
from trainer.checkpoint.background import Saver
from trainer.ranks import heartbeat
from trainer.ranks import process_group as distributed
from trainer.ranks.heartbeat import Beat, Heartbeat, Peers
from trainer.ranks.process_group import Ranks

Report = dict[str, Any]
BLAME = "waited in vain for rank 1, which hangs, is dead or cut off; see train.timeout_s"


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    return reported("tests.programs.heartbeat_runs", tmp_path_factory.mktemp("heartbeat"))


def last(said: str) -> str:
    return said.strip().splitlines()[-1]


def test_a_dead_rank_ends_one_whose_main_thread_cannot_be_woken(report: Report) -> None:
    dead = report["dead"]
    assert dead["codes"] == [OTHER_ERROR, -9]
    # As `sys.excepthook` had it before torch put its own in front, which marks each line with the rank.
    line = f"embeddings.errors.RankError: rank 0, before or after training: {BLAME}"
    assert last(dead["said"][0]) == line
    assert "Traceback" not in dead["said"][0]
    assert dead["seconds"] < 30


def test_a_rank_that_lives_and_hangs_is_named_with_the_step(report: Report) -> None:
    hung = report["hung"]
    assert last(hung["said"][0]).endswith(f"RankError: rank 0, after step 7: {BLAME}")
    # Rank 1 is not in a collective that others have not begun, so it blames nobody until they are gone.
    assert hung["codes"] == [OTHER_ERROR, OTHER_ERROR]
    assert "waited in vain for rank 0" in last(hung["said"][1])
    assert "the ranks' store is gone" in last(hung["said"][1])
    assert hung["said"][1].count("sendBytes failed") <= 1, "torch tells of it each time one asks"


def test_a_main_thread_that_wakes_raises_the_blame_and_not_what_followed(report: Report) -> None:
    said = report["woken"]["said"][0]
    assert report["woken"]["codes"][0] == 1
    assert "ValueError: the loss is not finite" in said, "as the cause"
    assert last(said).endswith(f"RankError: rank 0, after step 7: {BLAME}")
    assert last(report["unnoticed"]["said"][0]).endswith(f"before or after training: {BLAME}")


def test_a_save_that_needs_the_lost_rank_is_hardly_waited_for() -> None:
    granted: list[float] = []
    saver = Saver.__new__(Saver)
    saver._running = SimpleNamespace(join=granted.append)  # type: ignore[assignment]
    for text in (f"rank 0, after step 7: {BLAME}", "rank 0: the launcher (process 7) is gone; start again"):
        saver.__exit__(RankError, RankError(text), None)
    assert granted == [2, 60]


def test_work_that_takes_long_is_no_silence(report: Report) -> None:
    assert report["unhurried"]["codes"] == [0, 0] and report["apart"]["codes"] == [0, 0]
    assert report["unhurried"]["said"] == ["", ""]


@pytest.mark.gpu2
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_the_same_over_nccl(tmp_path: Path) -> None:
    """The device wait ends by aborting, or the process by its heartbeat; no watchdog ends it by a signal."""
    done = launched("tests.programs.heartbeat_runs", str(tmp_path), "nccl", timeout=200)
    assert done.returncode == 0, done.stderr[-4000:]
    report = json.loads((tmp_path / "report.json").read_text())
    for name in ("dead", "hung"):
        found = report[name]
        assert found["codes"] == [OTHER_ERROR, -9 if name == "dead" else OTHER_ERROR], found
        assert f"RankError: rank 0, after step 7: {BLAME}" in found["said"][0]
    assert report["unhurried"]["codes"] == [0, 0]


def test_the_exit_code_is_that_of_a_lost_rank() -> None:
    assert heartbeat._EXIT_CODE == OTHER_ERROR


def test_what_a_thread_ends_the_process_with_is_said_as_any_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command line shows it in one line, and leaves it for torchrun's summary."""
    hooks = []

    def verb() -> int:
        hooks.append(cli.sys.excepthook)
        return 0

    monkeypatch.setattr("pipelines.doctor.doctor", verb)
    before = cli.sys.excepthook
    assert cli.main(["doctor"]) == 0
    assert cli.sys.excepthook is before
    hooks[0](ValueError, cli.typer.BadParameter("told"), None)
    assert capsys.readouterr().err == "tandemrec: error: told; see `tandemrec --help`\n"


def test_a_rank_that_cannot_count_says_that_it_lives_all_the_same() -> None:
    """While a group is made, say: the others must not take it for dead."""
    store = dist.HashStore()

    def fail() -> heartbeat.Begun:
        raise RuntimeError("no such group")

    beating = [Heartbeat(rank, 3, store, 2.0, fail, aborted) for rank in range(2)]
    for each in beating:
        each.start()
    # The third never comes.
    assert beating[0]._acknowledged.wait(0.2) is False and not beating[0].blame
    end = time.monotonic() + 30
    while not all(each.blame for each in beating) and time.monotonic() < end:
        time.sleep(0.02)
    for each in beating:
        with pytest.raises(RankError, match="while the ranks met: waited in vain for rank 2, which hangs"):
            each.check()
        each.stop(well=False)
        faulthandler.cancel_dump_traceback_later()


def test_while_a_woken_main_thread_asks_the_others_nothing_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A collective over gloo times out by itself, as late as the heartbeat finds the lost rank."""
    store = dist.HashStore()
    beating = Heartbeat(0, 2, store, 0.1, dict, aborted, grace_s=0.1)
    monkeypatch.setattr(beating, "_end", lambda: ended.append(1))
    ended: list[int] = []
    ranks = Ranks(0, 2, 2, torch.device("cpu"), store, None, beating)

    def ask(asked: Ranks) -> list[int]:
        beating.start()
        beating._thread.join()
        return [1]

    monkeypatch.setattr(distributed, "_silent", ask)
    with (
        pytest.raises(RankError, match="rank 0, after step 7: waited in vain for rank 1"),
        distributed.naming_the_lost(ranks, lambda: "after step 7"),
    ):
        raise RuntimeError("Timed out waiting 3000ms for recv operation to complete")
    faulthandler.cancel_dump_traceback_later()
    assert beating.blame and not ended


def aborted() -> None:
    """Nothing is under way that had to end."""


def beats(*begun: int, number: int = 1, left: bool = False) -> dict[int, Beat]:
    return {rank: Beat(number, {"0": count}, left) for rank, count in enumerate(begun, 1)}


def test_silence_is_counted_from_the_last_new_beat() -> None:
    peers = Peers([1, 2], 10, started=0)
    assert peers.lost(10) == [] and peers.lost(10.5) == [1, 2]
    peers.hear(11, {"0": 3}, beats(3, 3))
    assert peers.lost(20) == []
    peers.hear(20, {"0": 3}, {**beats(3, 3), **{1: Beat(2, {"0": 3})}})
    assert peers.lost(22) == [2], "the same beat, seen again, is no news"


def test_who_is_behind_is_counted_from_when_it_was_left_behind() -> None:
    peers = Peers([1, 2], 10, started=0)
    for now in range(0, 100, 5):
        # Both beat; this rank and rank 2 have begun a collective more than rank 1 since second 50.
        peers.hear(now, {"0": 3 + (now >= 50)}, beats(3, 3 + (now >= 50), number=now))
        assert peers.lost(now) == ([1] if now > 60 else [])
    peers.hear(100, {"0": 4}, beats(4, 4, number=100))
    assert peers.lost(100) == []


def test_a_rank_that_has_left_is_missed_in_a_collective_only() -> None:
    peers = Peers([1], 10, started=0)
    peers.hear(1, {"0": 3}, beats(3, left=True))
    assert peers.lost(1000) == []
    peers.hear(1000, {"0": 4}, beats(3, left=True))
    assert peers.lost(1005) == [] and peers.lost(1011) == [1]


def test_a_process_that_was_frozen_hears_first() -> None:
    peers = Peers([1], 10, started=0)
    peers.hear(1, {"0": 3}, beats(3))
    peers.hear(500, {"0": 3}, beats(9, number=2))
    assert peers.lost(500) == []


def test_groups_of_others_tell_nothing() -> None:
    peers = Peers([1], 10, started=0)
    for now in (0, 20):
        peers.hear(now, {"mine": 5}, {1: Beat(now, {"theirs": 1})})
    assert peers.lost(25) == []


@given(st.lists(st.tuples(st.integers(1, 3), st.integers(0, 9)), max_size=30))
def test_ranks_that_wait_no_longer_than_the_patience_are_never_lost(steps: list[tuple[int, int]]) -> None:
    """Any order in which three ranks begin collectives, none more than 9 s after the first, is healthy."""
    peers, now = Peers([1, 2], 10, started=0.0), 0.0
    for mine, (first, seconds) in enumerate(steps, 1):
        # One rank is first, or this one is; the others come `seconds` later.
        ahead = {rank: mine - (rank != first) for rank in (1, 2)}
        peers.hear(now, {"0": mine - (first == 3)}, {r: Beat(2 * mine, {"0": n}) for r, n in ahead.items()})
        assert peers.lost(now) == []
        now += seconds
        peers.hear(now, {"0": mine}, {r: Beat(2 * mine + 1, {"0": mine}) for r in (1, 2)})
        assert peers.lost(now) == []


def test_a_beat_travels_whole() -> None:
    beat = Beat(7, {"0": 3, "model": 12}, left=True)
    assert Beat.of(beat.text()) == beat == Beat.of(beat.text().encode())
