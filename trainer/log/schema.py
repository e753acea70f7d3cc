"""The sequence log: one Parquet row is a user block, one `manifest.json` describes the whole.

    <log>/manifest.json             LogManifest, below
    <log>/manifest.sha256           digest of manifest.json itself
    <log>/<split>/part-00000.parquet  rows of `schema_of`
    <log>/vocab/<feature>.parquet   value, id, count (what the dense ids stand for)

A block is one user's history and the requests made against it, so that the long history is stored
once however many requests refer to it.
"""

from __future__ import annotations

import glob
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal

import pyarrow as pa
from pydantic import Field, ValidationError, model_validator

from embeddings.errors import ConfigError, DataError
from trainer.config.mistakes import problems_of, words_of
from trainer.config.toml import Settings
from trainer.log.clusters import ClusterInfo
from trainer.log.encoders.table import AnyEncoder
from trainer.log.names import FileName, path_problem
from trainer.sealed_folder import DIGEST, MANIFEST, Seal
from trainer.storage import is_remote

# The bound of raw ids, which may be any 64-bit integers.
ANY_ID: Final = 1 << 64
FORMAT: Final = "tandemrec.sequence-log"
VERSION: Final = 1
VOCABULARIES = "vocab"
SEAL = Seal(lambda path, problem: DataError(problem, file=path), "ingest the events again")
CLUSTER_COLUMNS = ("cluster_size", "cluster_time")
Side = Literal["both", "history", "candidate"]
REQUEST_COLUMNS = ("id", "timestamp", "history_end", "num_candidates")


class FeatureInfo(Settings):
    """A feature of ids, or of numbers that an encoder makes ids of."""

    rows: int = Field(ge=1)
    """The largest id + 1: the rows that an embedding table needs. Id 0 is unknown. 1 where ids are raw, and
    of numbers."""
    raw: bool = False
    """Whether ids are any 64-bit integers, such as hashes, instead of dense ones. A model needs
    [ids.<feature>] for it."""
    hashed: bool = False
    """Whether raw ids are hashes of text, see `trainer.log.hashed_ids`."""
    vocabulary: str = ""
    """SHA-256 of the values that the ids stand for, in order; empty if there are none."""
    multi: bool = False
    """Whether a behavior or candidate has a list of ids (possibly empty) instead of one."""
    side: Side = "both"
    """What carries it: `both` behaviors and candidates, only `history` (a behavior's type, say) or only
    `candidate`. Where it is missing its bag is empty, so its vector is zero."""
    encoder: AnyEncoder | None = Field(None, exclude_if=lambda encoder: encoder is None)
    """What makes ids of numbers. Then the log holds codes of numbers, see `trainer.log.encoders.code`, and a
    model has tables of the encoder's parts instead of one of the feature itself (`table_features`)."""

    @model_validator(mode="after")
    def _numbers_are_no_ids(self) -> FeatureInfo:
        if self.encoder is not None and (self.raw or self.multi or self.rows != 1 or self.vocabulary):
            raise ValueError("a feature with an encoder has numbers, one each, and neither ids nor values")
        if self.encoder is not None and not self.encoder.gives_ids:
            raise ValueError(f'encoder "{self.encoder.kind}" gives no ids; the log keeps it in `numeric`')
        return self

    @property
    def bound(self) -> int:
        """Ids, or codes of numbers, lie below it."""
        return ANY_ID if self.raw or self.encoder is not None else self.rows

    @property
    def of_behaviors(self) -> bool:
        return self.side != "candidate"

    @property
    def of_candidates(self) -> bool:
        return self.side != "history"


class TableFeature(FeatureInfo):
    """A feature as tables have it: of ids, or one part of an encoded number."""

    field: str = ""
    """The feature of the log that it is a part of; empty: it is one itself."""
    most_ids: int = 1
    """The most ids of a bag; of a multi-valued feature of the log, nobody knows it."""
    meaning: str = ""
    """What the ids of a part stand for; see `vocabulary` of those of the log."""


def table_features(infos: Mapping[str, FeatureInfo]) -> dict[str, TableFeature]:
    """The features that tables have, of those that a log has: an encoded number becomes its parts."""
    found: dict[str, TableFeature] = {}
    for name, info in infos.items():
        if info.encoder is None:
            found[name] = TableFeature(**dict(info))
            continue
        most, meanings = info.encoder.most_ids(name), info.encoder.meanings(name)
        for part, rows in info.encoder.parts(name).items():
            many, meaning = most[part], meanings[part]
            found[part] = TableFeature(
                rows=rows, multi=many > 1, side=info.side, field=name, most_ids=many, meaning=meaning
            )
    return found


def part_clash(infos: Mapping[str, FeatureInfo]) -> str:
    """Which part of an encoded number has the name of another feature; empty if none has."""
    taken = set(infos)
    for name, info in infos.items():
        for part in () if info.encoder is None else info.encoder.parts(name):
            if part != name and part in taken:
                return f"the encoder of {name!r} has a part {part!r}, which is another feature; rename one"
            taken.add(part)
    return ""


class FileInfo(Settings):
    """One Parquet file; `path` is relative to the log, `bytes` and `sha256` are of the whole file."""

    path: str
    rows: int = Field(ge=1)
    bytes: int = Field(ge=1)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    row_groups: int = Field(default=0, ge=0)
    """A log that was made before these were counted has 0, and its readers open each file to count them."""

    @model_validator(mode="after")
    def _stays_inside(self) -> FileInfo:
        # A log may come from anywhere: its manifest must not make a reader open files outside of it.
        if problem := path_problem(self.path, "the log's folder"):
            raise ValueError(f"path {self.path!r} {problem}")
        return self


class LabelInfo(Settings):
    """How many candidates of a split have a label, and of how many it is >= 0.5."""

    observed: int = Field(ge=0)
    positives: int = Field(ge=0)


class SplitInfo(Settings):
    """The files of one split and their totals; `positives` counts candidates whose first label is >= 0.5."""

    files: list[FileInfo]
    rows: int = Field(ge=0)
    requests: int = Field(ge=0)
    candidates: int = Field(ge=0)
    positives: int = Field(ge=0)
    behaviors: int = Field(ge=0)
    labels: dict[str, LabelInfo] = Field(default_factory=dict)
    """Of each label; a log that was made before these were counted has none."""


class ColumnInfo(Settings):
    """What ingest understood of a column of the raw tables."""

    table: str
    setting: str
    """The setting that names the column."""
    column: str
    found: str
    """The types that the column has in the files."""
    read_as: str
    """What the values were taken for."""
    note: str = ""
    """Why they were taken for that, or what of them was lost."""


class LogManifest(Settings):
    """What a sequence log holds and how it was made."""

    format: Literal["tandemrec.sequence-log"] = FORMAT
    version: Literal[1] = VERSION
    features: dict[FileName, FeatureInfo]
    """The features of behaviors and candidates."""
    context: dict[FileName, FeatureInfo] = Field(default_factory=dict)
    """The features of a request, those of its user included."""
    numeric: list[str] = Field(default_factory=list)
    """The numbers that a candidate has."""
    weighted: bool = False
    """Whether a candidate has a sample weight."""
    clusters: ClusterInfo | None = None
    """How histories were clustered, if they were (`tandemrec cluster`)."""
    tasks: list[str]
    """The labels that a candidate has."""
    partial: list[str] = Field(default_factory=list)
    """The labels that only a part of the candidates has: where one was not observed it is null (NaN means the
    same). The other labels are never null."""
    label_weights: list[str] = Field(default_factory=list)
    """The labels with a sample weight of their own, which counts beside the weight of the candidate."""
    taxonomy: list[str]
    """The features that classify items, from coarse to fine."""
    named: dict[str, FeatureInfo] = Field(default_factory=dict)
    """Users and requests that the raw tables name with text: their numbers are ids of `vocab/user_id.parquet`
    and `vocab/request_id.parquet`."""
    columns: list[ColumnInfo] = Field(default_factory=list)
    """How ingest read the columns of the raw tables."""
    notes: list[str] = Field(default_factory=list)
    """What else ingest noticed in the raw tables."""
    splits: dict[FileName, SplitInfo]
    ingest: dict[str, Any]
    """The settings of the ingest, or of whatever else made the log."""
    report: dict[str, Any]
    """What the ingest read, wrote and left out."""

    @property
    def table_features(self) -> dict[str, TableFeature]:
        """The features of behaviors and candidates that tables have."""
        return table_features(self.features)

    @property
    def table_context(self) -> dict[str, TableFeature]:
        """The features of requests that tables have."""
        return table_features(self.context)

    def holds(self, split: str) -> bool:
        """Whether the log has any request in a split."""
        return split in self.splits and bool(self.splits[split].files)

    def require(self, split: str) -> None:
        """Raises ConfigError where the log has no request in a split."""
        if not self.holds(split):
            full = ", ".join(name for name in self.splits if self.holds(name)) or "no split"
            raise ConfigError(
                f"--split {split}: the log has requests in {full}; [split] of its ingest config decides"
            )

    @model_validator(mode="after")
    def _check_together(self) -> LogManifest:
        unknown = [name for name in self.taxonomy if name not in self.features]
        if unknown:
            raise ValueError(f"taxonomy names features that the log does not have: {', '.join(unknown)}")
        if clash := part_clash({**self.features, **self.context}):
            raise ValueError(clash)
        for field, names in (("partial", self.partial), ("label_weights", self.label_weights)):
            if unknown := [name for name in names if name not in self.tasks]:
                raise ValueError(f"{field} names labels that the log does not have: {', '.join(unknown)}")
        # Each split has a folder of its own.
        taken = [name for name in self.splits if name in (VOCABULARIES, MANIFEST, DIGEST)]
        if taken:
            raise ValueError(f"a split is called {taken[0]!r}, which is something else in a log")
        return self


def _load_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        problem = "no such file, so this is not a sequence log; write one with `tandemrec ingest`"
        raise DataError(_left_behind(path.parent.resolve()) or problem, file=path) from error
    except NotADirectoryError as error:
        problem = "is a file, and a sequence log is a folder; name the one that `tandemrec ingest` wrote"
        raise DataError(problem, file=path.parent) from error
    except (OSError, ValueError, RecursionError) as error:
        if is_remote(path) and isinstance(error, OSError):
            raise DataError(f"cannot be read: {error.strerror or error}", file=path) from None
        problem = f"not readable as JSON ({error}); run `tandemrec ingest` again"
        raise DataError(problem, file=path) from error


def moved_away(staging: Path) -> Path:
    """Where a log waits while the one in `staging` takes its place (`trainer.log.writer`)."""
    return staging.with_name(f"{staging.name}-old")


def _left_behind(log: Path) -> str:
    """What to do about a log that an overwrite, killed on its way, had moved away; empty if there is none."""
    if is_remote(log):
        return ""
    found = sorted(log.parent.glob(f"{glob.escape(log.name)}.tmp-*-old/{MANIFEST}")) if log.name else []
    if not found or log.exists():
        return ""
    old = found[0].parent
    return (
        f"missing: whoever was replacing this log was killed, or is about to finish; the older log is {old}: "
        "ingest again (which restores it first), or rename it back"
    )


def read_manifest(log: Path) -> LogManifest:
    """Reads and checks `<log>/manifest.json`.

    Raises:
        DataError: it is missing, not JSON, of another format or version, or has wrong fields.
    """
    path = log / MANIFEST
    raw = _load_json(path)
    SEAL.read(path.parent)
    found = raw.get("format") if isinstance(raw, dict) else None
    if found != FORMAT:
        problem = f"format is {found!r}, expected {FORMAT!r}; name the folder that `tandemrec ingest` wrote"
        raise DataError(problem, file=path)
    version = raw.get("version")
    if version != VERSION:
        problem = f"version {version!r} is unknown, only {VERSION} is read; ingest the events again"
        raise DataError(problem, file=path)
    try:
        return LogManifest.model_validate(raw)
    except ValidationError as error:
        first = problems_of(LogManifest, raw)[0]
        place = ".".join(str(part) for part in first["loc"])
        problem = f"{place or 'manifest'}: {words_of(first)}; ingest the events again"
        raise DataError(problem, file=path) from error


def is_sequence_log(path: Path) -> bool:
    """Whether `path` is a sequence log of any version: only such a folder may ever be replaced."""
    try:
        raw = _load_json(path / MANIFEST)
    except DataError:
        return False
    return isinstance(raw, dict) and raw.get("format") == FORMAT


def _list_of(item: pa.DataType, nullable: bool = False) -> pa.DataType:
    return pa.list_(pa.field("element", item, nullable=nullable))


def schema_of(manifest: LogManifest) -> pa.Schema:
    """The columns of a user block with N behaviors, R requests and C_r candidates in request r.

    Lists `history_*` have N items (oldest first, timestamps in unix seconds), `request_*` and `context_*`
    have R (by time); `candidate_*`, `numeric_*`, `label_*`, `weight` and `weight_*` are R lists of C_r items.
    Where a feature is multi-valued an item is itself a list of ids. Request r sees `history[:end_r]`, end_r =
    `request_history_end[r]`. `cluster_*` have N items where histories are clustered. `num_*` and
    `request_num_candidates` repeat lengths, so that a reader can plan without decoding the ids. Only the
    items of partial labels are nullable.
    """

    def ids(info: FeatureInfo) -> pa.DataType:
        return _list_of(_list_of(pa.int64()) if info.multi else pa.int64())

    features, requests = manifest.features, _list_of(pa.int64())
    floats, known_or_null = (_list_of(_list_of(pa.float32(), nullable)) for nullable in (False, True))
    columns: list[tuple[str, pa.DataType]] = [("user_id", pa.int64())]
    columns += [(f"history_{name}", ids(info)) for name, info in features.items() if info.of_behaviors]
    columns += [("history_timestamp", _list_of(pa.int64()))]
    columns += [(name, _list_of(pa.int64())) for name in CLUSTER_COLUMNS] if manifest.clusters else []
    columns += [(f"request_{name}", requests) for name in REQUEST_COLUMNS]
    columns += [(f"context_{name}", ids(info)) for name, info in manifest.context.items()]
    columns += [
        (f"candidate_{name}", _list_of(ids(info))) for name, info in features.items() if info.of_candidates
    ]
    columns += [(f"numeric_{name}", floats) for name in manifest.numeric]
    columns += [
        (f"label_{task}", known_or_null if task in manifest.partial else floats) for task in manifest.tasks
    ]
    columns += [("weight", floats)] if manifest.weighted else []
    columns += [(f"weight_{task}", floats) for task in manifest.label_weights]
    columns += [(name, pa.int64()) for name in ("num_behaviors", "num_requests", "num_candidates")]
    return pa.schema([pa.field(name, kind, nullable=False) for name, kind in columns])
