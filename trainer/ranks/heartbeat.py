"""A thread beside the training that hears from the other ranks, because NCCL's own way to end is no way out.

A gloo collective that waits in vain raises, and the command line names the lost rank. With NCCL the main
thread waits for the device, where nothing can be raised, until torch's watchdog ends the process by a signal.
So each rank says every few seconds through the store that it lives and how many collectives it has begun. A
rank that no longer says so is dead, frozen or cut off. One that lives, and has for the whole time-out not
begun a collective that this rank has begun, hangs. Either way the collectives are aborted, so that the main
thread wakes with an error, which `naming_the_lost` of `process_group` turns into a RankError; a main thread
that does not wake is not waited for.

Work that may take any length of time is no silence: while rank 0 plans or counts, the other ranks wait in
`embeddings.agreement.unhurried`, not in a collective, so that no rank has begun more of them than another.
"""

from __future__ import annotations

import datetime
import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, NoReturn, cast

import torch.distributed as dist

from embeddings import private
from embeddings.errors import RankError

# Collectives begun, by the name of their group.
Begun = dict[str, int]
Hook = Callable[[type[BaseException], BaseException, TracebackType | None], Any]

# Between two beats, and a part of the time-out where that is short.
_BEAT_S, _PART = 5.0, 8
# How long the main thread may take to wake once the collectives are aborted, and a process to end.
GRACE_S, LEAVE_S = 10.0, 30.0
# As the command line ends for a RankError.
_EXIT_CODE = 1
_STDERR = 2
# Of the store.
_ANSWER_S, _JOIN_S = 10.0, 2.0


@dataclass(frozen=True)
class Beat:
    """What a rank says.

    Attributes:
        number: of this beat; begun: see `Begun`; left: the rank has come to its end.
    """

    number: int
    begun: Begun
    left: bool = False

    def text(self) -> str:
        return json.dumps([self.number, self.begun, self.left])

    @classmethod
    def of(cls, text: str | bytes) -> Beat:
        return cls(*json.loads(text))


@dataclass
class Peers:
    """What is known of the other ranks, and since when; the caller brings the time.

    Args:
        others: their ranks; patience_s: after so much silence a rank is lost; started: the time now.
    """

    others: list[int]
    patience_s: float
    started: float
    _beats: dict[int, Beat] = field(default_factory=dict)
    _heard: dict[int, float] = field(default_factory=dict)
    _behind: dict[tuple[int, str], tuple[int, float]] = field(default_factory=dict)

    def hear(self, now: float, mine: Begun, beats: dict[int, Beat]) -> None:
        """Take note of the newest beats; ranks that nothing was heard of may be left out."""
        for rank, beat in beats.items():
            if rank not in self._beats or beat.number != self._beats[rank].number:
                self._heard[rank] = now
            self._beats[rank] = beat
        for rank, beat in self._beats.items():
            # A group that this rank is not in, or that the other one has not made yet, tells nothing.
            for name in mine.keys() & beat.begun.keys():
                key, theirs = (rank, name), beat.begun[name]
                if theirs >= mine[name]:
                    self._behind.pop(key, None)
                elif key not in self._behind or self._behind[key][0] != theirs:
                    self._behind[key] = (theirs, now)

    def lost(self, now: float) -> list[int]:
        """The ranks that are silent, or that others have waited for, longer than the patience."""
        ended = {rank for rank, beat in self._beats.items() if beat.left}
        heard = {rank: self._heard.get(rank, self.started) for rank in self.others if rank not in ended}
        silent = {rank for rank, at in heard.items() if now - at > self.patience_s}
        hanging = {rank for (rank, _), (_, since) in self._behind.items() if now - since > self.patience_s}
        return sorted(silent | hanging)


class Heartbeat:
    """Says that this rank lives, and acts where another one does not.

    Args:
        rank, world_size: of this process; store: of all ranks.
        timeout_s: silence that means that a rank is lost.
        begun: asked in the thread; abort: has collectives under way end with an error, may block.
        grace_s: how long the main thread may take from there to `acknowledge`.
        show: as `sys.excepthook`, has the error seen that the thread ends the process with.

    Attributes:
        blame: which ranks are lost, in words; empty as long as none is.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        store: dist.Store,
        timeout_s: float,
        begun: Callable[[], Begun],
        abort: Callable[[], None],
        grace_s: float = GRACE_S,
        show: Hook = sys.__excepthook__,
    ) -> None:
        self.rank, self.blame = rank, ""
        self._where: Callable[[], str] = lambda: "while the ranks met"
        self._others = [other for other in range(world_size) if other != rank]
        # A connection of its own: the main thread may hold the other one for as long as it waits for a key.
        self._store = dist.PrefixStore("heartbeat", cast(Any, store).clone())
        self._store.set_timeout(datetime.timedelta(seconds=min(_ANSWER_S, timeout_s)))
        self._timeout_s, self._grace_s = timeout_s, grace_s
        self._begun, self._abort, self._show = begun, abort, show
        self._number, self._well, self._complete, self._cut = 0, False, False, ""
        self._asking: threading.Thread | None = None
        self._heard: dict[int, Beat] = {}
        self._over, self._acknowledged = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, well: bool = True) -> None:
        """This rank ends; where it ends well, the others need not hear of it any more."""
        self._well = well
        self._acknowledged.set()
        self._over.set()
        self._thread.join(_JOIN_S)

    @contextmanager
    def at(self, where: Callable[[], str]) -> Iterator[None]:
        """Within this context the main thread is at a place that messages name.

        Raises:
            RankError: see `check`.
        """
        before, self._where = self._where, where
        try:
            yield
            self.check()
        finally:
            self._where = before

    def check(self) -> None:
        """Raise in the main thread what the heartbeat found, if anything.

        What was computed since the collectives were aborted is worth nothing.

        Raises:
            RankError: a rank is lost.
        """
        if self.blame:
            raise self.acknowledge(self._where)

    def acknowledge(self, where: Callable[[], str]) -> RankError:
        """The error to raise; from here on the main thread ends the process."""
        self._acknowledged.set()
        return RankError(f"rank {self.rank}, {where()}: {self.blame}")

    def _run(self) -> None:
        peers = Peers(self._others, self._timeout_s, time.monotonic())
        while not self._over.wait(min(_BEAT_S, self._timeout_s / _PART)):
            mine = self._counted()
            peers.hear(time.monotonic(), mine, self._asked(mine))
            lost = peers.lost(time.monotonic())
            if lost and not self._over.is_set():
                self._act(lost)
                return
        if self._well and not self._cut:
            # Whoever keeps the store may have ended before.
            with suppress(RuntimeError):
                self._say(self._counted(), left=True)

    def _counted(self) -> Begun:
        try:
            return self._begun()
        except Exception:
            # A group that is being made or has failed. That this rank lives it says all the same, or the
            # others would take it for dead.
            return {}

    def _say(self, mine: Begun, left: bool = False) -> None:
        self._number += 1
        self._store.set(str(self.rank), Beat(self._number, mine, left).text())

    def _asked(self, mine: Begun) -> dict[int, Beat]:
        """`_exchange`, with a limit of its own: none while an answer is still to come.

        Where the cable to the store's machine is cut, torch (2.13) waits until the kernel gives the
        connection up, a quarter of an hour, whatever the store's time-out is.
        """
        if self._asking is None or not self._asking.is_alive():
            heard: dict[int, Beat] = {}
            self._heard = heard
            self._asking = threading.Thread(
                target=lambda: heard.update(self._exchange(mine)), name="heartbeat-store", daemon=True
            )
            self._asking.start()
        self._asking.join(min(_ANSWER_S, self._timeout_s))
        return {} if self._asking.is_alive() else self._heard

    def _exchange(self, mine: Begun) -> dict[int, Beat]:
        """Say this rank's beat; -> the newest of the others, none where the store does not answer."""
        if self._cut:
            return {}
        try:
            self._say(mine)
            if not self._complete:
                self._complete = self._store.check([str(other) for other in self._others])
            # Those that have said anything yet: in the end all, which is one question then.
            speakers = self._others
            if not self._complete:
                speakers = [other for other in self._others if self._store.check([str(other)])]
            texts = self._store.multi_get([str(other) for other in speakers]) if speakers else []
        except dist.DistNetworkError as error:
            # It went with the launcher or with rank 0, which may have come to its end: that this rank hears
            # of nobody any more matters only if it goes on for long.
            self._cut = " ".join(str(error).split())[:160]
            return {}
        except RuntimeError:
            # It is slow.
            return {}
        return {other: Beat.of(text) for other, text in zip(speakers, texts, strict=True)}

    def _act(self, lost: list[int]) -> None:
        who = ", ".join(map(str, lost))
        self.blame = f"waited in vain for rank {who}, which hangs, is dead or cut off; see train.timeout_s"
        if self._cut:
            self.blame += f" (the ranks' store is gone: {self._cut})"
        # Needs no interpreter, which a call that blocks may hold.
        faulthandler.dump_traceback_later(self._grace_s + LEAVE_S, exit=True, file=_STDERR)
        threading.Thread(target=self._abort, name="abort", daemon=True).start()
        if not self._acknowledged.wait(self._grace_s):
            # The main thread does not wake. A save under way has had the same time to end.
            self._end()

    def _end(self) -> NoReturn:
        self._show(RankError, self.acknowledge(self._where), None)
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(_EXIT_CODE)


def leave_in_time() -> None:
    """End the process even if its groups, threads or the device do not let it go."""
    faulthandler.dump_traceback_later(LEAVE_S, exit=True, file=_STDERR)


def collectives_begun(backend: str) -> Begun:
    """How many collectives each group of this rank has begun over a backend (`nccl`).

    Groups over another one are left out: those of gloo have time-outs of their own, some of them longer.
    """
    return {name: private.collectives_begun(each) for name, each in private.backends(backend).items()}


def abort_collectives(backend: str) -> None:
    """Have all collectives over a backend end; those that wait for them, and later ones, raise.

    All groups at once, since one that is aborted alone may wait for another.
    """

    def abort(each: Any) -> None:
        # A group may have failed before, or fail to end in its own time: what ends then is the process.
        with suppress(RuntimeError):
            each.abort()

    threads = [
        threading.Thread(target=abort, args=(each,), daemon=True)
        for each in private.backends(backend).values()
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
