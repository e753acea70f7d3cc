"""Which version a path stands for, and when that was exported."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from embeddings.errors import SnapshotError, UnavailableError
from trainer.sealed_folder import MANIFEST
from trainer.snapshot.manifest import LATEST, VERSION_NAME, SnapshotManifest
from trainer.storage import is_remote
from trainer.storage.objects import written_at


def resolve(path: Path) -> Path:
    """A version's folder, or the newest version of a folder of versions."""
    if (path / MANIFEST).is_file():
        return path
    try:
        name = (path / LATEST).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        if is_remote(path) and isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
            raise UnavailableError(path, f"cannot be read: {error.strerror or error}") from None
        raise SnapshotError(
            path,
            "no snapshot here (neither manifest.json nor LATEST); run `tandemrec export`, or wait for the "
            "first version of `tandemrec online`",
        ) from None
    if not VERSION_NAME.fullmatch(name):
        raise SnapshotError(path / LATEST, f"names {name!r}, which is no version")
    return path / name


def exported_at(version: Path, manifest: SnapshotManifest) -> float | None:
    """When a version was exported, in seconds since 1970; None where that cannot be said.

    A version of earlier software does not say it. Then it is when its manifest was written where it lies.
    """
    if manifest.exported_at is not None:
        return float(manifest.exported_at)
    with suppress(OSError):
        return written_at(version / MANIFEST)
    return None
