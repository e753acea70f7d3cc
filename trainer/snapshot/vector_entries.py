"""What a version's manifest says of the pre-trained vectors that it has."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Final

from pydantic import Field

from trainer.config.toml import Settings
from trainer.data.similarity.directions import MOST_DIM

FOLDER: Final = "vectors/"


class SnapshotVectors(Settings):
    """Pre-trained vectors that a version has, by their name in the config.

    Attributes:
        rows: ids that have a vector; dim: numbers of each.
        raw, hashed: whether the log's ids are any integers, and whether these are hashes of text.
        of_base: whether the file is that of the base.
    """

    rows: int = Field(ge=0, lt=2**48)
    dim: int = Field(ge=1, le=MOST_DIM)
    raw: bool = False
    hashed: bool = False
    of_base: bool = False

    @property
    def size(self) -> int:
        """Bytes of the numbers in the file."""
        return self.rows * (8 + 2 * self.dim)


def vectors_path(name: str) -> str:
    """Where the vectors of a name lie."""
    return f"{FOLDER}{name}.safetensors"


def own_paths(vectors: Mapping[str, SnapshotVectors]) -> set[str]:
    """The files that a version has itself."""
    return {vectors_path(name) for name, each in vectors.items() if not each.of_base}


def problem_of_vectors(
    vectors: Mapping[str, SnapshotVectors], used: Collection[str], sizes: Mapping[str, int], base: bool
) -> str:
    """What a manifest says of vectors that the rest of it contradicts; empty if nothing is.

    Args:
        used: names of the vectors that its config compares; sizes: path -> bytes of the version's files.
        base: whether it builds on another version.
    """
    if set(used) != set(vectors):
        return "its vectors are not those of its config"
    for name, each in vectors.items():
        if each.of_base and not base:
            return f"its vectors {name} are those of a base, but there is none"
        if not each.of_base and sizes.get(vectors_path(name), 0) < each.size:
            return f"{vectors_path(name)} has more rows than its file has room for"
    return ""
