"""`tandemrec evaluate`: a trained run on a whole split, beside baselines that need no training."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from pipelines.console import quiet_third_parties
from pipelines.quality_report import baselines_key, remarks, report, without
from pipelines.score import write_named_scores
from pipelines.start import open_split
from trainer.checkpoint.averages import Weights
from trainer.checkpoint.restore import RestoredModel, restore
from trainer.checkpoint.same_vectors import changed_vectors
from trainer.data.reader import SequenceLogReader
from trainer.quality.balance import by_balance
from trainer.quality.baseline_files import baselines_of
from trainer.quality.baselines import by_baseline, counted_feature
from trainer.quality.domains import SplitMetrics
from trainer.quality.evaluate import scored_split, shared_metrics
from trainer.quality.history_free import history_free_entry, history_free_line
from trainer.quality.metrics import entry_of
from trainer.quality.overlap import LEAST_OVERLAP, Overlap, too_small
from trainer.quality.scored import Scores
from trainer.ranks.device import DeviceName
from trainer.ranks.process_group import Ranks, process_group, sum_counts
from trainer.run_folder import RunFolder

# Candidates by which the searches of raw and averaged weights are compared.
_COMPARED = 20_000


def evaluate(
    run: Path,
    split: str,
    which: str = "",
    device: DeviceName | None = None,
    sample: int = 0,
    weights: Weights = "raw",
    history_length: int = 0,
) -> Mapping[str, Any]:
    """Measure a run on every request of `split`; prints tables, extends summary.json, keeps the scores.

    Works on any number of ranks. The scores go to `<run>/scores-<split>.parquet`, those of a sample to
    `<run>/scores-<split>-sample.parquet`. With averaged weights `-averaged` follows the split's name, in
    summary.json `_averaged`; at another history length `-at-<L>`, and `_at_<L>`.

    Args:
        which: checkpoint, see `trainer.checkpoint.save_load.find_to_use`; device: None = as the run trained.
        sample: about so many candidates are scored at most, those of some users; 0 = all.
        weights: the dense ones: those of the last step, or their average over its phase.
        history_length: L, behaviors that a request may see; 0 = as many as in training.

    Returns:
        What summary.json holds of the split: metrics of the first task, and of every task under `tasks`.
    """
    folder = RunFolder(run)
    quiet_third_parties()
    settings = folder.read_config().train
    with process_group(settings.timeout_s, device or settings.device) as ranks:
        restored = restore(folder, ranks, which, weights, history_length)
        restored.manifest.require(split)
        reader = open_split(
            restored.config, split, restored.rows, ranks, limit=sample, finders=restored.finders
        )
        for line in changed_vectors(restored.state, reader.vectors, f"step {restored.step:,}"):
            if ranks.speaks:
                print(line, flush=True)
        overlap = _overlap(restored, reader, ranks) if restored.averages else {}
        restored.put(restored.averages)
        with scored_split(restored.sharded.model, reader, ranks.device, run) as scored:
            measured = shared_metrics(scored, reader)
            if ranks.speaks:
                _report(folder, restored, reader, scored, measured, overlap)
    return measured.entry()


def _overlap(restored: RestoredModel, reader: SequenceLogReader, ranks: Ranks) -> dict[str, float]:
    """Branch -> how much the search of averaged weights keeps of that of raw ones, on the first candidates of
    the split; said, and collective."""
    overlap, seen = Overlap(restored.config.model, choices=True), 0
    if not overlap:
        return {}
    model = restored.sharded.model.module
    with closing(reader.steps()) as steps:
        for step in steps:
            batch = step.batch.to(ranks.device)
            by_raw = model.search(batch)
            raw = restored.put(restored.averages)
            by_averaged = model.search(batch)
            restored.put(raw)
            if step.counted:
                overlap.add(by_raw, by_averaged)
            seen += batch.step_candidates
            if seen >= _COMPARED:
                break
    for name, count in overlap.counts.items():
        overlap.counts[name] = sum_counts(count)
    shares = overlap.shares()
    if ranks.speaks:
        print("\n".join(overlap.lines(f"{seen:,} candidates of {reader.split}")), flush=True)
        for name in too_small(shares):
            print(f"below {LEAST_OVERLAP:.0%} in {name}: export refuses these averaged weights", flush=True)
    return shares


def _report(
    folder: RunFolder,
    restored: RestoredModel,
    reader: SequenceLogReader,
    scored: Scores,
    measured: SplitMetrics,
    overlap: Mapping[str, float],
) -> None:
    """Keep scores and metrics, and print what a person reads of them."""
    split, data = reader.split, restored.config.data
    sampled = measured.sampled
    averaged = bool(restored.averages)
    length = data.history_length
    at = f"_at_{length}" if length != folder.read_config().data.history_length else ""
    name = f"{split}{at}" + ("_averaged" if averaged else "")
    kept = folder.scores(split + at.replace("_", "-"), sampled is not None, averaged)
    of_names = write_named_scores(scored.chunks(), kept, data.log, restored.manifest, sampled)
    with baselines_of(reader, folder.path) as beside:
        table, feature = beside.metrics(scored), counted_feature(restored.manifest)
        slices = {task: scored.by_history(task=place) for place, task in enumerate(scored.tasks)}
        pairs = by_balance(scored, beside.positives, split, reader.columns.labels.tasks)
        missing = beside.missing
    entries = {
        name: measured.entry(),
        f"{name}_step": restored.step,
        baselines_key(split) + at: by_baseline(table),
        f"{name}_by_history": {
            part: entry_of({task: parts[part] for task, parts in slices.items()})
            for part in next(iter(slices.values()))
        },
    }
    if without_history := history_free_entry(split, restored.manifest.report):
        entries[f"{split}_history_free"] = without_history
    if overlap:
        entries[f"{name}_overlap"] = dict(overlap)
    if pairs:
        entries[f"{name}_by_balance"] = {
            "/".join(pair): {part: stratum.entry() for part, stratum in strata.items()}
            for pair, strata in pairs.items()
        }
    folder.update_summary(entries)
    requests, users = scored.counts()
    size = f"{scored.size:,} candidates of {requests:,} requests by {users:,} users"
    if sampled:
        size += f", a sample of the split's {reader.candidates:,} candidates; their scores: {kept}"
    what = ", averaged weights" if averaged else ""
    what += f", at a history length of {length:,}" if at else ""
    lines = [f"{split}, after step {restored.step:,}{what}: {size}", *without(missing)]
    lines += report(measured, table, slices, pairs, feature, data.domain)
    lines += history_free_line(split, restored.manifest.report)
    of_quality = remarks(split, measured, table, feature)
    lines += [*([""] if of_quality else []), *of_quality, *of_names]
    print("\n".join(lines), flush=True)
