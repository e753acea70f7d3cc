"""Writes a sequence log so that it appears whole or not at all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from embeddings.errors import DataError
from trainer.log.schema import (
    SEAL,
    FileInfo,
    LabelInfo,
    LogManifest,
    SplitInfo,
    is_sequence_log,
    moved_away,
)
from trainer.sealed_folder import entry_of, exchange, publish, remove_folder, scratch, sync, sync_tree, voice
from trainer.storage import is_remote
from trainer.storage.objects import or_half_of_one


def check_target(out: Path, overwrite: bool) -> None:
    """Refuses an `out` that must not be replaced.

    Raises:
        DataError: it is a sequence log and `overwrite` is false, or it is something else.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not is_sequence_log(out):
        problem = f"exists and is not a sequence log, so it stays; name another folder{or_half_of_one(out)}"
        raise DataError(problem, file=out)
    if not overwrite:
        raise DataError("is a sequence log already; name another folder or say --overwrite", file=out)


@contextmanager
def staged(out: Path, overwrite: bool) -> Iterator[Path]:
    """A new folder beside `out` that becomes `out` if the body succeeds and vanishes if it fails.

    What killed processes left beside `out` goes first; a log that one of them had moved away comes back.

    Raises:
        DataError: `out` must not be replaced, or the disk is full or otherwise refuses to be written.
    """
    out = out.resolve()  # beside the folder itself, where `out` is a link to it
    try:
        with scratch(out.parent, out.name, rescue=lambda folder: _bring_back(folder, out)) as staging:
            check_target(out, overwrite)
            yield staging
            check_target(out, overwrite)  # somebody else may have finished the same log meanwhile
            sync_tree(staging)
            if not is_remote(out) and out.exists() and exchange(staging, out):
                sync(out.parent)  # the older log is the one in `staging` now, and goes with it
            else:
                old = moved_away(staging)
                publish(staging, out, aside=old, synced=True)
                remove_folder(old)
    except OSError as error:
        raise DataError(f"cannot be made: {error}", file=out) from error


def write_split(
    tables: Iterable[pa.RecordBatch], root: Path, split: str, schema: pa.Schema, layout: tuple[int, int]
) -> SplitInfo:
    """Writes the rows of one split under `root/split`.

    Args:
        tables: the rows in their final order, in pieces of any size.
        schema: of `trainer.log.schema.schema_of`.
        layout: rows in a row group, rows in a file (a multiple of the former).
    """
    rows_per_group, rows_per_file = layout
    files: list[FileInfo] = []
    totals = dict.fromkeys(("rows", "requests", "candidates", "behaviors"), 0)
    tasks = [name.removeprefix("label_") for name in schema.names if name.startswith("label_")]
    labels = {task: Counter(observed=0, positives=0) for task in tasks}
    groups = _row_groups(tables, rows_per_group, schema)
    for first in groups:
        path = root / split / f"part-{len(files):05d}.parquet"
        path.parent.mkdir(exist_ok=True)
        rows = row_groups = 0
        with pq.ParquetWriter(path, schema, compression="zstd", write_page_checksum=True) as writer:
            group: pa.Table | None = first
            while group is not None:
                writer.write_table(group, row_group_size=rows_per_group)
                rows, row_groups = rows + group.num_rows, row_groups + 1
                totals["rows"] += group.num_rows
                for task, counts in labels.items():
                    counts.update(_count_labels(group[f"label_{task}"]))
                for name in ("requests", "candidates", "behaviors"):
                    totals[name] += pc.sum(group[f"num_{name}"]).as_py()
                # Asking for the next group only when this file has room leaves it to the next file.
                group = next(groups, None) if rows < rows_per_file else None
        name = path.relative_to(root).as_posix()
        files.append(FileInfo(path=name, rows=rows, row_groups=row_groups, **entry_of(path)))
    found = {task: LabelInfo(**counts) for task, counts in labels.items()}
    return SplitInfo(files=files, positives=found[tasks[0]].positives, labels=found, **totals)


def _count_labels(lists: pa.ChunkedArray) -> dict[str, int]:
    """How many candidates have a label, which is neither null nor NaN, and of how many it is >= 0.5."""
    values = pc.list_flatten(lists, recursive=True)
    missing = pc.sum(pc.is_null(values, nan_is_null=True)).as_py() or 0
    positives = pc.sum(pc.greater_equal(values, 0.5)).as_py() or 0
    return {"observed": len(values) - missing, "positives": positives}


def write_manifest(root: Path, manifest: LogManifest) -> None:
    """Writes the manifest and its digest, the last files of a log."""
    SEAL.write(root, manifest.model_dump_json(indent=2) + "\n")


def _row_groups(batches: Iterable[pa.RecordBatch], size: int, schema: pa.Schema) -> Iterator[pa.Table]:
    waiting = schema.empty_table()
    for batch in batches:
        rows = pa.Table.from_batches([batch.select(schema.names)]).cast(schema)
        waiting = pa.concat_tables([waiting, rows])
        while waiting.num_rows >= size:
            yield waiting.slice(0, size)
            waiting = waiting.slice(size)
    if waiting.num_rows:
        yield waiting


def _bring_back(staging: Path, out: Path) -> None:
    """Undo or finish an overwrite that was killed between its two renames."""
    old = moved_away(staging)
    if old.is_dir() and out.is_dir() and not any(out.iterdir()):
        out.rmdir()
    if old.is_dir() and not out.exists():
        old.rename(out)
        voice.say(f"{out}: restored, since the process that was replacing it was killed")
    elif is_sequence_log(out):
        remove_folder(old)
