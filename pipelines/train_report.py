"""The last lines of `tandemrec train`: how good the model is beside baselines, and what comes next."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from embeddings.errors import TandemError
from pipelines.quality_report import baselines_key, remarks, without
from trainer.data.reader import SequenceLogReader
from trainer.log.schema import LogManifest
from trainer.quality.baselines import baselines, by_baseline, counted_feature
from trainer.quality.metrics import Metrics, entry_of

_SPLITS = ("test", "validation")


def quality(
    metrics: Mapping[str, Metrics] | None,
    validation: SequenceLogReader | None,
    manifest: LogManifest,
    step: int,
) -> tuple[dict[str, Any], list[str]]:
    """The validation after `step` beside its baselines: entries of summary.json, and plain sentences.

    Training is over and saved by then: a baseline that cannot be computed is said, and is no failure.
    Nothing is said of a log without a validation split.
    """
    if metrics is None or validation is None:
        return {}, []
    entries: dict[str, Any] = {"validation": entry_of(metrics), "validation_step": step}
    try:
        beside = baselines(validation)
    except (TandemError, OSError, MemoryError) as error:
        return entries, [f"no baselines beside the validation: {error}"]
    table, feature = beside.metrics(), counted_feature(manifest)
    entries[baselines_key("validation")] = by_baseline(table)
    return entries, [*without(beside.missing), *remarks("validation", metrics, table, feature)]


def next_commands(run: Path, manifest: LogManifest) -> list[str]:
    """Where the curves are, and the command that measures the run."""
    folder, split = shlex.quote(str(run)), next(filter(manifest.holds, _SPLITS), "train")
    other = "" if split == "test" else f" --split {split}"
    return [f"curves: tensorboard --logdir {folder}", f"next:   tandemrec evaluate --run {folder}{other}"]
