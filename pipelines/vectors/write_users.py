"""Writes the vectors of the users of a split."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pyarrow as pa

from embeddings.errors import ConfigError, DataError
from pipelines.vectors.job import Job
from pipelines.vectors.users import Users, UserSource
from pipelines.vectors.write_items import values_of_ids
from trainer.snapshot.retrieval.vector_files import VECTORS, VectorWriter


def write_users(job: Job, part: Path, room: Path) -> None:
    """vectors.parquet: a row for each user and group, users in the order of the log."""
    source = UserSource.of(job.snapshot, job.space, job.log, job.options.split)
    job.remarks += source.remarks
    named = job.manifest.named.get("user_id")
    values = None if named is None else job.raw_values("user_id", named, room)
    users = 0
    with ExitStack() as opened:
        writer: VectorWriter | None = None
        for found in source.stream():
            groups = _groups(job, found.vector.shape[1])
            if writer is None:
                fields = _fields(job, values)
                writer = opened.enter_context(VectorWriter(part / VECTORS, fields, found.vector.shape[2]))
            vectors = found.vector[:, groups].reshape(-1, found.vector.shape[2])
            writer.write(_columns(job, found, groups, values), vectors)
            users += found.user.size
    if not users:
        raise DataError(f"no user of split {job.options.split!r} has a request with candidates", file=job.log)
    job.counts["users"] = users


def _groups(job: Job, count: int) -> list[int]:
    """The groups that are written, of `count`.

    Raises:
        ConfigError: some are not there.
    """
    chosen = list(job.options.groups) or list(range(count))
    beyond = [group for group in chosen if not 0 <= group < count]
    if beyond:
        raise ConfigError(f"--groups {beyond[0]}: the ids of {job.space.group_feature} are 0 to {count - 1}")
    return chosen


def _fields(job: Job, values: pa.Array | None) -> list[pa.Field]:
    """The columns before the vector."""
    names = ["user_id", "request_id", "timestamp", *(["group"] if job.space.group_feature else [])]
    fields = [pa.field(name, pa.int64(), nullable=False) for name in names]
    fields += [] if values is None else [pa.field("value", values.type)]
    return [*fields, pa.field("offset", pa.float32(), nullable=False)]


def _columns(job: Job, found: Users, groups: list[int], values: pa.Array | None) -> list[pa.Array]:
    each = np.repeat(np.arange(found.user.size), len(groups))
    columns = [pa.array(part[each]) for part in (found.user, found.request, found.time)]
    columns += [pa.array(np.tile(groups, found.user.size))] if job.space.group_feature else []
    columns += [] if values is None else [values_of_ids(values, found.user[each])]
    return [*columns, pa.array(found.offset[each])]
