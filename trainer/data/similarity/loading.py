"""The vectors of a run, read once in a process however many readers of its log there are."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final
from weakref import WeakValueDictionary

import numpy as np

from trainer.config.sections import DataConfig
from trainer.data.row_group import read_footer
from trainer.data.similarity.files import VectorCounts, files_of, read_vectors
from trainer.data.similarity.similarity import Similarity, keys_in_log, similarities_of, vectors_used
from trainer.data.similarity.vectors import Vectors
from trainer.log.schema import LogManifest


@dataclass(frozen=True, eq=False)
class LoadedVectors:
    """Vectors, and what was found in their files.

    Attributes:
        line: a sentence that says what was found.
    """

    vectors: Vectors
    counts: VectorCounts
    line: str

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all ids and directions."""
        content = hashlib.sha256(self.vectors.ids.tobytes())
        content.update(np.ascontiguousarray(self.vectors.directions).view(np.uint8).data)
        return content.hexdigest()


# What is still in use, by all that it was made of; the files' times and sizes are told apart.
_IN_USE: Final[WeakValueDictionary[tuple[object, ...], LoadedVectors]] = WeakValueDictionary()


def load_vectors(data: DataConfig, manifest: LogManifest) -> dict[str, LoadedVectors]:
    """The vectors that some similarity compares, by their names in the config.

    Raises:
        ConfigError: the log has no such key. DataError, UnavailableError: see `read_vectors`.
    """
    found = {}
    for name, key in keys_in_log(data, manifest).items():
        settings = data.vectors[name]
        stamps = tuple(map(_stamp, files_of(settings.file)))
        known = (str(data.log), str(key), settings.model_dump_json(), stamps)
        if (loaded := _IN_USE.get(known)) is None:
            vectors, counts = read_vectors(settings, key, data.log)
            loaded = LoadedVectors(vectors, counts, counts.line(settings.file, key.name))
            _IN_USE[known] = loaded
        found[name] = loaded
    return found


def given_vectors(loaded: Mapping[str, LoadedVectors]) -> dict[str, Vectors]:
    """Without what was found in the files."""
    return {name: each.vectors for name, each in loaded.items()}


def bytes_held(data: DataConfig) -> int:
    """About the memory that the vectors of a run take in a process while they are read; 0 where no file is.

    Their directions have two bytes a number, and there are two copies of them at the end of the reading.
    """
    held = 0
    for name in vectors_used(data):
        settings = data.vectors[name]
        for file in files_of(settings.file) if settings.file.exists() else ():
            footer = read_footer(file)
            for place in range(footer.num_row_groups):
                group = footer.row_group(place)
                for column in map(group.column, range(group.num_columns)):
                    if column.path_in_schema.partition(".")[0] == settings.vector_column:
                        width = 8 if column.physical_type == "DOUBLE" else 4
                        held += 2 * (8 * group.num_rows + 2 * column.total_uncompressed_size // width)
    return held


def open_similarities(
    data: DataConfig, manifest: LogManifest, given: Mapping[str, Vectors] | None = None
) -> tuple[dict[str, LoadedVectors], tuple[Similarity, ...]]:
    """The similarities of a config over a log, and the vectors that were loaded for them.

    Args:
        given: the vectors; None: they are read from their files.

    Raises:
        ConfigError, DataError, UnavailableError: see `load_vectors` and `similarities_of`.
    """
    loaded = load_vectors(data, manifest) if given is None else {}
    vectors = given_vectors(loaded) if given is None else given
    return loaded, similarities_of(data, keys_in_log(data, manifest), vectors)


def _stamp(file: Path) -> tuple[str, int, float]:
    # Whoever opens a missing file says what is wrong.
    found = file.stat() if file.exists() else None
    return str(file), found.st_size if found else -1, found.st_mtime if found else 0.0
