"""How far along: a live line on a terminal, a line every few seconds with the same content elsewhere."""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack
from typing import TextIO

from rich.console import Console
from rich.live import Live
from rich.text import Text

_EVERY_S = 5.0
_BAR = 24


class Progress(ExitStack):
    """Shows step, loss, samples/s and time left. Use as a context manager.

    Args:
        label: what is running.
        speaks: only then anything is written.
        stream: where to; a terminal gets a line that redraws itself below whatever is printed meanwhile.
    """

    def __init__(self, label: str, speaks: bool, stream: TextIO | None = None) -> None:
        super().__init__()
        self.label, self.speaks, self.stream = label, speaks, stream or sys.stdout
        self._live: Live | None = None
        if speaks and self.stream.isatty():
            # Without the thread that redraws by itself: a run that hangs must not look alive.
            self._live = self.enter_context(Live(console=Console(file=self.stream), auto_refresh=False))
        self._started = self._shown = time.monotonic()
        self._first_share: float | None = None

    def show(self, share: float, text: str, last: bool = False) -> None:
        """Report that `share` (0 to 1) is done; drawn at most a few times a second, or every 5 s."""
        if not self.speaks:
            return
        now = time.monotonic()
        if self._first_share is None:
            self._first_share, self._started = share, now
        if not last and now - self._shown < (0.2 if self._live else _EVERY_S):
            return
        self._shown, full = now, round(share * _BAR)
        bar = "[" + "#" * full + "." * (_BAR - full) + "]"
        done, left = share - self._first_share, ""
        if done > 0:
            seconds = int((now - self._started) * (1 - share) / done)
            left = f"{seconds // 60}:{seconds % 60:02d} left"
        line = f"{self.label} {bar} {share:4.0%} {text} {left}"
        if self._live is not None:
            self._live.update(Text(line), refresh=True)
        else:
            print(line, file=self.stream, flush=True)
