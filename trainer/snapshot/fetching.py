"""A snapshot in an object store, brought to this machine, where it is mapped as any other."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from embeddings.errors import SnapshotError, UnavailableError
from trainer.sealed_folder import DIGEST, MANIFEST, locked, retire
from trainer.snapshot.chain import Chain, read_chain
from trainer.snapshot.loading import Snapshot, load_snapshot
from trainer.snapshot.manifest import SEAL
from trainer.snapshot.resolving import resolve
from trainer.storage import is_remote
from trainer.storage.fetched import cache_of, drop_old, fetch, put


def load_fetched(path: Path, cache: Path | None = None) -> Snapshot:
    """`load_snapshot` of what `fetched` gives; files that were damaged in the cache are fetched again.

    Raises:
        SnapshotError, UnavailableError: see there.
    """
    version = resolve(path)
    local = fetched(version, cache)
    try:
        return load_snapshot(local)
    except SnapshotError:
        # Loading reads all files anyhow, so only now it is worth to look which one was damaged.
        if not is_remote(path) or not _bring(read_chain(version), local.parent, check=True):
            raise
    return load_snapshot(local)


def fetched(path: Path, cache: Path | None = None) -> Path:
    """The local folder of a version: `path` itself, or what was fetched of a remote one.

    Its search part, which only a retrieval service reads, is left where it is.

    Args:
        path: a version's folder, or the folder of versions.
        cache: where fetched versions are kept; None: in the user's folder of caches.

    Raises:
        SnapshotError: there is no version, or it is damaged.
        UnavailableError: the store cannot be read now, or there is no room for it here.
    """
    if not is_remote(path):
        return path
    chain = read_chain(resolve(path))
    root = cache_of(chain.path.parent, cache)
    _bring(chain, root)
    drop_old(root, {version.name for version, _ in chain.versions})
    return root / chain.path.name


def shown(given: Path, version: Path) -> str:
    """How to call the version that is used: where it lies, and where it was fetched to."""
    if not is_remote(given):
        return str(version)
    return f"{given if given.name == version.name else given / version.name} (fetched to {version})"


def beside(base: Chain, part: Path) -> Chain:
    """The version that a draft builds on, where the draft expects it: a remote one is fetched there.

    Raises:
        SnapshotError: it is damaged. UnavailableError: it cannot be fetched now.
    """
    if not is_remote(base.path):
        return base
    _bring(base, part.parent, search=True)
    return read_chain(part.parent / base.path.name)


def _bring(chain: Chain, root: Path, search: bool = False, check: bool = False) -> bool:
    """Fetch the versions of a chain into a folder -> whether any file had to be; see `fetch` for `check`.

    Args:
        search: with their search parts.
    """
    missing = False
    try:
        for remote, manifest in chain.versions:
            local = root / remote.name
            seal = {name: (remote / name).read_bytes() for name in (MANIFEST, DIGEST)}
            _make_way(local, seal[MANIFEST])
            wanted = {
                name: (entry.bytes, entry.sha256)
                for name, entry in manifest.listed().items()
                if search or not name.startswith("search/")
            }
            missing |= fetch(remote, wanted, local, SnapshotError, check)
            for name, content in seal.items():
                put(local / name, content)
    except OSError as error:
        problem = f"cannot be fetched to {root}: {error.strerror or error} ({error.filename})"
        lost = isinstance(error, FileNotFoundError) and not str(error.filename).startswith(str(root))
        # An object that is gone is a fault of the version; whatever else fails may work a moment later.
        raise (SnapshotError if lost else UnavailableError)(chain.path, problem) from None
    return missing


def _make_way(local: Path, manifest: bytes) -> None:
    """Remove another version of the same number that lay there once, but none that is half written."""

    def another() -> bool:
        with suppress(SnapshotError):
            return SEAL.read(local) != manifest
        return False

    if another():
        # Of several processes that find it, one removes it, and the others find what that one fetched.
        lock = local.with_name(f"{local.name}.lock")
        with locked(lock, "a process may remove what another one has just fetched", wait=True):
            if another():
                retire(local, local.name, strict=True)
