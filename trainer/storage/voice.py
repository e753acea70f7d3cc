"""What one process says once."""

from __future__ import annotations

import sys


class Voice:
    """Says each thing once a process, on stderr; `process_group` silences all ranks but the first."""

    def __init__(self) -> None:
        self.silent = False
        self._said: set[str] = set()

    def say(self, line: str, once: str = "") -> None:
        """Print a line; where `once` was said before, nothing."""
        if not self.silent and (once or line) not in self._said:
            self._said.add(once or line)
            print(f"tandemrec: {line}", file=sys.stderr, flush=True)


voice = Voice()
