"""The job of `tandemrec vectors`: reads a snapshot and a log, writes a sealed folder of vectors."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pyarrow.parquet as pq
import torch

from embeddings.errors import ConfigError
from pipelines.console import quiet_third_parties
from pipelines.vectors.job import Job
from pipelines.vectors.options import VectorOptions
from pipelines.vectors.write_index import write_index
from pipelines.vectors.write_items import write_items
from pipelines.vectors.write_users import write_users
from trainer.log.schema import read_manifest
from trainer.ranks.machine import keep_freed_memory
from trainer.sealed_folder import MANIFEST, entry_of, file_digest, scratch
from trainer.snapshot import load_fetched, shown
from trainer.snapshot.retrieval.spaces.table import open_space
from trainer.snapshot.retrieval.vector_files import (
    SEAL,
    VECTOR,
    VECTORS,
    IndexInfo,
    ListedFile,
    VectorsManifest,
    staged_vectors,
)

_PACKAGES = ("tandemrec", "torch", "faiss-cpu")


def write_vectors(
    snapshot: Path, log: Path, out: Path, options: VectorOptions, cache: Path | None = None
) -> VectorsManifest:
    """Write vectors of the items or users of a log, and maybe an index over items, into a new folder.

    Args:
        snapshot: a version's folder or the folder of versions; log: a sequence log of its vocabulary.
        cache: where a snapshot in an object store is fetched to; None: the user's caches.

    Raises:
        ConfigError: the model has no such vectors, and the message says why.
        SnapshotError: the snapshot is corrupt. DataError: the log is, or `out` must not be replaced.
    """
    quiet_third_parties()
    keep_freed_memory()
    loaded, manifest = load_fetched(snapshot, cache), read_manifest(log)
    loaded.self_check()
    job = Job(loaded, open_space(loaded, options.space, options.branch, options.task), log, manifest, options)
    _check(job)
    with (
        torch.no_grad(),
        staged_vectors(out, options.overwrite) as part,
        scratch(part.parent, f"{out.name}-room") as room,
    ):
        index = None
        if options.of == "users":
            write_users(job, part, room)
        else:
            wanted = write_items(job, part, room)
            index = write_index(job, part, wanted) if options.index != "none" else None
        found = _seal(job, part, index)
    counts = ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in found.counts.items())
    size = sum(entry.bytes for entry in found.files.values()) / 1e6
    print(f"{found.rows:,} vectors of {found.width} numbers ({counts}), {size:,.1f} MB, ", end="")
    print(f"space {found.space}, of", end=" ")
    print(f"{shown(snapshot, loaded.path)} -> {out}", *job.remarks, sep="\n")
    return found


def _check(job: Job) -> None:
    """Raises ConfigError for options that contradict the model or the log."""
    space, options = job.space, job.options
    if options.of == "users":
        if space.user_obstacle:
            raise ConfigError(f"--of users --space {space.name}: {space.user_obstacle}")
        if options.index != "none":
            raise ConfigError("--index: an index is over items, and users are what asks it; take --of items")
    if options.of == "users" or options.index != "none":
        job.manifest.require(options.split)
    if options.groups and (options.of != "users" or not space.group_feature):
        raise ConfigError("--groups: only users in a space with groups of items have several vectors")


def _seal(job: Job, part: Path, index: IndexInfo | None) -> VectorsManifest:
    """Write the manifest over all files that are in the folder."""
    with pq.ParquetFile(part / VECTORS) as parquet:
        rows, schema = parquet.metadata.num_rows, parquet.schema_arrow
    files = {path.name: ListedFile(**entry_of(path)) for path in sorted(part.iterdir())}
    options, snapshot = job.options, job.snapshot
    manifest = VectorsManifest(
        of=options.of,
        space=job.space.name,
        branch=options.branch,
        task=job.space.task if job.space.reads_task else "",
        product=job.space.about,
        heads=job.space.heads,
        scale=job.space.scale,
        rows=rows,
        width=schema.field(VECTOR).type.list_size,
        columns=schema.names,
        item=options.item if options.of == "items" else "",
        group=job.space.group_feature,
        snapshot=snapshot.digest(),
        step=snapshot.manifest.step,
        log=file_digest(job.log / MANIFEST),
        counts=job.counts,
        index=index,
        files=files,
        versions={name: importlib.metadata.version(name) for name in _PACKAGES},
    )
    SEAL.write(part, manifest.model_dump_json(indent=2))
    return manifest
