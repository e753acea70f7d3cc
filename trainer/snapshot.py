"""Serving snapshots: JSON and safetensors only, no code, no pickle, and never trusted unverified.

    SNAP/LATEST                     name of the newest version; moves last
    SNAP/v00000001/manifest.json    format, config, features, groups, size and SHA-256 of every file
    SNAP/v00000001/manifest.sha256  digest of manifest.json itself
    SNAP/v00000001/tables/<group>.safetensors
    SNAP/v00000001/dense.safetensors
    SNAP/v00000001/recorded.safetensors   a few requests and the trainer's scores of them

A version is built beside its place and renamed into it. Loading checks every digest, then every tensor's
name, type and shape against the config, and replays the recorded requests on demand.
"""

from __future__ import annotations

import json
import re
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from embeddings.collections import weight_name
from embeddings.errors import ConfigError, DataError, SnapshotError
from embeddings.groups import TableGroup, TableSpec
from embeddings.plain import PlainBagCollection
from trainer.assemble import build_model, count_numbers
from trainer.config import Config
from trainer.data.batch import RequestBatch
from trainer.data.schema import FeatureInfo
from trainer.durable import file_digest, sync, write_text
from trainer.model.two_stage import Prediction, TwoStageModel
from trainer.recorded import pack, unpack
from trainer.settings import Settings

_VERSION_NAME = re.compile(r"v\d{8}$")
_MANIFEST, _DIGEST, _LATEST = "manifest.json", "manifest.sha256", "LATEST"
_LARGEST_MANIFEST = 16 << 20


class SnapshotFile(Settings):
    """Size and digest of one file, path relative to the version's folder."""

    path: str = Field(pattern=r"^[A-Za-z0-9_-]+(/[A-Za-z0-9_-]+)?\.safetensors$")
    bytes: int = Field(ge=0)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class SnapshotTable(Settings):
    """One table of a group."""

    feature: str
    rows: int = Field(ge=1)
    dim: int = Field(ge=1)


class SnapshotManifest(Settings):
    """What a version holds. `step` counts training steps; `score_bound` is the promised parity."""

    format: Literal["tandemrec.snapshot"] = "tandemrec.snapshot"
    version: Literal[1] = 1
    step: int = Field(ge=0)
    dtype: Literal["fp32"] = "fp32"
    score_bound: float = Field(ge=0, le=0.01)
    tasks: tuple[str, ...]
    numeric: tuple[str, ...]
    features: dict[str, int]
    vocabularies: dict[str, str]
    recorded_features: tuple[str, ...]
    recorded_context: tuple[str, ...]
    groups: dict[str, tuple[SnapshotTable, ...]]
    config: Config
    files: tuple[SnapshotFile, ...]
    versions: dict[str, str]


@dataclass(frozen=True)
class Snapshot:
    """A loaded version: the model in eval mode over plain, memory-mapped tables."""

    path: Path
    manifest: SnapshotManifest
    model: TwoStageModel
    recorded: tuple[RequestBatch, Tensor]

    @torch.no_grad()
    def score(self, batch: RequestBatch) -> Tensor:
        """Probabilities, float32 [C, T]."""
        prediction: Prediction = self.model(batch)
        return prediction.logits.sigmoid()

    def numeric_names(self) -> list[str]:
        """What the columns of `RequestBatch.numeric` must be."""
        return [*self.manifest.numeric, *self.manifest.config.data.search.count_names]

    def digest(self) -> str:
        """SHA-256 of the manifest, which holds those of all files."""
        return file_digest(self.path / _MANIFEST)

    def check_vocabularies(self, known: Mapping[str, FeatureInfo], log: Path) -> None:
        """The same ids must stand for the same things in a log and in training.

        Raises:
            DataError: the log lacks a feature, or its ids are of another vocabulary.
        """
        for feature, expected in self.manifest.vocabularies.items():
            if feature not in known:
                raise DataError(f"lacks the feature {feature!r} that the snapshot needs", file=log)
            found = known[feature].vocabulary
            if expected and found and found != expected:
                raise DataError(
                    f"its ids of {feature!r} are of another vocabulary than the snapshot's, so they would "
                    "mean nothing to it; ingest with `--vocabulary` and the log it was trained on",
                    file=log,
                )

    def self_check(self) -> float:
        """Largest difference to the trainer's scores on the recorded requests.

        Raises:
            SnapshotError: the difference exceeds the manifest's bound.
        """
        batch, expected = self.recorded
        try:
            found = self.score(batch)
        except (RuntimeError, IndexError, ValueError, KeyError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise SnapshotError(self.path, f"cannot score its recorded requests: {reason}") from None
        if found.shape != expected.shape:
            raise SnapshotError(self.path, "scores of the recorded requests have another shape")
        worst = float((found - expected).abs().max())
        if not worst <= self.manifest.score_bound:
            raise SnapshotError(
                self.path,
                f"scores of the recorded requests differ by {worst:.3g}, the bound is "
                f"{self.manifest.score_bound:.3g}; export again on this version of the software",
            )
        return worst


def publish(
    root: Path,
    config: Config,
    groups: Mapping[str, TableGroup],
    weights: Mapping[str, Tensor],
    recorded: tuple[RequestBatch, Tensor],
    facts: Mapping[str, Any],
) -> Path:
    """Write the next version under `root` and point LATEST at it.

    Args:
        config: the run's config; groups: its resolved table groups.
        weights: state dict of the unsharded model (tables and dense part).
        recorded: a batch and the trainer's probabilities for it, float32 [C, T].
        facts: `step`, `tasks`, `numeric`, `vocabularies`, `score_bound`, `versions` of the manifest.

    Raises:
        SnapshotError: it cannot be written; versions already published stay as they are.
    """
    part = root / f".tmp-{uuid.uuid4().hex[:8]}"
    final = root / f"v{_next_version(root):08d}"
    try:
        (part / "tables").mkdir(parents=True)
        _write_tensors(part, groups, weights, recorded)
        manifest = _describe(part, config, groups, recorded[0], facts)
        (part / _MANIFEST).write_text(manifest.model_dump_json(indent=1), encoding="utf-8")
        (part / _DIGEST).write_text(file_digest(part / _MANIFEST) + "\n", encoding="utf-8")
        for file in part.rglob("*"):
            sync(file)
        part.rename(final)
        write_text(root / _LATEST, final.name + "\n")
        sync(root)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(part, ignore_errors=True)
        raise SnapshotError(root, f"cannot be written: {error}") from None
    return final


def _describe(
    part: Path,
    config: Config,
    groups: Mapping[str, TableGroup],
    batch: RequestBatch,
    facts: Mapping[str, Any],
) -> SnapshotManifest:
    """The manifest of the tensors that lie in `part`."""
    files = tuple(
        SnapshotFile(path=str(f.relative_to(part)), bytes=f.stat().st_size, sha256=file_digest(f))
        for f in sorted(part.rglob("*.safetensors"))
    )
    tables = {name: tuple(SnapshotTable(**asdict(t)) for t in group.tables) for name, group in groups.items()}
    return SnapshotManifest(
        config=config,
        groups=tables,
        features={t.feature: t.rows for group in groups.values() for t in group.tables},
        recorded_features=tuple(batch.features.keys()),
        recorded_context=tuple(batch.context.keys()) if batch.context is not None else (),
        files=files,
        **facts,
    )


def resolve(path: Path) -> Path:
    """A version's folder, or the newest version of a folder of versions."""
    if (path / _MANIFEST).is_file():
        return path
    try:
        name = (path / _LATEST).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        raise SnapshotError(
            path, "no snapshot here (neither manifest.json nor LATEST); run `tandemrec export`"
        ) from None
    if not _VERSION_NAME.fullmatch(name):
        raise SnapshotError(path / _LATEST, f"names {name!r}, which is no version")
    return path / name


def load_snapshot(path: Path) -> Snapshot:
    """Verify and load a snapshot (a version's folder, or the folder of versions).

    Raises:
        SnapshotError: anything missing, changed, malformed or inconsistent, naming the file.
    """
    path = resolve(path)
    manifest = _read_manifest(path)
    for entry in manifest.files:
        _check_file(path, entry)
    _check_groups(path, manifest)
    groups = {name: _group(path, name, manifest) for name in manifest.groups}
    names = {entry.path for entry in manifest.files}
    collections = {}
    for name, group in groups.items():
        tables = _tensors(path, f"tables/{name}.safetensors", names)
        for table in group.tables:
            _expect(path, name, tables.get(group.table_name(table.feature)), (table.rows, table.dim))
        collections[name] = PlainBagCollection(group, tables)
    try:
        numbers = count_numbers(manifest.config, manifest.numeric)
        # Sizes in the config cost nothing until the tensors turn out to have them.
        with torch.device("meta"):
            model = build_model(manifest.config, groups, collections, len(manifest.tasks), numbers)
        # Copies, because a matrix product over a mapped file's unaligned memory rounds differently.
        dense = {name: tensor.clone() for name, tensor in _tensors(path, "dense.safetensors", names).items()}
        model.load_state_dict(dense, assign=True)
    except (RuntimeError, KeyError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise SnapshotError(path / "dense.safetensors", f"does not fit the config: {reason}") from None
    keys = (manifest.recorded_features, manifest.recorded_context)
    recorded = unpack(path, _tensors(path, "recorded.safetensors", names), keys)
    problem = recorded[0].problem(manifest.features, manifest.config.data.history_length)
    if problem:
        raise SnapshotError(path / "recorded.safetensors", problem)
    return Snapshot(path, manifest, model.eval(), recorded)


def _group(path: Path, name: str, manifest: SnapshotManifest) -> TableGroup:
    tables = tuple(TableSpec(t.feature, t.rows, t.dim) for t in manifest.groups[name])
    try:
        return TableGroup(name, tables, fusion=manifest.config.groups[name].fusion)
    except ConfigError as error:
        raise SnapshotError(path / _MANIFEST, str(error)) from None


def _check_groups(path: Path, manifest: SnapshotManifest) -> None:
    """The tables named must be those that the config's roles use, and the id bounds those of the tables."""
    if set(manifest.groups) != manifest.config.model.roles.used():
        raise SnapshotError(path / _MANIFEST, "its groups are not those of its config")
    rows: dict[str, int] = {}
    for tables in manifest.groups.values():
        for table in tables:
            if rows.setdefault(table.feature, table.rows) != table.rows:
                raise SnapshotError(path / _MANIFEST, f"tables of {table.feature!r} differ in rows")
    if rows != manifest.features:
        raise SnapshotError(path / _MANIFEST, "its features are not those of its tables")


def _next_version(root: Path) -> int:
    taken = [int(p.name[1:]) for p in root.glob("v*") if _VERSION_NAME.fullmatch(p.name)]
    return max(taken, default=0) + 1


def _write_tensors(
    part: Path,
    groups: Mapping[str, TableGroup],
    weights: Mapping[str, Tensor],
    recorded: tuple[RequestBatch, Tensor],
) -> None:
    for name, group in groups.items():
        tables = {
            group.table_name(feature): weights[
                f"collections.{name}.{weight_name(group, feature)}"
            ].contiguous()
            for feature in group.features
        }
        save_file(tables, part / "tables" / f"{name}.safetensors")
    dense = {k: v.contiguous() for k, v in weights.items() if not k.startswith("collections.")}
    save_file(dense, part / "dense.safetensors")
    batch, scores = recorded
    save_file({**pack(batch), "scores": scores.contiguous()}, part / "recorded.safetensors")


def _read_manifest(path: Path) -> SnapshotManifest:
    file = path / _MANIFEST
    try:
        for name, limit in ((_MANIFEST, _LARGEST_MANIFEST), (_DIGEST, 128)):
            if (path / name).is_symlink() or (path / name).stat().st_size > limit:
                raise SnapshotError(path / name, f"larger than {limit:,} bytes, or no plain file")
        if file_digest(file) != (path / _DIGEST).read_text(encoding="utf-8").strip():
            raise SnapshotError(file, f"does not match {_DIGEST}; it is corrupt, take another copy")
        tree = json.loads(
            file.read_text(encoding="utf-8"), object_pairs_hook=_no_duplicates, parse_constant=_no_constant
        )
        return SnapshotManifest.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise SnapshotError(file, f"{place}: {first['msg']}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise SnapshotError(file, f"unreadable: {error}") from None


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree = dict(pairs)
    if len(tree) != len(pairs):
        raise ValueError("a key occurs twice")
    return tree


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is no JSON number")


def _check_file(path: Path, entry: SnapshotFile) -> None:
    file = path / entry.path
    if file.is_symlink() or file.parent.is_symlink() or not file.is_file():
        raise SnapshotError(file, "missing, or not a plain file")
    if file.stat().st_size != entry.bytes or file_digest(file) != entry.sha256:
        raise SnapshotError(file, "does not match the manifest; it is corrupt, take another copy")


def _tensors(path: Path, name: str, listed: set[str]) -> dict[str, Tensor]:
    if name not in listed:
        raise SnapshotError(path / name, "not listed in the manifest")
    try:
        tensors: dict[str, Tensor] = load_file(path / name)
    except (SafetensorError, OSError, ValueError) as error:
        raise SnapshotError(path / name, f"unreadable: {error}") from None
    return tensors


def _expect(path: Path, group: str, table: Tensor | None, shape: tuple[int, int]) -> None:
    file = path / "tables" / f"{group}.safetensors"
    if table is None:
        raise SnapshotError(file, "lacks a table that the manifest names")
    if table.dtype != torch.float32 or tuple(table.shape) != shape:
        raise SnapshotError(file, f"holds {table.dtype} {list(table.shape)}, expected float32 {list(shape)}")
