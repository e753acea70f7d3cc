"""Files that grow, of a run in a store that knows only whole objects: written here, uploaded now and then."""

from __future__ import annotations

import tempfile
import time
from contextlib import suppress
from pathlib import Path

from trainer.storage.local import voice
from trainer.storage.objects import upload

# Seconds between two uploads; a save and the end of a run do not wait for them.
EVERY_S = 30.0


class Spool:
    """A folder of this machine whose files are uploaded, each whole, when they have changed.

    Attributes:
        due: whether the last upload was long enough ago.
    """

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="tandemrec-")
        # Local file or folder -> its place.
        self._places: dict[Path, Path] = {}
        self._uploaded: dict[Path, tuple[int, int]] = {}
        self._next = time.monotonic() + EVERY_S

    def file(self, place: Path) -> Path:
        """The local form of a file, with what the store has of it."""
        local = Path(self._folder.name, place.name)
        with suppress(FileNotFoundError):
            local.write_bytes(place.read_bytes())
        self._places[local] = place
        return local

    def folder(self, place: Path) -> Path:
        """The local form of a folder to which files are added; what the store has of it stays there."""
        local = Path(self._folder.name, place.name)
        local.mkdir()
        self._places[local] = place
        return local

    @property
    def due(self) -> bool:
        return time.monotonic() >= self._next

    def offer(self) -> None:
        """Upload what has changed; a store that fails is said, and tried again the next time."""
        try:
            self.keep()
        except OSError as error:
            self._next = time.monotonic() + EVERY_S
            voice.say(f"{error.filename}: not uploaded, and tried again: {error.strerror or error}")

    def keep(self) -> None:
        """Upload what has changed.

        Raises:
            OSError: the store cannot be written.
        """
        for local, place in self._places.items():
            for file in [local] if local.is_file() else sorted(local.iterdir()) if local.is_dir() else []:
                now = file.stat().st_size, file.stat().st_mtime_ns
                if self._uploaded.get(file) != now:
                    upload(file, place if file == local else place / file.name)
                    self._uploaded[file] = now
        self._next = time.monotonic() + EVERY_S

    def forget(self) -> None:
        """Upload nothing any more."""
        self._places.clear()

    def close(self, failing: bool = False) -> None:
        """Upload the rest, and delete the local files.

        Args:
            failing: something else has gone wrong, which is the error to be told.

        Raises:
            OSError: the store cannot be written.
        """
        try:
            self.offer() if failing else self.keep()
        finally:
            self._folder.cleanup()
