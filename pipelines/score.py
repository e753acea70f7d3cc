"""`tandemrec score`: batch scoring from a snapshot, without the trainer and without sharding."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import pyarrow as pa
from torch import Tensor

from embeddings.errors import DataError, SnapshotError
from pipelines.console import quiet_third_parties
from trainer.config.tasks import labels_of, named_tasks
from trainer.data.batch import RequestBatch
from trainer.data.reader import SequenceLogReader
from trainer.data.row_group import read_footer
from trainer.log.known_values import map_values
from trainer.log.schema import VOCABULARIES, LogManifest, read_manifest
from trainer.quality.compare import compare_scores
from trainer.quality.evaluate import score_in_order
from trainer.quality.score_files import ScoreFiles
from trainer.quality.scored import SAMPLED, Names, Scored, write_scores
from trainer.ranks.machine import keep_freed_memory
from trainer.sealed_folder import scratch
from trainer.snapshot import Snapshot, load_fetched, shown
from trainer.snapshot.uncertainty import LACKING

# Column of a file of scores -> whose names it has.
_NAME_COLUMNS = {"user": "user_id", "request": "request_id"}


def score(
    snapshot: Path,
    requests: Path,
    split: str,
    limit: int,
    out: Path,
    against: Path | None = None,
    cache: Path | None = None,
    uncertainty: bool = False,
) -> Path:
    """Score the first `limit` requests (0 = all) of a split of a sequence log into a Parquet file.

    Args:
        snapshot: a version's folder or the folder of versions.
        requests: a sequence log. Its ids must be of the vocabulary the model was trained with. It needs no
            labels: those that it lacks are NaN in the file.
        against: scores of `tandemrec evaluate` to compare with; a difference above the snapshot's own bounds
            is an error.
        cache: where a snapshot in an object store is fetched to; None: the user's caches.
        uncertainty: of each task, beside `score_<task>`, write `mean_<task>` and `deviation_<task>` of the
            logit, and `probability_<task>` with the deviation in it.

    Raises:
        SnapshotError: the snapshot is corrupt, or scores differ. DataError: the log is malformed.
    """
    quiet_third_parties()
    keep_freed_memory()
    if against is not None:
        refuse_sample(against)
    loaded = load_fetched(snapshot, cache)
    loaded.self_check()
    if uncertainty and not loaded.posteriors:
        raise SnapshotError(loaded.path, f"{LACKING}, as --uncertainty asks for")
    manifest = read_manifest(requests)
    manifest.require(split)
    reader, left_out = open_requests(loaded, requests, split)
    mine, wanted = reader.numeric_names(), loaded.numeric_names()
    if mine != wanted:
        raise DataError(f"has numbers {mine}, the snapshot was trained with {wanted}", file=requests)
    loaded.check_vocabularies({**reader.columns.features, **reader.columns.context}, requests)
    judging = _Judging(loaded) if uncertainty else None
    counted = _Counted(score_in_order(judging or loaded.score, reader, limit))
    beside = None if judging is None else judging.columns
    remarks = [*left_out, *write_named_scores(counted, out, requests, manifest, beside=beside)]
    size = f"{counted.candidates:,} candidates of {counted.requests:,} requests"
    print(f"{size} scored by {shown(snapshot, loaded.path)} -> {out}", *remarks, sep="\n")
    if against is not None:
        _compare(out, against, loaded)
    return out


def _compare(out: Path, against: Path, loaded: Snapshot) -> None:
    """Say how far scores lie from those of the trainer, and refuse what lies beyond the snapshot's bound."""
    with tempfile.TemporaryDirectory() as scratch:
        some, known = (ScoreFiles([file], Path(scratch)) for file in (out, against))
        worst, equal = compare_scores(some, known)
    if worst == float("inf"):
        problem = "lacks scores of some of these requests; is it of the same split, and of all of it?"
        raise DataError(problem, file=against)
    bound = loaded.manifest.score_bound
    kept = f"{equal:.2%} bit-equal, bound {bound:.0e}"
    print(f"largest difference to the trainer's own scores: {worst:.3g} ({kept})")
    if not worst <= bound:
        problem = f"scores differ by {worst:.3g} from {against}, more than {bound:.0e}; are these, too, of "
        problem += f"step {loaded.manifest.step:,}, as the snapshot is? `evaluate` says which it measures"
        raise SnapshotError(loaded.path, problem)


def refuse_sample(file: Path) -> None:
    """Raises DataError where scores are those of a sample: most requests of the split have none there."""
    metadata = read_footer(file).metadata or {}
    if sampled := metadata.get(SAMPLED.encode()):
        problem = f"holds a sample of its split ({sampled.decode()} candidates), and all requests are scored"
        raise DataError(f"{problem}; compare with scores of `evaluate` without --sample", file=file)


class _Judging:
    """Scores batches, and keeps what else is known of the last one."""

    def __init__(self, loaded: Snapshot) -> None:
        self._loaded = loaded
        self._last: dict[str, Tensor] = {}

    def __call__(self, batch: RequestBatch) -> Tensor:
        judged = self._loaded.judge(batch)
        kinds = {"mean": judged.mean, "deviation": judged.deviation, "probability": judged.probability}
        self._last = {
            f"{kind}_{task}": values_CT[:, place]
            for place, task in enumerate(self._loaded.manifest.tasks)
            for kind, values_CT in kinds.items()
        }
        return judged.mean.sigmoid()

    def columns(self, chunk: Scored) -> Mapping[str, pa.Array]:
        """Of the chunk that `score_in_order` has just made: the first candidates of the last batch."""
        return {name: pa.array(values[: chunk.size].numpy()) for name, values in self._last.items()}


class _Counted:
    """Counts candidates and requests that pass by."""

    def __init__(self, chunks: Iterable[Scored]) -> None:
        self._chunks = chunks
        self.candidates = self.requests = 0

    def __iter__(self) -> Iterator[Scored]:
        for chunk in self._chunks:
            self.candidates += chunk.size
            # A block holds whole requests, and each request is in one block.
            self.requests += chunk.requests
            yield chunk


def open_requests(loaded: Snapshot, log: Path, split: str) -> tuple[SequenceLogReader, list[str]]:
    """A reader of requests for a snapshot, and remarks on what it does without.

    A task is known by its name, whatever labels the log has and in whatever order.
    """
    described, manifest = loaded.manifest, read_manifest(log)
    data = described.config.data.model_copy(update={"log": log})
    tasks = named_tasks(described.config.tasks, described.tasks)
    remarks = []
    if lacking := [
        name for name in labels_of(described.config.tasks, described.tasks) if name not in manifest.tasks
    ]:
        remarks.append(f"the log has no label {', '.join(lacking)}: labels of the tasks that need it are NaN")
    # Where the model reads the domain, it is one of its features.
    if data.domain and data.domain not in {*described.features, *manifest.features, *manifest.context}:
        remarks.append(f"the log has no feature {data.domain}: the scores have no domain")
        data = data.model_copy(update={"domain": ""})
    return SequenceLogReader(data, split, loaded.id_bounds(), tasks=tasks, vectors=loaded.vectors), remarks


def write_named_scores(
    chunks: Scored | Iterable[Scored],
    path: Path,
    log: Path,
    manifest: LogManifest,
    sampled: tuple[int, int] | None = None,
    beside: Names | None = None,
) -> list[str]:
    """Write the scores, with the names `user` and `request` where the log has names; returns remarks.

    Names that cannot be read are left out and remarked on: they must not cost the scores.

    Args:
        sampled: see `write_scores`; beside: further columns.
    """
    names: dict[str, tuple[str, pa.Array]] = {}
    remarks = []
    for column, key in _NAME_COLUMNS.items():
        if key not in manifest.named:
            continue
        file, digest = log / VOCABULARIES / f"{key}.parquet", manifest.named[key].vocabulary
        try:
            # Large ones are mapped; what is deleted and mapped stays until nobody uses it.
            with scratch(path.parent, f"{path.name}-{column}") as folder:
                names[column] = key, map_values(file, digest, folder, of_log=True)
        except (DataError, OSError) as error:
            remarks.append(f"the scores have no column {column}: {error}")

    def named(chunk: Scored) -> dict[str, pa.Array]:
        found = dict(beside(chunk)) if beside else {}
        for column, (key, values) in names.items():
            ids = getattr(chunk, key)
            found[column] = values.take(pa.array(ids - 1, mask=(ids < 1) | (ids > len(values))))
        return found

    write_scores(chunks, path, named, sampled)
    return remarks
