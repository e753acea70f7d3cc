"""From requests to scores, without Parquet: the same blocks, batches and model as in training."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from embeddings.errors import ConfigError
from trainer.data.batch import RequestBatch
from trainer.data.blocks import Block, Decoded, WindowedRows, with_windows
from trainer.data.collate import collate
from trainer.data.files import RowGroup
from trainer.data.row_group import Bags, FeatureIds, Floats, Ints
from trainer.data.rows import Columns, UserRows
from trainer.log.schema import FeatureInfo
from trainer.model.branch import Branch
from trainer.model.read.sequence import Behaviors
from trainer.serving.asked import Needs, Request
from trainer.serving.checks import seen as seen_of
from trainer.serving.vocabulary import Vocabulary
from trainer.serving.window_search import WindowSearch
from trainer.snapshot import Snapshot

# Delivered beside the ids when an answer is to name behaviors: their places in the request's history.
_PLACE = "history place"
MOST_EXPLAINED = 100


@dataclass(frozen=True)
class Kept:
    """What a branch kept for one candidate, heaviest first: places in the request's history, and weights."""

    places: list[int]
    weights: list[float]


@dataclass(frozen=True)
class Scored:
    """Answer to one request.

    Attributes:
        probabilities: float32 [c, T].
        kept: branch -> what it kept for each of the c candidates; empty unless asked for.
        history_used: behaviors that the model could see.
        unknown: place -> raw values there that stand for no id.
    """

    probabilities: Floats
    kept: Mapping[str, list[Kept]]
    history_used: int = 0
    unknown: Mapping[str, int] = field(default_factory=dict)


class Seconds(NamedTuple):
    """Where the time of one model call went: batch, look-ups and search; the rest of the model."""

    search: float
    ranking: float


class Scorer:
    """Scores requests with a snapshot. Calls must not overlap.

    Args:
        snapshot: its searches are replaced by ones that work request by request.
        chunk: behaviors of a chunk of clusters, for a model that searches clusters; 0 = not known.
        clock: seconds; of the wall, unless a measurement wants those of the processor.

    Raises:
        ConfigError: the model searches clusters, and their chunk is not known.
    """

    def __init__(
        self, snapshot: Snapshot, chunk: int = 0, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.snapshot, self.needs, self.clock = snapshot, Needs.of(snapshot), clock
        manifest = snapshot.manifest
        self.data = manifest.config.data
        if self.data.clusters and not chunk:
            raise ConfigError(
                f"{snapshot.path}: its model searches clusters, which are made offline; give --histories a "
                "log by `tandemrec cluster`"
            )
        self.columns = Columns(
            features=_infos(self.needs.features, self.needs),
            tasks=manifest.tasks,
            context=_infos(self.needs.context, self.needs),
            numeric=manifest.numeric,
            chunk=chunk if self.data.clusters else 0,
        )
        # `trainer.serving.current` sets them; requests may then hold raw values of these features.
        self.vocabularies: Mapping[str, Vocabulary] = {}
        self._searched = 0.0
        self.branches: dict[str, Branch] = {}
        for name, branch in snapshot.model.branches.items():
            assert isinstance(branch, Branch)
            self.branches[name] = branch
            if branch.search is not None:
                branch.search = WindowSearch.around(branch.search)
                branch.search.register_forward_hook(self._note_searched)

    @property
    def version(self) -> str:
        """Name of the snapshot's version."""
        return self.snapshot.path.name

    @property
    def tasks(self) -> tuple[str, ...]:
        return self.snapshot.manifest.tasks

    def batch(self, requests: Sequence[Request], places: bool = False) -> RequestBatch:
        """Requests side by side, as the reader lays them; with `places` under a key of their own."""
        columns = self.columns
        if places:
            columns = replace(columns, features={**columns.features, _PLACE: FeatureInfo(rows=1)})
        rows = _user_rows(requests, columns)
        windowed = with_windows(rows, self.data.history_length, self.data.ingestion_delay)
        blocks = [_block(windowed, request, r) for r, request in enumerate(requests)]
        return collate(blocks, self.data, columns, int(rows.candidate_offsets[-1]))

    def score(self, requests: Sequence[Request], explain: bool = False) -> tuple[list[Scored], Seconds]:
        """One model call for all requests; each gets what it would get alone, to 1e-6.

        The product of a matrix with more rows may round the last bit otherwise; nothing else differs.
        """
        started = self._searched = self.clock()
        batch = self.batch(requests, places=explain)
        seen: dict[str, tuple[Behaviors, Any]] = {}
        hooks = [self._watch(name, branch, seen) for name, branch in self.branches.items() if explain]
        try:
            probabilities = self.snapshot.score(batch).numpy()
        finally:
            for hook in hooks:
                hook.remove()
        ended = self.clock()
        skipped = np.repeat([r.skipped for r in requests], [r.count for r in requests]).tolist()
        kept = {name: _kept(batch, skipped, *found) for name, found in seen.items()}
        bounds = np.cumsum([request.count for request in requests])
        scored = [
            Scored(
                part,
                {name: found[end - request.count : end] for name, found in kept.items()},
                seen_of(request, self.needs),
                request.unknown,
            )
            for request, part, end in zip(
                requests, np.split(probabilities, bounds[:-1]), bounds.tolist(), strict=True
            )
        ]
        return scored, Seconds(self._searched - started, ended - self._searched)

    def _note_searched(self, *_: object) -> None:
        self._searched = self.clock()

    @staticmethod
    def _watch(name: str, branch: Branch, seen: dict[str, tuple[Behaviors, Any]]) -> Any:
        """Note what the branch's sequence model is given."""

        def note(_: object, given: tuple[Behaviors, Any]) -> None:
            if given[1] is not None:
                seen[name] = given

        return branch.sequence.register_forward_pre_hook(note)


def _infos(names: Sequence[str], needs: Needs) -> dict[str, FeatureInfo]:
    return {name: FeatureInfo(rows=needs.rows.get(name, 1)) for name in names}


def _block(windowed: WindowedRows, request: Request, r: int) -> Block:
    rows = Decoded(RowGroup(Path("request"), r), windowed)
    return Block(0, r, r + 1, int(request.history.time.size), request.count, rows)


def _user_rows(requests: Sequence[Request], columns: Columns) -> UserRows:
    """Every request as a user row of its own."""
    histories = [request.history for request in requests]
    behaviors = np.array([history.time.size for history in histories])
    counts = np.array([request.count for request in requests])
    places = {_PLACE: [Bags(np.arange(n)) for n in behaviors.tolist()]} if _PLACE in columns.features else {}
    ends = [np.searchsorted(request.history.time, request.time) for request in requests]
    numeric = [
        np.stack([request.numeric[name] for name in columns.numeric], axis=1)
        if columns.numeric
        else np.zeros((request.count, 0), dtype=np.float32)
        for request in requests
    ]
    clusters: dict[str, Ints] = {}
    if columns.chunk:
        for name in ("cluster_size", "cluster_time"):
            clusters[name] = np.concatenate([getattr(history, name) for history in histories])
    total = int(counts.sum())
    return UserRows(
        user_id=np.array([request.user_id for request in requests]),
        history_offsets=_offsets(behaviors),
        request_offsets=np.arange(len(requests) + 1),
        history=_side([h.features for h in histories], behaviors, columns.features, places),
        history_time=np.concatenate([history.time for history in histories]),
        request_id=np.arange(len(requests)),
        request_time=np.array([request.time for request in requests]),
        history_end=np.array(ends, dtype=np.int64),
        candidate_offsets=_offsets(counts),
        candidates=_side([request.candidates for request in requests], counts, columns.features),
        context=_side([request.context for request in requests], np.ones_like(counts), columns.context),
        labels=np.zeros((total, len(columns.tasks)), dtype=np.float32),
        numeric=np.concatenate(numeric),
        weight=np.broadcast_to(np.float32(1), total),
        **clusters,
    )


def _offsets(sizes: Ints) -> Ints:
    offsets: Ints = np.concatenate([[0], np.cumsum(sizes)])
    return offsets


def _side(
    parts: Sequence[Mapping[str, Bags]],
    sizes: Ints,
    names: Mapping[str, FeatureInfo],
    more: Mapping[str, list[Bags]] | None = None,
) -> FeatureIds:
    """Ids of all requests; a feature that some request lacks has empty bags there."""
    bags: dict[str, list[Bags | None]] = {
        name: [part.get(name) for part in parts] for name in names if any(name in p for p in parts)
    }
    bags |= {name: list(found) for name, found in (more or {}).items()}
    single = [name for name, found in bags.items() if all(b is not None and b.offsets is None for b in found)]
    ids = np.empty((len(single), int(sizes.sum())), dtype=np.int64)
    for row, name in zip(ids, single, strict=True):
        np.concatenate([b.values for b in bags[name] if b is not None], out=row)
    multi = {name: _joined(found, sizes) for name, found in bags.items() if name not in single}
    return FeatureIds(single, ids, multi)


def _joined(parts: Sequence[Bags | None], sizes: Ints) -> Bags:
    lengths, values = [], []
    for part, size in zip(parts, sizes.tolist(), strict=True):
        if part is None:
            lengths.append(np.zeros(size, dtype=np.int64))
            continue
        values.append(part.values)
        lengths.append(np.ones(size, dtype=np.int64) if part.offsets is None else np.diff(part.offsets))
    found: list[npt.NDArray[Any]] = values or [np.empty(0, dtype=np.int64)]
    return Bags(np.concatenate(found), _offsets(np.concatenate(lengths)))


def _kept(
    batch: RequestBatch, skipped: Sequence[int], behaviors: Behaviors, weight_CHK: torch.Tensor
) -> list[Kept]:
    """For each candidate, the heaviest kept behaviors; with several heads, by their mean weight.

    `skipped`: of each candidate's request, behaviors that were sent before those it holds.
    """
    kept = behaviors.selection
    place = batch.features[_PLACE].values()
    weight = weight_CHK.mean(1).masked_fill(~kept.mask, -torch.inf)
    best = weight.topk(min(MOST_EXPLAINED, weight.shape[1]), dim=1)
    found = []
    for before, index, values in zip(skipped, kept.index.gather(1, best.indices), best.values, strict=True):
        real = values > -torch.inf
        found.append(Kept((place[index[real]] + before).tolist(), values[real].tolist()))
    return found
