"""Files of a store that must be mapped: fetched once into a folder of this machine, verified on the way."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import stat
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from embeddings.errors import ConfigError
from trainer.storage.local import voice
from trainer.storage.objects import LEFT_S, in_parallel, pieces

_AT_ONCE = 4
# Of a file that is not complete.
_PART = re.compile(r"\..+\.[0-9a-f]{12}")


def cache_of(folder: Path, cache: Path | None = None) -> Path:
    """Where what is fetched from a remote folder lies: in `cache`, or in the user's own folder of caches."""
    return own_cache(cache) / hashlib.sha256(str(folder).encode()).hexdigest()[:16]


def own_cache(cache: Path | None = None) -> Path:
    """`cache`, or the user's own folder of caches where none is named.

    Raises:
        ConfigError: the user has no home folder, as in a container with a random user id.
    """
    if cache is not None:
        return cache
    try:
        return Path.home() / ".cache" / "tandemrec"
    except RuntimeError:
        raise ConfigError(
            f"user {os.getuid()} has no home folder, so there is no folder of caches: name one with --cache "
            "where the command has it, or set HOME"
        ) from None


def shared_cache() -> Path:
    """The same for a command without --cache: if there is no home folder, one among the temporary files.

    Raises:
        ConfigError: that one is another user's. OSError: it cannot be made.
    """
    with suppress(ConfigError):
        return own_cache()
    # One name for all processes of this user, which share what is there.
    folder = Path(tempfile.gettempdir()) / f"tandemrec-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise ConfigError(f"{folder}: belongs to another user; set HOME, or TMPDIR to another folder")
    return folder


def fetch(
    folder: Path,
    files: Mapping[str, tuple[int, str]],
    into: Path,
    fail: Callable[[Path, str], Exception],
    check: bool = False,
) -> bool:
    """Have some files of a remote folder in a local one -> whether any had to be fetched.

    Those that are there in their size stay. Several processes may do so at once: each file gets its name
    once it is complete.

    Args:
        files: name -> bytes and SHA-256; fail: makes the error of a file.
        check: read those that are there; a damaged one is fetched again, which one line says.

    Raises:
        OSError: the store cannot be read, or this machine has no room.
    """

    def one(name: str) -> bool:
        target, (size, digest) = into / name, files[name]
        if target.is_file() and target.stat().st_size == size:
            if not check or _digest(target) == digest:
                return False
            voice.say(f"{target}: was damaged since it was fetched, so it is fetched again")
        target.parent.mkdir(parents=True, exist_ok=True)
        sha = hashlib.sha256()
        with _whole(target) as part:
            with part.open("wb") as file:
                for piece in pieces(folder / name, size):
                    sha.update(piece)
                    file.write(piece)
            if sha.hexdigest() != digest:
                raise fail(folder / name, "does not match the manifest, so it is corrupt")
        return True

    for parent in {(into / name).parent for name in files}:
        _drop_parts(parent)
    return any(in_parallel(one, sorted(files), _AT_ONCE))


def _drop_parts(folder: Path) -> None:
    """Delete what killed fetches left: parts that are older than a day."""
    with suppress(OSError):
        for path in folder.iterdir():
            if _PART.fullmatch(path.name) and _is_old(path):
                path.unlink()


def put(file: Path, content: bytes) -> None:
    """Have a small file hold some bytes: replaced whole, and only where it holds others."""
    if not file.is_file() or file.read_bytes() != content:
        with _whole(file) as part:
            part.write_bytes(content)


@contextmanager
def _whole(target: Path) -> Iterator[Path]:
    """A file to write that gets its name once the body succeeds; threads may do so at once."""
    part = target.with_name(f".{target.name}.{uuid.uuid4().hex[:12]}")
    try:
        yield part
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)


def _digest(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def drop_old(folder: Path, needed: set[str]) -> None:
    """Delete what lies in a folder of fetched folders and was not needed for more than a day."""
    for name in needed:
        # Another process, which needs others, sees that it was used now.
        with suppress(OSError):
            os.utime(folder / name)
    with suppress(OSError):
        for path in folder.iterdir():
            if path.name not in needed and _is_old(path):
                shutil.rmtree(path, ignore_errors=True)


def _is_old(path: Path) -> bool:
    """False too where it went meanwhile."""
    with suppress(OSError):
        return time.time() - path.stat().st_mtime > LEFT_S
    return False
