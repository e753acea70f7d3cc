"""A version of a snapshot and those that it builds on, and which of their files hold a part of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from embeddings.errors import SnapshotError
from embeddings.lookup.stored import StoredTable
from trainer.data.similarity.vectors import Vectors
from trainer.sealed_folder import MANIFEST, file_digest
from trainer.snapshot.id_maps import LayeredIds, read_ids
from trainer.snapshot.manifest import ListedFile, SnapshotIds, SnapshotManifest, StoredRows
from trainer.snapshot.matrix_file import LayeredReader
from trainer.snapshot.reading import read_manifest
from trainer.snapshot.rows import read_rows
from trainer.snapshot.vector_entries import vectors_path
from trainer.snapshot.vectors import read_vectors

# A chain this long would be slower to load than to write anew.
LONGEST_CHAIN = 64


@dataclass(frozen=True)
class Chain:
    """A version and those that it builds on, newest first; all manifests verified, no file of theirs yet."""

    versions: tuple[tuple[Path, SnapshotManifest], ...]

    @property
    def path(self) -> Path:
        return self.versions[0][0]

    @property
    def manifest(self) -> SnapshotManifest:
        return self.versions[0][1]

    def rows(self, stem: str, name: str) -> StoredTable:
        """A matrix of the newest version; its files are taken for checked.

        Raises:
            SnapshotError: a file is not what its manifest says, or a base does not hold the matrix.
        """
        return read_rows([(path, stored) for path, _, stored in self._holding(stem)], stem, name)

    def reader(self, stem: str, name: str) -> LayeredReader:
        """The same, read once from first row to last and checked meanwhile.

        Raises:
            SnapshotError: as `rows`.
        """
        return LayeredReader(self._holding(stem), stem, name)

    def files(self, stem: str) -> list[tuple[Path, ListedFile]]:
        """The files that hold a matrix, in whichever version."""
        return [
            (path, listed[file])
            for path, listed, _ in self._holding(stem)
            for file in (f"{stem}.safetensors", f"{stem}.ids.safetensors")
            if file in listed
        ]

    def id_map(self, name: str) -> LayeredIds:
        """A map of ids of the newest version; its files are taken for checked.

        Raises:
            SnapshotError: a file is not what its manifest says, or a base does not hold the map.
        """
        held = [(path, file, entry) for path, file, entry, _ in self._holding_ids(name)]
        return read_ids(held, self.manifest.config.id_rules[name])

    def id_files(self, name: str) -> list[tuple[Path, ListedFile]]:
        """The files that hold a map of ids, in whichever version."""
        return [(path, listed[file]) for path, file, _, listed in self._holding_ids(name)]

    def vectors(self, name: str) -> Vectors:
        """Pre-trained vectors of the newest version; their file is taken for checked.

        Raises:
            SnapshotError: the file is not what its manifest says, or a base does not have it.
        """
        folder, _ = self.vectors_file(name)
        return read_vectors(folder, name, self.manifest.vectors[name])

    def vectors_file(self, name: str) -> tuple[Path, ListedFile]:
        """The file that holds them, and the folder of its version."""
        for path, manifest in self.versions:
            described = manifest.vectors.get(name)
            if described is None:
                break
            if not described.of_base:
                return path, manifest.listed()[vectors_path(name)]
        raise SnapshotError(self.path, f"no version that it builds on holds its vectors {name}")

    def _holding_ids(self, name: str) -> list[tuple[Path, str, SnapshotIds, dict[str, ListedFile]]]:
        """The versions that a map of ids is put together from, oldest first."""
        found: list[tuple[Path, str, SnapshotIds, dict[str, ListedFile]]] = []
        for path, manifest in self.versions:
            there = {key: (file, entry) for file, key, entry in manifest.id_maps()}
            if name not in there:
                break
            found.insert(0, (path, *there[name], manifest.listed()))
            if there[name][1].base_live is None:
                return found
        raise SnapshotError(self.path, f"no version that it builds on holds its map of {name} whole")

    def _holding(self, stem: str) -> list[tuple[Path, dict[str, ListedFile], StoredRows]]:
        """The versions that a matrix is put together from, oldest first."""
        found: list[tuple[Path, dict[str, ListedFile], StoredRows]] = []
        for path, manifest in self.versions:
            stored = {key: entry for key, _, entry in manifest.matrices()}.get(stem)
            if stored is None:
                break
            found.insert(0, (path, manifest.listed(), stored))
            if stored.changed is None:
                return found
        raise SnapshotError(self.path / f"{stem}.safetensors", "no version that it builds on holds it whole")


def read_chain(path: Path) -> Chain:
    """The manifests of a version and of the versions beside it that it builds on.

    Raises:
        SnapshotError: one is missing, damaged, or another than the delta was made against.
    """
    versions = [(path, read_manifest(path))]
    while (base := versions[-1][1].base) is not None:
        below = path.parent / f"v{base.number:08d}"
        if len(versions) >= LONGEST_CHAIN:
            raise SnapshotError(path, f"builds on more than {LONGEST_CHAIN} versions; export it whole")
        if below.is_symlink() or not (below / MANIFEST).is_file():
            raise SnapshotError(path, f"is a delta, and its base {below.name} is not beside it")
        manifest = read_manifest(below)
        if file_digest(below / MANIFEST) != base.sha256 or manifest.number != base.number:
            raise SnapshotError(path, f"is a delta against another {below.name} than the one beside it")
        versions.append((below, manifest))
    return Chain(tuple(versions))
