"""Publishes checkpoints beside a training: one process of its own, one version at a time.

RUN/published.json     the step of the newest checkpoint that was published
RUN/.publishing.lock   held by the process that publishes; that of a killed run ends by itself
"""

from __future__ import annotations

import json
import multiprocessing
import signal
import time
import traceback
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import TracebackType
from typing import Any

from embeddings.errors import DataError, SnapshotError, TandemError
from pipelines.console import quiet_third_parties
from pipelines.export_version import ExportOptions, Published, publish_version
from trainer.checkpoint import files
from trainer.config.online import OnlineConfig
from trainer.data.stream.folder import WindowFolder
from trainer.data.stream.ledger import Ledger
from trainer.log.schema import LogManifest
from trainer.log.schema import read_manifest as read_log
from trainer.loop.online import Version
from trainer.ranks.process_group import Ranks, process_group
from trainer.run_folder import RunFolder
from trainer.sealed_folder import locked, write_text
from trainer.snapshot.manifest import LATEST
from trainer.snapshot.publishing import open_base, version_of
from trainer.snapshot.reading import read_manifest

_FAILURES = 3
# How long a process whose pipe is closed may take to end.
_GONE_S = 5.0
_STOPS = (signal.SIGTERM, signal.SIGINT)


@dataclass(frozen=True)
class Places:
    """Folders: of the run, of its snapshot's versions, and of the stream."""

    run: Path
    snapshots: Path
    stream: Path

    @property
    def published(self) -> Path:
        """Says which checkpoint was published last."""
        return self.run / "published.json"


@dataclass(frozen=True)
class Order:
    """A checkpoint to publish: of a step; `window`: the newest that it was trained on, which appeared at that
    unix second."""

    step: int
    window: str
    appeared: float


@dataclass(frozen=True)
class Answer:
    """What became of an order: facts of the version, or why there is none."""

    facts: Mapping[str, Any]
    problem: str = ""


class VersionPublisher:
    """Publishes what it is offered; use as a context manager, on rank 0.

    A version that fails is said and tried again with the next one, which holds what it would have held. After
    three in a row the run ends; so it does where the last version of a run fails.
    """

    def __init__(self, places: Places, settings: OnlineConfig) -> None:
        self._places, self._settings = places, settings
        self._step = _published_step(places.published)
        self._failures, self._busy = 0, False
        self._done: list[Version] = []
        self._pipe, self._process = self._started()

    def _started(self) -> tuple[Connection, BaseProcess]:
        context = multiprocessing.get_context("spawn")
        mine, other = context.Pipe()
        given = other, self._places, self._settings
        process = context.Process(target=serve, args=given, daemon=True)
        # Held back until the process ignores them, which takes seconds: a signal to all of a group of
        # processes would end it, and the run could not stop in order. What a start brings up the first time
        # lets them through, so it is brought up before.
        resource_tracker.ensure_running()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPS)
        try:
            process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        # Or its end would not be noticed.
        other.close()
        return mine, process

    def __enter__(self) -> VersionPublisher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pipe.close()
        if error is not None:
            # What it leaves of a version is swept by the next one.
            self._process.kill()
        self._process.join()

    def due(self, ledger: Ledger) -> bool:
        """Whether so many windows were trained since the newest version as `online.publish_every` says."""
        after = self._order.step if self._busy else self._step
        trained = [each for each in ledger.entries if each.outcome == "trained" and each.step > after]
        return len(trained) >= self._settings.publish_every

    def offer(self, step: int, ledger: Ledger) -> None:
        """See `trainer.loop.online.Publisher`."""
        self.wait()
        if self._failures >= _FAILURES:
            raise SnapshotError(self._places.snapshots, f"{_FAILURES} versions in a row failed")
        newest = next(each for each in reversed(ledger.entries) if each.outcome == "trained")
        self._send(Order(step, newest.name, newest.stamp.appeared))

    def wait(self) -> None:
        """See `trainer.loop.online.Publisher`."""
        limit = self._settings.publish_timeout_s
        self._take_answer(limit)
        if self._busy:
            late = f"a version was not done after {limit:g} s (online.publish_timeout_s)"
            raise SnapshotError(self._places.snapshots, f"{late}; the same command publishes it")

    def finish(self) -> None:
        """Raises SnapshotError where the last version failed."""
        self.wait()
        if self._failures:
            what = "the last version failed, see above; the same command publishes it"
            raise SnapshotError(self._places.snapshots, what)

    def done(self) -> list[Version]:
        """See `trainer.loop.online.Publisher`."""
        self._take_answer(0.0)
        done, self._done = self._done, []
        return done

    def _send(self, order: Order) -> None:
        with suppress(BrokenPipeError):
            self._pipe.send(order)
        self._order, self._busy = order, True

    def _take_answer(self, timeout: float) -> None:
        """Wait so long for what is being published."""
        if not self._busy or not self._pipe.poll(timeout):
            return
        try:
            answer: Answer = self._pipe.recv()
        except (EOFError, OSError):
            # Of the second kind where it has left something unread.
            self._process.join(_GONE_S)
            code = self._process.exitcode
            raise SnapshotError(
                self._places.snapshots, f"the process that publishes has ended (exit code {code}), see above"
            ) from None
        self._busy, step = False, self._order.step
        if answer.problem:
            self._failures += 1
            line = f"not published, the next version will hold it: {answer.problem}"
            self._done.append(Version(step, line, {"window": self._order.window, "problem": answer.problem}))
            return
        self._failures, self._step = 0, step
        self._done.append(Version(step, _line(answer.facts), answer.facts))


def serve(pipe: Connection, places: Places, settings: OnlineConfig) -> None:
    """What the process does: publish what comes through the pipe, until its other end is closed."""
    for number in _STOPS:
        # Whoever stops the run stops this by closing the pipe.
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPS)
    quiet_third_parties()
    without = "two runs may publish at a time"
    lock = locked(places.run / ".publishing.lock", without, wait=True)
    with lock, process_group(device="cpu", alone=True) as ranks, suppress(EOFError, ConnectionError):
        while True:
            pipe.send(answer_to(pipe.recv(), places, settings, ranks))


def answer_to(order: Order, places: Places, settings: OnlineConfig, ranks: Ranks) -> Answer:
    """Publish a checkpoint, unless that was done; `ranks`: a group of one."""
    try:
        return Answer(_publish(order, places, settings, ranks))
    except (TandemError, OSError, MemoryError) as error:
        return Answer({}, str(error) or type(error).__name__)
    except Exception as error:
        # Nobody has thought of it, so its whole story is shown; it counts as any failure.
        traceback.print_exc()
        return Answer({}, f"{type(error).__name__}: {error}")


def _publish(order: Order, places: Places, settings: OnlineConfig, ranks: Ranks) -> dict[str, Any]:
    started = time.monotonic()
    there = files.of_step(RunFolder(places.run).checkpoints, order.step)
    # A run that was killed may have published it and not written that down.
    path = version_of(places.snapshots, {files.manifest_digest(each) for each in there})
    if path is None:
        done = _new_version(order, places, settings, ranks)
        found, path = done.manifest.model_dump(mode="json"), done.path
    else:
        found = read_manifest(path).model_dump(mode="json")
    write_text(places.published, json.dumps({"step": order.step, "version": path.name}))
    return {
        "version": path.name,
        "window": order.window,
        "whole": found["base"] is None,
        "bytes": sum(file["bytes"] for file in found["files"]),
        "tombstones": sum(each["gone"] or 0 for each in found.get("ids", {}).values()),
        "live_ids": {feature: each["live"] for feature, each in found.get("ids", {}).items()},
        "seconds": time.monotonic() - started,
        "seconds_from_appearance": time.time() - order.appeared,
    }


def _new_version(order: Order, places: Places, settings: OnlineConfig, ranks: Ranks) -> Published:
    """A delta while its chain is short enough; whole where there is nothing that one could build on."""
    options = ExportOptions(
        dtype=settings.dtype,
        attention_dtype=settings.attention_dtype,
        keep=settings.keep,
        parity_requests=settings.compare_requests,
        which=str(order.step),
    )
    given = places.run, places.snapshots, ranks
    requests = _requests(places.stream, order.window)
    try:
        if since := _base(places.snapshots, settings.full_every):
            return publish_version(*given, replace(options, since=since), requests)
    except SnapshotError as error:
        # What it builds on may be damaged, and would be for every version after this one.
        print(f"no delta can be published, so this version is whole: {error}", flush=True)
    return publish_version(*given, options, requests)


def _base(snapshots: Path, full_every: int) -> str:
    """The version that a delta is to build on; empty where a whole version is due, or there is none.

    Raises:
        SnapshotError: the newest one, or one that it builds on, is missing or damaged.
    """
    try:
        newest = (snapshots / LATEST).read_text(encoding="utf-8").strip()
    except (FileNotFoundError, NotADirectoryError):
        return ""
    return newest if len(open_base(snapshots, newest).versions) < full_every else ""


def _requests(stream: Path, window: str) -> LogManifest:
    """A log of the window that was trained last, or of a later one, or else of any that is still there."""
    source = WindowFolder(stream)
    listed = source.listed()
    names = sorted(listed, key=lambda name: (name < window, name != window, name))
    for name in names:
        with suppress(DataError, OSError):
            found = source.open(name, listed[name])
            if not found.empty:
                return found.manifest(read_log(stream))
    raise DataError("no window is there to compare scores on; leave the newest ones there", file=stream)


def _published_step(file: Path) -> int:
    """The step of the checkpoint that was published last; -1 = none."""
    if not file.exists():
        return -1
    try:
        return int(json.loads(file.read_text(encoding="utf-8"))["step"])
    except (ValueError, KeyError, TypeError):
        raise DataError("does not say which step was published; move it away", file=file) from None


def _line(facts: Mapping[str, Any]) -> str:
    kind = "whole" if facts["whole"] else "a delta"
    size, seconds = facts["bytes"] / 1e6, facts["seconds"]
    return (
        f"published {facts['version']}, {kind} of {size:,.1f} MB, in {seconds:.1f} s: "
        f"{facts['seconds_from_appearance']:,.1f} s after window {facts['window']} appeared"
    )
