"""Takes windows out of a stream one by one, each once, in an order that a run which was killed keeps.

Before a window is trained its name is written down beside the run. A run that goes on from a checkpoint takes
the same windows in the same order as before, whatever has arrived meanwhile.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from embeddings.errors import DataError
from trainer.data.stream.ledger import REMEMBERED, Entry, Ledger, Outcome
from trainer.data.stream.source import Source, Stamp, Window, damaged
from trainer.sealed_folder import write_text


@dataclass
class Taken:
    """What was found in a stream.

    Attributes:
        ledger: with all that needs no training; window: what is to be trained next, None = nothing is there.
        waiting: windows there behind it; newest: unix second of the newest request of all of them.
        again: the stream could not be read, and is to be looked at again.
        lines: what a person should know.
    """

    ledger: Ledger
    window: Window | None = None
    waiting: int = 0
    newest: int = 0
    again: bool = False
    lines: list[str] = field(default_factory=list)


class Intake:
    """Decides what becomes of each window; on one rank.

    Args:
        source: of the windows; stream: its folder, for errors; order: the file that keeps the order.
        skip: damaged windows are left out instead of ending the run.
        retry_s: how long what cannot be read is tried again.
    """

    def __init__(self, source: Source, stream: Path, order: Path, skip: bool, retry_s: float) -> None:
        self._source, self._stream, self._file = source, stream, order
        self._skip, self._retry_s = skip, retry_s
        self._order = self._read_order()
        # Since when something could not be read, by the monotonic clock.
        self._failing: float | None = None

    def next(self, ledger: Ledger, step: int, inside: str = "") -> Taken:
        """What is to be trained after what the ledger holds.

        Args:
            step: the run's steps so far. inside: digest of the window that a checkpoint lies in; it is the
                next one, or nothing is.

        Raises:
            DataError: a window is damaged, gone from under the run, or cannot be read for too long.
        """
        taken = Taken(ledger)
        try:
            listed = self._source.listed()
            if not inside:
                self._look_back(taken, listed, step)
            while taken.window is None and (name := self._first(taken.ledger, listed)):
                self._take(taken, name, listed[name], step, inside)
            if inside and taken.window is None:
                raise self._gone("is gone")
            behind = taken.ledger.coming([*listed])
            behind = [name for name in behind if taken.window is None or name != taken.window.name]
        except OSError as error:
            self._failed(taken, error)
            return taken
        self._failing = None
        if taken.window is not None:
            taken.waiting = len(behind)
            taken.newest = max(taken.window.newest, self._source.newest(behind[-1]) if behind else 0)
        return taken

    def _look_back(self, taken: Taken, listed: Mapping[str, Stamp], step: int) -> None:
        """See which windows came late, or were written again."""
        for name in taken.ledger.late([*listed]):
            taken.lines.append(
                f"window {name} came late: {taken.ledger.newest} was taken before, so it is not trained"
            )
            self._enter(taken, name, listed[name], "late", step)
        for entry in taken.ledger.entries:
            now = listed.get(entry.name)
            if entry.outcome == "late" or now is None or now == entry.stamp:
                continue
            if self._source.digest(entry.name) != entry.digest:
                taken.lines.append(
                    f"window {entry.name} has other bytes than those that were taken ({entry.outcome}): it "
                    "is not trained again; give new data a name that sorts behind all others"
                )
            taken.ledger = taken.ledger.with_stamp(entry.name, now)

    def _first(self, ledger: Ledger, listed: Mapping[str, Stamp]) -> str:
        """The window that comes next; empty if there is none."""
        coming = ledger.coming([*listed])
        # What was taken before a kill comes first, though names before it have arrived since.
        again = [name for name in self._order if name > ledger.newest and name in listed]
        return next(iter([*again, *coming]), "")

    def _take(self, taken: Taken, name: str, stamp: Stamp, step: int, inside: str) -> None:
        """Look into a window, and say what becomes of it."""
        try:
            window = self._source.open(name, stamp)
        except DataError as error:
            if not self._skip or inside:
                raise damaged(name, error, self._stream) from None
            self._note(name)
            taken.lines.append(f"window {name} is damaged and skipped: {error}")
            self._enter(taken, name, stamp, "damaged", step)
            return
        if inside and window.digest != inside:
            raise self._gone(f"is not the one that is there first ({name}), or has other bytes")
        self._note(name)
        same = taken.ledger.with_bytes(window.digest)
        if same is not None:
            taken.lines.append(f"window {name} has the bytes of {same.name}, so it is not trained again")
            self._enter(taken, name, stamp, "twice", step, window.digest)
        elif window.empty:
            taken.lines.append(f"window {name} is empty")
            self._enter(taken, name, stamp, "empty", step, window.digest)
        else:
            taken.window = window

    def _enter(
        self, taken: Taken, name: str, stamp: Stamp, outcome: Outcome, step: int, digest: str = ""
    ) -> None:
        entry = Entry(taken.ledger.taken, name, digest, stamp, outcome, step)
        taken.ledger = taken.ledger.with_entry(entry)

    def _failed(self, taken: Taken, error: OSError) -> None:
        """Say that something cannot be read, unless that was said; after a while it ends the run."""
        now, taken.again, taken.window = time.monotonic(), True, None
        if self._failing is None:
            self._failing = now
            taken.lines.append(f"the stream cannot be read now, and is tried again: {error}")
        if now - self._failing > self._retry_s:
            problem = f"could not be read for {self._retry_s:,.0f} s (online.retry_s): {error}"
            raise DataError(f"{problem}; the same command goes on once it can", file=self._stream) from None

    def _gone(self, what: str) -> DataError:
        problem = f"the window that the newest checkpoint lies inside {what}"
        return DataError(f"{problem}; put it back, and the same command goes on", file=self._stream)

    def _note(self, name: str) -> None:
        """Write down that a window is taken, before anything is done with it."""
        if name not in self._order:
            self._order = [*self._order, name][-REMEMBERED:]
            write_text(self._file, json.dumps(self._order))

    def _read_order(self) -> list[str]:
        if not self._file.exists():
            return []
        try:
            return [str(name) for name in json.loads(self._file.read_text(encoding="utf-8"))]
        except (ValueError, TypeError):
            raise DataError("is no list of names; move it away", file=self._file) from None
