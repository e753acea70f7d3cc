"""A training of a stream that keeps the score of every candidate, made before it is learnt."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.online import online as job
from trainer.loop.online import WindowTrainer
from trainer.quality.scored import Scores, columns_of
from trainer.ranks.process_group import process_group
from trainer.run_config import load_config


class KeepingTrainer(WindowTrainer):
    """One rank; `kept` gets a table for each window."""

    kept: ClassVar[list[pa.Table]] = []

    def _cold(self, scores: Scores) -> dict[str, Any]:
        # Where scores are taken apart: this rank has all of them.
        self.kept.extend(pa.table(columns_of(chunk)) for chunk in scores.chunks())
        return super()._cold(scores)


def learn_windows(config: Path, stream: Path, out: Path, overrides: Sequence[str]) -> None:
    """Train all windows of a stream; the scores go to `<out>/scores.parquet`."""
    settings, _ = job.for_stream(load_config(config, overrides), stream)
    KeepingTrainer.kept.clear()
    with process_group(settings.train.timeout_s, settings.train.device) as ranks:
        job.run(settings, job.OnlineJob(stream, out), ranks, print, KeepingTrainer)
    pq.write_table(pa.concat_tables(KeepingTrainer.kept), out / "scores.parquet")
