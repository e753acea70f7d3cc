"""A version of a snapshot, verified before anything of it is used, as a model over memory-mapped tables."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from embeddings.errors import ConfigError, DataError, SnapshotError
from embeddings.groups import TableGroup, TableSpec
from embeddings.lookup.plain import PlainBagCollection
from embeddings.lookup.stored import StoredTable
from trainer.assemble import build_model, count_numbers
from trainer.config.sets import sets_of
from trainer.config.tasks import Task, named_tasks
from trainer.data.batch import RequestBatch
from trainer.data.batch_file import unpack
from trainer.data.living_ids import looked_up
from trainer.data.similarity.vectors import Vectors
from trainer.log.schema import ANY_ID, FeatureInfo
from trainer.model.frame import Prediction, TwoStageModel
from trainer.model.heads.last_layer import watched
from trainer.model.windows import Selection
from trainer.sealed_folder import MANIFEST, file_digest
from trainer.snapshot.chain import read_chain
from trainer.snapshot.checking import check_files
from trainer.snapshot.id_maps import Int64s, LayeredIds
from trainer.snapshot.manifest import (
    DENSE,
    OWN,
    RECORDED,
    SearchPart,
    SnapshotManifest,
    search_stem,
)
from trainer.snapshot.mapped_files import MappedFiles
from trainer.snapshot.posterior_file import read_posteriors
from trainer.snapshot.resolving import resolve
from trainer.snapshot.rows import expect_like, read_tensors
from trainer.snapshot.uncertainty import Judgement, Posterior, with_one
from trainer.snapshot.vector_entries import FOLDER

_MOST_RETRIES = 10
# A snapshot scores its recorded requests as it did when it was exported: bit for bit on that machine. Another
# processor adds up in another order, which moves a probability by some 1e-7, and now and then makes a
# candidate's Kth and next behavior change places, which moves it by more: one in a hundred may.
OWN_TOLERANCE = 1e-5
OWN_EXCEPTIONS = 0.01
_LONGEST_REASON = 500
_T = TypeVar("_T")
Model = Callable[[RequestBatch], Prediction]


class RecordedRequests(NamedTuple):
    """Requests and their probabilities, float32 [C, T]: the trainer's, and the snapshot's own at export."""

    batch: RequestBatch
    trained: Tensor
    own: Tensor


@dataclass(frozen=True)
class Snapshot:
    """A loaded version: the model in eval mode over plain, memory-mapped tables.

    Attributes:
        id_maps: of the features whose ids come and go, see `SnapshotManifest.ids`.
        vectors: pre-trained ones by their names in the config, which whoever makes batches compares.
        posteriors: task -> that of its last map, in the order of the tasks; empty where the version has none.
        files: which rows are read from while it scores.
    """

    path: Path
    manifest: SnapshotManifest
    model: TwoStageModel
    recorded: RecordedRequests
    id_maps: Mapping[str, LayeredIds] = field(default_factory=dict)
    vectors: Mapping[str, Vectors] = field(default_factory=dict)
    posteriors: Mapping[str, Posterior] = field(default_factory=dict)
    files: MappedFiles = field(default_factory=MappedFiles)

    @torch.no_grad()
    def score(self, batch: RequestBatch, model: Model | None = None) -> Tensor:
        """Probabilities, float32 [C, T], of a batch with ids, as the reader gives it; by `model`, of rows."""
        prediction = (model or self.model)(self.with_rows(batch))
        return prediction.logits.sigmoid()

    @torch.no_grad()
    def features(self, batch: RequestBatch, model: Model | None = None) -> tuple[Tensor, list[Tensor]]:
        """Of such a batch: logits [C, T], and of each task phi [C, D], see `trainer.snapshot.uncertainty`.

        The head must have last layers, see `Head.last_layer_obstacle`.
        """
        layers = self.model.head.last_layers()
        with watched(layers) as given:
            prediction = (model or self.model)(self.with_rows(batch))
        return prediction.logits, [with_one(given[layer.map]) for layer in layers]

    def judge(self, batch: RequestBatch, model: Model | None = None) -> Judgement:
        """What it says of such a batch, and how sure it is; for a version that has posteriors."""
        with torch.no_grad():
            return Judgement.of(*self.features(batch, model), self.posteriors)

    @torch.no_grad()
    def search(self, batch: RequestBatch) -> dict[str, Selection]:
        """What each branch's search keeps, of such a batch."""
        return self.model.search(self.with_rows(batch))

    def with_rows(self, batch: RequestBatch) -> RequestBatch:
        """The batch with rows of tables in the place of ids that come and go."""
        return looked_up(batch, self.id_maps)

    def id_key(self, group: str, feature: str) -> str:
        """The key that a group's table of a feature is looked up by, which is also the name of its map."""
        own, _ = self.manifest.config.own_keys(group)
        return own.get(feature, feature)

    def rows_of(self, key: str, ids: Int64s) -> Int64s:
        """Rows of the tables with this key for ids of the log."""
        return self.id_maps[key].look_up(ids) if key in self.id_maps else ids

    def id_bounds(self) -> dict[str, int]:
        """Feature -> below which the ids of a log must lie."""
        living = dict.fromkeys(self.manifest.ids, ANY_ID)
        return {name: living.get(name, rows) for name, rows in self.manifest.features.items()}

    def numeric_names(self) -> list[str]:
        """What the columns of `RequestBatch.numeric` must be."""
        return [*self.manifest.numeric, *self.manifest.config.data.search.count_names]

    def overwritten(self) -> str:
        """Which of its files was written over since it was loaded, in words; empty if none was."""
        return self.files.overwritten()

    def digest(self) -> str:
        """SHA-256 of the manifest, which holds those of all files."""
        return file_digest(self.path / MANIFEST)

    def check_vocabularies(self, known: Mapping[str, FeatureInfo], log: Path) -> None:
        """The same ids must stand for the same things in a log and in training, and be as many.

        Raises:
            DataError: the log lacks a feature, its ids are of another vocabulary, or it has lists of them
                where the model was trained with one each.
        """
        for feature, given in self.manifest.inputs.items():
            if feature in known and known[feature].multi and not given.multi:
                problem = f"has lists of {feature!r}, and the model was trained with one each"
                raise DataError(f"{problem}; ingest without multi = true", file=log)
            if feature in known and known[feature].encoder != given.encoder:
                problem = f"its numbers {feature!r} are encoded otherwise than those of the snapshot"
                raise DataError(f"{problem}; ingest both with one encoder", file=log)
        for feature, entry in self.manifest.ids.items():
            if feature in known and known[feature].raw != entry.raw:
                mine, theirs = ("dense", "raw") if entry.raw else ("raw", "dense")
                problem = f"its ids of {feature!r} are {mine}, and those that the snapshot was trained with"
                raise DataError(f"{problem} are {theirs}; ingest both alike", file=log)
        for name, described in self.manifest.vectors.items():
            key = self.manifest.config.data.vectors[name].key
            if key in known and known[key].raw != described.raw:
                problem = f"its ids of {key!r} are others than those that the snapshot has vectors of"
                raise DataError(f"{problem}: raw on one side only; ingest both alike", file=log)
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
            SnapshotError: the difference exceeds the manifest's bound, or the snapshot does not score as it
                did when it was exported.
        """
        try:
            found = self.score(self.recorded.batch)
        except (RuntimeError, IndexError, ValueError, KeyError) as error:
            raise SnapshotError(self.path, f"cannot score its recorded requests: {_line(error)}") from None
        trained = self.recorded.trained
        if found.shape != trained.shape:
            raise SnapshotError(self.path, "scores of the recorded requests have another shape")
        difference = (found - trained).abs()
        worst = float(difference.max())
        self.check_parity(worst, float(difference.mean()))
        self.check_own(found)
        return worst

    def check_own(self, found: Tensor) -> None:
        """Hold scores of the recorded requests, float32 [C, T], against the snapshot's own of old.

        Whatever the tables' type, these leave no room but that of rounding, and no manifest can widen it.

        Raises:
            SnapshotError: it scores otherwise now.
        """
        # A NaN is as the other scores are not.
        same = (found - self.recorded.own).abs() <= OWN_TOLERANCE
        other = int((~same).any(1).sum())
        if other > OWN_EXCEPTIONS * len(same):
            raise SnapshotError(
                self.path,
                f"{other:,} of {len(same):,} recorded candidates score otherwise than when it was exported, "
                f"by over {OWN_TOLERANCE:g}: it was changed, or the software was; export it again",
            )

    def check_parity(self, worst: float, mean: float) -> None:
        """Hold differences to the trainer's scores against what the manifest promises.

        Raises:
            SnapshotError: they are larger, or no numbers.
        """
        bounds = self.manifest
        if not (worst <= bounds.score_bound and mean <= bounds.mean_bound):
            raise SnapshotError(
                self.path,
                f"scores differ from the trainer's by up to {worst:.3g}, {mean:.3g} on average; the bounds "
                f"are {bounds.score_bound:.3g} and {bounds.mean_bound:.3g}: export again, on this version of "
                "the software or with a wider --dtype or --attention-dtype",
            )


def load_snapshot(path: Path, known: Collection[Path] = ()) -> Snapshot:
    """Verify and load a snapshot (a version's folder, or the folder of versions).

    Tables are mapped. What only a retrieval service reads, the search part, `load_search` checks.

    Args:
        known: files that the caller has checked itself.

    Raises:
        SnapshotError: anything missing, changed, malformed or inconsistent, naming the file.
    """
    for _ in range(_MOST_RETRIES):
        version = resolve(path)
        try:
            return _load(version, known)
        except SnapshotError:
            # Versions that were superseded meanwhile may be gone already.
            with suppress(SnapshotError):
                if resolve(path) != version:
                    continue
            raise
    raise SnapshotError(path, "versions are replaced faster than they can be loaded; keep more of them")


def load_search(path: Path, branch: str = "main") -> tuple[SearchPart, dict[tuple[str, str], StoredTable]]:
    """A branch's search part: its description, and (side, feature) -> stored rows, memory-mapped.

    Raises:
        SnapshotError: it is damaged, or the model has no such part.
    """
    chain = read_chain(resolve(path))
    part = chain.manifest.search.get(branch)
    if part is None or part.reason:
        reason = part.reason if part else "the model has no such branch"
        raise SnapshotError(chain.path, f"branch {branch!r} has no search part: {reason}")
    names = {stem: name for stem, name, _ in chain.manifest.matrices()}
    stems = {
        (entry.side, entry.feature): entry.table or search_stem(branch, place)
        for place, entry in enumerate(part.tables)
    }
    check_files([file for stem in stems.values() for file in chain.files(stem)])
    return part, {key: chain.rows(stem, names[stem]) for key, stem in stems.items()}


def _load(path: Path, known: Collection[Path]) -> Snapshot:
    chain = read_chain(path)
    manifest = chain.manifest
    matrices = {stem: name for stem, name, _ in manifest.matrices() if stem.startswith("tables/")}
    layered = ("tables/", "search/", "ids/", FOLDER)
    apart = [(path, e) for e in manifest.listed().values() if not e.path.startswith(layered)]
    of_maps = (file for name in manifest.ids for file in chain.id_files(name))
    of_vectors = (chain.vectors_file(name) for name in manifest.vectors)
    read = [*apart, *of_maps, *of_vectors, *(file for stem in matrices for file in chain.files(stem))]
    files = MappedFiles(read)
    check_files(read, known)
    named = tuple(manifest.config.tasks) or tuple(manifest.tasks)
    if tuple(manifest.tasks) != named:
        order = f"{', '.join(manifest.tasks)}, and its config has {', '.join(named)}"
        raise SnapshotError(path / MANIFEST, f"its tasks are {order}: take another copy")
    try:
        tasks = named_tasks(manifest.config.tasks, manifest.tasks)
        groups = {name: _group(name, manifest, tasks) for name in manifest.groups}
    except ConfigError as error:
        raise SnapshotError(path / MANIFEST, str(error)) from None
    tables = {name: chain.rows(stem, name) for stem, name in matrices.items()}
    collections = {name: PlainBagCollection(group, tables) for name, group in groups.items()}
    numbers = count_numbers(manifest.config, manifest.numeric)
    # Sizes in the config cost nothing until the tensors turn out to have them.
    with torch.device("meta"):
        model = _fitted_to_config(
            path, lambda: build_model(manifest.config, groups, collections, tasks, numbers)
        )
    # Copies, because a matrix product over a mapped file's unaligned memory rounds differently.
    dense = {name: tensor.clone() for name, tensor in read_tensors(path, DENSE).items()}
    expect_like(path, DENSE, dense, model.state_dict())
    _fitted_to_config(path, lambda: model.load_state_dict(dense, assign=True))
    id_maps = {name: chain.id_map(name) for name in manifest.ids}
    vectors = {name: chain.vectors(name) for name in manifest.vectors}
    posteriors = read_posteriors(path, manifest, model)
    recorded = _recorded(path, manifest)
    return Snapshot(path, manifest, model.eval(), recorded, id_maps, vectors, posteriors, files)


def _group(name: str, manifest: SnapshotManifest, tasks: Sequence[Task]) -> TableGroup:
    """A group with the tables that the manifest describes and the sets that its config says.

    Raises:
        ConfigError: these contradict each other.
    """
    config = manifest.config
    sets = tuple(sets_of(name, config.groups[name], tasks, manifest.features.get(config.data.domain, 0)))
    tables = manifest.groups[name]
    specs = tuple(TableSpec(table.feature, table.rows, table.dim, table.set) for table in tables)
    group = TableGroup(name, specs, fusion=config.groups[name].fusion, sets=sets)
    return group.with_keys(*config.own_keys(name))


def _recorded(path: Path, manifest: SnapshotManifest) -> RecordedRequests:
    tensors = read_tensors(path, RECORDED)
    own = tensors.pop(OWN, None)
    batch, trained = unpack(path, tensors, (manifest.recorded_features, manifest.recorded_context))
    # Ids that come and go may be any.
    rows = {name: count for name, count in manifest.features.items() if name not in manifest.ids}
    problem = batch.problem(rows, manifest.config.data.history_length)
    problem = problem or _problem_of_bags(batch, manifest) or _problem_of_domains(batch, manifest)
    if own is None or own.dtype != trained.dtype or own.shape != trained.shape:
        problem = problem or "lacks the snapshot's own scores"
    if problem:
        raise SnapshotError(path / RECORDED, problem)
    assert own is not None
    return RecordedRequests(batch, trained, own)


def _problem_of_bags(batch: RequestBatch, manifest: SnapshotManifest) -> str:
    """Which feature is not carried by what `inputs` says; empty if none is."""
    inputs = manifest.table_inputs
    for name in manifest.recorded_features:
        given = inputs[name]
        lengths = batch.features[name].lengths().split([batch.behaviors, batch.candidates])
        for found, carries in zip(lengths, (given.of_behaviors, given.of_candidates), strict=True):
            if bool((found > 0).any() if not carries else (found != 1).any() and not given.multi):
                return f"{name} is not what its inputs say"
    context = batch.context
    for name in manifest.recorded_context:
        if context is None or (not inputs[name].multi and bool((context[name].lengths() != 1).any())):
            return f"{name} is not what its inputs say"
    return ""


def _problem_of_domains(batch: RequestBatch, manifest: SnapshotManifest) -> str:
    """What is wrong with the domains of candidates, where the model may read them; empty if nothing is."""
    rows = manifest.features.get(manifest.config.data.domain)
    if rows is None:
        return ""
    if batch.domain is None:
        return "lacks the domains of its candidates"
    outside = bool(((batch.domain < 0) | (batch.domain >= rows)).any())
    return f"domains lie outside the table of {rows} rows" if outside else ""


def _fitted_to_config(path: Path, make: Callable[[], _T]) -> _T:
    try:
        return make()
    except ConfigError as error:
        raise SnapshotError(path / MANIFEST, f"its config contradicts itself: {error}") from None
    except (RuntimeError, KeyError, ValueError, AssertionError, TypeError, IndexError) as error:
        raise SnapshotError(path / DENSE, f"does not fit the config: {_line(error)}") from None


def _line(error: Exception) -> str:
    """All of a message in one line: torch names what does not fit from the second on."""
    return " ".join(str(error).split())[:_LONGEST_REASON] or type(error).__name__
