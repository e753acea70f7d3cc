"""How much of the planted signal lies in the behaviors that a search keeps."""

from __future__ import annotations

from contextlib import closing
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from pipelines.synth.kinds import Kind
from pipelines.synth.log import Behaviors
from trainer.analysis.search.kept import Floats, Recall, kept_behaviors, kept_places, measure
from trainer.data.batch import RequestBatch
from trainer.data.reader import SequenceLogReader


def planted_recall(
    model: nn.Module, reader: SequenceLogReader, whole: SequenceLogReader, kind: Kind, seed: int
) -> Recall:
    """Run the search of `model` over a whole split of a planted log made with `kind` and `seed`.

    `whole` reads the same split without a hard search in the data path: a batch with one lacks what the
    search left out. How steps are cut does not depend on the search, so the two go side by side.
    """
    weights, kept = [], []
    with closing(reader.steps()) as steps, closing(whole.steps()) as whole_steps:
        for step, whole_step in zip(steps, whole_steps, strict=True):
            batch, complete = step.batch, whole_step.batch
            if not torch.equal(_requests(batch), _requests(complete)):
                raise SystemExit("the two readers cut different steps; give them the same data settings")
            index, mask = kept_behaviors(model, batch)
            weights.append(np.abs(worth(complete, kind, seed)))
            kept.append(kept_places(batch, _array(index), _array(mask), weights[-1].shape))
    return measure(list(zip(weights, kept, strict=True)))


def worth(batch: RequestBatch, kind: Kind, seed: int) -> Floats:
    """The worth of each visible behavior to each candidate, [C, L'], newest first; 0 beyond the window."""
    request, n = batch.candidate_request, batch.behaviors
    start, end = batch.window_start[request], batch.window_end[request]
    step = torch.arange(int((end - start).max()))
    visible = step[None] < (end - start)[:, None]
    index = torch.where(visible, end[:, None] - 1 - step[None], 0)
    ids = {name: batch.features[name].values() for name in batch.features.keys()}  # noqa: SIM118 - no dict
    age = batch.request_time[request][:, None] - batch.behavior_time[index]
    seen = Behaviors(
        {name: _array(each[:n][index]) for name, each in ids.items()}, _array(1 + step), _array(age)
    )
    target = {name: _array(each[n:, None]) for name, each in ids.items()}
    return np.where(_array(visible), kind.worth(seed, target, seen), 0.0)


def _requests(batch: RequestBatch) -> torch.Tensor:
    return batch.request_id[batch.candidate_request]


def _array(tensor: torch.Tensor) -> npt.NDArray[Any]:
    array: npt.NDArray[Any] = tensor.detach().cpu().numpy()
    return array
