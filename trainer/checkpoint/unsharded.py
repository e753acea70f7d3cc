"""Plain tables: a checkpoint without ranks, as safetensors that anybody can read.

    DIR/manifest.json             format, step, tables, size and SHA-256 of every file
    DIR/manifest.sha256           of manifest.json itself
    DIR/tables/<table>.safetensors  `weight` [rows, dim], and the optimizer's `accumulator`, [rows] for
                                  row-wise Adagrad, [rows, dim] for Adagrad, none for SGD
    DIR/dense.safetensors         every other weight, by its name in the model
    DIR/vocab/<feature>.parquet   what the rows stand for, where the log says

A table goes from the checkpoint's shards straight into its memory-mapped file, so that what must fit in
memory is the largest shard, not the table.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from pydantic import Field
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from embeddings.errors import CheckpointError
from embeddings.lookup.sharding import table_of
from trainer.checkpoint import files as checkpoint_files
from trainer.checkpoint.save_load import load_tensors
from trainer.config.toml import Settings
from trainer.log.names import FileName, InnerPath, name_problem
from trainer.log.schema import FeatureInfo
from trainer.sealed_folder import MANIFEST, Seal, entry_of, naming, publish, scratch

SEAL = Seal(CheckpointError, "unshard again", names_file=True)
_DTYPES: Final = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_ALIGNMENT = 8


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
    """What a folder of plain tables holds; `vocabularies` as in the log: feature -> digest, or empty."""

    format: Literal["tandemrec.plain-tables"] = "tandemrec.plain-tables"
    version: Literal[1] = 1
    step: int = Field(ge=0)
    tables: dict[FileName, PlainTable]
    dense: dict[str, tuple[int, ...]]
    vocabularies: dict[FileName, str]
    rows: dict[str, int]
    config: dict[str, Any]
    files: dict[InnerPath, PlainFile]


@dataclass(frozen=True)
class PlainTables:
    """A verified folder; tables are memory-mapped when asked for."""

    path: Path
    manifest: PlainManifest

    def table(self, name: str) -> dict[str, Tensor]:
        """`weight`, and `accumulator` where there is one; memory-mapped."""
        with safe_open(self.path / "tables" / f"{name}.safetensors", framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no dict

    def dense(self) -> dict[str, Tensor]:
        return load_file(self.path / "dense.safetensors")


@dataclass(frozen=True)
class _Saved:
    """Tensors of a checkpoint that make one table: names and shapes."""

    weight: str
    accumulator: str


# Feature of a log -> what it says of it, and the file of its values.
Features = Mapping[str, tuple[FeatureInfo, Path]]


def unshard(path: Path, out: Path, features: Features) -> PlainManifest:
    """Write a verified checkpoint as plain tables; one process, no process group.

    Args:
        path: the checkpoint; out: must not exist.
        features: of the run's log, by the name that its tables have.

    Raises:
        CheckpointError: `out` is there already or cannot be written.
    """
    if out.exists():
        raise CheckpointError(out, "is there already; name another --out")
    try:
        with scratch(out.absolute().parent, out.name) as part:
            (part / "tables").mkdir()
            manifest = _write(path, part, features)
            publish(part, out.absolute())
    except OSError as error:
        raise CheckpointError(out, f"cannot be written: {error.strerror} ({error.filename})") from None
    return manifest


def _write(path: Path, part: Path, features: Features) -> PlainManifest:
    state = checkpoint_files.read_state(path)
    saved = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    sizes = {name: entry for name, entry in saved.items() if isinstance(entry, TensorStorageMetadata)}
    tables: dict[str, PlainTable] = {}
    for name, tensors in _tables(path, sizes).items():
        tables[name] = _write_table(path, part / "tables" / f"{name}.safetensors", name, tensors, sizes)
    dense = {
        name.removeprefix("model."): torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in sizes.items()
        if name.startswith("model.") and table_of(name) not in tables
    }
    load_tensors(path, {f"model.{name}": tensor for name, tensor in dense.items()}, distributed=False)
    save_file(dense, part / "dense.safetensors")
    used = {name: features[name] for name in sorted({table.feature for table in tables.values()})}
    _copy_vocabularies(part / "vocab", used)
    files = sorted(p for p in part.rglob("*") if p.is_file())
    manifest = PlainManifest(
        step=state["step"],
        tables=tables,
        dense={name: tuple(tensor.shape) for name, tensor in dense.items()},
        vocabularies={name: info.vocabulary for name, (info, _) in used.items()},
        rows={name: info.rows for name, (info, _) in used.items()},
        config=state["config"],
        files={str(file.relative_to(part)): PlainFile(**entry_of(file)) for file in files},
    )
    SEAL.write(part, manifest.model_dump_json(indent=1))
    return manifest


def _tables(path: Path, sizes: Mapping[str, TensorStorageMetadata]) -> dict[str, _Saved]:
    """Tables of a checkpoint: those weights that a collection holds."""
    found = {}
    for name in sizes:
        table = table_of(name)
        if not name.startswith("model.") or "__" not in table:
            continue
        if problem := name_problem(table):
            raise CheckpointError(path, f"the name of the table {table!r} {problem}")
        # Only the first accumulator is the optimizers' own; FBGEMM's others are counters.
        state = f"optim.state.fused.{name.removeprefix('model.')}.{table}.momentum1"
        found[table] = _Saved(name, state if state in sizes else "")
    return found


def _write_table(
    path: Path, file: Path, name: str, tensors: _Saved, sizes: Mapping[str, TensorStorageMetadata]
) -> PlainTable:
    group, feature = name.split("__", 1)
    rows, dim = sizes[tensors.weight].size
    layout = {"weight": (tuple(sizes[tensors.weight].size), sizes[tensors.weight].properties.dtype)}
    accumulator: Tensor | None = None
    kind: Literal["", "row", "weight"] = ""
    if tensors.accumulator:
        entry = sizes[tensors.accumulator]
        kind = "weight" if len(entry.size) == 2 else "row"
        layout["accumulator"] = ((rows, dim) if kind == "weight" else (rows,), entry.properties.dtype)
        if kind == "row" and entry.size[0] != rows:
            accumulator = torch.empty(entry.size, dtype=entry.properties.dtype)
    mapped = _mapped_file(file, layout)
    wanted = {tensors.weight: mapped["weight"]}
    if tensors.accumulator:
        wanted[tensors.accumulator] = mapped["accumulator"] if accumulator is None else accumulator
    load_tensors(path, wanted, distributed=False)
    if accumulator is not None:
        # One accumulator a row and column shard, each the mean over its columns: together their mean.
        mapped["accumulator"].copy_(accumulator.view(-1, rows).mean(0))
    return PlainTable(feature=feature, group=group, rows=rows, dim=dim, accumulator=kind)


def _mapped_file(file: Path, layout: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> dict[str, Tensor]:
    """A safetensors file of empty tensors that is filled by writing to them."""
    header: dict[str, Any] = {}
    end = 0
    for name, (shape, dtype) in layout.items():
        size = int(np.prod(shape)) * dtype.itemsize
        header[name] = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    start = 8 + len(text)
    with naming(file), file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        stream.flush()
        # Room is taken now: to write to a mapped file on a full disk would kill the process.
        os.posix_fallocate(stream.fileno(), 0, start + end)
    content = torch.from_file(str(file), shared=True, size=start + end, dtype=torch.uint8)
    return {
        name: content[start + entry["data_offsets"][0] : start + entry["data_offsets"][1]]
        .view(layout[name][1])
        .view(layout[name][0])
        for name, entry in header.items()
    }


def _copy_vocabularies(out: Path, used: Features) -> None:
    out.mkdir()
    for info, file in used.values():
        if info.vocabulary:
            shutil.copyfile(file, out / file.name)


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
    for name, entry in manifest.files.items() if check else ():
        SEAL.check(path / name, entry.bytes, entry.sha256)
    return PlainTables(path, manifest)
