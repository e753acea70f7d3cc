"""A new run that starts with another one's weights, row by row where the vocabularies differ.

A row of the new tables takes the old row of the same raw value. Values that the old log did not have keep
their seeded first weights and an empty accumulator, so they learn at full speed beside rows that have
settled. Row 0, unknown, follows row 0. The dense optimizer starts fresh, as does the schedule.

Where the new run has lanes of tables, they start from zero, and all accumulators fresh: those of the source
are of all its tasks together.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
import torch.distributed as dist
from torch import Tensor, nn

from embeddings.agreement import from_every_rank, from_rank_0
from embeddings.errors import CheckpointError, DataError, TandemError
from embeddings.groups import TableName
from embeddings.ids.rules import IdRules
from embeddings.lookup.sharding import table_of
from embeddings.lookup.shards import local_shards
from embeddings.private import ShardedTensor
from trainer.checkpoint.compatible import log_fingerprint
from trainer.checkpoint.dense_start import TaskHeads, fill_dense, tower_names
from trainer.checkpoint.plain_ids import check_ids
from trainer.checkpoint.save_load import find_to_use
from trainer.checkpoint.unsharded import (
    ENCODED,
    PlainManifest,
    PlainTables,
    Vocabularies,
    Vocabulary,
    open_plain_tables,
    unshard,
)
from trainer.config.tasks import resolve_tasks
from trainer.data.similarity.encoding import similarity_features
from trainer.log.known_values import drop_unused, known_values
from trainer.log.schema import LogManifest, TableFeature, read_manifest
from trainer.log.vocabulary import stream_values
from trainer.ranks.machine import give_pages_back, this_machine
from trainer.run_folder import RunFolder
from trainer.sealed_folder import remove_folder, voice
from trainer.storage import is_remote
from trainer.storage.fetched import shared_cache

_ROWS_AT_ONCE = 1 << 16
_BYTES_HELD = 1 << 26


def vocabularies(
    manifest: LogManifest, folder: Path, more: Mapping[str, TableFeature] | None = None
) -> dict[str, Vocabulary]:
    """Feature of tables -> its vocabulary, of a log or of a folder of plain tables that keeps a log's.

    Args:
        more: features that the log does not have.
    """
    items, contexts = {**manifest.table_features, **(more or {})}.items(), manifest.table_context.items()
    found = {name: Vocabulary(info, folder / f"{name}.parquet", info.meaning) for name, info in items}
    for name, info in contexts:
        found[name] = Vocabulary(info, folder / f"context_{name}.parquet", info.meaning)
    return found


def unshard_run(run: Path, out: Path) -> PlainManifest:
    """Write a run's newest verified checkpoint as plain tables.

    Raises:
        ConfigError: no run there. DataError: its log, which says what the rows stand for, is gone.
        CheckpointError: it has no usable checkpoint, or its log is another one by now.
    """
    folder = RunFolder(run)
    config = folder.read_config()
    found = find_to_use(folder.checkpoints, "newest", alone=True)
    assert found.path is not None
    for line in found.lines:
        voice.say(line)
    manifest = read_manifest(config.data.log)
    if log_fingerprint(manifest) != found.state["log"]:
        raise CheckpointError(
            found.path,
            f"was trained on another log than {config.data.log} is by now, so its rows have no names",
        )
    tasks = tower_names(resolve_tasks(config.tasks, manifest.tasks))
    known = vocabularies(manifest, config.data.log / "vocab", similarity_features(config.data))
    return unshard(found.path, out, known, tasks)


@contextmanager
def open_source(path: Path, scratch: Path) -> Iterator[PlainTables]:
    """The plain tables of a run or of a folder that `unshard` wrote; collective.

    Args:
        scratch: where those of a run are written, on storage that all ranks share; removed at the end.

    Raises:
        CheckpointError: it is neither, or damaged; on every rank.
    """

    def prepare() -> Path:
        try:
            if not (path / "checkpoints").is_dir():
                open_plain_tables(path)
                return path
            remove_folder(scratch)
            unshard_run(path, scratch)
            return scratch
        except CheckpointError:
            raise
        except TandemError as error:
            raise CheckpointError(path, str(error)) from None

    found = from_rank_0(prepare, slow=True)
    try:
        tables = replace(_open_on_all(found), given=path)
        yield tables
        dist.barrier()
        if is_remote(found):
            # They were fetched for this alone, by whichever rank of this machine came first.
            remove_folder(tables.path)
    finally:
        if dist.get_rank() == 0:
            remove_folder(scratch)


def _open_on_all(path: Path) -> PlainTables:
    """Open plain tables that rank 0 has verified; collective.

    Of a store each machine has a copy of its own, which its first rank fetches or verifies for the others;
    nobody does beside rank 0.
    """
    rank, machines, opened = dist.get_rank(), from_every_rank(this_machine), list[PlainTables]()
    first = machines.index(machines[rank]) == rank
    for turn in (True, False):

        def open_here(mine: bool = first == turn) -> None:
            if mine:
                opened.append(open_plain_tables(path, check=is_remote(path) and first and rank > 0))

        # To fetch and to read them takes longer than a collective waits.
        from_every_rank(open_here, slow=True)
    return opened[0]


def fill(
    tensors: Mapping[str, Any],
    source: PlainTables,
    log: Path,
    manifest: LogManifest,
    heads: TaskHeads,
    carry: bool,
    ids: Mapping[str, IdRules] | None = None,
    more: Mapping[str, TableFeature] | None = None,
    given: Collection[str] = (),
) -> list[str]:
    """Put the source's weights into a model's tensors, this rank's shards of them.

    Args:
        tensors: the state dict of a new run (`model`, `optim`), filled in place.
        source: whose weights; log, manifest: what the new run trains on; heads: of its tasks.
        carry: fill the rows' optimizer accumulators too.
        ids: rules of the new run's maps of ids that come and go; rows stay those of the same ids.
        more: features of tables that the log does not have.
        given: groups whose rows come from a file of the new run, and stay those.

    Returns:
        Lines that say what was found.

    Raises:
        CheckpointError: a table or dense weight is missing, or has another width or shape.
        DataError: a vocabulary is missing or damaged, or holds values of another type.
    """
    model = _without(tensors["model"], given)
    check_ids(source.name, source.manifest.ids, ids or {})
    tables = {table_of(name): name for name in model if table_of(name) in source.manifest.tables}
    new = _check_tables(model, source, heads)
    known, lines = vocabularies(manifest, log / "vocab", more), fill_dense(_dense(model), source, heads)
    for name in ids or {}:
        _check_same_values(name, known, source)
    if new:
        lines.append(f"tables with first weights, of sets of new tasks: {', '.join(new)}")
    kept = [each for each in source.manifest.tables if (of := TableName.of(each)) and of.group in given]
    if kept:
        lines.append(f"not taken over, since their rows are those of a file: {', '.join(kept)}")
    if left := [table for table in source.manifest.tables if table not in {*tables, *kept}]:
        lines.append(f"not taken over, since this model has no such tables: {', '.join(left)}")
    mixed = {str(table.main) for table in map(TableName.of, map(table_of, model)) if table and table.lane}
    if carry and mixed:
        lines.append(
            "accumulators start fresh: each task has its own (update = per_task), the source had one"
        )
    # Rows of ids that come and go belong to the same ids, whose map is taken over as well.
    maps: dict[str, Tensor | None] = dict.fromkeys(ids or {})
    used: set[Path | None] = set()
    for table, name in tables.items():
        entry = source.manifest.tables[table]
        if entry.feature not in maps:
            row_map = maps[entry.feature] = _row_map(entry.feature, known[entry.feature], source, used)
            line = "the same vocabulary"
            if row_map is not None:
                carried, before = int((row_map[1:] >= 0).sum()), source.manifest.rows[entry.feature] - 1
                line = f"{carried:,} of {before:,} values carried over, {len(row_map) - 1 - carried:,} new"
            lines.append(f"{entry.feature}: {line}")
        rows = model[name].size()[0]
        saved = source.table(table)
        _fill_rows(model[name], saved["weight"], maps[entry.feature], rows)
        state = tensors["optim"]["state"].get(f"fused.{name}", {}).get(f"{table}.momentum1")
        if carry and table not in mixed and state is not None and "accumulator" in saved:
            if len(state.size()) == saved["accumulator"].dim():
                _fill_rows(state, saved["accumulator"], maps[entry.feature], rows)
            else:
                lines.append(f"{table}: another optimizer than before, its accumulators start fresh")
    drop_unused(used)
    return lines


def check_source(
    model: nn.Module, heads: TaskHeads, path: Path, ids: Mapping[str, IdRules], given: Collection[str] = ()
) -> None:
    """Whether a model could start with weights from there, without reading all of them; one process.

    `given`: groups whose rows come from a file of the new run.

    Raises:
        CheckpointError: what is there is damaged, or does not fit; of a run, it has nothing to start with.
    """
    if (path / "checkpoints").is_dir():
        find_to_use(path / "checkpoints", "newest", alone=True)
        return
    source, weights = open_plain_tables(path), _without(model.state_dict(), given)
    check_ids(source.name, source.manifest.ids, ids)
    _check_tables(weights, source, heads)
    dense = _dense(weights).items()
    fill_dense({name: torch.empty_like(weight, device="meta") for name, weight in dense}, source, heads)


def _without(model: Mapping[str, Any], groups: Collection[str]) -> dict[str, Any]:
    """Weights without the tables of some groups."""
    of_tables = {name: TableName.of(table_of(name)) for name in model}
    return {
        name: weight
        for name, weight in model.items()
        if (table := of_tables[name]) is None or table.group not in groups
    }


def _dense(model: Mapping[str, Any]) -> dict[str, Any]:
    """All weights that no table has."""
    return {name: weight for name, weight in model.items() if TableName.of(table_of(name)) is None}


def _check_tables(model: Mapping[str, Any], source: PlainTables, heads: TaskHeads) -> list[str]:
    """Every table of the model must be there in its width, but those of a new task's own set.

    Returns:
        The latter.
    """
    known, new, new_sets = source.manifest.tables, [], heads.new_sets(source)
    for name, weight in model.items():
        table = table_of(name)
        wanted = TableName.of(table)
        if wanted is None or wanted.lane:
            continue
        if table not in known and wanted.set in new_sets:
            new.append(table)
            continue
        if table not in known:
            problem = f"has no table {table}; it has {', '.join(known)}"
            if wanted.set:
                # From one table they would start alike, and a mean over sets keeps them alike for good.
                problem += (
                    "; a table of a set starts from that of the same set of the same group, no other: name "
                    f"groups.{wanted.group}.sets as they are there, or train without train.init_from"
                )
            raise CheckpointError(source.name, problem)
        if known[table].dim != weight.size()[1]:
            raise CheckpointError(
                source.name, f"table {table} is {known[table].dim} wide, the config says {weight.size()[1]}"
            )
    return new


def _fill_rows(target: Tensor | ShardedTensor, source: Tensor, row_map: Tensor | None, rows: int) -> None:
    seen = 0
    for part, row, column in local_shards(target):
        for start in range(0, part.shape[0], _ROWS_AT_ONCE):
            here = torch.arange(start, min(start + _ROWS_AT_ONCE, part.shape[0]))
            # Accumulators of column shards lie one below the other, each as long as the table.
            new = here + row % rows
            if row_map is None:
                old = torch.where(new < source.shape[0], new, -1)
            else:
                old = torch.where(new < len(row_map), row_map[new.clamp(max=len(row_map) - 1)], -1)
            known = old >= 0
            values = source[old[known]]
            if part.dim() == 2:
                values = values[:, column : column + part.shape[1]]
            part[here[known].to(part.device)] = values.to(part.device, part.dtype)
            seen += values.nbytes
            if seen > _BYTES_HELD:
                # Of the source's file, which is mapped.
                give_pages_back(source.data_ptr(), source.nbytes)
                seen = 0


def _check_same_values(feature: str, new: Vocabularies, source: PlainTables) -> None:
    """Raise CheckpointError where ids that come and go stand for other values than in the source.

    Such a feature's ids may be dense ones, which name other values in another log.
    """
    if feature not in new or feature not in source.manifest.vocabularies:
        return
    if new[feature].info.vocabulary != source.manifest.vocabularies[feature]:
        problem = f"its ids of {feature} stand for other values than those of this log, and ids.{feature}"
        raise CheckpointError(
            source.name,
            f'{problem} takes rows over by ids; ingest both logs with ids = "raw" or "hashed" for it, or '
            "train without train.init_from",
        )


def _row_map(feature: str, new: Vocabulary, source: PlainTables, used: set[Path | None]) -> Tensor | None:
    """New row -> old row, -1 for none; None where the rows stand for the same.

    Args:
        used: folders of mapped vocabularies, for `drop_unused`; that of this one is put there.
    """
    digest, rows = source.manifest.vocabularies[feature], source.manifest.rows[feature]
    if ENCODED in (new.digest[: len(ENCODED)], digest[: len(ENCODED)]) and new.digest != digest:
        problem = f"{feature} was encoded otherwise: {digest or 'ids'}, and here {new.digest or 'ids'}"
        raise CheckpointError(
            source.name, f"{problem}; give both logs one encoder, or train without train.init_from"
        )
    if new.digest == digest:
        if not digest and new.info.rows != rows:
            raise CheckpointError(
                source.name,
                f"neither log says what the ids of {feature!r} stand for, and they have {rows} and "
                f"{new.info.rows} rows; ingest both with `tandemrec ingest`",
            )
        return None
    name = new.file.name
    old_file = source.path / "vocab" / name
    for file, known in ((old_file, digest), (new.file, new.info.vocabulary)):
        if not known:
            problem = "only one of the two logs says what its ids stand for; ingest both alike"
            raise DataError(problem, file=file)
    before = known_values(old_file, digest, shared_cache, of_log=True)
    used.add(before.folder)
    row_map = torch.full((new.info.rows,), -1, dtype=torch.int64)
    # The first value's row is 1.
    row_map[0], row = 0, 1
    for after in stream_values(new.file, new.info.vocabulary, of_log=True):
        if before.values.type != after.type:
            now, then = (
                "integers" if pa.types.is_integer(kind) else "text"
                for kind in (after.type, before.values.type)
            )
            problem = (
                f"holds {now}, that of {source.name} {then}: none would be found; ingest both logs alike"
            )
            raise DataError(problem, file=new.file)
        old = torch.from_numpy(before.ids(after))
        row_map[row : row + len(after)] = torch.where(old > 0, old, -1)
        row += len(after)
    return row_map
