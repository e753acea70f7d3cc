"""A batch of requests where everything has one id of every feature, made in one go.

`trainer.data.collate` lays any rows of a log side by side: lists of ids, hard searches, clusters, encoded
numbers. It goes through the columns of a row group, its windows and its blocks. Most requests need none of
that, and then the way costs a small request more than its look-ups. What is made here is the same batch
(property test), with `OneIdBags` in the place of KeyedJaggedTensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from embeddings.lookup.jagged import OneIdBags
from trainer.config.sections import DataConfig
from trainer.data.batch import RequestBatch, Sizes
from trainer.data.rows import Columns
from trainer.log.bags import Bags, Ids, Ints
from trainer.serving.request import Request


class PlainBatches:
    """Makes such batches for one snapshot.

    Args:
        columns: of the requests; config: of the data.
    """

    def __init__(self, columns: Columns, config: DataConfig) -> None:
        self.columns, self.length, self.delay = columns, config.history_length, config.ingestion_delay
        self.tasks = len(columns.tasks)
        self.features, self.context = list(columns.features), list(columns.context)
        encoded = any(info.encoder for info in (*columns.features.values(), *columns.context.values()))
        searched = config.search.levels or columns.chunk or columns.similarities
        self._never = bool(encoded or searched or not self.features)

    def of(self, requests: Sequence[Request]) -> RequestBatch | None:
        """The batch of these requests; None where something has several ids of a feature, or none."""
        if self._never or not all(map(self._is_plain, requests)):
            return None
        windows = [self._window(request) for request in requests]
        lengths = [window.stop - window.start for window in windows]
        counts = [request.count for request in requests]
        stops = np.cumsum(lengths)
        return RequestBatch(
            features=self._features(requests, windows),
            behavior_time=_joined(
                request.history.time[w] for request, w in zip(requests, windows, strict=True)
            ),
            request_time=torch.tensor([request.time for request in requests]),
            window_start=torch.from_numpy(stops - lengths),
            window_end=torch.from_numpy(stops),
            seen=torch.tensor(lengths),
            user_id=torch.tensor([request.user_id for request in requests]),
            request_id=torch.arange(len(requests)),
            candidate_request=torch.from_numpy(np.repeat(np.arange(len(counts)), counts)),
            labels=torch.zeros(sum(counts), self.tasks),
            weight=torch.ones(sum(counts)),
            numeric=self._numeric(requests, sum(counts)),
            context=self._context(requests),
            retrieval=None,
            step_candidates=sum(counts),
            domain=self._domain(requests, counts),
            sizes=self._sizes(lengths, stops, counts),
        )

    def _is_plain(self, request: Request) -> bool:
        sides = request.history.features, request.candidates
        return all(_has_one(side, self.features) for side in sides) and _has_one(
            request.context, self.context
        )

    def _window(self, request: Request) -> slice:
        """The behaviors that the request may see, of its history."""
        time = request.history.time
        # A behavior is visible if it is older than the request's time less the delay.
        end = int(time.searchsorted(request.time - self.delay))
        return slice(max(end - self.length, 0), end)

    def _features(self, requests: Sequence[Request], windows: Sequence[slice]) -> OneIdBags:
        """Key by key, all behaviors, then all candidates."""
        rows = []
        for name in self.features:
            parts = [r.history.features[name].values[w] for r, w in zip(requests, windows, strict=True)]
            rows.append(_joined([*parts, *(request.candidates[name].values for request in requests)]))
        return OneIdBags(self.features, torch.stack(rows) if len(rows) > 1 else rows[0][None])

    def _context(self, requests: Sequence[Request]) -> OneIdBags | None:
        if not self.context:
            return None
        rows = [_joined(request.context[name].values for request in requests) for name in self.context]
        return OneIdBags(self.context, torch.stack(rows))

    def _numeric(self, requests: Sequence[Request], count: int) -> Tensor:
        """[C, X]."""
        if not self.columns.numeric:
            return torch.zeros(count, 0)
        columns = [[request.numeric[name] for request in requests] for name in self.columns.numeric]
        numbers = np.stack([np.concatenate(column) for column in columns], axis=1)
        return torch.from_numpy(numbers)

    def _domain(self, requests: Sequence[Request], counts: Sequence[int]) -> Tensor | None:
        """[C]."""
        column = self.columns.domain
        if column is None:
            return None
        of_requests = [(r.context if column.of_requests else r.candidates)[column.feature] for r in requests]
        ids = _joined(bags.values for bags in of_requests)
        return ids.repeat_interleave(torch.tensor(counts)) if column.of_requests else ids

    def _sizes(self, lengths: Sequence[int], stops: Ints, counts: Sequence[int]) -> Sizes:
        total = sum(counts)
        some = int(bool(sum(lengths) + total))
        # Labels are all 0.
        return Sizes(
            windows=tuple(lengths),
            starts=tuple((stops - lengths).tolist()),
            candidates=tuple(counts),
            bags=(some,) * len(self.features),
            one_id=True,
            observed=(total,) * self.tasks,
            positives=(0,) * self.tasks,
            pairs=(0,) * self.tasks,
        )


def _has_one(side: Mapping[str, Bags], names: Sequence[str]) -> bool:
    """Whether everything has one id of each feature."""
    return all(name in side and side[name].offsets is None for name in names)


def _joined(parts: Iterable[Ids]) -> Tensor:
    """In memory of its own: those of a body may not be written to."""
    return torch.from_numpy(np.concatenate(list(parts), dtype=np.int64))
