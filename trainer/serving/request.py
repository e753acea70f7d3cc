"""A request to score: its JSON form, its arrays, and every check that must come before the model sees it.

A request is one user's history, oldest first, and the candidates to score. Ids are the dense ids of the log
that the snapshot was trained on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from embeddings.errors import TandemError
from trainer.data.row_group import Bags, Floats, Ints
from trainer.snapshot import Snapshot

Doubles = npt.NDArray[np.float64]
Int64 = Annotated[int, Field(strict=True, ge=-(2**63), lt=2**63)]
Number = Annotated[float, Field(allow_inf_nan=False)]
# One id each, or several each; which of the two, the first item says.
Ids = Annotated[list[Int64] | list[list[Int64]], Field(union_mode="left_to_right")]


class RequestError(TandemError):
    """A request that cannot be scored.

    Args:
        status: HTTP status of the answer; problem: what is wrong, and where in the request.
    """

    def __init__(self, status: int, problem: str) -> None:
        self.status = status
        super().__init__(problem)


@dataclass(frozen=True)
class Limits:
    """What one body may ask for.

    Attributes:
        body: bytes; requests: in one body; history: behaviors of a request; candidates: of a request.
    """

    body: int = 64 << 20
    requests: int = 64
    history: int = 100_000
    candidates: int = 5_000


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class HistoryBody(_Body):
    """A history, oldest behavior first; all lists are equally long.

    Attributes:
        timestamp: unix seconds, ascending.
        features: ids of every behavior.
        cluster_size, cluster_time: of the clusters, for a model that searches clusters.
    """

    timestamp: list[Int64]
    features: dict[str, Ids]
    cluster_size: list[Int64] | None = None
    cluster_time: list[Int64] | None = None


class RequestBody(_Body):
    """One user and his candidates.

    Attributes:
        user_id: whose stored history is meant, where the server has histories; or any name of the user.
        history: sent along; without it, the stored one of `user_id`.
        time: of the request, unix seconds; only older behaviors are seen. Left out, all of them are.
        candidates: ids of every candidate.
        context: ids of the request.
        numeric: numbers of every candidate.
    """

    user_id: Int64 | None = None
    history: HistoryBody | None = None
    time: Int64 | None = None
    candidates: dict[str, Ids]
    context: dict[str, Int64 | list[Int64]] = Field(default_factory=dict)
    numeric: dict[str, list[Number]] = Field(default_factory=dict)


class ScoreBody(_Body):
    """What POST /score takes.

    Attributes:
        explain: tell which behaviors were kept for every candidate, and their weights.
    """

    requests: list[RequestBody] = Field(min_length=1)
    explain: bool = False


@dataclass(frozen=True)
class History:
    """Behaviors of one user, oldest first.

    Attributes:
        time: int64 [n]; features: name -> ids of n behaviors.
        cluster_size, cluster_time: int64 [n], or None.
    """

    time: Ints
    features: Mapping[str, Bags]
    cluster_size: Ints | None = None
    cluster_time: Ints | None = None


@dataclass(frozen=True)
class Request:
    """A request as arrays: n behaviors, c candidates.

    Attributes:
        time: unix seconds; candidates: name -> ids of c candidates; count: c.
        context: name -> ids, one bag each; numeric: name -> [c], float32 once checked.
    """

    user_id: int
    history: History
    time: int
    candidates: Mapping[str, Bags]
    count: int
    context: Mapping[str, Bags]
    numeric: Mapping[str, Floats | Doubles] = field(default_factory=dict)


@dataclass(frozen=True)
class Needs:
    """What a snapshot must be given.

    Attributes:
        features: keys of behaviors and candidates, in the model's order; context: of the request.
        behavior, candidate: those that this side must have. A feature of one side only has nothing on the
            other.
        numeric: numbers of a candidate; rows: feature -> table rows; clusters: histories carry clusters.
    """

    features: tuple[str, ...]
    context: tuple[str, ...]
    behavior: tuple[str, ...]
    candidate: tuple[str, ...]
    numeric: tuple[str, ...]
    rows: Mapping[str, int]
    clusters: bool

    @staticmethod
    def of(snapshot: Snapshot) -> Needs:
        manifest = snapshot.manifest
        names, inputs = manifest.recorded_features, manifest.inputs
        return Needs(
            names,
            manifest.recorded_context,
            tuple(name for name in names if inputs[name].of_behaviors),
            tuple(name for name in names if inputs[name].of_candidates),
            manifest.numeric,
            manifest.features,
            manifest.config.data.clusters,
        )


def read_json(body: bytes) -> ScoreBody:
    """Raises RequestError (422) naming the place of the first mistake."""
    try:
        return ScoreBody.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        place = ".".join(map(str, first["loc"]))[:200]
        raise RequestError(422, f"{place}: {first['msg']}" if place else str(first["msg"])[:300]) from None


def from_json(
    body: RequestBody, stored: Mapping[int, History], needs: Needs, limits: Limits, place: str
) -> Request:
    """Arrays of one request of a body that `read_json` has read, checked.

    Args:
        stored: histories by user id; place: of the request in the body, for messages.
    """
    if body.history is not None:
        history = _history(body.history)
    else:
        history = stored_history(stored, body.user_id, place)
    candidates = {name: _bags(ids) for name, ids in body.candidates.items()}
    request = Request(
        user_id=body.user_id or 0,
        history=history,
        time=_time(body.time, history),
        candidates=candidates,
        count=max((_size(bags) for bags in candidates.values()), default=0),
        context={name: _one_bag(ids) for name, ids in body.context.items()},
        numeric={name: np.array(values, dtype=np.float64) for name, values in body.numeric.items()},
    )
    return checked(request, needs, limits, place)


def stored_history(stored: Mapping[int, History], user: int | None, place: str) -> History:
    """Raises RequestError: 422 without a user, 404 for an unknown one."""
    if user is None:
        raise RequestError(422, f"{place}: give a history, or a user_id where the server has histories")
    if not stored:
        raise RequestError(422, f"{place}.history: missing, and this server was started without --histories")
    if user not in stored:
        raise RequestError(404, f"{place}.user_id: no stored history of user {user}")
    return stored[user]


def _time(given: int | None, history: History) -> int:
    newest = int(history.time[-1]) if history.time.size else 0
    return min(newest, 2**63 - 2) + 1 if given is None else given


def _history(body: HistoryBody) -> History:
    clusters = (body.cluster_size, body.cluster_time)
    size, time = (None if part is None else _ints(part) for part in clusters)
    return History(
        _ints(body.timestamp), {name: _bags(ids) for name, ids in body.features.items()}, size, time
    )


def _ints(values: Sequence[int]) -> Ints:
    return np.array(values, dtype=np.int64)


def _bags(ids: Any) -> Bags:
    if not ids or not isinstance(ids[0], list):
        return Bags(_ints(ids))
    offsets = np.zeros(len(ids) + 1, dtype=np.int64)
    np.cumsum([len(bag) for bag in ids], out=offsets[1:])
    return Bags(_ints(list(chain.from_iterable(ids))), offsets)


def _one_bag(ids: int | list[int]) -> Bags:
    values = _ints(ids if isinstance(ids, list) else [ids])
    return Bags(values, np.array([0, values.size], dtype=np.int64))


def _size(bags: Bags) -> int:
    return bags.values.size if bags.offsets is None else bags.offsets.size - 1


def checked(request: Request, needs: Needs, limits: Limits, place: str) -> Request:
    """The request, of what the model needs alone.

    Raises:
        RequestError: 413 above a limit; 422 with the feature, its place and range for anything else.
    """
    history, n = request.history, int(request.history.time.size)
    _check_limit(n, limits.history, f"{place}.history", "behaviors", "--max-history")
    _check_limit(request.count, limits.candidates, f"{place}.candidates", "candidates", "--max-candidates")
    if not request.count:
        raise RequestError(422, f"{place}.candidates: there is none")
    _check_times(history.time, f"{place}.history.timestamp")
    where = f"{place}.history.features"
    behaviors = _checked_side(history.features, needs.features, needs.behavior, n, needs.rows, where)
    where = f"{place}.candidates"
    candidates = _checked_side(
        request.candidates, needs.features, needs.candidate, request.count, needs.rows, where
    )
    context = _checked_side(request.context, needs.context, needs.context, 1, needs.rows, f"{place}.context")
    cut = _checked_clusters(history, needs, place)
    numeric = {name: _numbers(request, name, place) for name in needs.numeric}
    return Request(
        request.user_id,
        History(history.time, behaviors, *cut),
        request.time,
        candidates,
        request.count,
        context,
        numeric,
    )


def _check_limit(found: int, most: int, place: str, what: str, option: str) -> None:
    if found > most:
        raise RequestError(413, f"{place}: {found:,} {what}, the server takes {most:,} ({option})")


def _check_times(times: Ints, place: str) -> None:
    if times.size and times.min() < -(2**53):
        raise RequestError(422, f"{place}: {times.min()} is no time in unix seconds")
    falls = np.flatnonzero(times[1:] < times[:-1])
    if falls.size:
        raise RequestError(422, f"{place}[{falls[0] + 1}]: older than the one before; sort by time")


def _checked_side(
    given: Mapping[str, Bags],
    known: Sequence[str],
    needed: Sequence[str],
    count: int,
    rows: Mapping[str, int],
    place: str,
) -> dict[str, Bags]:
    missing = [name for name in needed if name not in given]
    if missing and count:
        raise RequestError(422, f"{place}.{missing[0]}: missing; the snapshot needs {', '.join(needed)}")
    found = {name: given[name] for name in known if name in given}
    for name, bags in found.items():
        if _size(bags) != count:
            raise RequestError(422, f"{place}.{name}: {_size(bags):,} entries, expected {count:,}")
        _check_ids(bags.values, rows.get(name, 2**63 - 1), f"{place}.{name}")
    return found


def _check_ids(ids: Any, rows: int, place: str) -> None:
    # As unsigned numbers negative ids are the largest, so that one pass finds both.
    if ids.size and ids.view(np.uint64).max() >= rows:
        at = int(np.flatnonzero((ids < 0) | (ids >= rows))[0])
        raise RequestError(422, f"{place}[{at}]: id {ids[at]} lies outside [0, {rows})")


def _checked_clusters(history: History, needs: Needs, place: str) -> tuple[Ints | None, Ints | None]:
    if not needs.clusters:
        return None, None
    size, time = history.cluster_size, history.cluster_time
    for name, part in (("cluster_size", size), ("cluster_time", time)):
        if part is None or part.size != history.time.size:
            raise RequestError(422, f"{place}.history.{name}: one for each behavior is needed")
    if size is not None and size.size and size.min() < 0:
        raise RequestError(422, f"{place}.history.cluster_size: negative")
    return size, time


def _numbers(request: Request, name: str, place: str) -> Floats:
    place = f"{place}.numeric.{name}"
    if name not in request.numeric:
        raise RequestError(422, f"{place}: missing; the snapshot needs it")
    given = request.numeric[name]
    if given.size != request.count:
        raise RequestError(422, f"{place}: {given.size:,} entries, expected {request.count:,}")
    # Compared before the conversion, which would warn of what does not fit.
    if not (np.abs(given) < np.finfo(np.float32).max).all():
        raise RequestError(422, f"{place}: holds a number that is not finite in float32")
    return given.astype(np.float32)
