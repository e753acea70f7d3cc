"""What pathlib lacks for files of this machine, and what one process says once."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_EXCHANGE, _HERE = 2, -100  # RENAME_EXCHANGE and AT_FDCWD of Linux


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


def exchange(one: Path, other: Path) -> bool:
    """Have two folders change places in one step; False where the system or the file system cannot."""
    try:
        call = ctypes.CDLL(None).renameat2
    except (OSError, AttributeError):
        return False
    return bool(call(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE) == 0)


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Have an error of writing say which file: a full disk is told of without one."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise
