"""Similarities of candidates, for the blocks of a batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np

from embeddings.errors import ConfigError
from trainer.config.sections import DataConfig
from trainer.config.similarity import SimilarityConfig
from trainer.data.similarity.directions import Reals, cosines, cosines_of_pairs
from trainer.data.similarity.encoding import bags_of_tiers, encoder_of
from trainer.data.similarity.keys import Key
from trainer.data.similarity.statistics import STATISTICS, Ints, counts_of_tiers
from trainer.data.similarity.vectors import NOWHERE, Vectors
from trainer.log.bags import Bags, Ids
from trainer.log.encoders.code import codes_of_reals
from trainer.log.schema import LogManifest

# Cosines that are in memory at once, with some 24 bytes each.
_MOST_PAIRS: Final = 1 << 20


class BlockIds(NamedTuple):
    """The keys of one block: n behaviors, r requests, c candidates.

    Attributes:
        behaviors: int64 [n], ids; None where the similarity compares with requests.
        candidates: int64 [c], ids; requests: int64 [r], ids; None where it compares with behaviors.
        start, end: int64 [r], the behaviors that each request may see; counts: [r], candidates of each.
    """

    behaviors: Ids | None
    candidates: Ids
    requests: Ids | None
    start: Ints
    end: Ints
    counts: Ints


@dataclass(frozen=True, eq=False)
class Similarity:
    """One similarity of a run, over a log.

    Attributes:
        of, to: keys of the candidates and of what they are compared with; vectors, others: of these.
    """

    name: str
    settings: SimilarityConfig
    of: Key
    to: Key
    vectors: Vectors
    others: Vectors

    @property
    def of_behaviors(self) -> bool:
        """Whether candidates are compared with behaviors, and not with one vector of the request."""
        return self.to.side == "items"

    def bags(self, blocks: Sequence[BlockIds]) -> dict[str, Bags]:
        """The ids of all candidates of some blocks, one bag each, by the name of the feature.

        A bag with the id 0 is that of a candidate without a vector, or with nothing to compare it with.
        """
        compared = [self._of_block(block) for block in blocks]
        value = np.concatenate(compared)
        if self.settings.statistic == "histogram":
            counts = value.astype(np.int64)
            return {self.name: bags_of_tiers(counts, counts.sum(axis=1) > 0)}
        codes = codes_of_reals(value[:, 0], self.settings.step)
        encoded = encoder_of(self.settings).encode(codes)
        return {f"{self.name}{suffix}": bags for suffix, bags in encoded.items()}

    def _of_block(self, block: BlockIds) -> Reals:
        """[c, 1], the statistic of each candidate, NaN where there is none; or [c, tiers], counts."""
        settings = self.settings
        tiers = settings.tiers if settings.statistic == "histogram" else 0
        place = self.vectors.places(block.candidates)
        value = np.zeros((place.size, tiers)) if tiers else np.full((place.size, 1), np.nan)
        for some, cosine in self._cosines(block, place):
            if tiers:
                value[some] = counts_of_tiers(cosine, tiers)
            else:
                value[some, 0] = STATISTICS[settings.statistic](cosine, settings)
        return value

    def _cosines(self, block: BlockIds, place: Ints) -> Iterator[tuple[Ints, Reals]]:
        """Candidates that have a vector, and their cosines with all that they are compared with: [c, n]."""
        if self.of_behaviors:
            yield from self._with_behaviors(block, place)
            return
        assert block.requests is not None
        other = np.repeat(self.others.places(block.requests), block.counts)
        both = np.flatnonzero((place != NOWHERE) & (other != NOWHERE))
        if both.size:
            left, right = self.vectors.taken(place[both]), self.others.taken(other[both])
            yield both, cosines_of_pairs(left, right)[:, None]

    def _with_behaviors(self, block: BlockIds, place: Ints) -> Iterator[tuple[Ints, Reals]]:
        """Request by request; one product of matrices serves consecutive requests, if memory allows."""
        assert block.behaviors is not None
        behavior = self.others.places(block.behaviors)
        held = np.flatnonzero(behavior != NOWHERE)
        given = np.flatnonzero(place != NOWHERE)
        if not (held.size and given.size):
            return
        # Windows and requests among those that have vectors.
        start, end = np.searchsorted(held, block.start), np.searchsorted(held, block.end)
        bounds = np.searchsorted(given, np.concatenate([[0], np.cumsum(block.counts)]))
        left, right = self.vectors.taken(place[given]), self.others.taken(behavior[held])
        for first, last in _stretches(start, end, bounds):
            low, high = int(start[first:last].min()), int(end[first:last].max())
            most = max(1, _MOST_PAIRS // (high - low))
            for begin in range(int(bounds[first]), int(bounds[last]), most):
                stop = min(begin + most, int(bounds[last]))
                cosine = cosines(left[begin:stop], right[low:high])
                for request in range(first, last):
                    some = slice(max(begin, int(bounds[request])), min(stop, int(bounds[request + 1])))
                    if some.start < some.stop and start[request] < end[request]:
                        seen = slice(int(start[request]) - low, int(end[request]) - low)
                        yield given[some], cosine[some.start - begin : some.stop - begin, seen]


def _stretches(start: Ints, end: Ints, bounds: Ints) -> Iterator[tuple[int, int]]:
    """Consecutive requests [first, last) whose candidates and windows, taken together, are few enough.

    None begins with a request that has no candidate or an empty window.
    """
    first, requests = 0, start.size
    while first < requests:
        if start[first] == end[first] or bounds[first] == bounds[first + 1]:
            first += 1
            continue
        low, high, last = start[first], end[first], first + 1
        while last < requests:
            wide = max(high, end[last]) - min(low, start[last])
            if wide * (bounds[last + 1] - bounds[first]) > _MOST_PAIRS:
                break
            low, high, last = min(low, start[last]), max(high, end[last]), last + 1
        yield first, last
        first = last


def vectors_used(data: DataConfig) -> list[str]:
    """The names of all vectors that similarities compare, each once."""
    return list(dict.fromkeys(name for each in data.similarity.values() for name in (each.of, each.to)))


def keys_of(data: DataConfig) -> list[str]:
    """The names of all keys that similarities compare, each once."""
    return list(dict.fromkeys(data.vectors[name].key for name in vectors_used(data)))


def keys_in_log(data: DataConfig, manifest: LogManifest) -> dict[str, Key]:
    """What has the vectors of each name, in a log.

    Raises:
        ConfigError: see `Key.of`.
    """
    return {name: Key.of(manifest, name, data.vectors[name].key) for name in vectors_used(data)}


def similarities_of(
    data: DataConfig, keys: Mapping[str, Key], vectors: Mapping[str, Vectors]
) -> tuple[Similarity, ...]:
    """The similarities of a config.

    Args:
        keys, vectors: by the names of the vectors in the config.

    Raises:
        ConfigError: candidates or behaviors lack a key, or two vectors are not of one width.
    """
    found = []
    for name, settings in data.similarity.items():
        of, to = keys[settings.of], keys[settings.to]
        where = f"data.similarity.{name}"
        if of.side != "items" or of.info is None or not of.info.of_candidates:
            raise ConfigError(
                f"{where}.of = {settings.of!r}: its key is {of.name!r}, which candidates do not have"
            )
        if to.side == "items" and (to.info is None or not to.info.of_behaviors):
            raise ConfigError(
                f"{where}.to = {settings.to!r}: its key is {to.name!r}, which only candidates have; compare "
                "with vectors of behaviors, of a context feature or of users"
            )
        mine, theirs = vectors[settings.of], vectors[settings.to]
        if mine.dim != theirs.dim:
            raise ConfigError(
                f"{where}: vectors of {settings.of!r} have {mine.dim} numbers, those of {settings.to!r} "
                f"{theirs.dim}; only vectors of one model can be compared"
            )
        found.append(Similarity(name, settings, of, to, mine, theirs))
    return tuple(found)
