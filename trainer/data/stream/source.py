"""Where windows come from, and what one window is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from embeddings.errors import DataError
from trainer.log.schema import LogManifest, SplitInfo

SPLIT = "window"
"""The one split of a window's manifest."""


@dataclass(frozen=True)
class Stamp:
    """What tells without a look inside whether a window's bytes may have changed: their number, and the time
    of the last change in nanoseconds."""

    bytes: int
    changed: int

    @property
    def appeared(self) -> float:
        """Unix seconds."""
        return self.changed / 1e9


def damaged(name: str, error: DataError, stream: Path) -> DataError:
    """What to say of a window that cannot be read."""
    remedy = 'replace it, move it away, or set data.on_bad = "skip" to go on without it'
    return DataError(f"window {name} is damaged: {error}; {remedy}", file=stream)


@dataclass(frozen=True)
class Window:
    """A part of a stream that is trained as a whole, once.

    Attributes:
        name: windows come in the order of their names; stamp: of its bytes, when they were read; digest:
            their SHA-256.
        newest: unix second of its newest request, 0 where it has none.
        info: its file and totals. Positives and labels are not counted.
    """

    name: str
    stamp: Stamp
    digest: str
    newest: int
    info: SplitInfo

    @property
    def empty(self) -> bool:
        """Whether it has nothing to train on."""
        return not self.info.candidates

    def manifest(self, stream: LogManifest) -> LogManifest:
        """That of a log in the stream's folder which holds this window and nothing else."""
        return stream.model_copy(update={"splits": {SPLIT: self.info}})


class Source(Protocol):
    """Gives the windows of a stream, on one rank."""

    def listed(self) -> Mapping[str, Stamp]:
        """The windows that are there now, by name.

        Raises:
            OSError: that cannot be said now.
        """

    def digest(self, name: str) -> str:
        """SHA-256 of a window's bytes.

        Raises:
            OSError: it cannot be read now.
        """

    def open(self, name: str, stamp: Stamp) -> Window:
        """Look into a window.

        Raises:
            DataError: it is damaged. OSError: it cannot be read now.
        """

    def newest(self, name: str) -> int:
        """Unix second of a window's newest request; 0 where that cannot be said."""
