"""Batches of other shapes, made of recorded ones: few behaviors, one candidate, one request."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from embeddings.lookup.jagged import select_bags
from trainer.data.batch import RequestBatch, Retrieval


def other_shapes(batch: RequestBatch) -> Iterator[tuple[str, RequestBatch]]:
    """Batches, and what is special about each. Histories are cut where nothing was retrieved from them."""
    yield "first candidates alone", _candidates(batch, _first_of_each(batch))
    yield "a single request", of_request(batch, 0)
    yield "a single request, first candidate alone", _single(of_request(batch, batch.requests - 1))
    if batch.retrieval is None and batch.clusters is None:
        for most in (0, 1, 2):
            yield f"{most} behaviors at most", _newest(batch, most)
        yield (
            "a single request without behaviors, first candidate alone",
            _single(_newest(of_request(batch, 0), 0)),
        )


def of_request(batch: RequestBatch, number: int) -> RequestBatch:
    """One request of a batch, with all of the batch's behaviors."""
    kept = torch.nonzero(batch.candidate_request == number).squeeze(1)
    some, one = _candidates(batch, kept), slice(number, number + 1)
    parts = ("request_time", "window_start", "window_end", "seen", "user_id", "request_id")
    context = batch.context
    clusters = batch.clusters
    return replace(
        some,
        candidate_request=torch.zeros_like(some.candidate_request),
        context=None if context is None else select_bags(context, torch.tensor([number])),
        clusters=None if clusters is None else replace(clusters, end=clusters.end[one]),
        **{name: getattr(batch, name)[one] for name in parts},
    )


def _candidates(batch: RequestBatch, kept: torch.Tensor) -> RequestBatch:
    bags = torch.cat([torch.arange(batch.behaviors), batch.behaviors + kept])
    retrieval = batch.retrieval
    return replace(
        batch,
        features=select_bags(batch.features, bags),
        candidate_request=batch.candidate_request[kept],
        labels=batch.labels[kept],
        weight=batch.weight[kept],
        numeric=batch.numeric[kept],
        retrieval=retrieval and Retrieval(*(part[kept] for part in vars(retrieval).values())),
        task_weight=None if batch.task_weight is None else batch.task_weight[kept],
        domain=None if batch.domain is None else batch.domain[kept],
        items=None,
        sizes=None,
    )


def _first_of_each(batch: RequestBatch) -> torch.Tensor:
    request = batch.candidate_request
    new = torch.ones_like(request, dtype=torch.bool)
    new[1:] = request[1:] != request[:-1]
    return torch.nonzero(new).squeeze(1)


def _single(batch: RequestBatch) -> RequestBatch:
    return _candidates(batch, torch.arange(min(1, batch.candidates)))


def _newest(batch: RequestBatch, most: int) -> RequestBatch:
    start = torch.maximum(batch.window_start, batch.window_end - most)
    return replace(batch, window_start=start, seen=batch.window_end - start, sizes=None)
