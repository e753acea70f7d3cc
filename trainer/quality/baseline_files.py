"""Baselines on a split that is more than memory holds: what they need of each candidate lies in files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from trainer.data.reader import SequenceLogReader
from trainer.quality.baselines import RATES, Baselines, Scorer, baselines, read_candidates, unique_items
from trainer.quality.leads import leads
from trainer.quality.metrics import group_keys
from trainer.quality.ranking import Floats
from trainer.quality.runs import Merged, Runs
from trainer.quality.score_files import IN_MEMORY, ScoreFiles
from trainer.quality.scored import Scored, Scores
from trainer.quality.streamed import Part, assess
from trainer.sealed_folder import scratch


class BaselineFiles:
    """As `Baselines`, of any number of candidates.

    Args:
        reader: of the split; folder: for 40 to 60 bytes a candidate; most: see `Scorer.of`.

    Attributes:
        missing: what could not be computed, and why.
    """

    def __init__(self, reader: SequenceLogReader, folder: Path, most: int = 0) -> None:
        runs = Runs(folder, "baselines")
        for part in read_candidates(reader):
            runs.add(part)
        runs.flush()
        self._merged, self._folder = Merged(runs.files), folder
        users = [np.unique(part["user_id"]) for part in self._merged([])]
        has_items = "item_id" in self._merged.names
        items = unique_items(self._merged(["item_id"])) if has_items else None
        self._scorer = Scorer.of(reader, np.concatenate(users), items, most)
        self.missing = self._scorer.missing

    def positives(self, chunk: Scored) -> Floats | None:
        """[n, T], positives that training has of the candidates' users; None where it has none of any."""
        rates = self._scorer.rates
        return self._scorer.positives(chunk.user_id) if rates is not None and rates.any_positive else None

    def metrics(self, scored: Scores | None = None) -> dict[str, dict[str, dict[str, Any]]]:
        """As `Baselines.metrics`."""
        table: dict[str, dict[str, dict[str, Any]]] = {}
        first = next(self._merged())
        for task, name in enumerate(self._scorer.tasks):
            model = scored.assessed(task).estimates() if isinstance(scored, ScoreFiles) else None
            table[name] = {}
            for baseline in self._scorer.scores(first, [name])[name]:

                def parts(name: str = name, baseline: str = baseline) -> Iterator[Part]:
                    return self._parts(name, baseline)

                found = assess(parts, baseline in RATES, self._folder)
                values = {**found.ranking, **found.calibration}
                if model is not None:
                    values |= leads(model, found.estimates())
                table[name][baseline] = values
        return table

    def _parts(self, task: str, baseline: str) -> Iterator[Part]:
        """Candidates that have a label of a task, with the scores of a baseline."""
        for rows in self._merged():
            label = rows[f"label_{task}"]
            observed = ~np.isnan(label)
            score = self._scorer.scores(rows, [task])[task][baseline][observed]
            user, request = rows["user_id"][observed], rows["request_id"][observed]
            yield Part(score, label[observed], group_keys(user, request), group_keys(user))


@contextmanager
def baselines_of(
    reader: SequenceLogReader, folder: Path, most: int = 0
) -> Iterator[Baselines | BaselineFiles]:
    """Baselines on the reader's split, as long as the context lasts.

    Args:
        folder: for what memory does not hold; most: see `Scorer.of`.
    """
    if reader.expected <= IN_MEMORY:
        yield baselines(reader, most)
        return
    with scratch(folder, f"baselines-{reader.split}") as place:
        yield BaselineFiles(reader, place, most)
