"""How a snapshot compares to the trainer on a split: scores, ranking, and what the search keeps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from trainer.data.batch import RequestBatch
from trainer.data.reader import SequenceLogReader
from trainer.quality.domains import UNOBSERVED
from trainer.quality.evaluate import score_requests
from trainer.quality.metrics import number
from trainer.quality.overlap import Overlap
from trainer.quality.ranking import auc
from trainer.quality.scored import Scored
from trainer.snapshot import Snapshot
from trainer.snapshot.partial_model import PartialModel


@dataclass(frozen=True)
class TaskParity:
    """One task of a `Parity`.

    Attributes:
        worst, mean: absolute difference of probabilities.
        auc: by the trainer and by the snapshot, of the candidates with a label.
        alike: why there is no AUC, where there is none.
    """

    worst: float
    mean: float
    auc: tuple[float, float]
    alike: str = "all of these labels are alike"


@dataclass(frozen=True)
class Parity:
    """Attributes:
    requests, candidates: compared.
    worst, mean: absolute difference of probabilities; equal: share of candidates that are bit-equal.
    tasks: by name.
    overlap: branch -> share of the behaviors kept by the trainer's search that the snapshot's keeps too.
    reason: why scores may differ, where that is known.
    """

    requests: int = 0
    candidates: int = 0
    worst: float = 0.0
    mean: float = 0.0
    equal: float = 1.0
    tasks: Mapping[str, TaskParity] = field(default_factory=dict)
    overlap: Mapping[str, float] = field(default_factory=dict)
    reason: str = ""

    def lines(self, split: str) -> list[str]:
        """For a terminal."""
        if not self.requests:
            return ["parity on the recorded requests only"]
        lines = [
            f"parity on {self.candidates:,} candidates of {self.requests:,} {split} requests: largest "
            f"difference {self.worst:.3g}, mean {self.mean:.3g}, {self.equal:.2%} bit-equal"
        ]
        # On the first task's line: what the search keeps belongs to all of them.
        kept = "".join(f"; {share:.4%} of the search's top K kept ({n})" for n, share in self.overlap.items())
        for task, own in self.tasks.items():
            before, after = own.auc
            several = len(self.tasks) > 1
            line = f"AUC of {task}" if several else "AUC"
            line += f" {number(before, 6)} by the trainer, {number(after, 6)} by the snapshot"
            line += f"; {own.alike}" if math.isnan(before) else ""
            line += f"; largest difference {own.worst:.3g}, mean {own.mean:.3g}" if several else ""
            lines.append(f"{line}{kept if len(lines) == 1 else ''}")
        return [*lines, *([f"not bit-equal, since {self.reason}"] if self.reason and self.equal < 1 else [])]


def compare(trainer: PartialModel, snapshot: Snapshot, reader: SequenceLogReader, limit: int) -> Parity:
    """Score the first `limit` requests of a split with both."""
    overlap = Overlap(snapshot.manifest.config.model)

    def by_trainer(batch: RequestBatch) -> Tensor:
        if overlap:
            overlap.add(trainer.search(batch), snapshot.search(batch))
        return trainer.score(batch)

    first = score_requests(by_trainer, reader, limit)
    second = score_requests(snapshot.score, reader, limit)
    difference = np.abs(first.score - second.score)
    return Parity(
        requests=first.requests,
        candidates=difference.shape[0],
        worst=float(difference.max()),
        mean=float(difference.mean()),
        equal=float((first.score == second.score).all(axis=1).mean()),
        tasks={
            task: TaskParity(
                float(difference[:, t].max()),
                float(difference[:, t].mean()),
                (_auc(first, t), _auc(second, t)),
                **({} if first.observed(t).candidate.size else {"alike": UNOBSERVED}),
            )
            for t, task in enumerate(first.tasks)
        },
        overlap=overlap.shares(),
        reason=_reason(snapshot, trainer.device),
    )


def _reason(snapshot: Snapshot, device: torch.device) -> str:
    """Why the scores of a snapshot differ from those made on `device`; empty where they should not."""
    kinds = {name: tables[0].dtype for name, tables in snapshot.manifest.groups.items()}
    narrow = {name: kind for name, kind in kinds.items() if kind != "fp32"}
    reasons = [f"the snapshot's tables of {name} are {kind}" for name, kind in narrow.items()]
    if device.type != "cpu":
        reasons.append(f"the trainer's scores are from {device.type}, which rounds otherwise than a CPU")
    return " and ".join(reasons) + (", see --dtype and --attention-dtype" if narrow else "")


def _auc(scored: Scored, task: int) -> float:
    """Of the candidates that have a label of the task."""
    part = scored.observed(task)
    return auc(part.score[:, task], part.label[:, task])
