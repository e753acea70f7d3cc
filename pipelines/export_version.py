"""One version of a snapshot: written, compared with the trainer, published.

Nothing here holds the model: tables stream from the checkpoint into the snapshot, and the trainer's own
scores come from the few rows that the compared requests touch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from embeddings.errors import SnapshotError
from embeddings.lookup.stored import WIDTHS, Dtype
from pipelines.export_parity import Parity, compare
from pipelines.export_source import TrainedRun, open_run
from pipelines.export_uncertainty import UncertaintyOptions, check_uncertainty, with_uncertainty
from trainer.assemble import build_trainable, feature_rows
from trainer.checkpoint import files as checkpoint_files
from trainer.checkpoint.averages import Weights
from trainer.config.tasks import names_of
from trainer.data.batch import RequestBatch
from trainer.data.living_ids import looked_up
from trainer.data.similarity.encoding import parts_of_numbers
from trainer.log.schema import LogManifest
from trainer.log.vocabulary import stream_values
from trainer.quality.overlap import LEAST_OVERLAP, Overlap, too_small
from trainer.ranks.process_group import Ranks
from trainer.run_folder import versions
from trainer.sealed_folder import MANIFEST, file_digest
from trainer.snapshot import Snapshot, load_snapshot
from trainer.snapshot.chain import LONGEST_CHAIN, Chain
from trainer.snapshot.code import check_code, write_code
from trainer.snapshot.fetching import beside
from trainer.snapshot.manifest import BaseVersion, InputFeature, SnapshotManifest, VocabularyFile
from trainer.snapshot.partial_model import PartialModel, rows_of_requests
from trainer.snapshot.publishing import drafting, open_base, publish
from trainer.snapshot.search import SearchKind
from trainer.snapshot.vocabularies import SMALL, copy_vocabularies, vocabulary_paths
from trainer.snapshot.writing import Draft, Source, finish, group_dtypes, int8_lines

# Allowed differences between probabilities of the snapshot and of the trainer, largest and mean, by the
# narrowest type in use; docs/snapshots.md has the measurements behind them. With fp32 the snapshot's model
# does the same operations on the same numbers as the trainer's, so that on one CPU the scores must be
# bit-equal; another processor rounds the same operations differently, for which the manifest leaves room. In
# narrower types the largest difference is that of a candidate whose Kth and next behavior changed places: the
# mean says more.
BOUNDS: Mapping[Dtype, tuple[float, float]] = {"fp32": (1e-6, 1e-6), "fp16": (0.1, 5e-4), "int8": (0.2, 5e-3)}


@dataclass(frozen=True)
class ExportOptions:
    """How a version is written.

    Attributes:
        dtype, attention_dtype: how tables of representation and of attention are stored.
        since: a version in the folder to write a delta against; empty = write everything.
        keep: newest versions that stay, 0 = all.
        parity_requests: to compare ranking on besides the recorded ones; 0 = none.
        aoti: add the dense part as machine code.
        vocabularies: add the values that the ids stand for; None: where they are small.
        which: checkpoint, see `trainer.checkpoint.save_load.find_to_use`.
        search: for a retrieval service: `vectors` writes those that are projected; `none` names the tables
            whose rows are vectors as they are, and writes nothing.
        weights: the dense ones: those of the last step, or their average over its phase.
        uncertainty: how posteriors of the last maps are made; None: there are none.
        history_length: L, behaviors that a request may see; 0 = as many as in training.
    """

    dtype: Dtype = "fp32"
    attention_dtype: Dtype = "fp16"
    since: str = ""
    keep: int = 0
    parity_requests: int = 1000
    aoti: bool = False
    vocabularies: bool | None = None
    which: str = ""
    search: SearchKind = "none"
    weights: Weights = "raw"
    uncertainty: UncertaintyOptions | None = None
    history_length: int = 0


@dataclass(frozen=True)
class Published:
    """A version that was published.

    Attributes:
        parity: how its scores compare with the trainer's on `split` of the requests.
    """

    path: Path
    manifest: SnapshotManifest
    parity: Parity
    split: str


def publish_version(
    run: Path,
    out: Path,
    ranks: Ranks,
    options: ExportOptions = ExportOptions(),
    requests: LogManifest | None = None,
) -> Published:
    """Publish a checkpoint of `run` as the next version under `out`, once its scores are checked.

    May be called again and again in one process.

    Args:
        ranks: a process group of one, see `trainer.ranks.process_group`; the trainer's scores are made on its
            device.
        requests: of a log in the folder of the run's log, whose first split with requests is recorded and
            compared; None: validation requests of the run's log, or else those of training.

    Raises:
        SnapshotError: the snapshot would not score like the trainer, or the search by averaged weights keeps
            other behaviors, or it cannot be written; then nothing of it stays. CheckpointError: the run has
            no usable checkpoint, or no whole average. DataError: there is no request to compare, or no label
            of which posteriors could be made. ConfigError: the model can have none.
    """
    opened = open_run(run, options.which, options.weights, requests, options.history_length)
    if options.uncertainty is not None:
        check_uncertainty(opened)
    if options.aoti:
        # Before the tables are written, which takes long where they are large.
        model, _ = build_trainable(opened.config.without_lanes(), opened.manifest, torch.device("meta"))
        check_code(out, model)
    base = open_base(out, options.since) if options.since else None
    if base is not None and len(base.versions) >= LONGEST_CHAIN:
        raise SnapshotError(base.path, f"builds on {LONGEST_CHAIN - 1} others; export without --since")
    dtypes = group_dtypes(opened.config, options.dtype, options.attention_dtype)
    for line in int8_lines(opened.groups.values(), dtypes):
        print(line, flush=True)
    with drafting(out) as part:
        base = None if base is None else beside(base, part)
        manifest, parity = _write(part, opened, dtypes, base, ranks, options)
        if options.aoti:
            code = write_code(part, load_snapshot(part))
            manifest = manifest.model_copy(update={"code": (code,)})
        version = publish(out, part, manifest, options.keep)
    # With the number that it was given.
    return Published(
        version, manifest.model_copy(update={"number": int(version.name[1:])}), parity, opened.split
    )


def _write(
    part: Path,
    run: TrainedRun,
    dtypes: Mapping[str, Dtype],
    base: Chain | None,
    ranks: Ranks,
    options: ExportOptions,
) -> tuple[SnapshotManifest, Parity]:
    """Everything of a version but its number, and how it compares to the trainer."""
    recorded, parity_requests = run.recorded(), options.parity_requests
    batches = (looked_up(batch, run.id_maps) for batch in run.compared(recorded, parity_requests))
    parts = parts_of_numbers(run.config.data, run.manifest)
    found = rows_of_requests(batches, run.groups, run.config, parts)
    tables = {g.table_name(t): t.key for g in run.groups.values() for t in g.tables}
    source = Source(run.config, run.groups, run.reader, _base_step(run, base))
    wanted = {table: found.ids[key] for table, key in tables.items()}
    draft = Draft(part, source, dtypes, base, partial(found.watch, tables), wanted, options.search)
    raw = source.dense()
    dense = raw | dict(run.averages)
    draft.write_dense(dense)
    facts = {"groups": draft.write_tables(), "search": draft.write_search(dense)}
    known = {**run.manifest.features, **run.manifest.context}
    ids, vectors = draft.write_ids(run.id_maps, known), draft.write_vectors(run.vectors, known)
    trainer = PartialModel(run.config, run.manifest, ranks, dense, found, run.id_maps)
    if run.averages:
        _check_overlap(part, trainer, run, raw, [*run.compared(recorded, parity_requests)])
    bounds = BOUNDS[min(dtypes.values(), key=WIDTHS.index)]
    inputs = inputs_of(run.manifest, recorded)
    rows = feature_rows(run.groups)
    # Of what the ids of the model's features stand for; parts of numbers are no features of the log.
    digests = {name: known[name].vocabulary for name in {**rows, **inputs} if name in known}
    manifest = SnapshotManifest(
        number=1 if base is None else base.manifest.number + 1,
        base=base and BaseVersion(number=base.manifest.number, sha256=file_digest(base.path / MANIFEST)),
        step=run.step,
        weights="averaged" if run.averages else "raw",
        checkpoint=checkpoint_files.manifest_digest(run.checkpoint),
        score_bound=bounds[0],
        mean_bound=bounds[1],
        tasks=tuple(names_of(run.tasks)),
        numeric=tuple(run.manifest.numeric),
        features=rows | {name: each.rules.rows for name, each in run.id_maps.items() if name in rows},
        ids=ids,
        vectors=vectors,
        inputs=inputs,
        recorded_features=tuple(recorded.features.keys()),
        recorded_context=() if recorded.context is None else tuple(recorded.context.keys()),
        vocabularies=digests,
        vocabulary_files=copy_wanted_vocabularies(
            part, run.config.data.log, inputs, digests, options.vocabularies
        ),
        config=run.config,
        files=(),
        versions=versions(),
        **facts,
    )
    snapshot = finish(draft, manifest, recorded, trainer.score(recorded))
    if options.uncertainty is not None:
        snapshot = with_uncertainty(snapshot, run, options.uncertainty)
    return snapshot.manifest, _check(snapshot, trainer, run, ranks, parity_requests)


def _base_step(run: TrainedRun, base: Chain | None) -> int | None:
    """The step of the base's checkpoint, if the run has that very one; else all rows are compared."""
    if base is None or not base.manifest.checkpoint:
        return None
    there = checkpoint_files.of_step(run.checkpoint.parent, base.manifest.step)
    same = {checkpoint_files.manifest_digest(path) for path in there} == {base.manifest.checkpoint}
    return base.manifest.step if same else None


def _check(
    snapshot: Snapshot, trainer: PartialModel, run: TrainedRun, ranks: Ranks, parity_requests: int
) -> Parity:
    """Compare what was written with the trainer.

    Raises:
        SnapshotError: it does not score like the trainer. DataError: its vocabularies are not the log's.
    """
    worst, manifest = snapshot.self_check(), snapshot.manifest
    for entry in manifest.vocabulary_files:
        for _ in stream_values(snapshot.path / entry.path, manifest.vocabularies[entry.feature]):
            # To the end: only then is the digest compared.
            pass
    parity = compare(trainer, snapshot, run.open_requests(), parity_requests) if parity_requests else Parity()
    snapshot.check_parity(parity.worst, parity.mean)
    worst = max(worst, parity.worst)
    if worst > 0 and snapshot.manifest.score_bound == BOUNDS["fp32"][0] and ranks.device.type == "cpu":
        problem = f"scores differ by {worst:.3g} from the trainer's on this very machine"
        raise SnapshotError(snapshot.path, problem)
    return parity


def _check_overlap(
    part: Path,
    trainer: PartialModel,
    run: TrainedRun,
    raw: Mapping[str, Tensor],
    batches: Sequence[RequestBatch],
) -> None:
    """Compare what the search keeps by raw and by averaged weights, which the trainer has; and say it.

    The tables are those of the last step, and attention that is averaged without them may rank otherwise.

    Raises:
        SnapshotError: it keeps too few of the same.
    """
    overlap = Overlap(run.config.model, choices=True)
    averaged = [trainer.search(batch) for batch in batches] if overlap else []
    if not averaged:
        return
    trainer.put(raw)
    for batch, own in zip(batches, averaged, strict=True):
        overlap.add(trainer.search(batch), own)
    trainer.put(run.averages)
    shares, candidates = overlap.shares(), sum(batch.candidates for batch in batches)
    print("\n".join(overlap.lines(f"{candidates:,} candidates of {run.split}")), flush=True)
    if names := too_small(shares):
        raise SnapshotError(
            part,
            f"below {LEAST_OVERLAP:.0%} in {' and '.join(names)}: the averaged attention weights do not fit "
            "the tables, which are those of the last step; export raw weights, or have the phase that "
            f'averages freeze the attention (freeze = ["branches.{names[0]}.scorer"] and what else scores)',
        )


def inputs_of(manifest: LogManifest, batch: RequestBatch) -> dict[str, InputFeature]:
    """What carries the features of a batch, as the log has it."""
    inputs = {}
    of_log = manifest.table_features
    for key in batch.features.keys():  # noqa: SIM118 - no dict
        if key not in of_log:
            # A similarity, which nobody sends along.
            continue
        name = of_log[key].field or key
        info = manifest.features[name]
        inputs[name] = InputFeature(side=info.side, multi=info.multi, encoder=info.encoder)
    for key in () if batch.context is None else batch.context.keys():
        name = manifest.table_context[key].field or key
        info = manifest.context[name]
        inputs[name] = InputFeature(side="context", multi=info.multi, encoder=info.encoder)
    return inputs


def copy_wanted_vocabularies(
    part: Path, log: Path, inputs: Mapping[str, InputFeature], digests: Mapping[str, str], wanted: bool | None
) -> tuple[VocabularyFile, ...]:
    """The log's vocabularies, where they are wanted, or small and nobody said anything."""
    files = vocabulary_paths(log, inputs, digests)
    if wanted is None:
        there = [file.stat().st_size for file in files.values() if file.is_file()]
        if len(there) < len(files):
            return ()
        if sum(there) > SMALL:
            print(f"vocabularies of {sum(there) / 1e6:,.0f} MB are left out; --vocabularies adds them")
            return ()
    return copy_vocabularies(part, files) if wanted is not False else ()
