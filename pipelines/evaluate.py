"""`tandemrec evaluate`: a trained run on a whole split, beside baselines that need no training."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from embeddings.errors import ConfigError
from pipelines.console import quiet_third_parties, table_lines
from pipelines.train import has, open_split
from trainer.baselines import baselines
from trainer.distributed import process_group
from trainer.evaluation import score_split, shared_metrics, write_scores
from trainer.metrics import Metrics
from trainer.restore import restore
from trainer.run import RunFolder


def evaluate(run: Path, split: str, which: str = "") -> Mapping[str, float | int]:
    """Measure a run on every request of `split`; prints a table, extends summary.json, keeps the scores.

    Works on any number of ranks. The scores go to `<run>/scores-<split>.parquet`.
    """
    folder = RunFolder(run)
    quiet_third_parties()
    with process_group(folder.read_config().train.timeout_s) as ranks:
        restored = restore(folder, ranks, which)
        if not has(restored.manifest, split):
            full = [name for name in restored.manifest.splits if has(restored.manifest, name)]
            raise ConfigError(f"--split {split}: the log has requests in {', '.join(full)}")
        reader = open_split(restored.config, split, restored.rows, ranks)
        scored = score_split(restored.sharded.model, reader, ranks.device)
        metrics = shared_metrics(scored)
        if ranks.speaks:
            write_scores(scored, folder.scores(split))
            feature = counted_feature(restored.manifest.taxonomy)
            found = baselines(reader, feature)
            key = "baselines" if split == "test" else f"baselines_{split}"
            slices = scored.by_history()
            sliced = {name: part.as_dict() for name, part in slices.items()}
            folder.update_summary({split: metrics.as_dict(), key: found, f"{split}_by_history": sliced})
            print("\n".join([*_report(split, metrics, found, feature), "", *_slices(slices)]), flush=True)
    return metrics.as_dict()


def counted_feature(taxonomy: list[str]) -> str:
    """What the category baseline counts: the finest taxonomy level, or the item where there is none."""
    return taxonomy[-1] if taxonomy else "item_id"


def _report(
    split: str, metrics: Metrics, found: Mapping[str, Mapping[str, float]], feature: str
) -> list[str]:
    head = [split, "AUC", "GAUC", "logloss", "NE", "PCOC", "ECE"]
    values = [metrics.auc, metrics.gauc, metrics.logloss, metrics.ne, metrics.pcoc, metrics.ece]
    labels = {
        "popularity": "item popularity",
        "category_count": f"own past count of {feature}",
        "item_count": "own past count of item_id",
    }
    rows = [["trained model", *(f"{value:.4f}" for value in values)]]
    for name, scores in found.items():
        rows.append([labels[name], f"{scores['auc']:.4f}", f"{scores['gauc']:.4f}", "-", "-", "-", "-"])
    counted = f"{metrics.samples:,} candidates, {metrics.positives:,} positive"
    return [*table_lines(head, rows), f"{counted}; GAUC over {metrics.groups:,} requests"]


def _slices(slices: Mapping[str, Metrics]) -> list[str]:
    head = ["behaviors seen", "candidates", "AUC", "GAUC", "logloss", "PCOC"]
    rows = []
    for name, part in slices.items():
        values = (part.auc, part.gauc, part.logloss, part.pcoc)
        rows.append([name, f"{part.samples:,}", *(f"{value:.4f}" for value in values)])
    return table_lines(head, rows)
