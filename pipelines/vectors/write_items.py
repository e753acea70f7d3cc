"""Writes the vectors of all items of a log."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.vectors.items import ItemCatalogue, ItemColumns, Items, as_column
from pipelines.vectors.job import Job
from trainer.log.bags import Ints
from trainer.snapshot.retrieval.item_batch import item_batch
from trainer.snapshot.retrieval.vector_files import GROUPS, VECTORS, VectorWriter


def write_items(job: Job, part: Path, room: Path) -> ItemColumns:
    """vectors.parquet, and groups.parquet in a space with groups -> how items were read.

    Args:
        part: the folder to write to; room: a scratch folder.
    """
    wanted = ItemColumns.of(job.manifest, job.log, job.snapshot, job.options.item, job.space.group_feature)
    catalogue = ItemCatalogue(wanted, room)
    try:
        catalogue.collect(job.log, job.manifest)
        job.counts |= catalogue.counts
        names = room / "values"
        names.mkdir()
        values = job.raw_values(wanted.item, wanted.features[wanted.item], names)
        groups = _write(job, wanted, catalogue.stream(), values, part)
    finally:
        catalogue.close()
    if wanted.group:
        group, rows = np.array(list(groups)), np.array(list(groups.values()))
        first = np.cumsum(rows) - rows
        pq.write_table(pa.table({"group": group, "first": first, "rows": rows}), part / GROUPS)
    return wanted


def _write(
    job: Job, wanted: ItemColumns, pieces: Iterator[Items], values: pa.Array | None, part: Path
) -> dict[int, int]:
    """-> group -> how many items it has, in the order of the rows."""
    groups: dict[int, int] = {}
    with ExitStack() as opened:
        writer: VectorWriter | None = None
        for items in pieces:
            batch = item_batch(job.snapshot, items.features, items.item.size)
            vectors = job.space.items(batch).numpy()
            if writer is None:
                fields = _fields(wanted, values)
                writer = opened.enter_context(VectorWriter(part / VECTORS, fields, vectors.shape[1]))
            writer.write(_columns(wanted, items, values), vectors)
            if items.group is not None:
                for group, rows in zip(*np.unique(items.group, return_counts=True), strict=True):
                    groups[int(group)] = groups.get(int(group), 0) + int(rows)
    return groups


def _fields(wanted: ItemColumns, values: pa.Array | None) -> list[pa.Field]:
    """The columns before the vector."""
    whole = pa.int64()
    fields = [pa.field("item", whole, nullable=False), pa.field("occurrences", whole, nullable=False)]
    fields += [] if values is None else [pa.field("value", values.type)]
    others = ((name, info) for name, info in wanted.features.items() if name != wanted.item)
    return fields + [
        pa.field(f"feature_{name}", pa.list_(whole) if info.multi else whole) for name, info in others
    ]


def _columns(wanted: ItemColumns, items: Items, values: pa.Array | None) -> list[pa.Array]:
    columns = [pa.array(items.item), pa.array(items.occurrences)]
    columns += [] if values is None else [values_of_ids(values, items.item)]
    return columns + [
        as_column(items.features[name], info.multi)
        for name, info in wanted.features.items()
        if name != wanted.item
    ]


def values_of_ids(values: pa.Array, ids: Ints) -> pa.Array:
    """The value of each id, null where it stands for none; `values`: by id from 1."""
    return values.take(pa.array(ids - 1, mask=(ids < 1) | (ids > len(values))))
