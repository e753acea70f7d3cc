"""Plain tables: a checkpoint without ranks, as safetensors that anybody can read.

    DIR/manifest.json             format, step, tables, size and SHA-256 of every file
    DIR/manifest.sha256           of manifest.json itself
    DIR/tables/<table>.safetensors  `weight` [rows, dim], and the optimizer's `accumulator`, [rows] for
                                  row-wise Adagrad, [rows, dim] for Adagrad, none for SGD; the tables of a
                                  set lie in a folder of their own, as their names say
    DIR/dense.safetensors         every other weight, by its name in the model
    DIR/ids/<map>.safetensors   which ids the rows belong to, where they come and go; see
                                  `trainer.checkpoint.plain_ids`
    DIR/vocab/<feature>.parquet   what the rows stand for, where the log says

A table goes from the checkpoint's shards into its file a block of rows at a time, so that only that must fit
into memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from embeddings.errors import CheckpointError
from embeddings.groups import TableName
from embeddings.lookup.sharding import table_of
from trainer.checkpoint import files as checkpoint_files
from trainer.checkpoint.accumulators import accumulated, accumulator_of
from trainer.checkpoint.plain_ids import PlainIds, write_ids
from trainer.checkpoint.tensor_stream import TensorStream
from trainer.checkpoint.tensors import TensorReader
from trainer.config.toml import Settings
from trainer.log.names import FileName, InnerPath, path_problem
from trainer.log.schema import FeatureInfo
from trainer.sealed_folder import MANIFEST, Seal, entry_of, publish, raise_of_store, scratch
from trainer.storage import is_remote
from trainer.storage.fetched import cache_of, drop_old, fetch, shared_cache
from trainer.storage.objects import copy_file, or_half_of_one

_ROWS_AT_ONCE = 1 << 20
ENCODED = "encoded: "
SEAL = Seal(CheckpointError, "unshard again", names_file=True)


class PlainTable(Settings):
    """One table: `accumulator` is the shape of the optimizer's, per row; empty where it has none."""

    feature: FileName
    group: str
    rows: int = Field(ge=1)
    dim: int = Field(ge=1)
    accumulator: Literal["", "row", "weight"] = ""


class PlainFile(Settings):
    bytes: int = Field(ge=0)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class PlainManifest(Settings):
    """What a folder of plain tables holds; `vocabularies`: feature -> `Vocabulary.digest`.

    Version 2 says the tasks and may have tables of sets; 1 is still read. Version 3 has maps of ids.
    """

    format: Literal["tandemrec.plain-tables"] = "tandemrec.plain-tables"
    version: Literal[1, 2, 3] = 2
    step: int = Field(ge=0)
    tables: dict[InnerPath, PlainTable]
    dense: dict[str, tuple[int, ...]]
    vocabularies: dict[FileName, str]
    rows: dict[str, int]
    config: dict[str, Any]
    files: dict[InnerPath, PlainFile]
    ids: dict[FileName, PlainIds] = Field(default_factory=dict)
    tasks: tuple[str, ...] | None = None
    """The tasks with towers, in the order of the head's rows; None: written before these were kept."""


@dataclass(frozen=True)
class PlainTables:
    """A verified folder; tables are memory-mapped when asked for.

    Attributes:
        given: the run that it was written from, where that is what the user named.
    """

    path: Path
    manifest: PlainManifest
    given: Path | None = None

    @property
    def name(self) -> Path:
        """What the user gave, for messages: the run, where the folder was written from one."""
        return self.path if self.given is None else self.given

    def table(self, name: str) -> dict[str, Tensor]:
        """`weight`, and `accumulator` where there is one; memory-mapped."""
        with safe_open(self.path / "tables" / f"{name}.safetensors", framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no dict

    def dense(self) -> dict[str, Tensor]:
        return load_file(self.path / "dense.safetensors")


@dataclass(frozen=True)
class Vocabulary:
    """What the rows of a feature's tables stand for: `info` as in a log, `file` of values and ids.

    `meaning` says it of a part of an encoded number, of which there is no file.
    """

    info: FeatureInfo
    file: Path
    meaning: str = ""

    @property
    def digest(self) -> str:
        """Equal where rows stand for the same; empty where nobody knows for what."""
        return f"{ENCODED}{self.meaning}" if self.meaning else self.info.vocabulary


# By the feature's name.
Vocabularies = Mapping[str, Vocabulary]


def unshard(path: Path, out: Path, features: Vocabularies, tasks: Sequence[str]) -> PlainManifest:
    """Write a verified checkpoint as plain tables; one process, no process group.

    Args:
        path: the checkpoint; out: must not exist.
        features: of the run's log, by the name that its tables have.
        tasks: the run's tasks with towers, in their order.

    Raises:
        CheckpointError: `out` is there already or cannot be written.
    """
    if out.exists():
        raise CheckpointError(out, f"is there already; name another --out{or_half_of_one(out)}")
    try:
        with scratch(out.absolute().parent, out.name) as part:
            (part / "tables").mkdir()
            manifest = _write(path, part, features, tuple(tasks))
            publish(part, out.absolute())
    except OSError as error:
        if str(error.filename).startswith(str(path)):
            raise_of_store(path, error)
        raise CheckpointError(out, f"cannot be written: {error.strerror} ({error.filename})") from None
    return manifest


def _write(path: Path, part: Path, features: Vocabularies, tasks: tuple[str, ...]) -> PlainManifest:
    state, reader = checkpoint_files.read_state(path), TensorReader(path)
    tables = {}
    for weight in reader.names():
        name = TableName.of(table_of(weight))
        if name is None:
            # No collection holds it.
            continue
        table = table_of(weight)
        if problem := path_problem(table):
            raise CheckpointError(path, f"the name of the table {table!r} {problem}")
        file = part / "tables" / f"{table}.safetensors"
        file.parent.mkdir(parents=True, exist_ok=True)
        tables[table] = _write_table(reader, file, name, weight)
    dense = {name: reader.whole(name) for name in reader.names() if table_of(name) not in tables}
    # Not save_file, whose files nobody else may read.
    (part / "dense.safetensors").write_bytes(save(dense))
    used = {name: features[name] for name in sorted({table.feature for table in tables.values()})}
    (part / "vocab").mkdir()
    for entry in used.values():
        if entry.info.vocabulary:
            copy_file(entry.file, part / "vocab" / entry.file.name)
    maps = write_ids(path, part)
    files = sorted(p for p in part.rglob("*") if p.is_file())
    manifest = PlainManifest(
        version=3 if maps else 2,
        ids=maps,
        step=state["step"],
        tables=tables,
        dense={name: tuple(tensor.shape) for name, tensor in dense.items()},
        vocabularies={name: entry.digest for name, entry in used.items()},
        rows={name: entry.info.rows for name, entry in used.items()},
        config=state["config"],
        tasks=tasks,
        files={str(file.relative_to(part)): PlainFile(**entry_of(file)) for file in files},
    )
    SEAL.write(part, manifest.model_dump_json(indent=1))
    return manifest


def _write_table(reader: TensorReader, file: Path, name: TableName, weight: str) -> PlainTable:
    rows, dim = reader.shape(weight)
    layout: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {"weight": (reader.dtype(weight), (dim,))}
    accumulator = accumulator_of(weight)
    kind: Literal["", "row", "weight"] = ""
    if accumulator in reader:
        size = reader.shape(accumulator)
        kind = "weight" if len(size) == 2 else "row"
        layout["accumulator"] = reader.dtype(accumulator), size[1:]
    with TensorStream(file, layout, rows, alignment=8) as stream:
        for _, band in reader.bands(weight):
            stream.append("weight", band)
        lanes = [accumulator_of(lane) for lane in reader.lanes(weight)]
        if kind and (lanes or (kind == "row" and size[0] != rows)):
            # What tasks gathered by themselves is added up, as one table would have it of gradients that have
            # nothing to do with each other.
            for start in range(0, rows, _ROWS_AT_ONCE):
                stop = min(start + _ROWS_AT_ONCE, rows)
                each = [accumulated(reader, name, rows, start, stop) for name in (accumulator, *lanes)]
                stream.append("accumulator", torch.stack(each).sum(0))
        elif kind:
            for _, band in reader.bands(accumulator):
                stream.append("accumulator", band)
    return PlainTable(feature=name.feature, group=name.group, rows=rows, dim=dim, accumulator=kind)


def open_plain_tables(path: Path, check: bool = True) -> PlainTables:
    """Open a folder of plain tables, and compare its files with the manifest (`check`).

    Raises:
        CheckpointError: it is none, or a file is missing or changed.
    """
    if not (path / MANIFEST).is_file():
        raise CheckpointError(path, f"holds no {MANIFEST}, so it is no folder that `unshard` wrote")
    try:
        manifest = PlainManifest.model_validate_json(SEAL.read(path))
    except ValueError as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(path / MANIFEST, f"unreadable: {reason}; unshard again") from None
    if is_remote(path):
        return PlainTables(_fetched(path, manifest, check), manifest, path)
    for name, entry in manifest.files.items() if check else ():
        SEAL.check(path / name, entry.bytes, entry.sha256)
    return PlainTables(path, manifest)


def _fetched(path: Path, manifest: PlainManifest, check: bool) -> Path:
    """The files in a folder of this machine, where they are mapped."""
    local = cache_of(path, shared_cache())
    wanted = {name: (entry.bytes, entry.sha256) for name, entry in manifest.files.items()}
    known = hashlib.sha256(manifest.model_dump_json().encode()).hexdigest()[:16]
    try:
        fetch(path, wanted, local / known, CheckpointError, check)
        drop_old(local, {known})
    except OSError as error:
        problem = f"cannot be fetched to {local}: {error.strerror} ({error.filename})"
        raise CheckpointError(path, problem) from None
    return local / known
