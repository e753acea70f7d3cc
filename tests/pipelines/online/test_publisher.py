"""What a training is told of versions that are published beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from embeddings.errors import DataError, SnapshotError
from pipelines.online.publisher import Answer, Order, Places, VersionPublisher
from trainer.config.online import OnlineConfig
from trainer.data.stream.ledger import Entry, Ledger
from trainer.data.stream.source import Stamp

FACTS = {"version": "v00000001", "window": "w", "whole": True, "bytes": 10, "seconds": 1.0,
         "seconds_from_appearance": 2.0}  # fmt: skip


class Other:
    """The other end: answers only when told to; `gone` once its process has ended."""

    exitcode = -9

    def __init__(self) -> None:
        self.orders: list[Order] = []
        self.answers: list[Answer] = []
        self.gone = self.killed = False

    def send(self, order: Order) -> None:
        self.orders.append(order)

    def poll(self, timeout: float) -> bool:
        return bool(self.answers) or self.gone

    def recv(self) -> Answer:
        if not self.answers:
            raise EOFError
        return self.answers.pop(0)

    def close(self) -> None:
        pass

    def join(self, timeout: float | None = None) -> None:
        pass

    def kill(self) -> None:
        self.killed = True


@pytest.fixture
def other(monkeypatch: pytest.MonkeyPatch) -> Other:
    end = Other()
    monkeypatch.setattr(VersionPublisher, "_started", lambda self: (end, end))
    return end


def publisher(folder: Path, **settings: Any) -> VersionPublisher:
    return VersionPublisher(Places(folder, folder / "versions", folder / "stream"), OnlineConfig(**settings))


def ledger(*steps: int) -> Ledger:
    """Of windows that were trained up to these steps."""
    found = Ledger()
    for number, step in enumerate(steps):
        found = found.with_entry(Entry(number, f"w{step}", f"{step}", Stamp(1, 10**9), "trained", step))
    return found


def test_a_version_in_the_making_counts_as_published(tmp_path: Path, other: Other) -> None:
    running = publisher(tmp_path, publish_every=2)
    assert not running.due(ledger(1)) and running.due(ledger(1, 2))
    running.offer(2, ledger(1, 2))
    assert other.orders == [Order(2, "w2", 1.0)]
    assert not running.due(ledger(1, 2, 3)) and running.due(ledger(1, 2, 3, 4))
    assert running.done() == []
    other.answers.append(Answer(FACTS))
    (version,) = running.done()
    assert version.step == 2 and version.entry == FACTS and "published v00000001, whole" in version.line
    assert not running.due(ledger(1, 2, 3)) and running.due(ledger(1, 2, 3, 4))
    running.finish()


def test_what_an_earlier_start_has_published_is_not_due(tmp_path: Path, other: Other) -> None:
    (tmp_path / "published.json").write_text(json.dumps({"step": 3, "version": "v00000002"}))
    running = publisher(tmp_path)
    assert not running.due(ledger(1, 2, 3)) and running.due(ledger(1, 2, 3, 5))
    (tmp_path / "published.json").write_text("{}")
    with pytest.raises(DataError, match="move it away"):
        publisher(tmp_path)


def test_a_failure_is_said_and_tried_again_but_not_for_ever(tmp_path: Path, other: Other) -> None:
    running = publisher(tmp_path)
    for step in (1, 2):
        running.offer(step, ledger(step))
        other.answers.append(Answer({}, "the disk is full"))
    (first, second) = running.done()
    assert first.line == "not published, the next version will hold it: the disk is full"
    assert (first.step, second.step) == (1, 2) and running.due(ledger(1, 2))
    with pytest.raises(SnapshotError, match="the last version failed"):
        running.finish()
    running.offer(3, ledger(3))
    other.answers.append(Answer(FACTS))
    running.finish()
    for step in (4, 5, 6):
        running.offer(step, ledger(step))
        other.answers.append(Answer({}, "no"))
    with pytest.raises(SnapshotError, match="3 versions in a row failed"):
        running.offer(7, ledger(7))


def test_a_process_that_has_ended_ends_the_run(tmp_path: Path, other: Other) -> None:
    with pytest.raises(SnapshotError, match="has ended"), publisher(tmp_path) as running:
        running.offer(1, ledger(1))
        other.gone = True
        running.wait()
    assert other.killed


def test_a_process_that_hangs_ends_the_run(tmp_path: Path, other: Other) -> None:
    with (
        pytest.raises(SnapshotError, match="not done after 5 s"),
        publisher(tmp_path, publish_timeout_s=5) as running,
    ):
        running.offer(1, ledger(1))
        running.wait()
    assert other.killed
