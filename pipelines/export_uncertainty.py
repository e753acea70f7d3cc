"""Posteriors of a snapshot's last maps, from one pass over a sample of the training split.

The snapshot itself scores the sample, so that they are those of what is served: of tables in its types, and
of averaged weights where it has these.
"""

from __future__ import annotations

import time
from contextlib import closing
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from embeddings.errors import ConfigError, DataError, SnapshotError
from pipelines.export_source import TrainedRun
from trainer.assemble import id_bounds
from trainer.data.batch import RequestBatch
from trainer.data.reader import SequenceLogReader
from trainer.snapshot import Snapshot
from trainer.snapshot.laplace import Doubles, curvature, evidence, posterior
from trainer.snapshot.uncertainty import TaskUncertainty, Uncertainty, last_layer_obstacle
from trainer.snapshot.writing import add_uncertainty


@dataclass(frozen=True)
class UncertaintyOptions:
    """How posteriors are made.

    Attributes:
        candidates: of the training split that are looked at, about, those of whole users; 0 = all.
        prior: the precision of the weights' prior; 0: the evidence chooses it for each task.
    """

    candidates: int = 200_000
    prior: float = 0.0


@dataclass
class _Sums:
    """What the candidates so far say of one task."""

    curvature: Doubles
    labelled: int = 0

    def add(self, phi_CD: Tensor, logit_C: Tensor, label_C: Tensor, weight_C: Tensor) -> None:
        known = ~label_C.isnan()
        self.labelled += int(known.sum())
        parts = (each[known].double().numpy() for each in (phi_CD, logit_C, weight_C))
        self.curvature += curvature(*parts)


def check_uncertainty(run: TrainedRun) -> None:
    """Raises ConfigError where the run's model has no last map for each task."""
    if problem := last_layer_obstacle(run.config.model, run.config.tasks):
        raise ConfigError(f"--uncertainty: {problem}; export without it")


def with_uncertainty(draft: Snapshot, run: TrainedRun, options: UncertaintyOptions) -> Snapshot:
    """A draft's posteriors, found and written; says of how many candidates, and how long it took.

    Raises:
        DataError: the log has no training request any more, or a task has no label in the sample.
        SnapshotError: the snapshot gives a candidate no finite logit.
    """
    started = time.monotonic()
    bounds = id_bounds(run.groups, run.config)
    reader = SequenceLogReader(
        run.config.data,
        "train",
        bounds,
        tasks=run.tasks,
        manifest=run.manifest,
        vectors=run.vectors,
        limit=options.candidates,
    )
    layers = draft.model.head.last_layers()
    sums = [_Sums(np.zeros((layer.map.in_features + 1,) * 2)) for layer in layers]
    candidates = 0
    with closing(reader.steps()) as steps:
        for step in steps:
            _add(draft, step.batch, sums)
            candidates += step.batch.candidates
    if not all(np.isfinite(each.curvature).all() for each in sums):
        raise SnapshotError(draft.path, "gives candidates of training no finite logits; train it anew")
    described, posteriors = {}, {}
    for task, layer, own in zip(draft.manifest.tasks, layers, sums, strict=True):
        if not own.labelled:
            problem = f"no candidate of {candidates:,} in the training split has the label of {task!r}"
            raise DataError(f"{problem}; export without --uncertainty", file=run.config.data.log)
        # The sample stands for the whole split.
        whole = own.curvature * (reader.candidates / candidates)
        prior = options.prior or evidence(whole, layer.weights.double().numpy())
        posteriors[task] = posterior(whole, prior)
        described[task] = TaskUncertainty(width=len(whole), prior=prior, labelled=own.labelled)
    made = Uncertainty(candidates=candidates, of=reader.candidates, tasks=described)
    print("\n".join(lines(made, time.monotonic() - started)), flush=True)
    return add_uncertainty(draft, made, posteriors)


def _add(draft: Snapshot, batch: RequestBatch, sums: list[_Sums]) -> None:
    logits_CT, phi = draft.features(batch)
    weight_CT = batch.weight[:, None].expand_as(batch.labels)
    if batch.task_weight is not None:
        weight_CT = weight_CT * batch.task_weight
    for task, (own, phi_CD) in enumerate(zip(sums, phi, strict=True)):
        own.add(phi_CD, logits_CT[:, task], batch.labels[:, task], weight_CT[:, task])


def lines(made: Uncertainty, seconds: float) -> list[str]:
    """What posteriors were made of, for a terminal."""
    each = ", ".join(
        f"{task} {own.width} weights, prior precision {own.prior:.3g}" for task, own in made.tasks.items()
    )
    share = f"{made.candidates:,} of {made.of:,} training candidates"
    return [f"uncertainty: {share} in {seconds:.1f} s; {each}"]
