"""Versions appear whole, in order, and go away whole; any number of exports may share a folder.

SNAP/.tmp-<id>/   a version being written, locked by who writes it (.tmp-<id>.lock beside it); swept once
                  that lock is free
SNAP/.lock        held while a draft begins, and while a version gets its number, LATEST moves and old
                  versions go

In an object store there are no locks: `v########/claim` is made by whoever gets that number, the version is
uploaded below it, its manifest last, and then LATEST moves.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path

from safetensors import SafetensorError

from embeddings.errors import SnapshotError
from trainer.sealed_folder import (
    DIGEST,
    MANIFEST,
    entry_of,
    file_digest,
    locked,
    remove_folder,
    retire,
    scratch,
    sync,
    write_text,
)
from trainer.sealed_folder import publish as publish_folder
from trainer.snapshot.chain import Chain, read_chain
from trainer.snapshot.manifest import (
    LATEST,
    SEAL,
    VERSION_NAME,
    SnapshotFile,
    SnapshotManifest,
)
from trainer.snapshot.reading import read_manifest
from trainer.storage import is_remote, place
from trainer.storage.objects import create, listed, unfinished
from trainer.storage.objects import publish as upload_folder

_CLAIM = "claim"


@contextmanager
def drafting(root: Path) -> Iterator[Path]:
    """A folder to write a version into; whatever goes wrong in the body, nothing of it stays.

    Raises:
        SnapshotError: it cannot be written; versions already published stay as they are.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        with ExitStack() as held:
            with _locked(root):
                part = held.enter_context(scratch(root, "", owns=True))
            if is_remote(root):
                # What a delta builds on is fetched beside it.
                part = part / "draft"
                part.mkdir()
            yield part
    except (OSError, SafetensorError) as error:
        raise SnapshotError(root, f"cannot be written: {error}") from None
    finally:
        # Only goes where nothing was ever published.
        with suppress(OSError):
            if not is_remote(root):
                root.rmdir()


def publish(root: Path, part: Path, manifest: SnapshotManifest, keep: int) -> Path:
    """Give a drafted version the next number, point LATEST at it, and retire what is older than `keep`.

    Args:
        manifest: its number counts for nothing; keep: newest versions that stay, 0 = all. What these build
            on stays too.

    Raises:
        SnapshotError: the base of a delta went away or changed meanwhile.
    """
    with _locked(root):
        if base := manifest.base:
            below = root / f"v{base.number:08d}" / MANIFEST
            if not below.is_file() or file_digest(below) != base.sha256:
                raise SnapshotError(root, f"the base, version {base.number}, went away meanwhile")
        # One more than any number that was given out, also where the newest version was deleted by hand.
        taken = [path.name for path in _versions(root)]
        with suppress(OSError):
            taken.append((root / LATEST).read_text(encoding="utf-8").strip())
        number = max((int(name[1:]) for name in taken if VERSION_NAME.fullmatch(name)), default=0) + 1
        if is_remote(root):
            return _upload(root, part, manifest, number, keep)
        _seal(part, manifest, number)
        final = root / f"v{number:08d}"
        publish_folder(part, final)
        write_text(root / LATEST, final.name + "\n")
        sync(root)
        if keep:
            _retire(root, keep)
    return final


def _seal(part: Path, manifest: SnapshotManifest, number: int) -> None:
    """Seal a draft as the version of this number, exported now."""
    known = {"number": number, "exported_at": int(time.time())}
    SEAL.write(part, manifest.model_copy(update=known).model_dump_json(indent=1))


def _upload(root: Path, part: Path, manifest: SnapshotManifest, number: int, keep: int) -> Path:
    """Publish to a store, under the next number that nobody else has."""
    final = _claimed(root, number)
    number = int(final.name[1:])
    _seal(part, manifest, number)
    upload_folder(part, final, (MANIFEST, DIGEST))
    newest = ""
    with suppress(FileNotFoundError):
        newest = (root / LATEST).read_text(encoding="utf-8").strip()
    # Another export may have been faster with a later number.
    if not VERSION_NAME.fullmatch(newest) or newest < final.name:
        write_text(root / LATEST, final.name + "\n")
    (final / _CLAIM).unlink(missing_ok=True)
    for left in unfinished(root, DIGEST):
        if VERSION_NAME.fullmatch(left.name):
            remove_folder(left)
    if keep:
        _retire(root, keep)
    return final


def _claimed(root: Path, number: int) -> Path:
    """Claim a number, or the next one: by an object that only one can make, where the store can."""
    while True:
        final = root / f"v{number:08d}"
        if create(final / _CLAIM):
            if not (final / DIGEST).is_file():
                return final
            # It was published since the numbers were listed, and its claim was taken back.
            (final / _CLAIM).unlink(missing_ok=True)
        number += 1


def describe(part: Path, file: Path) -> SnapshotFile:
    """A safetensors file of a version, as its manifest lists it."""
    return SnapshotFile(path=str(file.relative_to(part)), **entry_of(file))


def open_base(root: Path, since: str) -> Chain:
    """The version that a delta is to build on: its number, or its folder under `root`.

    Raises:
        SnapshotError: there is no such version.
    """
    given = place(since)
    name = f"v{int(since):08d}" if since.isdecimal() and len(since) < 9 else given.name
    inside = since.isdecimal() or given.parent in (Path(), root)
    if not (inside or is_remote(root) or is_remote(given)):
        inside = given.parent.samefile(root)
    if not inside or not VERSION_NAME.fullmatch(name) or not (root / name / MANIFEST).is_file():
        there = ", ".join(sorted(p.name for p in _versions(root))) or "no versions"
        raise SnapshotError(root, f"has no version {since!r} to build a delta on; it has {there}")
    return read_chain(root / name)


def version_of(root: Path, checkpoints: Collection[str]) -> Path | None:
    """The newest version, where it was made of one of some checkpoints; None: of none of them.

    An export that was killed may have published it before LATEST moved, which moves now.

    Args:
        checkpoints: digests of their manifests.
    """
    with _locked(root) if root.exists() else nullcontext():
        versions = sorted(_versions(root))
        if not versions or _checkpoint_of(versions[-1]) not in checkpoints:
            return None
        newest = versions[-1]
        write_text(root / LATEST, newest.name + "\n")
    return newest


def _checkpoint_of(version: Path) -> str | None:
    """What a version was made of; None where that cannot be said."""
    with suppress(SnapshotError):
        return read_manifest(version).checkpoint
    return None


def _versions(root: Path) -> list[Path]:
    found = listed(root) if is_remote(root) else root.glob("v*")
    return [path for path in found if VERSION_NAME.fullmatch(path.name)]


def _retire(root: Path, keep: int) -> None:
    versions = sorted(_versions(root))
    if is_remote(root):
        # Those that are being written, or that an export left that was killed, are none yet.
        versions = [path for path in versions if (path / DIGEST).is_file()]
    needed = set(versions[-keep:])
    for path in versions[-keep:]:
        # Whatever cannot be read is left alone, and so is all that it may need.
        try:
            needed |= {below for below, _ in read_chain(path).versions}
        except SnapshotError:
            return
    for path in versions:
        if path not in needed:
            retire(path, "")


def _locked(root: Path) -> AbstractContextManager[bool]:
    """Hold the lock of a folder of versions, once it is free."""
    without = "exports at once into one folder may disturb each other"
    if is_remote(root):
        without += ", unless it makes an object only where there is none (If-None-Match)"
    return locked(root / ".lock", without, wait=True)
