"""Pre-trained vectors as the rows of a table group that nothing trains."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from embeddings.errors import ConfigError
from embeddings.groups import TableGroup
from embeddings.lookup.sharding import table_of
from embeddings.lookup.shards import local_shards
from trainer.config.sections import DataConfig
from trainer.data.similarity.directions import LENGTH
from trainer.data.similarity.files import VectorCounts, read_vectors
from trainer.data.similarity.keys import Key
from trainer.log.schema import LogManifest


def rows_of_vectors(
    data: DataConfig, manifest: LogManifest, group: TableGroup, name: str
) -> tuple[Tensor, VectorCounts]:
    """A group's rows from the files of vectors: float32 [rows, dim], zeros for an id without a vector.

    A row is a direction in whole numbers divided by their common length 2^12, so that a product of two of
    them is a whole number of 2^-24 and at most 1 in amount: float32 holds every sum on the way, and the
    cosine has the same bits in any order, on any device (`trainer.data.similarity.directions`).

    Args:
        name: of the vectors in [data.vectors].

    Raises:
        ConfigError: the group's feature is not what has the vectors, or its table has another width.
        DataError, UnavailableError: see `read_vectors`.
    """
    (table,), settings = group.tables, data.vectors[name]
    where = f"groups.{group.name}.vectors = {name!r}"
    if settings.key != table.feature:
        raise ConfigError(f"{where}: these are vectors of {settings.key}, and the group has {table.feature}")
    key = Key.of(manifest, name, settings.key)
    if key.info is None or key.info.raw:
        raise ConfigError(f"{where}: {settings.key} has no numbered ids in the log; ingest it with numbers")
    vectors, counts = read_vectors(settings, key, data.log)
    if vectors.dim != table.dim:
        raise ConfigError(
            f"{where}: {settings.file} has vectors of {vectors.dim} numbers; set "
            f"groups.{group.name}.dim = {vectors.dim}"
        )
    rows = np.zeros((table.rows, table.dim), dtype=np.float32)
    rows[vectors.ids] = vectors.directions.astype(np.float32) / LENGTH
    return torch.from_numpy(rows), counts


def set_rows_of_vectors(
    weights: Mapping[str, Any],
    groups: Mapping[str, TableGroup],
    names: Mapping[str, str],
    data: DataConfig,
    manifest: LogManifest,
) -> list[str]:
    """Fill the tables of groups whose rows are pre-trained, and -> a line for each that says what was found.

    Args:
        weights: the state dict of a sharded model, whose other weights stay.
        names: group -> the name of its vectors in [data.vectors], empty where it is trained.

    Raises:
        ConfigError, DataError, UnavailableError: see `rows_of_vectors`.
    """
    lines = []
    for name, group in groups.items():
        if vectors := names.get(name, ""):
            rows, counts = rows_of_vectors(data, manifest, group, vectors)
            set_given_rows(weights, group, rows)
            lines.append(f"groups.{name}: {counts.line(data.vectors[vectors].file, group.tables[0].feature)}")
    return lines


@torch.no_grad()
def set_given_rows(weights: Mapping[str, Any], group: TableGroup, rows: Tensor) -> None:
    """Put rows into the shards of a group's one table."""
    (table,) = group.tables
    for name, weight in weights.items():
        if table_of(name) == group.table_name(table):
            for part in local_shards(weight):
                height, width = part.tensor.shape
                own = rows[part.row : part.row + height, part.column : part.column + width]
                part.tensor.copy_(own)
