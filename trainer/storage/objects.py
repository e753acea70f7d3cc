"""What a store has instead of rename, append and folders: whole objects, written in an order.

An object is there whole or not at all, a folder is what the names of objects have in common. So a sealed
folder counts once its manifest is there, which is written last and deleted first.
"""

from __future__ import annotations

import errno
import fnmatch
import hashlib
import os
import shutil
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

from trainer.storage.local import voice
from trainer.storage.places import is_remote, store_of

# Bytes of a part of an upload, of which there may be 10,000; one of them is in memory.
PART = 1 << 25
# Bytes of a piece of a download, and pieces under way.
PIECE, PIECES = 1 << 24, 4
# Requests under way at once, of one process.
AT_ONCE = 16
# Seconds after which what nobody has finished is what a killed process left, where no lock tells: a day.
LEFT_S = 86_400
Item = TypeVar("Item")
Result = TypeVar("Result")


def sizes(folder: Path) -> dict[str, int]:
    """Path inside a folder -> bytes, of every file in it; empty where there is no such folder."""
    if not is_remote(folder):
        return {str(p.relative_to(folder)): p.stat().st_size for p in folder.rglob("*") if p.is_file()}
    return {name: int(info["size"]) for name, info in _inside(folder)}


def _inside(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Path inside a remote folder, and what the store says of it, of every object in it."""
    store, root = store_of(folder)
    prefix = root.rstrip("/") + "/"
    for path, info in store.find(root, detail=True).items():
        if path.startswith(prefix) and not path.endswith("/"):
            yield path.removeprefix(prefix), info


def listed(folder: Path) -> list[Path]:
    """What is directly in a remote folder; empty where there is no such folder."""
    with suppress(FileNotFoundError, NotADirectoryError):
        return list(folder.iterdir())
    return []


def unfinished(folder: Path, mark: str, seconds: float = LEFT_S) -> list[Path]:
    """The folders directly in a remote one that lack the file `mark` and are older than so many seconds."""
    newest: dict[str, float] = {}
    finished: set[str] = set()
    for path, info in _inside(folder):
        name, _, file = path.partition("/")
        if file == mark:
            finished.add(name)
        if file:
            newest[name] = max(newest.get(name, 0.0), _written(info))
    old = time.time() - seconds
    return [folder / name for name, written in newest.items() if name not in finished and written < old]


def remove_left(folder: Path, pattern: str, seconds: float = LEFT_S) -> None:
    """Delete the folders directly in a remote one that have such names and are older than so many seconds."""
    for path in listed(folder):
        if fnmatch.fnmatchcase(path.name, pattern):
            written = [_written(info) for _, info in _inside(path)]
            if written and max(written) < time.time() - seconds:
                remove(path, ())


def written_at(path: Path) -> float:
    """When a file or an object was written, in seconds since 1970."""
    if not is_remote(path):
        return path.stat().st_mtime
    store, name = store_of(path)
    return _written(store.info(name))


def _written(info: dict[str, Any]) -> float:
    """When an object was written; what has no time is as good as new."""
    written: Any = info.get("LastModified") or info.get("created")
    return float(written.timestamp() if hasattr(written, "timestamp") else written or time.time())


def digest(path: Path) -> str:
    """SHA-256 of an object, of which nothing is kept."""
    sha = hashlib.sha256()
    for piece in pieces(path, path.stat().st_size):
        sha.update(piece)
    return sha.hexdigest()


def read_range(path: Path, start: int, end: int) -> bytes:
    """Bytes [start, end) of a file of this machine or of a store.

    Raises:
        OSError: it cannot be read, or ends before.
    """
    content = b""
    if start < end and is_remote(path):
        store, name = store_of(path)
        content = store.cat_file(name, start=start, end=end)
    elif start < end:
        with path.open("rb") as file:
            file.seek(start)
            content = file.read(end - start)
    if len(content) < end - start:
        problem = f"ends at byte {start + len(content):,}, before byte {end:,}"
        raise OSError(errno.EIO, problem, str(path))
    return content


def pieces(path: Path, size: int) -> Iterator[bytes]:
    """The content of an object, fetched in pieces, several at a time."""
    with ThreadPoolExecutor(PIECES, "fetch") as pool:
        waiting: deque[Future[bytes]] = deque()
        for start in range(0, size, PIECE):
            waiting.append(pool.submit(read_range, path, start, min(start + PIECE, size)))
            if len(waiting) == PIECES:
                yield waiting.popleft().result()
        for left in waiting:
            yield left.result()


@contextmanager
def writing(path: Path) -> Iterator[BinaryIO]:
    """An object to write piece by piece, in parts; it is there once the body has succeeded."""
    file: Any = cast(Any, path).open("wb", block_size=PART)
    try:
        yield file
        file.close()
    except BaseException:
        # A file of fsspec that is closed is one that was written.
        with suppress(Exception):
            getattr(file, "discard", lambda: None)()
        file.closed = True
        raise


def create(path: Path) -> bool:
    """Make a small object -> whether there was none; a store without conditional writes always says so."""
    store, root = store_of(path)
    mine = os.urandom(8).hex().encode()
    try:
        store.pipe_file(root, mine, mode="create")
    except FileExistsError:
        # By this very process, where the answer to its first attempt was lost.
        with suppress(FileNotFoundError):
            return bool(store.cat_file(root) == mine)
        return False
    return True


@contextmanager
def uploading(path: Path) -> Iterator[Path]:
    """A local file to write, which becomes the object once the body has succeeded."""
    with tempfile.TemporaryDirectory(prefix="tandemrec-") as folder:
        part = Path(folder, path.name)
        yield part
        upload(part, path)


def upload(file: Path, path: Path) -> None:
    """Write a local file to a store."""
    with file.open("rb") as content, writing(path) as target:
        shutil.copyfileobj(content, target, PART)


def below(folder: Path, name: str) -> Path:
    """Where an object of this name lies in a local folder; in a store, `..` is a name like any other.

    Raises:
        OSError: the name leads out of the folder.
    """
    if ".." in name.split("/") or name.startswith("/"):
        raise OSError(errno.EINVAL, "its name leads out of the folder that it is copied to", name)
    return folder / name


def copy_folder(source: Path, target: Path) -> None:
    """Copy the files of a folder, local or remote, into a new local one; where there is none, nothing."""
    for name in sizes(source):
        file = below(target, name)
        file.parent.mkdir(parents=True, exist_ok=True)
        copy_file(source / name, file)


def copy_file(source: Path, target: Path) -> None:
    """Copy a file, local or remote, into a local one."""
    with source.open("rb") as content, target.open("wb") as file:
        shutil.copyfileobj(content, file, PIECE)


def remove(folder: Path, first: Sequence[str], *, strict: bool = False) -> None:
    """Delete a remote folder with all that is in it; those named `first` before the others.

    Args:
        strict: what cannot be deleted is an error.
    """
    store, root = store_of(folder)
    try:
        for name in first:
            with suppress(FileNotFoundError):
                store.rm_file(f"{root}/{name}")
        prefix = root.rstrip("/") + "/"
        rest = [name for name in store.find(root) if name.startswith(prefix)]
        # What `rm` takes for a pattern may be the name of other objects, too.
        patterns = {name for name in rest if set(name) & set("*?[")}
        if plain := [name for name in rest if name not in patterns]:
            store.rm(plain)
        in_parallel(store.rm_file, sorted(patterns))
        # A store has no folders; other remote file systems do. What is none here is a bucket, which stays.
        with suppress(FileNotFoundError, NotImplementedError):
            if "/" in root.strip("/") and not set(root) & set("*?[") and store.exists(root):
                store.rm(root, recursive=True)
    except OSError:
        if strict:
            raise


def publish(part: Path, final: Path, last: Sequence[str], *, replace: bool | None = None) -> None:
    """Upload a local folder; the files named `last` after all others, in this order.

    Args:
        replace: whether what is there goes first, the files named `last` before all else; None: nothing is.

    Raises:
        FileExistsError: something is there, and is not to be replaced.
    """
    if replace is not None and final.exists():
        if not replace:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(final))
        voice.say(f"{final}: a store replaces no folder at once, so for a while there is none")
        remove(final, last, strict=True)
    files = [path for path in part.rglob("*") if path.is_file()]
    names = {path.relative_to(part).as_posix(): path for path in files}
    most = [name for name in sorted(names) if name not in last]
    in_parallel(lambda name: upload(names[name], final / name), most, at_once=4)
    for name in last:
        if name in names:
            upload(names[name], final / name)


def or_half_of_one(folder: Path, seal: str = "manifest.sha256") -> str:
    """What else to do about a folder that is in the way; of a store it may be what a killed upload left."""
    if is_remote(folder) and not (folder / seal).is_file():
        return f"; if an upload into it was killed, which leaves no {seal}, delete what that left"
    return ""


def in_parallel(
    function: Callable[[Item], Result], items: Iterable[Item], at_once: int = AT_ONCE
) -> list[Result]:
    """The results for some items, in order, several at a time: what takes long is the way to the store."""
    with ThreadPoolExecutor(at_once, "store") as pool:
        return list(pool.map(function, items))
