"""Versions of a stream's training: what a process that publishes does where something of it is not whole."""

from __future__ import annotations

import signal
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

import pipelines.online.publisher as publishing
from embeddings.errors import ConfigError, DataError, SnapshotError
from pipelines.export_version import ExportOptions
from pipelines.online.online import OnlineJob, _first_window
from pipelines.online.publisher import Order, Places, VersionPublisher
from tests.helpers.streams import add_window, rows_of, write_stream
from trainer.config.online import OnlineConfig
from trainer.data.stream.folder import WINDOWS, WindowFolder
from trainer.data.stream.ledger import Entry, Ledger
from trainer.data.stream.source import Stamp
from trainer.loop.online import Stream, WindowTrainer
from trainer.ranks.process_group import Ranks, process_group
from trainer.run_config import Config

LEDGER = Ledger().with_entry(Entry(0, "w1", "", Stamp(1, 1), "trained", 3))


class Ended:
    """A process that is no more."""

    exitcode = -9

    def join(self, timeout: float | None = None) -> None:
        pass

    kill = join


def publisher_at(root: Path, monkeypatch: pytest.MonkeyPatch, pipe: Connection) -> VersionPublisher:
    monkeypatch.setattr(VersionPublisher, "_started", lambda self: (pipe, Ended()))
    return VersionPublisher(Places(root, root / "versions", root), OnlineConfig())


@pytest.mark.parametrize("sent", [True, False])
def test_a_process_that_ends_is_told_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sent: bool
) -> None:
    """Also where it was killed before it has read what it was sent."""
    mine, other = Pipe()
    publisher = publisher_at(tmp_path, monkeypatch, mine)
    if sent:
        publisher.offer(3, LEDGER)
        other.close()
    else:
        other.close()
        publisher.offer(3, LEDGER)
    with pytest.raises(SnapshotError, match=r"the process that publishes has ended \(exit code -9\)"):
        publisher.wait()


def test_signals_wait_until_a_new_process_ignores_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[set[int]] = []

    class Process(Ended):
        def __init__(self, **given: Any) -> None:
            pass

        def start(self) -> None:
            held.append(set(signal.pthread_sigmask(signal.SIG_BLOCK, [])))

    monkeypatch.setattr(publishing.multiprocessing.get_context("spawn"), "Process", Process, raising=False)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    VersionPublisher(Places(tmp_path, tmp_path, tmp_path), OnlineConfig())
    assert held and {signal.SIGTERM, signal.SIGINT} <= held[0]
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before


def test_a_version_is_whole_where_no_delta_can_be_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[ExportOptions] = []

    def publish(run: Path, out: Path, ranks: Ranks, options: ExportOptions, requests: Any) -> str:
        asked.append(options)
        if options.since:
            raise SnapshotError(out, "its base is damaged")
        return "a version"

    monkeypatch.setattr(publishing, "publish_version", publish)
    monkeypatch.setattr(publishing, "_requests", lambda *given: None)
    places = Places(tmp_path, tmp_path, tmp_path)

    def made() -> list[str]:
        asked.clear()
        assert publishing._new_version(Order(3, "w1", 0.0), places, OnlineConfig(), None) == "a version"  # type: ignore[arg-type,comparison-overlap]
        return [each.since for each in asked]

    assert made() == [""]
    # The newest version is gone.
    (tmp_path / "LATEST").write_text("v00000007\n")
    assert made() == [""]
    monkeypatch.setattr(publishing, "_base", lambda *given: "v00000007")
    assert made() == ["v00000007", ""]


def test_what_nobody_has_thought_of_counts_as_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def publish(*given: Any) -> dict[str, Any]:
        raise StopIteration

    monkeypatch.setattr(publishing, "_publish", publish)
    order: Any = Order(3, "w1", 0.0)
    assert publishing.answer_to(order, *[None] * 3).problem.startswith("StopIteration")  # type: ignore[arg-type]


def test_all_ranks_hear_that_nothing_can_be_published(monkeypatch: pytest.MonkeyPatch) -> None:
    def told(compute: object) -> None:
        raise SnapshotError(Path("versions"), "the process has ended")

    # As on a rank that has no publisher.
    monkeypatch.setattr("trainer.loop.online.from_rank_0", told)
    trainer = WindowTrainer.__new__(WindowTrainer)
    trainer.stream = Stream(None, None, lambda window: None)  # type: ignore[arg-type,return-value]
    with pytest.raises(SnapshotError, match="has ended"):
        trainer._write_versions()


def test_the_first_window_that_can_be_read_says_what_the_input_is(tmp_path: Path) -> None:
    stream = write_stream(tmp_path / "stream")
    (stream / WINDOWS / "w0.parquet").write_bytes(b"damage")
    source, job = WindowFolder(stream), OnlineJob(stream, tmp_path / "run")
    with process_group(device="cpu") as ranks:
        assert ranks.world_size == 1
        with pytest.raises(DataError, match=r"no window with requests can be read; window w0: .*w0\.parquet"):
            _first_window(source, job, Config(), print, {})
        add_window(stream, "w1", rows_of(1))
        assert _first_window(source, job, Config(), print, {}).name == "w1"
        with pytest.raises(DataError, match=r"w1: no row group is good"):
            _first_window(source, job, Config(), print, {"w1": "no row group is good"})
        (stream / WINDOWS / "w0.parquet").unlink()
        (stream / WINDOWS / "w1.parquet").unlink()
        with pytest.raises(ConfigError, match="no window with requests is there yet"):
            _first_window(source, job, Config(), print, {})
