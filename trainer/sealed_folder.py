"""Files and folders that are there whole or not at all, and what a shared folder does not promise of that.

SMB, FUSE and object stores that are mounted as folders lack some calls: to sync a folder, to lock, to rename
onto a file. Work goes on without them, and one line a process says which promise is weaker there. Whatever
else goes wrong (a full disk, a broken one) is an error as ever.
"""

from __future__ import annotations

import errno
import fcntl
import fnmatch
import glob
import hashlib
import os
import re
import shutil
import socket
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.storage import is_remote, local, objects

exchange, naming, Voice, voice = local.exchange, local.naming, local.Voice, local.voice
_LACKING = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOTTY}
_NO_SYNC_OF_FOLDERS = _LACKING | {errno.EISDIR, errno.EACCES, errno.EPERM, errno.EBADF}
_NO_SYNC_OF_FILES = _LACKING | {errno.EBADF}
_NO_LOCKS = _LACKING | {errno.ENOLCK, errno.EPERM, errno.EBADF}
_NO_REPLACING = _LACKING | {errno.EEXIST, errno.ENOTEMPTY, errno.EACCES, errno.EPERM, errno.EBUSY}
_ROUNDS = 100
_STAYS = "what a killed process leaves behind stays until somebody deletes it"
# Of a sealed folder.
MANIFEST, DIGEST = "manifest.json", "manifest.sha256"


def file_digest(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    if is_remote(path):
        return objects.digest(path)
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def entry_of(file: Path) -> dict[str, Any]:
    """Size and digest of a file, as a manifest lists them."""
    return {"bytes": file.stat().st_size, "sha256": file_digest(file)}


@dataclass(frozen=True)
class Seal:
    """How one kind of folder is sealed.

    `manifest.json` lists every other file of the folder with its size and SHA-256, and `manifest.sha256`
    holds the digest of `manifest.json` itself.

    Attributes:
        error: makes an error of a place and of what is wrong there.
        remedy: what to do where the folder is damaged.
        names_file: `manifest.sha256` is a line that `sha256sum -c` reads; else it is the digest alone.
    """

    error: Callable[[Path, str], Exception]
    remedy: str
    names_file: bool = False

    def write(self, folder: Path, manifest: str) -> None:
        """Seal a folder whose files have reached the disk."""
        content = manifest.encode()
        (folder / MANIFEST).write_bytes(content)
        (folder / DIGEST).write_bytes(self._digest_line(content))
        for path in (folder / MANIFEST, folder / DIGEST, folder):
            sync(path)

    def read(self, folder: Path) -> bytes:
        """The manifest, once it is known to be what was written; JSON reads many flipped bits all the same.

        Raises:
            Exception: of this kind: it cannot be read, or has another digest.
        """
        manifest, digest = folder / MANIFEST, folder / DIGEST
        content, line = self._content(manifest), self._content(digest)
        expected = self._digest_line(content)
        if line != expected and (self.names_file or line.strip() != expected.strip()):
            problem = f"does not match {DIGEST}, so it or {digest} is corrupt; {self.remedy}"
            raise self.error(manifest, problem)
        return content

    def _content(self, file: Path) -> bytes:
        try:
            return file.read_bytes()
        except OSError as error:
            raise_of_store(file, error)
            raise self.error(file, f"unreadable: {error.strerror}; {self.remedy}") from None

    def check(
        self, file: Path, size: int, digest: str, digest_of: Callable[[Path], str] = file_digest
    ) -> None:
        """Compare a file with its entry in the manifest; `digest_of` reads it.

        Raises:
            Exception: of this kind: it cannot be read, or differs.
        """
        try:
            same = file.stat().st_size == size and digest_of(file) == digest
        except OSError as error:
            raise_of_store(file, error)
            raise self.error(file, f"unreadable: {error.strerror}; {self.remedy}") from None
        if not same:
            raise self.error(file, f"does not match the manifest, so it is corrupt; {self.remedy}")

    def _digest_line(self, manifest: bytes) -> bytes:
        named = f"  {MANIFEST}" if self.names_file else ""
        return f"{hashlib.sha256(manifest).hexdigest()}{named}\n".encode()


def raise_of_store(file: Path, error: Exception) -> None:
    """Raise an error of a store as it is: one that cannot be read now says nothing about its files.

    So none of them is to be given up, or told to be damaged. An object that is not there is a fault of it.
    """
    if is_remote(file) and isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
        raise error


def publish(part: Path, final: Path, *, aside: Path | None = None, synced: bool = False) -> None:
    """Give a folder its name, once all that is in it has reached the disk.

    Args:
        aside: where a folder goes that has the name already; it comes back if this one cannot take its place.
        synced: all that is in it has reached the disk already.
    """
    if is_remote(final):
        objects.publish(part, final, (MANIFEST, DIGEST), replace=aside is not None)
        return
    if not synced:
        sync_tree(part)
    replaced = aside if aside is not None and final.exists() else None
    if replaced is not None:
        final.rename(replaced)
    try:
        part.rename(final)
    except OSError:
        if replaced is not None:
            replaced.rename(final)
        raise
    sync(final.parent)


def retire(folder: Path, name: str, *, strict: bool = False) -> None:
    """Rename a folder to `<name>.tmp-<id>`, so that nobody finds half of it, and `remove_folder` it."""
    if is_remote(folder):  # where nothing is renamed, and its manifest is deleted first
        remove_folder(folder, strict=strict)
        return
    gone = folder.with_name(f"{name}.tmp-{uuid.uuid4().hex[:12]}")
    folder.rename(gone)
    remove_folder(gone, strict=strict)


def sync_tree(folder: Path) -> None:
    """Have a folder with all that is in it reach the disk."""
    for path in () if is_remote(folder) else (*folder.rglob("*"), folder):
        sync(path)


def sync(path: Path) -> None:
    """Have a file's or a directory's content reach the disk.

    A rename may get there before the data does; a power cut would then leave an empty file behind it.
    """
    if is_remote(path):
        return
    folder = path.is_dir()
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        if not folder or error.errno not in _NO_SYNC_OF_FOLDERS:
            raise
        _weaken(path, "does not sync folders", error, "a power cut may lose what was saved last")
        return
    try:
        sync_open(descriptor, path, folder)
    finally:
        os.close(descriptor)


def sync_open(descriptor: int, path: Path, folder: bool = False) -> None:
    """`sync` of a file or folder that is open already; `path` is what a message names."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (_NO_SYNC_OF_FOLDERS if folder else _NO_SYNC_OF_FILES):
            raise
        what = f"does not sync {'folders' if folder else 'files'}"
        _weaken(path, what, error, "a power cut may lose what was saved last")


def _weaken(path: Path, what: str, error: OSError, so: str) -> None:
    """Say which promise is not kept."""
    place = path if path.is_dir() else path.parent
    voice.say(f"warning: {place}: this file system {what} ({error.strerror}), so {so}", what + so)


@contextmanager
def locked(path: Path, without: str, *, wait: bool = False) -> Iterator[bool]:
    """Hold a lock file, which is there while it is held -> whether this file system has locks at all.

    The lock of a killed process is free at once. A file, since NFS does not lock folders.

    Args:
        without: what may happen where there are no locks, for the line that says so.

    Raises:
        BlockingIOError: another process holds it, and there was no wish to wait.
    """
    if is_remote(path):
        voice.say(f"warning: {path.parent}: a store keeps no locks, so {without}", without)
        yield False
        return
    descriptor, held = _take(path, without, wait)
    try:
        yield held
    finally:
        # Gone before it is free: whoever waited for it finds out, see `_take`.
        with suppress(OSError):
            path.unlink()
        os.close(descriptor)


def _take(path: Path, without: str, wait: bool) -> tuple[int, bool]:
    for _ in range(_ROUNDS):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), path.stat()):
                    return descriptor, True
        except OSError as error:
            if error.errno in _NO_LOCKS:
                _weaken(path, "keeps no locks", error, without)
                return descriptor, False
            os.close(descriptor)
            if error.errno == errno.EACCES:
                raise BlockingIOError(errno.EAGAIN, error.strerror, str(path)) from None
            raise
        # The former holder removed what we waited for.
        os.close(descriptor)
    raise BlockingIOError(errno.EAGAIN, "is taken again and again, or changes its identity", str(path))


@contextmanager
def scratch(
    parent: Path, name: str, *, owns: bool = False, rescue: Callable[[Path], None] | None = None
) -> Iterator[Path]:
    """A new folder `<parent>/<name>.tmp-<id>`, its lock beside it, that goes at the end unless it moved.

    Those of killed processes go first: where the lock file is there and nobody holds it. What is to be
    published to a store is written on this machine first, in the folder of temporary files.

    Args:
        owns: whatever has such a name is one of these, lock file or not.
        rescue: is called with a folder that is about to go.
    """
    if is_remote(parent):
        parent, name, owns, rescue = Path(tempfile.gettempdir()), f"tandemrec-{name}", False, None
    parent.mkdir(parents=True, exist_ok=True)
    sweep(parent, f"{glob.escape(name)}.tmp-*", owns=owns, rescue=rescue)
    folder = parent / f"{name}.tmp-{uuid.uuid4().hex[:12]}"
    with locked(folder.with_name(f"{folder.name}.lock"), _STAYS):
        try:
            folder.mkdir()
            yield folder
        finally:
            remove_folder(folder)


def _listed(folder: Path) -> list[Path]:
    """What is in a folder; nothing where it may not be read, as it can be written all the same."""
    try:
        return list(folder.iterdir())
    except OSError:
        return []


def sweep(
    parent: Path,
    pattern: str,
    *,
    owns: bool = False,
    alone: bool = False,
    rescue: Callable[[Path], None] | None = None,
) -> None:
    """Delete the temporary folders that killed processes left.

    Args:
        pattern: of their names; owns, rescue: see `scratch`.
        alone: a lock on `parent` keeps other writers out, so that no folder has one of its own.
    """
    entries = fnmatch.filter((path.name for path in _listed(parent)), pattern)
    stale = {entry.removesuffix(".lock") for entry in entries if owns or entry.endswith(".lock")}
    for folder in (parent / entry for entry in sorted(stale)):
        with suppress(OSError), ExitStack() as held:
            if alone or held.enter_context(locked(folder.with_name(f"{folder.name}.lock"), _STAYS)):
                if rescue is not None:
                    rescue(folder)
                remove_folder(folder)


def remove_folder(folder: Path, *, strict: bool = False) -> None:
    """Delete a folder with all that is in it, as far as that goes; what remains is an error if `strict`."""
    if is_remote(folder):
        objects.remove(folder, (MANIFEST, DIGEST), strict=strict)
        return
    with suppress(OSError):
        shutil.rmtree(folder)
    # It opens folders to delete in them safely, which not every file system can; there by names.
    for place, folders, files in os.walk(folder, topdown=False):
        for name in (*files, *folders):
            path = Path(place, name)
            with suppress(OSError):
                path.rmdir() if name in folders and not path.is_symlink() else path.unlink()
    try:
        folder.rmdir()
    except FileNotFoundError:
        return
    except OSError:
        if strict:
            raise


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file to write beside `path` that takes its place once the body succeeds."""
    if is_remote(path):
        with objects.uploading(path) as part:
            yield part
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    # What killed processes of this host left of this very file goes, and what is older than a day.
    any_part = re.compile(rf"{re.escape(f'.{path.name}.tmp-')}([A-Za-z0-9._]+-)?(\d+)")
    for stale in _listed(path.parent):
        if match := any_part.fullmatch(stale.name):
            with suppress(OSError):
                dead = match[1] == f"{_host()}-" and not _alive(int(match[2]))
                if dead or time.time() - stale.stat().st_mtime > objects.LEFT_S:
                    stale.unlink()
    part = path.with_name(f".{path.name}.tmp-{_host()}-{os.getpid()}")
    try:
        with naming(path):
            yield part
            sync(part)
            _move_onto(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Replace a small file whole."""
    if is_remote(path):
        path.write_bytes(text.encode())
        return
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9.]", "_", socket.gethostname()) or "host"


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


def _move_onto(part: Path, path: Path) -> None:
    try:
        part.replace(path)
    except OSError as error:
        if error.errno not in _NO_REPLACING or not path.exists():
            raise
        old = path.with_name(f".{path.name}.tmp-{_host()}-0")
        path.rename(old)
        try:
            part.rename(path)
        except OSError:
            old.rename(path)
            raise
        _weaken(path, "cannot rename onto a file", error, "a reader may find none for a moment")
        old.unlink()
