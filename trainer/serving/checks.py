"""Every check of a request that must come before the model sees it, and the cut to what the model reads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from trainer.data.row_group import Floats
from trainer.log.bags import Bags, Ints
from trainer.serving.request import History, Limits, Needs, Part, Request, RequestError


def check_request(request: Request, needs: Needs, limits: Limits, at: Callable[[str], str]) -> Request:
    """The request with what the model needs alone.

    Args:
        at: names a place in the request, for messages; see `trainer.serving.form.RequestForm.at`.

    Raises:
        RequestError: 413 above a limit; 422 with the feature, its place and range for anything else.
    """
    history, n = request.history, int(request.history.time.size)
    _check_limit(request.count, limits.candidates, at("candidates"), "candidates", "limits.candidates")
    if not request.count:
        raise RequestError(422, f"{at('candidates')}: there is none")
    check_times(history.time, needs.latest, at("history.timestamp"))
    if not 0 <= request.time <= needs.latest:
        check_times(np.array([request.time]), needs.latest, at("time"), several=False)
    start, end = _window(history, request.time, needs)
    _check_limit(end - start, limits.history, at("history"), "behaviors", "limits.history")

    def ids(part: Part, given: Mapping[str, Bags], count: int) -> dict[str, Bags]:
        """The known features of a part of `count` behaviors, candidates or requests."""
        missing = [name for name in part.needed if name not in given]
        if missing and count:
            needed = ", ".join(part.needed)
            where = at(f"{part.path}.{missing[0]}")
            raise RequestError(422, f"{where}: missing; the snapshot needs {needed}")
        names = [name for name in part.known if name in given]
        places = {name: at(f"{part.path}.{name}") for name in names}
        return {n: _checked_bags(n, given[n], count, needs, limits, places[n]) for n in names}

    behaviors = ids(needs.history, history.features, n)
    candidates = ids(needs.candidates, request.candidates, request.count)
    context = ids(needs.context, request.context, 1)
    clusters = _checked_clusters(history, needs, at)
    return replace(
        request,
        history=History(history.time, behaviors, *clusters),
        candidates=candidates,
        context=context,
        numeric={n: _numbers(request, n, at(f"{needs.numeric.path}.{n}")) for n in needs.numeric.known},
    )


def check_names(given: Iterable[str], part: Part, place: str) -> None:
    """Refuses a name that the snapshot does not know where one that it needs is missing: a misspelled one.

    Where none is missing, further names pass: clients may send what another version of the model reads.

    Raises:
        RequestError: 422 with the first such name, and those that are known.
    """
    given = list(given)
    unknown = [name for name in given if name not in part.known]
    if unknown and not set(part.needed).issubset(given):
        has = ", ".join(part.known) or "none"
        raise RequestError(422, f"{place}: {unknown[0][:80]} is not known; this snapshot has {has}")


def cut_history(request: Request, needs: Needs) -> Request:
    """A checked request with only those behaviors that the model reads: its scores are the same."""
    start, end = _window(request.history, request.time, needs)
    if not start and end == request.history.time.size:
        return request
    # Copies: slices would keep all that was sent in memory.
    return replace(request, history=request.history.part(slice(start, end)), skipped=request.skipped + start)


def visible_behaviors(request: Request, needs: Needs) -> int:
    """How many behaviors the model reads."""
    visible = np.searchsorted(request.history.time, request.time - needs.delay)
    return min(int(visible), needs.length)


def _window(history: History, when: int, needs: Needs) -> tuple[int, int]:
    """[start, end) of the behaviors that scoring needs: all, where clusters count from the first."""
    if needs.clusters:
        return 0, int(history.time.size)
    visible, end = np.searchsorted(history.time, [when - needs.delay, when]).tolist()
    return max(visible - needs.length, 0), end


def _check_limit(count: int, most: int, place: str, what: str, option: str) -> None:
    if count > most:
        raise RequestError(413, f"{place}: {count:,} {what}, the server takes {most:,} ({option})")


def check_times(times: Ints, latest: int, place: str, several: bool = True) -> None:
    """Unix seconds, ascending.

    Args:
        several: whether they are a list, in which messages name the wrong one's place.

    Raises:
        RequestError: 422 for another unit, times before 1970, or another order.
    """
    if not times.size:
        return
    # As unsigned numbers negative times are the largest, so that one pass finds both.
    if times.view(np.uint64).max() > latest:
        at = int(np.flatnonzero((times < 0) | (times > latest))[0])
        where = f"{place}[{at}]" if several else place
        problem = f"{times[at]} is no time in unix seconds{_unit_hint(int(times[at]))}"
        raise RequestError(422, f"{where}: {problem}")
    falls = np.flatnonzero(times[1:] < times[:-1])
    if falls.size:
        raise RequestError(422, f"{place}[{falls[0] + 1}]: older than the one before; sort by time")


def _unit_hint(time: int) -> str:
    """What to divide by, for the units in use; each is what lies in this century."""
    units = {1_000: "milliseconds", 1_000_000: "microseconds", 1_000_000_000: "nanoseconds"}
    for factor, unit in units.items():
        if factor * 10**8 <= time < factor * 10**10:
            return f"; it looks like {unit}, so divide by {factor:,}"
    return "; it is before 1970" if time < 0 else "; it lies too far in the future"


def _checked_bags(name: str, bags: Bags, count: int, needs: Needs, limits: Limits, place: str) -> Bags:
    """The ids of `count` behaviors, candidates or requests, without offsets where each has exactly one."""
    if bags.size != count:
        raise RequestError(422, f"{place}: {bags.size:,} entries, expected {count:,}")
    if bags.offsets is not None:
        lengths = np.diff(bags.offsets)
        if name not in needs.multi:
            other = np.flatnonzero(lengths != 1)
            if other.size:
                at = int(other[0])
                number = f"{lengths[at]:,} ids" if lengths[at] else "no id"
                raise RequestError(422, f"{place}[{at}]: {number}; the feature has exactly one")
            bags = Bags(bags.values)
        elif lengths.size and lengths.max() > limits.bag:
            at = int(lengths.argmax())
            problem = f"{lengths[at]:,} ids, the server takes {limits.bag:,} of one (limits.bag)"
            raise RequestError(413, f"{place}[{at}]: {problem}")
    if name in needs.living or name in needs.encoders:
        return bags
    ids: Any = bags.values
    rows = needs.rows.get(name, 2**63 - 1)
    # As unsigned numbers negative ids are the largest, so that one pass finds both.
    if ids.size and ids.view(np.uint64).max() >= rows:
        at = int(np.flatnonzero((ids < 0) | (ids >= rows))[0])
        raise RequestError(422, f"{place}[{at}]: id {ids[at]} lies outside [0, {rows})")
    return bags


def _checked_clusters(
    history: History, needs: Needs, at: Callable[[str], str]
) -> tuple[Ints | None, Ints | None]:
    if not needs.clusters:
        return None, None
    size, time = history.cluster_size, history.cluster_time
    for name, part in (("cluster_size", size), ("cluster_time", time)):
        if part is None or part.size != history.time.size:
            raise RequestError(422, f"{at(f'history.{name}')}: one for each behavior is needed")
    if size is not None and size.size and size.min() < 0:
        raise RequestError(422, f"{at('history.cluster_size')}: negative")
    return size, time


def _numbers(request: Request, name: str, place: str) -> Floats:
    if name not in request.numeric:
        raise RequestError(422, f"{place}: missing; the snapshot needs it")
    given = request.numeric[name]
    if given.size != request.count:
        raise RequestError(422, f"{place}: {given.size:,} entries, expected {request.count:,}")
    # Compared before the conversion, which would warn of what does not fit.
    if not (np.abs(given) < np.finfo(np.float32).max).all():
        raise RequestError(422, f"{place}: holds a number that is not finite in float32")
    return given.astype(np.float32)
