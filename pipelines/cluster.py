"""`tandemrec cluster`: add clusters of every history to a sequence log (TWIN-V2's offline part)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import nn

from embeddings.errors import DataError, SnapshotError
from embeddings.lookup.jagged import one_id_bags
from pipelines.console import quiet_third_parties
from trainer.data.row_group import read_footer, read_group
from trainer.data.rows import Columns, UserRows, read_rows
from trainer.log.clusters import ClusterInfo, cluster_history
from trainer.log.schema import CLUSTER_COLUMNS, VOCABULARIES, LogManifest, SplitInfo, read_manifest, schema_of
from trainer.log.writer import staged, write_manifest, write_split
from trainer.snapshot import Snapshot, load_fetched
from trainer.storage.objects import copy_folder

# Words in place of a feature: that of the fewest values, and no feature at all.
COARSEST, NOTHING = "coarsest", "none"


def cluster(log: Path, snapshot: Path, out: Path, info: ClusterInfo, overwrite: bool = False) -> LogManifest:
    """Copy a log with two more columns: size and mean time of the cluster that a behavior represents.

    Args:
        log: the sequence log; snapshot: whose attention vectors of behaviors are clustered.
        out: the log to write.
        info: chunk, cap, grouping feature and seed. `COARSEST` in place of the feature takes the one of the
            fewest values, `NOTHING` or an empty name none.

    Raises:
        DataError: the log is damaged, lacks the grouping feature, or is of another vocabulary.
        SnapshotError: the snapshot is corrupt.
    """
    quiet_third_parties()
    manifest, loaded = read_manifest(log), load_fetched(snapshot)
    loaded.check_vocabularies({**manifest.features, **manifest.context}, log)
    info = info.model_copy(update={"group_by": grouping_feature(manifest, info.group_by, log)})
    clustered = manifest.model_copy(update={"clusters": info.model_copy(update={"source": loaded.digest()})})
    shares = []
    with staged(out, overwrite) as staging:
        splits = {}
        for split, files in manifest.splits.items():
            sizes: list[int] = []
            rows = _clustered_rows(log, manifest, files, loaded, info, sizes)
            layout = (1, 1)  # rows of a row group and of a file, as the log has them
            if files.files:
                size = read_footer(log / files.files[0].path).row_group(0).num_rows
                layout = (size, max(size, files.files[0].rows // size * size))
            splits[split] = write_split(rows, staging, split, schema_of(clustered), layout)
            shares.append(f"{split}: {sum(sizes):,} clusters of {files.behaviors:,} behaviors")
        copy_folder(log / VOCABULARIES, staging / VOCABULARIES)
        write_manifest(staging, clustered.model_copy(update={"splits": splits}))
    grouped = f"grouped by {info.group_by}" if info.group_by else "not grouped by any feature"
    print(f"{'; '.join(shares)}, {grouped} -> {out}")
    return clustered


def grouping_feature(manifest: LogManifest, wanted: str, log: Path) -> str:
    """The feature whose values are clustered apart; empty = none.

    TWIN-V2 groups by the fraction of a video that was played. A log has no such thing by a fixed name. Of its
    features the one of the fewest values comes next to it: a bucketed fraction, an action, the coarsest level
    of a taxonomy.

    Raises:
        DataError: the log, at `log`, has no such single-valued feature of behaviors.
    """
    fit = {
        name: each.rows
        for name, each in manifest.features.items()
        if each.of_behaviors and not each.multi and not each.encoder
    }
    if wanted in fit or not wanted:
        return wanted
    if wanted == NOTHING:
        return ""
    if wanted == COARSEST:
        # Rows of raw ids are not known; items themselves are what is clustered.
        known = [name for name in fit if not manifest.features[name].raw and name != "item_id"]
        return min(known, key=lambda name: (fit[name], name), default="")
    problem = f"has no single-valued feature {wanted!r} of behaviors to group by"
    raise DataError(f"{problem}; it has {', '.join(fit)}", file=log)


def _clustered_rows(
    log: Path, manifest: LogManifest, files: SplitInfo, loaded: Snapshot, info: ClusterInfo, sizes: list[int]
) -> Iterator[pa.RecordBatch]:
    bounds = loaded.id_bounds()
    ids = {name: info for name, info in manifest.features.items() if info.encoder is None}
    columns = Columns.of(manifest, {name: bounds.get(name, info.bound) for name, info in ids.items()})
    for entry in files.files:
        footer = read_footer(log / entry.path)
        for group in range(footer.num_row_groups):
            rows = read_rows(log / entry.path, group, columns, footer)
            vectors = behavior_vectors(rows, loaded)
            values = np.zeros(rows.history_time.size, dtype=np.int64)
            if info.group_by:
                values = rows.history[info.group_by].values.astype(np.int64)
            clusters = [
                cluster_history(vectors[a:b], values[a:b], rows.history_time[a:b], info)
                for a, b in zip(rows.history_offsets[:-1], rows.history_offsets[1:], strict=True)
            ]
            size, time = (np.concatenate([getattr(c, name) for c in clusters]) for name in ("size", "time"))
            sizes.append(int((size > 0).sum()))
            table = read_group(log / entry.path, group, footer.schema.to_arrow_schema().names, footer).table
            offsets = pa.array(rows.history_offsets.astype(np.int32))
            for name, column in zip(CLUSTER_COLUMNS, (size, time), strict=True):
                table = table.append_column(name, pa.ListArray.from_arrays(offsets, pa.array(column)))
            yield from table.combine_chunks().to_batches()


@torch.no_grad()
def behavior_vectors(rows: UserRows, loaded: Snapshot) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    """Attention vectors of all behaviors of a row group: float32 [behaviors, D]."""
    group = loaded.manifest.config.model.roles.attention_behavior
    features = [table.feature for table in loaded.manifest.groups[group]]
    missing = [
        name for name in features if name not in rows.history or rows.history[name].offsets is not None
    ]
    if missing:
        raise SnapshotError(
            loaded.path, f"attends to {missing[0]!r}, which is no single-valued feature of the behaviors"
        )
    keys = [loaded.id_key(group, name) for name in features]
    ids = torch.stack(
        [
            torch.from_numpy(loaded.rows_of(key, rows.history[name].values.astype(np.int64)))
            for key, name in zip(keys, features, strict=True)
        ]
    )
    collection = loaded.model.collections[group]
    assert isinstance(collection, nn.Module)
    vectors = loaded.model.lookups({group: collection(one_id_bags(keys, ids))})[group]
    array: np.ndarray[tuple[int, int], np.dtype[np.float32]] = vectors.numpy()
    return array
