"""The one exception tree. Every message says what is wrong, where, and what to do.

TandemError
├── ConfigError       a config file, an override or a command-line value
├── DataError         a log, a file, a row group, a column or a row
├── CheckpointError   a checkpoint that cannot be written, verified or loaded
├── SnapshotError     a serving snapshot that cannot be written, verified or loaded
├── UnavailableError  a store or a disk that fails now; what lies there may be sound
└── RankError         another rank, or the launcher, died or hangs; the cause is told there, not here
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any


class TandemError(Exception):
    """Base of all errors a user can cause or mend; the command line shows it as one line."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Have pickle keep the error as it is, since subclasses take other arguments than its text."""
        return _again, (type(self), self.args, self.__dict__)


def _again(kind: type[TandemError], args: tuple[Any, ...], fields: dict[str, Any]) -> TandemError:
    error = kind.__new__(kind, *args)
    error.args = args
    error.__dict__.update(fields)
    return error


class ConfigError(TandemError):
    """The configuration is wrong or asks for something this machine cannot do."""


class DataError(TandemError):
    """A log is missing, malformed or corrupt.

    Args:
        problem: what is wrong and what to do about it.
        file, row_group, column, row: where, as far as it is known.
    """

    def __init__(
        self,
        problem: str,
        *,
        file: str | Path | None = None,
        row_group: int | None = None,
        column: str | None = None,
        row: int | None = None,
    ) -> None:
        self.problem = problem
        self.file = None if file is None else str(file)
        self.row_group = row_group
        self.column = column
        self.row = row
        places = {"row group": row_group, "column": column, "row": row}
        where = ", ".join(f"{name} {value}" for name, value in places.items() if value is not None)
        place = ": ".join(part for part in (self.file or "", where) if part)
        super().__init__(f"{place}: {problem}" if place else problem)


class CheckpointError(TandemError):
    """A checkpoint failed to save, verify or load."""

    def __init__(self, path: str | Path, problem: str) -> None:
        self.path, self.problem = str(path), problem
        super().__init__(f"{path}: {problem}")


class SnapshotError(TandemError):
    """A serving snapshot failed to save, verify or load."""

    def __init__(self, path: str | Path, problem: str) -> None:
        self.path = str(path)
        super().__init__(f"{path}: {problem}")


class UnavailableError(TandemError):
    """A store or a disk fails now, which says nothing about what lies there; trying again may help."""

    def __init__(self, path: str | Path, problem: str) -> None:
        self.path = str(path)
        super().__init__(f"{path}: {problem}")


class RankError(TandemError):
    """This rank cannot go on because another one, or the launcher, does not; starting again may help."""


def hint_of(name: str, known: Iterable[str], otherwise: str) -> str:
    """The end of a message about a wrong name: the nearest known one, or `otherwise` where none is near."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"did you mean {near[0]!r}?" if near else otherwise
