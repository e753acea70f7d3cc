"""Whether a portable model scores as its snapshot does, by the runtime that it is for."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from embeddings.errors import SnapshotError
from trainer.data.batch import RequestBatch
from trainer.data.reader import SequenceLogReader
from trainer.portable.building import Portable
from trainer.portable.cuts import other_shapes
from trainer.portable.requests import of_candidates
from trainer.portable.runtimes import Run
from trainer.quality.evaluate import score_requests
from trainer.quality.metrics import number
from trainer.quality.ranking import auc
from trainer.quality.scored import Scored

# Of probabilities, and of each task's AUC.
BOUND = 1e-6


@dataclass
class Compared:
    """How scores of a runtime compare with those of the snapshot.

    Attributes:
        requests, candidates: that were compared; worst: largest difference of a probability.
        aucs: task -> by the snapshot and by the runtime.
    """

    requests: int = 0
    candidates: int = 0
    worst: float = 0.0
    aucs: dict[str, tuple[float, float]] = field(default_factory=dict)

    def lines(self, what: str) -> Iterator[str]:
        """For a terminal."""
        counted = f"{self.candidates:,} candidates of {self.requests:,}"
        yield f"parity on {counted} {what}: largest difference {self.worst:.3g}"
        for task, (snapshot, runtime) in self.aucs.items():
            yield f"AUC of {task} {number(snapshot, 6)} by the snapshot, {number(runtime, 6)} by the runtime"


@dataclass
class Comparison:
    """A runtime beside its snapshot.

    Args:
        portable: the model; run: the runtime with it; file: named in errors.
    """

    portable: Portable
    run: Run
    file: Path

    def scores(self, batch: RequestBatch) -> Tensor:
        """The runtime's, [C, T], of a batch as the reader gives it."""
        arrays = self.portable.arrays(batch)
        return of_candidates(self.run(arrays), arrays["candidate_length"])  # type: ignore[arg-type]

    def of_recorded(self) -> Compared:
        """Recorded requests, as they are and in other shapes.

        Where the snapshot's tables are fp32, the trainer's own scores of them are compared, too.

        Raises:
            SnapshotError: a score differs by more than `BOUND`.
        """
        snapshot, done = self.portable.snapshot, Compared()
        recorded = snapshot.recorded
        found = self.scores(recorded.batch)
        self._check(done, "recorded", recorded.batch, recorded.own, found)
        if snapshot.manifest.score_bound <= BOUND:
            self._check(done, "recorded, by the trainer", recorded.batch, recorded.trained, found)
        for what, batch in other_shapes(recorded.batch):
            self._check(done, f"recorded, {what}", batch, snapshot.score(batch), self.scores(batch))
        done.requests, done.candidates = recorded.batch.requests, recorded.batch.candidates
        return done

    def of_split(self, reader: SequenceLogReader, limit: int, auc_bound: float = BOUND) -> Compared:
        """The first `limit` requests of a split, 0 = all.

        Args:
            auc_bound: how far an AUC may be off.

        Raises:
            SnapshotError: a score differs by more than `BOUND`, or an AUC by more than its own.
        """
        done, found = Compared(), deque[Tensor]()

        def by_snapshot(batch: RequestBatch) -> Tensor:
            expected = self.portable.snapshot.score(batch)
            found.append(self.scores(batch))
            self._check(done, reader.split, batch, expected, found[-1])
            return expected

        its = score_requests(by_snapshot, reader, limit)
        mine = score_requests(lambda _: found.popleft(), reader, limit)
        done.requests, done.candidates = mine.requests, mine.score.shape[0]
        for place, task in enumerate(mine.tasks):
            done.aucs[task] = before, after = _auc(its, place), _auc(mine, place)
            # A task without a label, or with labels of one kind, has none.
            if not (abs(before - after) <= auc_bound or np.isnan(before)):
                problem = f"the AUC of {task} is {after:.8f} instead of {before:.8f} on {reader.split}"
                raise SnapshotError(self.file, f"{problem}; nothing is published")
        return done

    def _check(self, done: Compared, what: str, batch: RequestBatch, expected: Tensor, found: Tensor) -> None:
        if found.shape != expected.shape:
            shapes = f"{tuple(found.shape)} instead of {tuple(expected.shape)}"
            raise SnapshotError(self.file, f"scores of {what} requests have another shape: {shapes}")
        if not found.numel():
            return
        # What is no number is as far as can be.
        difference = (found - expected).abs().nan_to_num(torch.inf, torch.inf)
        worst = float(difference.max())
        done.worst = max(done.worst, worst)
        if worst <= BOUND:
            return
        candidate, task = divmod(int(difference.argmax()), difference.shape[1])
        request = int(batch.candidate_request[candidate])
        within = candidate - int((batch.candidate_request < request).sum())
        off = int((difference > BOUND).any(1).sum())
        raise SnapshotError(
            self.file,
            f"request {int(batch.request_id[request])} ({what}), candidate {within}, task "
            f"{self.portable.signature.tasks[task]}: {float(found[candidate, task]):.8f} instead of "
            f"{float(expected[candidate, task]):.8f}, off by {worst:.3g} where {BOUND:g} is allowed; {off:,} "
            f"of {len(difference):,} candidates are; nothing is published",
        )


def _auc(scored: Scored, task: int) -> float:
    part = scored.observed(task)
    return auc(part.score[:, task], part.label[:, task])
