"""DCP's file writer, with the SHA-256 of every file made while it is written."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from torch.distributed.checkpoint.filesystem import FileSystemWriter

from trainer.checkpoint.files import Entries
from trainer.checkpoint.store_files import StoreFiles
from trainer.sealed_folder import sync_open
from trainer.storage import is_remote
from trainer.storage.objects import writing

# Below this handing a buffer to another thread costs more than hashing it.
_LARGE = 1 << 18


class HashedWriter(FileSystemWriter):
    """Writes and syncs DCP's files of this rank, one after the other; `files` says what became of them."""

    def __init__(self, path: Path) -> None:
        # The streams sync. Nothing is copied ahead from a device: an asynchronous save has copied all of it,
        # and torch would open a CUDA context for that wherever it can, even if no tensor lies on a device.
        super().__init__("", sync_files=False, per_thread_copy_ahead=0)
        self.fs = self.files = _HashingFileSystem()
        self.path = path

    @property
    def checkpoint_id(self) -> str | os.PathLike[str]:
        """As it is pickled into the metadata, which are read without the packages of a store, too."""
        return str(self.path) if is_remote(cast(Path, self.path)) else self.path


class _HashingFileSystem(StoreFiles):
    """Attributes:
    entries: name -> size and digest of what was written.
    problem: the first error of the operating system; torch hides it behind one of its own.
    """

    def __init__(self) -> None:
        self.entries: Entries = {}
        self.problem: OSError | None = None

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Generator[io.IOBase, None, None]:
        opened = writing(path) if is_remote(path) else path.open("wb")
        with ThreadPoolExecutor(1, "hash") as pool, self.noting(), opened as raw:
            stream = _HashingStream(raw, pool, self)
            yield stream
            stream.close()
            self.entries[path.name] = {"bytes": stream.size, "sha256": stream.sha.hexdigest()}

    def rename(self, path: Any, new_path: Any) -> None:
        super().rename(path, new_path)
        self.entries[new_path.name] = self.entries.pop(path.name)

    @contextmanager
    def noting(self) -> Generator[None, None, None]:
        try:
            yield
        except OSError as error:
            self.problem = self.problem or error
            raise


class _HashingStream(io.RawIOBase):
    """What is written goes to a file and, at the same time in another thread, into a digest."""

    def __init__(self, raw: BinaryIO, pool: ThreadPoolExecutor, system: _HashingFileSystem) -> None:
        self._raw, self._pool, self._system = raw, pool, system
        self.sha, self.size = hashlib.sha256(), 0

    def write(self, content: Any) -> int:
        view = memoryview(content).cast("B")
        with self._system.noting():
            if len(view) < _LARGE:
                self.sha.update(view)
                self._raw.write(view)
            else:
                hashed = self._pool.submit(self.sha.update, view)
                try:
                    self._raw.write(view)
                finally:
                    # The buffer is the caller's again once this returns.
                    hashed.result()
        self.size += len(view)
        return len(view)

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.size

    def flush(self) -> None:
        if not self._raw.closed:
            self._raw.flush()

    def close(self) -> None:
        """Have what was written reach the disk; what goes to a store gets there when that file is closed."""
        if isinstance(self._raw, io.BufferedWriter) and not self._raw.closed:
            self._raw.flush()
            sync_open(self._raw.fileno(), Path(self._raw.name))
            self._raw.close()
        super().close()
