"""User states in one file that the server processes of a machine share, in /dev/shm or on a disk.

The file is a ring of fixed size behind a table of places:

    header     magic, bytes of the ring, entries of the table; then the tail, which only grows
    table      sets of `_WAYS` entries: key, position, length, and a checksum of these
    ring       states one behind the other, the oldest overwritten by the newest

A position counts all bytes ever reserved, so position modulo the ring's size is a place, and what lies more
than the ring's size behind the tail is overwritten. Readers take no lock: they look at the tail again when
they have read, and verify a digest (`codec`). A writer holds `flock` for as long as it moves the tail, a few
microseconds, and the lock of a killed process is free at once. A writer that is killed later leaves bytes
that no entry names. Everything goes through `pread` and `pwrite` instead of a mapping: a file that somebody
cut short is then an error, and no signal that ends the server.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import threading
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import ByteSize, Field

from embeddings.errors import ConfigError, UnavailableError
from trainer.config.toml import Settings

_MAGIC = b"TRSTATE1"
_HEADER = struct.Struct("<8sQQ")
_TAIL = struct.Struct("<QQ")
_ENTRY = struct.Struct("<32sQQI12x")
# The tail has a page of its own, then comes the table. States begin at multiples of 64 bytes.
_TAIL_AT, _TABLE_AT, _ALIGNED = 64, 4096, 64
_WAYS = 8
# Of each so many bytes of the ring, the table has an entry.
_BYTES_OF_ENTRY = 16 << 10
# A larger share of the ring is no single user's.
_LARGEST = 4
# How often, and in which steps in seconds, the lock is tried for.
_TRIES, _PAUSE = 50, 0.001
_FULL = (1 << 64) - 1


class SharedMemorySettings(Settings):
    """The server processes of one machine share states, in a file."""

    kind: Literal["shared_memory"]
    """A file of this machine."""
    folder: Path = Path("/dev/shm/tandemrec")
    """The folder of the file, which is made where it is missing. All processes that share states name the
    same one, and may write there."""
    bytes: ByteSize = Field(ByteSize(1 << 30), ge=1 << 20)
    """The size of the file, all of which is taken at the start. The oldest states give way to new ones.
    Processes with another size have another file."""

    def open(self) -> SharedMemoryStore:
        """Raises:
        ConfigError: the file cannot be made, for lack of room or rights.
        """
        return SharedMemoryStore(self.folder, int(self.bytes))


class _Entry(NamedTuple):
    """Where a state lies."""

    key: bytes
    position: int
    length: int

    def packed(self) -> bytes:
        return _ENTRY.pack(*self, self._check())

    def _check(self) -> int:
        return zlib.crc32(_ENTRY.pack(*self, 0)) | 1

    @staticmethod
    def unpacked(content: bytes) -> _Entry | None:
        """None where nothing was ever written, or half of it."""
        *fields, check = _ENTRY.unpack(content)
        entry = _Entry(*fields)
        return entry if check == entry._check() else None


class SharedMemoryStore:
    """See `trainer.serving.user_state.store.StateStore`.

    Args:
        folder: of the file; size: bytes of the ring.

    Raises:
        ConfigError: the file cannot be made.
    """

    def __init__(self, folder: Path, size: int) -> None:
        self._size = size // _ALIGNED * _ALIGNED
        self._sets = max(self._size // (_BYTES_OF_ENTRY * _WAYS), 1)
        self._ring_at = _TABLE_AT + self._sets * _WAYS * _ENTRY.size
        self.file = folder / f"user_states.{self._size}.ring"
        self._turn = threading.Lock()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._descriptor = self._opened()
        except OSError as error:
            problem = f"user_states.store: {self.file}: cannot be made: {error.strerror or error}"
            raise ConfigError(f"{problem}; take another folder or fewer bytes") from None

    def get(self, key: bytes) -> bytes | None:
        with self._plain_errors():
            for _, entry in self._entries(key):
                if entry is not None and entry.key == key and self._is_there(entry):
                    content = os.pread(self._descriptor, entry.length, self._place(entry.position))
                    # Whatever was overwritten meanwhile is gone.
                    whole = len(content) == entry.length and self._is_there(entry)
                    return content if whole else None
            return None

    def put(self, key: bytes, parts: Sequence[bytes | memoryview]) -> None:
        length = sum(len(part) for part in parts)
        if not length or length > self._size // _LARGEST:
            return
        with self._plain_errors():
            position = self._reserve(length)
            self._write(list(parts), self._place(position))
            # Now at last it can be found.
            at = self._chosen(key)
            os.pwrite(self._descriptor, _Entry(key, position, length).packed(), at)

    def close(self) -> None:
        os.close(self._descriptor)

    def _opened(self) -> int:
        """The file, made where it is missing or is another one's."""
        try:
            descriptor = os.open(self.file, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            self._make()
            descriptor = os.open(self.file, os.O_RDWR | os.O_CLOEXEC)
        known = os.pread(descriptor, _HEADER.size, 0) == _HEADER.pack(_MAGIC, self._size, self._sets)
        if not known or os.fstat(descriptor).st_size != self._ring_at + self._size:
            os.close(descriptor)
            raise OSError(errno.EINVAL, "another file, or a damaged one, lies there: delete it")
        return descriptor

    def _make(self) -> None:
        part = self.file.with_name(f"{self.file.name}.tmp-{os.getpid()}-{threading.get_ident()}")
        descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            # All of it at once: a disk that is full later would be found out by requests.
            os.posix_fallocate(descriptor, 0, self._ring_at + self._size)
            os.pwrite(descriptor, _HEADER.pack(_MAGIC, self._size, self._sets), 0)
            os.pwrite(descriptor, _TAIL.pack(0, _FULL), _TAIL_AT)
            # Of several processes one is first, and the others take its file.
            with suppress(FileExistsError):
                os.link(part, self.file)
        finally:
            os.close(descriptor)
            part.unlink()

    def _place(self, position: int) -> int:
        return self._ring_at + position % self._size

    def _tail(self) -> int | None:
        """How many bytes were ever reserved; None where the number is half written."""
        content = os.pread(self._descriptor, _TAIL.size, _TAIL_AT)
        if len(content) < _TAIL.size:
            raise OSError(errno.EIO, "was cut short")
        tail, inverse = _TAIL.unpack(content)
        return int(tail) if tail ^ inverse == _FULL else None

    def _is_there(self, entry: _Entry) -> bool:
        """Whether nothing was written over it yet."""
        tail = self._tail()
        fits = entry.position % self._size + entry.length <= self._size
        return tail is not None and fits and tail <= entry.position + self._size and entry.position < tail

    def _entries(self, key: bytes) -> Iterator[tuple[int, _Entry | None]]:
        """Where the entries of a key's set lie, and what they say."""
        at = _TABLE_AT + int.from_bytes(key[:8], "little") % self._sets * _WAYS * _ENTRY.size
        content = os.pread(self._descriptor, _WAYS * _ENTRY.size, at)
        for way in range(len(content) // _ENTRY.size):
            part = content[way * _ENTRY.size : (way + 1) * _ENTRY.size]
            yield at + way * _ENTRY.size, _Entry.unpacked(part)

    def _chosen(self, key: bytes) -> int:
        """The entry to write: that of the key, else a free one, else the oldest."""
        entries = list(self._entries(key))
        ages = [
            (entry is None or entry.key != key, -1 if entry is None else entry.position, at)
            for at, entry in entries
        ]
        return min(ages)[2]

    def _reserve(self, length: int) -> int:
        """Move the tail on -> the position of so many bytes in a row."""
        room = -(-length // _ALIGNED) * _ALIGNED
        with self._locked():
            tail = self._tail()
            if tail is None:
                tail = self._after_all()
            left = self._size - tail % self._size
            position = tail if room <= left else tail + left
            new = position + room
            os.pwrite(self._descriptor, _TAIL.pack(new, _FULL ^ new), _TAIL_AT)
        return position

    def _after_all(self) -> int:
        """Where the tail may be, if nobody knows it any more: behind everything that an entry names."""
        size = self._sets * _WAYS * _ENTRY.size
        content = os.pread(self._descriptor, size, _TABLE_AT)
        ends = [0]
        for at in range(0, len(content) - _ENTRY.size + 1, _ENTRY.size):
            entry = _Entry.unpacked(content[at : at + _ENTRY.size])
            ends += [] if entry is None else [entry.position + entry.length]
        return -(-max(ends) // self._size) * self._size

    def _write(self, parts: list[bytes | memoryview], at: int) -> None:
        for part in parts:
            view = memoryview(part)
            while view:
                written = os.pwrite(self._descriptor, view, at)
                view, at = view[written:], at + written

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the file's lock, for which nobody waits longer than a moment.

        Raises:
            OSError: a process holds it, and does not go on.
        """
        with self._turn:
            for _ in range(_TRIES):
                try:
                    fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    time.sleep(_PAUSE)
            else:
                raise OSError(errno.EAGAIN, "is locked by a process that does not go on")
            try:
                yield
            finally:
                fcntl.flock(self._descriptor, fcntl.LOCK_UN)

    @contextmanager
    def _plain_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UnavailableError(self.file, f"fails: {error.strerror or error}") from None
