"""Whether the files that a snapshot has mapped are still those that were checked.

Rows are read from the files while requests are scored, long after the digests were compared. A file that is
deleted or replaced under its name stays what it was for whoever has it mapped. One that is written over where
it lies changes under the server: it scores with other numbers, or with none at all.
"""

from __future__ import annotations

import os
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import NamedTuple

from embeddings.errors import SnapshotError
from trainer.snapshot.manifest import SEAL, ListedFile


class _Stamp(NamedTuple):
    """What tells a file that was not touched from one that may have been."""

    device: int
    inode: int
    size: int
    modified_ns: int

    @classmethod
    def of(cls, file: Path) -> _Stamp | None:
        """None where nothing has that name."""
        try:
            found = os.stat(file)
        except OSError:
            return None
        return cls(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)

    def is_same_file(self, other: _Stamp) -> bool:
        return (self.device, self.inode) == (other.device, other.inode)


class MappedFiles:
    """The files of a version, as they are before their digests are compared.

    Args:
        files: (folder of a version, its entry), of this version and of those that it builds on.
    """

    def __init__(self, files: Sequence[tuple[Path, ListedFile]] = ()) -> None:
        self._entries = {folder / entry.path: entry for folder, entry in files}
        self._good = {file: _Stamp.of(file) for file in self._entries}
        self._bad: dict[Path, _Stamp] = {}

    def overwritten(self) -> str:
        """Which file was written over, in words; empty if none was.

        Takes a call of the system for each file. One that was touched is read once more, to compare its
        digest: a copy with the same content changes nothing.
        """
        for file, entry in self._entries.items():
            good, now = self._good[file], _Stamp.of(file)
            # Another file of this name, or none, is not the one that is mapped.
            if good is None or now is None or now == good or not now.is_same_file(good):
                continue
            if self._bad.get(file) != now and self._has_digest(file, entry):
                self._good[file] = now
                continue
            self._bad[file] = now
            problem = "was written over since it was loaded, so that scores are no more those of this version"
            return f"{entry.path} {problem}; export anew, and never write into the folder of a version"
        return ""

    def state(self) -> Hashable:
        """Equal as long as no file is touched. Takes a call of the system for each."""
        return tuple(map(_Stamp.of, self._entries))

    def _has_digest(self, file: Path, entry: ListedFile) -> bool:
        try:
            SEAL.check(file, entry.bytes, entry.sha256)
        except SnapshotError:
            return False
        return True
