"""`tandemrec evaluate`: a trained run on a whole split, beside baselines that need no training."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipelines.console import quiet_third_parties
from pipelines.quality_report import baselines_key, remarks, report, without
from pipelines.score import write_named_scores
from pipelines.start import open_split
from trainer.checkpoint.restore import restore
from trainer.quality.balance import by_balance
from trainer.quality.baselines import baselines, by_baseline, counted_feature
from trainer.quality.evaluate import score_split, shared_metrics
from trainer.quality.metrics import entry_of
from trainer.ranks.device import DeviceName
from trainer.ranks.process_group import process_group
from trainer.run_folder import RunFolder


def evaluate(
    run: Path, split: str, which: str = "", device: DeviceName | None = None, sample: int = 0
) -> Mapping[str, Any]:
    """Measure a run on every request of `split`; prints tables, extends summary.json, keeps the scores.

    Works on any number of ranks. The scores go to `<run>/scores-<split>.parquet`.

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
        scored = score_split(restored.sharded.model, reader, ranks.device)
        measured = shared_metrics(scored, reader)
        entry = measured.entry()
        if not ranks.speaks:
            return entry
        data = restored.config.data
        of_names = write_named_scores(scored, folder.scores(split), data.log, restored.manifest)
        beside = baselines(reader)
        table, feature = beside.metrics(scored), counted_feature(restored.manifest)
        slices = {task: scored.by_history(task=place) for place, task in enumerate(scored.tasks)}
        pairs = by_balance(scored, beside.positives, split, reader.columns.labels.tasks)
        entries = {
            split: entry,
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
        size = (
            f"{scored.score.shape[0]:,} candidates of {scored.requests:,} requests by {scored.users:,} users"
        )
        if measured.sampled:
            size += f", a sample of the split's {reader.candidates:,} candidates"
        lines = [f"{split}: {size}", *without(beside.missing)]
        lines += report(measured, table, slices, pairs, feature, data.domain)
        of_quality = remarks(split, measured, table, feature)
        lines += [*([""] if of_quality else []), *of_quality, *of_names]
        print("\n".join(lines), flush=True)
    return entry
