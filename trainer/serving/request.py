"""A request as arrays, the limits of what a server takes, and what a snapshot needs to be given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from embeddings.errors import TandemError
from trainer.data.row_group import Floats
from trainer.log.bags import Bags, Ints
from trainer.log.encoders.encoder import Encoder
from trainer.snapshot import Snapshot
from trainer.snapshot.manifest import names_of_inputs

Doubles = npt.NDArray[np.float64]
# The year 2242 in seconds. Milliseconds are larger from April 1970 on.
_LATEST = 1 << 33


class RequestError(TandemError):
    """A request that cannot be scored.

    Args:
        status: HTTP status of the answer; problem: what is wrong, and where in the request.
        retry_after: seconds after which trying again may help; None: it does not, or nobody knows when.
    """

    def __init__(self, status: int, problem: str, retry_after: int | None = None) -> None:
        self.status, self.retry_after = status, retry_after
        super().__init__(problem)


@dataclass(frozen=True)
class Limits:
    """What one body may ask for.

    Attributes:
        body: bytes; requests: in one body.
        history: behaviors of a request that the model reads; candidates: of a request.
        bag: ids of one behavior, candidate or context; ids: values of a body, shared ones counted each time.
        json: bytes of a body in JSON, whose parser needs some ten times as many.
        explained: candidates of a body that is to be explained.
        cost: of a body, in pairs: see `trainer.serving.cost`.
    """

    body: int = 64 << 20
    requests: int = 64
    history: int = 100_000
    candidates: int = 5_000
    bag: int = 1_000
    ids: int = 8 << 20
    json: int = 8 << 20
    explained: int = 5_000
    cost: int = 4_000_000_000


@dataclass(frozen=True)
class History:
    """Behaviors of one user, oldest first.

    Attributes:
        time: int64 [n]; features: name -> ids of n behaviors, or codes of numbers.
        cluster_size, cluster_time: int64 [n], or None.
    """

    time: Ints
    features: Mapping[str, Bags]
    cluster_size: Ints | None = None
    cluster_time: Ints | None = None

    def part(self, chosen: slice) -> History:
        """Consecutive behaviors, copied."""
        features = {name: bags.part(chosen) for name, bags in self.features.items()}
        clusters = (None if c is None else c[chosen].copy() for c in (self.cluster_size, self.cluster_time))
        return History(self.time[chosen].copy(), features, *clusters)


@dataclass(frozen=True)
class Request:
    """A request as arrays: n behaviors, c candidates.

    Attributes:
        time: unix seconds; candidates: name -> ids of c candidates; count: c.
        context: name -> ids, one bag each; numeric: name -> [c], float32 once checked.
        skipped: behaviors that were sent before the first of `history`.
        unknown: place -> how many raw values stand for no id there.
    """

    user_id: int
    history: History
    time: int
    candidates: Mapping[str, Bags]
    count: int
    context: Mapping[str, Bags]
    numeric: Mapping[str, Floats | Doubles] = field(default_factory=dict)
    skipped: int = 0
    unknown: Mapping[str, int] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """What its arrays take."""
        history = self.history
        arrays: list[npt.NDArray[np.generic] | None] = [history.cluster_size, history.cluster_time]
        arrays += [history.time, *self.numeric.values()]
        for side in (history.features, self.candidates, self.context):
            arrays += [part for bags in side.values() for part in (bags.values, bags.offsets)]
        return sum(array.nbytes for array in arrays if array is not None)


class Part(NamedTuple):
    """A part of a request that holds ids or numbers by name: every form of a body has the same parts.

    Attributes:
        name: `candidates`, `history`, `context` or `numeric`; raw values without an id are counted under it.
        path: where it is in a JSON request; prefix: of its columns in Arrow and in the sequence log.
        known: the names that the snapshot reads, in its order; needed: those of them that must be given.
    """

    name: str
    path: str
    prefix: str
    known: tuple[str, ...]
    needed: tuple[str, ...]


@dataclass(frozen=True)
class Needs:
    """What a snapshot must be given.

    Attributes:
        candidates, history, context, numeric: the parts of a request. Candidates and history know the same
            features; one that only the other side has is not needed.
        encoders: features that are numbers -> what makes ids of them.
        users: whether the model compares candidates with vectors of users, by their numbers.
        rows: feature -> table rows, which ids must lie below unless they come and go.
        living: features whose ids come and go, and may be any integers; hashed: those of them whose ids are
            hashes of text.
        clusters: whether histories carry clusters.
        multi: features and context that may have several ids, or none; the others have exactly one.
        length: behaviors that the model reads at most; delay: seconds that the youngest of them are old.
        latest: unix seconds; later times are in another unit.
    """

    candidates: Part
    history: Part
    context: Part
    numeric: Part
    rows: Mapping[str, int]
    clusters: bool
    multi: frozenset[str]
    length: int
    delay: int
    latest: int
    living: frozenset[str] = frozenset()
    hashed: frozenset[str] = frozenset()
    encoders: Mapping[str, Encoder] = field(default_factory=dict)
    users: bool = False

    @property
    def parts(self) -> tuple[Part, ...]:
        return self.candidates, self.history, self.context, self.numeric

    @staticmethod
    def of(snapshot: Snapshot) -> Needs:
        manifest = snapshot.manifest
        inputs, data, numeric = manifest.inputs, manifest.config.data, manifest.numeric
        names = names_of_inputs(manifest.recorded_features, inputs)
        context = names_of_inputs(manifest.recorded_context, inputs)
        keys = {name: data.vectors[name].key for name in manifest.vectors}
        times = snapshot.recorded.batch.request_time
        # A model that was trained on times of another unit takes times as late as twice its own.
        trained = int(times.max()) if times.numel() else 0
        of_candidates = tuple(name for name in names if inputs[name].of_candidates)
        of_behaviors = tuple(name for name in names if inputs[name].of_behaviors)
        return Needs(
            Part("candidates", "candidates", "candidate_", names, of_candidates),
            Part("history", "history.features", "history_", names, of_behaviors),
            Part("context", "context", "context_", context, context),
            Part("numeric", "numeric", "numeric_", numeric, numeric),
            manifest.features,
            data.clusters,
            frozenset(name for name, given in inputs.items() if given.multi),
            data.history_length,
            data.ingestion_delay,
            max(_LATEST, 2 * trained),
            frozenset(
                [*manifest.ids, *(keys[name] for name, entry in manifest.vectors.items() if entry.raw)]
            ),
            frozenset(
                [name for name, entry in manifest.ids.items() if entry.hashed]
                + [keys[name] for name, entry in manifest.vectors.items() if entry.hashed]
            ),
            {name: given.encoder for name, given in inputs.items() if given.encoder is not None},
            any(key not in inputs for key in keys.values()),
        )
