"""Writing a version: table by table from a checkpoint, in a folder that readers do not look at.

The memory it takes is that of the dense part and of some blocks of rows, whatever the size of the tables and
of their shards. `trainer.snapshot.publishing` then gives the folder its number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from embeddings.groups import TableGroup
from embeddings.ids.frozen import FrozenIds
from embeddings.ids.rules import IdRules
from embeddings.lookup.stored import WIDTHS, Dtype, row_bytes
from embeddings.plan.memory import gigabytes
from trainer.checkpoint.tensors import TensorReader
from trainer.data.batch import RequestBatch
from trainer.data.batch_file import pack
from trainer.data.similarity.vectors import Vectors
from trainer.log.schema import FeatureInfo
from trainer.run_config import Config
from trainer.snapshot.chain import Chain
from trainer.snapshot.checking import check_files
from trainer.snapshot.id_maps import write_ids
from trainer.snapshot.loading import RecordedRequests, Snapshot, load_snapshot
from trainer.snapshot.manifest import (
    DENSE,
    OWN,
    RECORDED,
    SEAL,
    UNCERTAINTY,
    SearchPart,
    SearchTable,
    SnapshotFile,
    SnapshotIds,
    SnapshotManifest,
    SnapshotTable,
    StoredRows,
    ids_path,
    search_stem,
    table_stem,
)
from trainer.snapshot.publishing import describe
from trainer.snapshot.rows import RowSource, block_rows, write_changes, write_rows, write_touched
from trainer.snapshot.search import Part, SearchKind, search_parts
from trainer.snapshot.uncertainty import Posterior, Uncertainty
from trainer.snapshot.vector_entries import SnapshotVectors, vectors_path
from trainer.snapshot.vectors import write_vectors

# Read of a checkpoint at once; and how much between two rows is read rather than leapt over. To begin anew
# takes 0.6 ms, in which 1 to 2 MB are read.
_BAND_BYTES, _NEAR_BYTES = 8 << 20, 1 << 20
# Tables that a warning names.
_NAMED = 6
# Told of all rows of a table as they pass by: (table name, first row, rows).
Watch = Callable[[str, int, Tensor], None]


@dataclass(frozen=True)
class Source:
    """A trained model in a checkpoint.

    Attributes:
        config, groups: of the run; reader: of its checkpoint.
        base_step: of the checkpoint that the base of a delta was made of, where this one may build on it.
    """

    config: Config
    groups: Mapping[str, TableGroup]
    reader: TensorReader
    base_step: int | None = None

    def dense(self) -> dict[str, Tensor]:
        """Everything but tables, under the names of the model's state dict."""
        return {n: self.reader.whole(n) for n in self.reader.names() if not n.startswith("collections.")}

    def rows(self, group: str, table: str) -> Iterator[tuple[int, Tensor]]:
        """A table of a group, by its name, as (first row, rows)."""
        return self.reader.bands(self.reader.table(group, table), _BAND_BYTES)

    def touched(self, group: str, table: str) -> Iterator[tuple[Tensor, Tensor]] | None:
        """(ids, rows) of all that may differ from the base, ascending; None: the checkpoint cannot tell."""
        if self.base_step is None:
            return None
        ids = self.reader.touched_since(self.reader.table(group, table), self.base_step)
        return None if ids is None else self._picked(group, table, ids)

    def picked(self, group: str, table: str, ids: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Rows of ascending ids, and what lies between near ones, as (first row, rows)."""
        name = self.reader.table(group, table)
        width = math.prod(self.reader.shape(name)[1:]) * self.reader.dtype(name).itemsize
        near, most = (max(1, size // width) for size in (_NEAR_BYTES, _BAND_BYTES))
        # A stretch ends where the next id is far, or where it has become long.
        far = (ids.diff() > near) | (ids[1:] // most != ids[:-1] // most)
        for stretch in ids.tensor_split(torch.nonzero(far).squeeze(1) + 1):
            if stretch.numel():
                start, stop = int(stretch[0]), int(stretch[-1]) + 1
                yield start, self.reader.rows(name, start, stop)

    def _picked(self, group: str, table: str, ids: Iterator[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        for some in ids:
            for first, rows in self.picked(group, table, some):
                begin, end = torch.searchsorted(some, torch.tensor([first, first + len(rows)])).tolist()
                yield some[begin:end], rows[some[begin:end] - first]


@dataclass
class Draft:
    """A version that is being written into `folder`, as a delta where there is a base.

    Attributes:
        wanted: table -> the ids, ascending, whose rows `watch` must be told of.
        search: what is written for a retrieval service.
        files: of matrices, by path, once they are written; checked: files of the base that were.
    """

    folder: Path
    source: Source
    dtypes: Mapping[str, Dtype]
    base: Chain | None = None
    watch: Watch | None = None
    wanted: Mapping[str, Tensor] = field(default_factory=dict)
    search: SearchKind = "none"
    files: dict[str, SnapshotFile] = field(default_factory=dict)
    checked: set[Path] = field(default_factory=set)

    def write_tables(self) -> dict[str, tuple[SnapshotTable, ...]]:
        """All tables of all groups, for the manifest."""
        (self.folder / "tables").mkdir()
        tables = {}
        for name, group in self.source.groups.items():
            entries = []
            for place, table in enumerate(group.tables):
                key = group.table_name(table)
                shape = table.rows, table.dim
                rows = partial(self._table_rows, name, key)
                place_ = table_stem(name, place), key, shape, self.dtypes[name]
                stored = self._write_touched(name, *place_) or self._write(*place_, rows)
                entries.append(SnapshotTable(feature=table.feature, set=table.set, **stored.model_dump()))
            tables[name] = tuple(entries)
        return tables

    def write_search(self, dense: Mapping[str, Tensor]) -> dict[str, SearchPart]:
        """The search part of each branch that has one, in the types of its tables."""
        found, (config, groups) = {}, (self.source.config, self.source.groups)
        for branch, (described, parts) in search_parts(config, groups, dense, self.search).items():
            tables = []
            for place, part in enumerate(parts):
                dtype, shape = self.dtypes[part.group], (part.rows, part.dim)
                if part.projection is None:
                    names = [groups[part.group].table_name(table) for table in groups[part.group].tables]
                    table = table_stem(part.group, names.index(part.table))
                    stored = StoredRows(rows=part.rows, dim=part.dim, dtype=dtype)
                else:
                    (self.folder / "search").mkdir(exist_ok=True)
                    table, stem, name = "", search_stem(branch, place), f"{part.side}__{part.feature}"
                    stored = self._write(stem, name, shape, dtype, partial(self._part_rows, part))
                entry = stored.model_dump()
                tables.append(SearchTable(feature=part.feature, side=part.side, table=table, **entry))
            found[branch] = described.model_copy(update={"tables": tuple(tables)})
        return found

    def write_ids(
        self, maps: Mapping[str, FrozenIds], infos: Mapping[str, FeatureInfo]
    ) -> dict[str, SnapshotIds]:
        """All maps of ids, for the manifest; `infos`: of the log's features."""
        found = {}
        for place, (name, now) in enumerate(maps.items()):
            rules, info = now.rules, infos[now.rules.within or name]
            described = SnapshotIds(
                capacity=rules.capacity,
                shared_rows=rules.shared_rows,
                live=now.ids.size,
                raw=info.raw,
                hashed=info.hashed,
            )
            base = self.base.id_map(name) if self.base is not None and self._has_like(name, rules) else None
            found[name], file = write_ids(self.folder, ids_path(place), now, described, base)
            self.files[file.path] = file
        return found

    def write_vectors(
        self, vectors: Mapping[str, Vectors], infos: Mapping[str, FeatureInfo]
    ) -> dict[str, SnapshotVectors]:
        """All pre-trained vectors, for the manifest; those that the base has are left where they are.

        Args:
            infos: of the log's features.
        """
        found = {}
        for name, given in vectors.items():
            described, entry = write_vectors(self.folder, name, given)
            if (info := infos.get(self.source.config.data.vectors[name].key)) is not None:
                described = described.model_copy(update={"raw": info.raw, "hashed": info.hashed})
            file = SnapshotFile(path=vectors_path(name), **entry)
            if self.base is not None and name in self.base.manifest.vectors:
                _, known = self.base.vectors_file(name)
                if (known.bytes, known.sha256) == (file.bytes, file.sha256):
                    (self.folder / file.path).unlink()
                    found[name] = described.model_copy(update={"of_base": True})
                    continue
            self.files[file.path], found[name] = file, described
        return found

    def _has_like(self, name: str, rules: IdRules) -> bool:
        """Whether the base has such a map, whose ids may have the same rows."""
        assert self.base is not None
        before = self.base.manifest.config.id_rules.get(name)
        return before is not None and before.layout == rules.layout

    def write_dense(self, dense: Mapping[str, Tensor]) -> None:
        # Not save_file, whose files nobody else may read.
        content = save({name: tensor.contiguous() for name, tensor in dense.items()})
        (self.folder / DENSE).write_bytes(content)

    def write_recorded(self, batch: RequestBatch, trained: Tensor, own: Tensor) -> None:
        """A batch and its probabilities by the trainer and by the snapshot, float32 [C, T]."""
        scores = {"scores": trained.contiguous(), OWN: own.contiguous()}
        (self.folder / RECORDED).write_bytes(save({**pack(batch), **scores}))

    def _write(
        self, stem: str, name: str, shape: tuple[int, int], dtype: Dtype, rows: RowSource
    ) -> StoredRows:
        if self.base is None or self._in_base(stem, name, shape, dtype) is None:
            written = write_rows(self.folder, stem, name, shape, dtype, rows)
        else:
            with closing(self.base.reader(stem, name)) as base:
                written = write_changes(self.folder, stem, name, shape, dtype, rows, base)
            if written.stored.changed is not None:
                self.checked.update(base.files)
        self.files |= {entry.path: entry for entry in written.files}
        return written.stored

    def _write_touched(
        self, group: str, stem: str, name: str, shape: tuple[int, int], dtype: Dtype
    ) -> StoredRows | None:
        """The delta of a table whose touched rows the checkpoint knows; None where it has to be compared."""
        known = self._in_base(stem, name, shape, dtype)
        touched = None if known is None or known.rows != shape[0] else self.source.touched(group, name)
        if self.base is None or touched is None:
            return None
        written = write_touched(self.folder, stem, name, shape, dtype, touched, self.base.rows(stem, name))
        if written is None:
            return None
        if self.watch is not None:
            for first, rows in self.source.picked(group, name, self.wanted[name]):
                self.watch(name, first, rows)
        # Whoever loads the version checks them; here a few of their rows were read, not all.
        self.checked.update(path / entry.path for path, entry in self.base.files(stem))
        self.files |= {entry.path: entry for entry in written.files}
        return written.stored

    def _in_base(self, stem: str, name: str, shape: tuple[int, int], dtype: Dtype) -> StoredRows | None:
        """The base's matrix, where a delta of it can be laid over that."""
        for key, tensor, entry in () if self.base is None else self.base.manifest.matrices():
            if (key, tensor, entry.dim, entry.dtype) == (stem, name, shape[1], dtype):
                return entry
        return None

    def _table_rows(self, group: str, table: str) -> Iterator[tuple[int, Tensor]]:
        for first, band in self.source.rows(group, table):
            if self.watch is not None:
                self.watch(table, first, band)
            yield first, band

    def _part_rows(self, part: Part) -> Iterator[tuple[int, Tensor]]:
        for begin, band in self.source.rows(part.group, part.table):
            size = block_rows(max(band.shape[1], part.dim))
            for first, rows in zip(range(begin, begin + len(band), size), band.split(size), strict=True):
                yield first, part.of(rows)


def finish(draft: Draft, manifest: SnapshotManifest, batch: RequestBatch, trained: Tensor) -> Snapshot:
    """Describe what was written, load it as anybody would, and record its own scores beside the trainer's.

    Args:
        manifest: of a draft whose tables and dense part are written; its `files` count for nothing.
        batch, trained: to record, and the trainer's probabilities of it, float32 [C, T].
    """
    part = draft.folder
    draft.write_recorded(batch, trained, own=trained.clone())
    files = {**draft.files, **{name: describe(part, part / name) for name in (DENSE, RECORDED)}}

    def sealed(files: Mapping[str, SnapshotFile]) -> SnapshotManifest:
        ordered = tuple(files[path] for path in sorted(files))
        described = manifest.model_copy(update={"files": ordered})
        SEAL.write(part, described.model_dump_json(indent=1))
        return described

    sealed(files)
    snapshot = load_snapshot(part, draft.checked)
    check_files([(part, entry) for path, entry in files.items() if path.startswith("search/")])
    # Written from memory again: the loaded batch is mapped from the file that this replaces.
    recorded = RecordedRequests(batch, trained, own=snapshot.score(snapshot.recorded.batch))
    draft.write_recorded(*recorded)
    files[RECORDED] = describe(part, part / RECORDED)
    return replace(snapshot, manifest=sealed(files), recorded=recorded)


def add_uncertainty(
    snapshot: Snapshot, described: Uncertainty, posteriors: Mapping[str, Posterior]
) -> Snapshot:
    """The same draft with posteriors of its last maps, which it is sealed with."""
    part, manifest = snapshot.path, snapshot.manifest
    (part / UNCERTAINTY).write_bytes(save({task: each.root for task, each in posteriors.items()}))
    files = {entry.path: entry for entry in manifest.files} | {
        UNCERTAINTY: describe(part, part / UNCERTAINTY)
    }
    update = {"files": tuple(files[path] for path in sorted(files)), "uncertainty": described}
    manifest = manifest.model_copy(update=update)
    SEAL.write(part, manifest.model_dump_json(indent=1))
    return replace(snapshot, manifest=manifest, posteriors=posteriors)


def group_dtypes(config: Config, dtype: Dtype, attention: Dtype) -> dict[str, Dtype]:
    """How each group is stored: a group that serves attention and representation gets the wider of both."""
    wanted: dict[str, set[Dtype]] = {}
    for branch in config.model.all_branches().values():
        for role, group in branch.roles.model_dump().items():
            if group:
                scores = role.startswith("attention") or role == "cross"
                wanted.setdefault(group, set()).add(attention if scores else dtype)
    return {group: max(kinds, key=WIDTHS.index) for group, kinds in wanted.items()}


def int8_lines(groups: Iterable[TableGroup], dtypes: Mapping[str, Dtype]) -> list[str]:
    """A warning of the tables that int8 makes no smaller than fp16, since each row has a scale; or none."""
    names: list[str] = []
    sizes: dict[Dtype, int] = {"int8": 0, "fp16": 0}
    for group in groups:
        for table in group.tables if dtypes.get(group.name) == "int8" else ():
            each = {dtype: table.rows * row_bytes(table.dim, dtype) for dtype in sizes}
            if each["int8"] >= each["fp16"]:
                names.append(group.table_name(table))
                sizes = {dtype: size + each[dtype] for dtype, size in sizes.items()}
    if not names:
        return []
    shown = ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")
    return [
        "warning: int8 is no smaller than fp16 for rows of up to 8 numbers, since each has 8 bytes of scale: "
        f"{shown} take {gigabytes(sizes['int8'])}, and {gigabytes(sizes['fp16'])} in fp16"
    ]
