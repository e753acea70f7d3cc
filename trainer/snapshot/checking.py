"""Files of a version against their entries in its manifest: each is read once, several side by side.

SHA-256 is what limits that, some 1.2 GB/s a core; hence the threads.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import threading
import time
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from embeddings.errors import SnapshotError
from trainer.sealed_folder import voice
from trainer.snapshot.manifest import SEAL, ListedFile

_PIECE = 4 << 20
_MOST_THREADS = 4
# What takes no longer than that needs no words.
_SILENT_S = 5.0


def check_files(
    files: Sequence[tuple[Path, ListedFile]], known: Collection[Path] = (), every: float = _SILENT_S
) -> None:
    """Each must be a plain file of the size and digest that its manifest says.

    Args:
        files: (a version's folder, entry); known: files that were checked already by whoever calls.
        every: seconds between two lines of progress.

    Raises:
        SnapshotError: one is not; naming the first.
    """
    wanted = [(path / entry.path, entry) for path, entry in files if path / entry.path not in known]
    for file, _ in wanted:
        if file.is_symlink() or file.parent.is_symlink() or not file.is_file():
            raise SnapshotError(file, "missing, or not a plain file")
    progress = _Progress(sum(entry.bytes for _, entry in wanted), every)

    def check(one: tuple[Path, ListedFile]) -> None:
        # Retired versions go away at any moment, so that it may be unreadable by now.
        SEAL.check(one[0], one[1].bytes, one[1].sha256, progress.digest)

    if progress.whole < _PIECE or len(wanted) < 2:
        for one in wanted:
            check(one)
        return
    with ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1)) as threads:
        # The first failure, in the order of the files; those that wait are not begun.
        begun = [threads.submit(check, one) for one in wanted]
        try:
            for each in begun:
                each.result()
        finally:
            threads.shutdown(cancel_futures=True)


class _Progress:
    """Counts what was read of `whole` bytes, over all threads."""

    def __init__(self, whole: int, every: float) -> None:
        self.whole, self._every, self._read = whole, every, 0
        self._lock, self._begun = threading.Lock(), time.monotonic()
        self._said = self._begun

    def digest(self, file: Path) -> str:
        content = hashlib.sha256()
        # Not of the heap: glibc would keep so much for each thread that ever checked a file.
        with file.open("rb") as raw, mmap.mmap(-1, _PIECE) as room, memoryview(room) as piece:
            while count := raw.readinto(piece):
                content.update(piece[:count])
                self._add(count)
        return content.hexdigest()

    def _add(self, count: int) -> None:
        with self._lock:
            self._read += count
            now = time.monotonic()
            if now - self._said < self._every:
                return
            self._said = now
            rate = self._read / (now - self._begun)
        done, whole = self._read / 1e9, self.whole / 1e9
        voice.say(f"checking the snapshot's files: {done:.1f} of {whole:.1f} GB, {rate / 1e9:.2f} GB/s")
