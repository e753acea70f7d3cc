"""Which windows of a stream were taken, in what order, and what became of them.

It is part of every checkpoint, so that a run which goes on from one knows what it has trained. It remembers
the newest windows only: a stream may go on for years.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from trainer.data.stream.source import Stamp

REMEMBERED = 1000
Outcome = Literal["trained", "empty", "twice", "damaged", "late"]
"""What becomes of a window. `twice`: its bytes were trained before under another name. `late`: its name sorts
before that of a window which was taken before it."""


@dataclass(frozen=True)
class Entry:
    """A window that was taken.

    Attributes:
        number: windows taken before it; digest: SHA-256 of its bytes, empty where nobody has read them.
        stamp: of its bytes as they were last seen.
        step: the run's steps once it was done.
    """

    number: int
    name: str
    digest: str
    stamp: Stamp
    outcome: Outcome
    step: int = 0

    @staticmethod
    def of_state(state: Mapping[str, Any]) -> Entry:
        """Of a checkpoint."""
        return Entry(**{**state, "stamp": Stamp(**state["stamp"])})


@dataclass(frozen=True)
class Ledger:
    """What was taken so far.

    Attributes:
        entries: the newest ones, in the order in which they were taken.
        counts: of all windows ever taken, by what became of them.
        newest: the largest name of those that were not late; empty before the first.
        event: unix second of the newest request of all trained windows.
    """

    entries: tuple[Entry, ...] = ()
    counts: Mapping[str, int] = field(default_factory=dict)
    newest: str = ""
    event: int = 0

    @staticmethod
    def of_state(state: Mapping[str, Any]) -> Ledger:
        """Of a checkpoint."""
        entries = tuple(Entry.of_state(each) for each in state["entries"])
        return Ledger(entries, dict(state["counts"]), state["newest"], state["event"])

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON."""
        return asdict(self)

    @property
    def taken(self) -> int:
        """The number of all windows ever taken."""
        return sum(self.counts.values())

    def with_entry(self, entry: Entry, event: int = 0) -> Ledger:
        """The same with one more window; `event`: unix second of its newest request."""
        newest = self.newest if entry.outcome == "late" else max(self.newest, entry.name)
        counts = {**self.counts, entry.outcome: self.counts.get(entry.outcome, 0) + 1}
        entries = (*self.entries, entry)[-REMEMBERED:]
        return Ledger(entries, counts, newest, max(self.event, event))

    def with_stamp(self, name: str, stamp: Stamp) -> Ledger:
        """The same, once somebody has looked at a window whose stamp has changed."""
        entries = tuple(replace(each, stamp=stamp) if each.name == name else each for each in self.entries)
        return replace(self, entries=entries)

    def with_bytes(self, digest: str) -> Entry | None:
        """The window that was trained with these bytes."""
        trained = (each for each in self.entries if each.outcome == "trained")
        return next((each for each in trained if each.digest == digest), None)

    def late(self, names: Sequence[str]) -> list[str]:
        """Those of the names there that sort before a window that was taken, and were not spoken of.

        What sorts before all that is remembered is not looked at: nobody knows whether it was trained.
        """
        if not self.newest:
            return []
        known = {each.name for each in self.entries}
        # A late one's own name says nothing of how far back the others go.
        in_order = [each.name for each in self.entries if each.outcome != "late"]
        oldest = min(in_order, default=self.newest) if self.taken > len(self.entries) else ""
        return [name for name in names if oldest < name < self.newest and name not in known]

    def coming(self, names: Sequence[str]) -> list[str]:
        """Those of the names there that are still to be taken, in order."""
        return sorted(name for name in names if name > self.newest)
