"""What a version of a snapshot says of itself."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Literal

from pydantic import Field, model_validator

from embeddings.errors import SnapshotError
from embeddings.groups import TableName
from embeddings.lookup.stored import Dtype
from trainer.config.tables import GroupName
from trainer.config.toml import Settings
from trainer.data.similarity.encoding import similarity_features
from trainer.log.encoders.table import AnyEncoder
from trainer.run_config import Config
from trainer.sealed_folder import Seal
from trainer.snapshot.uncertainty import Uncertainty
from trainer.snapshot.vector_entries import SnapshotVectors

VERSION_NAME = re.compile(r"v\d{8}")
LATEST = "LATEST"
SEAL = Seal(SnapshotError, "take another copy")
DENSE, RECORDED = "dense.safetensors", "recorded.safetensors"
UNCERTAINTY = "uncertainty.safetensors"
# Tensor of the recorded requests: probabilities by the snapshot itself, when it was exported.
OWN = "own_scores"
_Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class SnapshotFile(Settings):
    """Size and digest of one file, path relative to the version's folder."""

    path: str = Field(pattern=r"^[a-z0-9_]+(/[a-z0-9_]+(\.[a-z0-9_]+)*)?\.safetensors$", max_length=200)
    bytes: int = Field(ge=0)
    sha256: _Sha256


class CodeFile(Settings):
    """The same of a file that holds machine code: nothing here ever opens it but to check its digest."""

    path: str = Field(pattern=r"^code/[a-z0-9_]+\.pt2$", max_length=200)
    bytes: int = Field(ge=0)
    sha256: _Sha256
    describes: str


class StoredRows(Settings):
    """A matrix of `rows` vectors of `dim` numbers, and how a version holds it.

    Attributes:
        dtype: how numbers are stored, see `embeddings.lookup.stored`.
        base_rows: None where the version holds all rows; else it holds those that are new or different from
            the base's matrix, which has so many rows. Rows from `rows` to `base_rows` are gone.
        changed: how many rows a delta holds.
    """

    rows: int = Field(ge=1, lt=2**48)
    dim: int = Field(ge=1, le=65_536)
    dtype: Dtype
    base_rows: int | None = Field(None, ge=1, lt=2**48)
    changed: int | None = Field(None, ge=0, lt=2**48)

    @property
    def held(self) -> int:
        """Rows in the file."""
        return self.rows if self.changed is None else self.changed

    @model_validator(mode="after")
    def _delta_or_not(self) -> StoredRows:
        if (self.base_rows is None) != (self.changed is None):
            raise ValueError("base_rows and changed go together")
        return self


class SnapshotTable(StoredRows):
    """One table of a group; `set` is empty unless the group has several of them."""

    feature: str
    set: str = Field("", pattern=r"^[a-z0-9_]*$", max_length=200)


class SearchTable(StoredRows):
    """One feature's part of the vectors that stage one compares.

    Attributes:
        table: stem of the table whose rows these are, just as they are; empty where a matrix of its own, in
            the branch's files, holds them.
    """

    feature: str
    side: Literal["key", "query"]
    table: str = Field("", pattern=r"^(tables/[a-z0-9_]+\.[0-9]+)?$", max_length=200)


class SearchPart(Settings):
    """What a retrieval service needs of a branch's search; see docs/snapshots.md for the formula.

    Attributes:
        reason: why there is none; then everything else is empty.
        combine: whether a vector is the features' parts side by side (`concat`), or their `sum`.
        heads: the vector is cut into so many equal parts, one dot product each.
        scale: what a dot product is multiplied by.
        tables: `key` parts by feature; `query` parts too where they are not the same.
    """

    reason: str = ""
    combine: Literal["concat", "sum"] = "concat"
    heads: int = Field(1, ge=1)
    scale: float = Field(1.0, gt=0)
    tables: tuple[SearchTable, ...] = ()


class SnapshotIds(Settings):
    """Which raw ids have a row of a feature's tables, where ids come and go, and how a version holds that.

    Attributes:
        capacity, shared_rows: see `embeddings.ids.rules.IdRules`; live: ids that have a row.
        raw, hashed: whether the log's ids are any integers, and whether these are hashes of text.
        base_live: None where the version holds all ids; else it holds what differs from the base, which has
            so many. set: ids that have a row now, or another one; gone: ids that have none any more.
    """

    capacity: int = Field(ge=1, lt=2**48)
    shared_rows: int = Field(ge=1, lt=2**48)
    live: int = Field(ge=0, lt=2**48)
    raw: bool = False
    hashed: bool = False
    base_live: int | None = Field(None, ge=0, lt=2**48)
    set: int | None = Field(None, ge=0, lt=2**48)
    gone: int | None = Field(None, ge=0, lt=2**48)

    @property
    def held(self) -> tuple[int, int]:
        """Ids with a row in the file, and ids without."""
        return (self.live, 0) if self.set is None or self.gone is None else (self.set, self.gone)

    @property
    def size(self) -> int:
        """Bytes of the numbers in the file."""
        return 16 * self.held[0] + 8 * self.held[1]

    @model_validator(mode="after")
    def _delta_or_not(self) -> SnapshotIds:
        if len({self.base_live is None, self.set is None, self.gone is None}) > 1:
            raise ValueError("base_live, set and gone go together")
        if self.live > self.capacity:
            raise ValueError("more ids have a row than there is capacity for")
        return self


class VocabularyFile(Settings):
    """The values that a feature's ids stand for, value and id, as the log has them."""

    feature: str
    path: str = Field(pattern=r"^vocab/[0-9]+\.parquet$", max_length=200)
    bytes: int = Field(ge=0)
    sha256: _Sha256


ListedFile = SnapshotFile | CodeFile | VocabularyFile


class InputFeature(Settings):
    """What carries a feature: behaviors, candidates, `both`, or the request (`context`).

    Attributes:
        multi: a list of ids, possibly empty, instead of one.
        encoder: what makes ids of it, if it is a number; tables then have the encoder's parts.
    """

    side: Literal["both", "history", "candidate", "context"]
    multi: bool
    encoder: AnyEncoder | None = Field(None, exclude_if=lambda encoder: encoder is None)

    @property
    def of_behaviors(self) -> bool:
        return self.side in ("both", "history")

    @property
    def of_candidates(self) -> bool:
        return self.side in ("both", "candidate")


class BaseVersion(Settings):
    """The version that a delta builds on: its number and the digest of its manifest."""

    number: int = Field(ge=1, lt=10**8)
    sha256: _Sha256


class SnapshotManifest(Settings):
    """What a version holds. `step` counts training steps.

    Attributes:
        score_bound, mean_bound: the promised parity with the trainer: largest and mean absolute difference of
            probabilities.
        features: rows of each feature's tables; inputs: what carries the features that a request must have,
            those without a table included that a hard search compares.
        recorded_features, recorded_context: features of tables in the order of the recorded requests, which
            hold numbers as their encoders' parts.
        checkpoint: digest of the manifest of the checkpoint that this was made of; empty: not known.
        weights: whether the dense part is that of the step, or its average over the phase.
        vocabularies: feature -> digest of the values that its ids stand for; vocabulary_files: these values.
        ids: the map of each feature whose ids come and go, `<feature>@<group>` where a group has a capacity
            of its own. Software from before there were such features refuses a manifest that has it.
        vectors: pre-trained ones, by their name in the config; the same holds for it.
        uncertainty: where the version can say how sure it is of a logit. Earlier software refuses that, too.
        exported_at: when it was published, in seconds since 1970; versions of earlier software do not say it,
            and earlier software refuses a manifest that does.
    """

    format: Literal["tandemrec.snapshot"] = "tandemrec.snapshot"
    version: Literal[3] = 3
    number: int = Field(ge=1, lt=10**8)
    base: BaseVersion | None = None
    exported_at: int | None = Field(None, ge=0, lt=2**40, exclude_if=lambda given: given is None)
    step: int = Field(ge=0)
    weights: Literal["raw", "averaged"] = "raw"
    checkpoint: str = Field("", pattern=r"^([0-9a-f]{64})?$")
    score_bound: float = Field(ge=0, le=0.2)
    mean_bound: float = Field(ge=0, le=0.01)
    tasks: tuple[str, ...]
    numeric: tuple[str, ...]
    features: dict[str, int]
    inputs: dict[str, InputFeature]
    vocabularies: dict[str, str]
    recorded_features: tuple[str, ...]
    recorded_context: tuple[str, ...]
    groups: dict[GroupName, tuple[SnapshotTable, ...]]
    search: dict[GroupName, SearchPart]
    ids: dict[str, SnapshotIds] = Field(default_factory=dict, exclude_if=lambda ids: not ids)
    vectors: dict[str, SnapshotVectors] = Field(default_factory=dict, exclude_if=lambda vectors: not vectors)
    uncertainty: Uncertainty | None = Field(None, exclude_if=lambda given: given is None)
    config: Config
    files: tuple[SnapshotFile, ...]
    code: tuple[CodeFile, ...] = ()
    vocabulary_files: tuple[VocabularyFile, ...] = ()
    versions: dict[str, str]

    @property
    def table_inputs(self) -> dict[str, InputFeature]:
        """`inputs` as recorded requests have them: similarities too, and numbers as their encoders' parts."""
        found = {}
        for name, given in self.inputs.items():
            most = {name: 1} if given.encoder is None else given.encoder.most_ids(name)
            for part, ids in most.items():
                many = given.multi if given.encoder is None else ids > 1
                found[part] = InputFeature(side=given.side, multi=many)
        for part, info in similarity_features(self.config.data).items():
            found[part] = InputFeature(side="candidate", multi=info.multi)
        return found

    def matrices(self) -> Iterator[tuple[str, str, StoredRows]]:
        """Every matrix that has files, as (their stem, name of its tensor, description)."""
        for group, tables in self.groups.items():
            for place, table in enumerate(tables):
                name = TableName(group, table.set, table.feature)
                yield table_stem(group, place), str(name), table
        for branch, part in self.search.items():
            for place, entry in enumerate(part.tables):
                if not entry.table:
                    yield search_stem(branch, place), f"{entry.side}__{entry.feature}", entry

    def id_maps(self) -> Iterator[tuple[str, str, SnapshotIds]]:
        """Every map of ids, as (its file, its name, description)."""
        for place, (name, entry) in enumerate(self.ids.items()):
            yield ids_path(place), name, entry

    @property
    def tombstones(self) -> int:
        """Ids that had a row in the base and have none here."""
        return sum(entry.gone or 0 for name, entry in self.ids.items() if "@" not in name)

    def listed(self) -> dict[str, ListedFile]:
        entries: tuple[ListedFile, ...] = (*self.files, *self.code, *self.vocabulary_files)
        return {entry.path: entry for entry in entries}


def names_of_inputs(recorded: Sequence[str], inputs: Mapping[str, InputFeature]) -> tuple[str, ...]:
    """The inputs that recorded features are of, in that order."""
    numbers = {name: given.encoder for name, given in inputs.items() if given.encoder is not None}
    of_part = {part: name for name, encoder in numbers.items() for part in encoder.parts(name)}
    found = dict.fromkeys(of_part.get(name, name) for name in recorded)
    # A similarity is none of them.
    return tuple(name for name in found if name in inputs)


def table_stem(group: str, place: int) -> str:
    """Where a group's table number `place` lies; features may have any names, files not."""
    return f"tables/{group}.{place}"


def ids_path(place: int) -> str:
    """Where map number `place` lies."""
    return f"ids/{place}.safetensors"


def search_stem(branch: str, place: int) -> str:
    return f"search/{branch}.{place}"
