"""`tandemrec evaluate`: a trained run on a whole split, beside baselines that need no training."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipelines.console import quiet_third_parties
from pipelines.quality_report import baselines_key, remarks, report, without
from pipelines.score import write_named_scores
from pipelines.start import open_split
from trainer.checkpoint.restore import RestoredModel, restore
from trainer.data.reader import SequenceLogReader
from trainer.quality.balance import by_balance
from trainer.quality.baseline_files import baselines_of
from trainer.quality.baselines import by_baseline, counted_feature
from trainer.quality.domains import SplitMetrics
from trainer.quality.evaluate import scored_split, shared_metrics
from trainer.quality.metrics import entry_of
from trainer.quality.scored import Scores
from trainer.ranks.device import DeviceName
from trainer.ranks.process_group import process_group
from trainer.run_folder import RunFolder


def evaluate(
    run: Path, split: str, which: str = "", device: DeviceName | None = None, sample: int = 0
) -> Mapping[str, Any]:
    """Measure a run on every request of `split`; prints tables, extends summary.json, keeps the scores.

    Works on any number of ranks. The scores go to `<run>/scores-<split>.parquet`, those of a sample to
    `<run>/scores-<split>-sample.parquet`.

    Args:
        which: checkpoint, see `trainer.checkpoint.save_load.find_to_use`; device: None = as the run trained.
        sample: about so many candidates are scored at most, those of some users; 0 = all.

    Returns:
        What summary.json holds of the split: metrics of the first task, and of every task under `tasks`.
    """
    folder = RunFolder(run)
    quiet_third_parties()
    settings = folder.read_config().train
    with process_group(settings.timeout_s, device or settings.device) as ranks:
        restored = restore(folder, ranks, which)
        restored.manifest.require(split)
        reader = open_split(restored.config, split, restored.rows, ranks, limit=sample)
        with scored_split(restored.sharded.model, reader, ranks.device, run) as scored:
            measured = shared_metrics(scored, reader)
            if ranks.speaks:
                _report(folder, restored, reader, scored, measured)
    return measured.entry()


def _report(
    folder: RunFolder,
    restored: RestoredModel,
    reader: SequenceLogReader,
    scored: Scores,
    measured: SplitMetrics,
) -> None:
    """Keep scores and metrics, and print what a person reads of them."""
    split, data = reader.split, restored.config.data
    sampled = measured.sampled
    kept = folder.scores(split, sampled is not None)
    of_names = write_named_scores(scored.chunks(), kept, data.log, restored.manifest, sampled)
    with baselines_of(reader, folder.path) as beside:
        table, feature = beside.metrics(scored), counted_feature(restored.manifest)
        slices = {task: scored.by_history(task=place) for place, task in enumerate(scored.tasks)}
        pairs = by_balance(scored, beside.positives, split, reader.columns.labels.tasks)
        missing = beside.missing
    entries = {
        split: measured.entry(),
        f"{split}_step": restored.step,
        baselines_key(split): by_baseline(table),
        f"{split}_by_history": {
            name: entry_of({task: parts[name] for task, parts in slices.items()})
            for name in next(iter(slices.values()))
        },
    }
    if pairs:
        entries[f"{split}_by_balance"] = {
            "/".join(pair): {name: stratum.entry() for name, stratum in strata.items()}
            for pair, strata in pairs.items()
        }
    folder.update_summary(entries)
    requests, users = scored.counts()
    size = f"{scored.size:,} candidates of {requests:,} requests by {users:,} users"
    if sampled:
        size += f", a sample of the split's {reader.candidates:,} candidates; their scores: {kept}"
    lines = [f"{split}, after step {restored.step:,}: {size}", *without(missing)]
    lines += report(measured, table, slices, pairs, feature, data.domain)
    of_quality = remarks(split, measured, table, feature)
    lines += [*([""] if of_quality else []), *of_quality, *of_names]
    print("\n".join(lines), flush=True)
