"""A snapshot in an object store, brought to this machine, where it is mapped as any other."""

from __future__ import annotations

from pathlib import Path

from embeddings.errors import SnapshotError
from trainer.sealed_folder import DIGEST, MANIFEST, remove_folder
from trainer.snapshot.loading import Chain, Snapshot, load_snapshot, read_chain, resolve
from trainer.storage import is_remote
from trainer.storage.fetched import cache_of, drop_old, fetch


def load_fetched(path: Path, cache: Path | None = None) -> Snapshot:
    """`load_snapshot` of what `fetched` gives; files that were damaged in the cache are fetched again.

    Raises:
        SnapshotError: see there.
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
        SnapshotError: there is no version, or it is damaged, or it cannot be fetched.
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
        SnapshotError: it is damaged, or it cannot be fetched.
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
            mine = local / MANIFEST
            if mine.is_file() and mine.read_bytes() != seal[MANIFEST]:
                # Another version of the same number lay there once.
                remove_folder(local, strict=True)
            wanted = {
                name: (entry.bytes, entry.sha256)
                for name, entry in manifest.listed().items()
                if search or not name.startswith("search/")
            }
            missing |= fetch(remote, wanted, local, SnapshotError, check)
            for name, content in seal.items():
                (local / name).write_bytes(content)
    except OSError as error:
        why = f"{error.strerror} ({error.filename})"
        raise SnapshotError(chain.path, f"cannot be fetched to {root}: {why}") from None
    return missing
