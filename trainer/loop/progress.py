"""How far along: a live bar on a terminal, plain lines with the same content elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TextIO

_EVERY_S = 5.0
_BAR = 24


class Progress:
    """Shows step, loss, samples/s and time left. Use as a context manager.

    Args:
        label: what is running.
        speaks: only then anything is written.
        stream: where to; a terminal gets a bar that redraws itself, anything else a line every few seconds.
    """

    def __init__(self, label: str, speaks: bool, stream: TextIO | None = None) -> None:
        self.label, self.speaks = label, speaks
        self.stream = stream or sys.stdout
        self._live = self.stream.isatty()
        self._started = self._shown = time.monotonic()
        self._first_share: float | None = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.speaks and self._live:
            self.stream.write("\n")
            self.stream.flush()

    def show(self, share: float, text: str, last: bool = False) -> None:
        """Report that `share` (0 to 1) is done; drawn at most a few times a second, or every 5 s."""
        if not self.speaks:
            return
        now = time.monotonic()
        if self._first_share is None:
            self._first_share, self._started = share, now
        if not last and now - self._shown < (0.2 if self._live else _EVERY_S):
            return
        self._shown = now
        line = f"{self.label} {_bar(share)} {share:4.0%} {text} {self._left(share, now)}"
        self.stream.write(f"\r\x1b[2K{line}" if self._live else f"{line}\n")
        self.stream.flush()

    def _left(self, share: float, now: float) -> str:
        done = share - (self._first_share or 0.0)
        if done <= 0:
            return ""
        seconds = int((now - self._started) * (1 - share) / done)
        return f"{seconds // 60}:{seconds % 60:02d} left"


def _bar(share: float) -> str:
    full = round(share * _BAR)
    return "[" + "#" * full + "." * (_BAR - full) + "]"
