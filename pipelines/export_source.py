"""What an export is made of: a run's checkpoint, not loaded, and the requests that scores are compared on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from embeddings.errors import CheckpointError, DataError
from embeddings.groups import TableGroup
from embeddings.ids.frozen import FrozenIds
from trainer.assemble import id_bounds, resolve_groups
from trainer.checkpoint import save_load as checkpoint
from trainer.checkpoint.averages import Weights, averaged_weights, steps_missing
from trainer.checkpoint.history_length import at_length
from trainer.checkpoint.id_files import frozen_ids
from trainer.checkpoint.same_vectors import changed_vectors
from trainer.checkpoint.tensors import TensorReader
from trainer.config.tasks import Task, resolve_tasks
from trainer.data.batch import RequestBatch
from trainer.data.reader import SequenceLogReader
from trainer.data.similarity.loading import given_vectors, load_vectors
from trainer.data.similarity.vectors import Vectors
from trainer.log.schema import LogManifest, read_manifest
from trainer.run_config import Config
from trainer.run_folder import RunFolder

_RECORDED_CANDIDATES = 512
# Where the requests come from that scores are compared on: the first of these splits that has any.
_SPLITS = ("validation", "train")


@dataclass(frozen=True)
class TrainedRun:
    """A checkpoint of a run, not loaded.

    Attributes:
        manifest: of the log that the run trains on; requests: of the log whose requests are compared, with
            files relative to the same folder; split: which of its splits.
        averages: the dense weights that are written instead of those of the step.
        id_maps: of the features whose ids come and go; vectors: pre-trained ones.
    """

    config: Config
    manifest: LogManifest
    groups: Mapping[str, TableGroup]
    reader: TensorReader
    checkpoint: Path
    step: int
    requests: LogManifest
    split: str
    averages: Mapping[str, Tensor] = field(default_factory=dict)
    id_maps: Mapping[str, FrozenIds] = field(default_factory=dict)
    vectors: Mapping[str, Vectors] = field(default_factory=dict)

    @property
    def tasks(self) -> tuple[Task, ...]:
        return resolve_tasks(self.config.tasks, self.manifest.tasks)

    def open_requests(self, candidates: int | None = None) -> SequenceLogReader:
        """The split that scores are compared on, in steps of the run's size or of another."""
        changes = {} if candidates is None else {"batch_candidates": candidates}
        data = self.config.data.model_copy(update=changes)
        bounds = id_bounds(self.groups, self.config)
        return SequenceLogReader(
            data, self.split, bounds, tasks=self.tasks, manifest=self.requests, vectors=self.vectors
        )

    def recorded(self) -> RequestBatch:
        """The few requests that a version holds with their scores."""
        with closing(self.open_requests(_RECORDED_CANDIDATES).steps()) as steps:
            return next(steps).batch

    def compared(self, recorded: RequestBatch, limit: int) -> Iterator[RequestBatch]:
        """The recorded batch and those of the first `limit` requests, as `compare` will read them."""
        yield recorded
        seen = 0
        with closing(self.open_requests().steps()) as steps:
            while seen < limit and (step := next(steps, None)) is not None:
                yield step.batch
                seen += step.batch.requests


def open_run(
    run: Path,
    which: str = "",
    weights: Weights = "raw",
    requests: LogManifest | None = None,
    history_length: int = 0,
) -> TrainedRun:
    """Find a checkpoint of a run, and compare its tables with what the config says.

    Args:
        which: checkpoint, see `trainer.checkpoint.save_load.find_to_use`.
        requests: of a log in the same folder whose requests are compared; None: of the run's own log.
        history_length: L, 0 = that of the run.

    Raises:
        CheckpointError: the run has no usable checkpoint, or no whole average. DataError: there is no request
            to compare. ConfigError: its weights have one history length alone.
    """
    folder = RunFolder(run)
    config = folder.read_config()
    manifest = read_manifest(config.data.log)
    config = at_length(config, manifest, history_length)
    found = checkpoint.find_to_use(folder.checkpoints, which)
    path = found.path
    assert path is not None
    for line in found.lines:
        print(line, flush=True)
    groups, reader = resolve_groups(config, manifest), TensorReader(path)
    check_tables(path, groups, reader)
    averages: dict[str, Tensor] = {}
    if weights == "averaged":
        averages = averaged_weights(reader, path, found.state)
        if missing := steps_missing(found.state):
            problem = f"lies within its phase, whose average misses {missing:,} steps; train it to its end"
            raise CheckpointError(path, f"{problem}, or export raw weights")
    step, given = int(found.state["step"]), requests or manifest
    split, id_maps = _split_of(given, config.data.log), frozen_ids(path, config.id_rules)
    if split == "train":
        print("this log has no validation requests: scores are compared on training ones", flush=True)
    loaded = load_vectors(config.data, manifest)
    for line in changed_vectors(found.state, loaded, path.name):
        print(line, flush=True)
    vectors = given_vectors(loaded)
    return TrainedRun(config, manifest, groups, reader, path, step, given, split, averages, id_maps, vectors)


def check_tables(path: Path, groups: Mapping[str, TableGroup], reader: TensorReader) -> None:
    """Raises:
    CheckpointError: a table has another shape than the log and the config say.
    """
    for name, group in groups.items():
        for table in group.tables:
            shape = reader.shape(reader.table(name, group.table_name(table)))
            if shape != (table.rows, table.dim):
                problem = f"table {group.table_name(table)} is {list(shape)}, its log and config say "
                raise CheckpointError(path, f"{problem}{[table.rows, table.dim]}")


def _split_of(requests: LogManifest, log: Path) -> str:
    split = next((name for name in (*_SPLITS, *requests.splits) if requests.holds(name)), None)
    if split is None:
        raise DataError("has no request to compare the scores of a snapshot on", file=log)
    return split
