"""A request to score in JSON: its form, and its arrays.

A request is one user's history, oldest first, and the candidates to score. Ids are the dense ids of the log
that the snapshot was trained on, or raw values where the body says so and the server has the vocabularies.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError
from pydantic_core import from_json as parsed

from trainer.config.mistakes import path_in, words_of
from trainer.data.row_group import Bags, Ints
from trainer.serving.asked import History, Limits, Needs, Request, RequestError
from trainer.serving.checks import check_names, checked, size_of
from trainer.serving.users import as_user, names_of, number_sent, stored_history
from trainer.serving.vocabulary import Translation

Int64 = Annotated[int, Field(strict=True, ge=-(2**63), lt=2**63)]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Text = Annotated[str, Field(strict=True)]
# The first mistake ends a list: a report of each would take a thousand times the room of what is wrong.
Ints64 = Annotated[list[Int64], Field(fail_fast=True)]
Texts = Annotated[list[Text], Field(fail_fast=True)]
# One id each, or several each; which of the two, the first item says. Raw values may be text.
ManyInts64 = Annotated[list[Ints64], Field(fail_fast=True)]
ManyTexts = Annotated[list[Texts], Field(fail_fast=True)]
Ids = Annotated[Ints64 | Texts | ManyInts64 | ManyTexts, Field(union_mode="left_to_right")]


def _kind_of_user(given: Any) -> str | None:
    if isinstance(given, str):
        return "text"
    return "integer" if isinstance(given, int) and not isinstance(given, bool) else None


_KINDS = "Input should be a valid integer, or text in a body of raw values"
User = Annotated[
    Annotated[Int64, Tag("integer")] | Annotated[Text, Tag("text")],
    Discriminator(_kind_of_user, custom_error_type="user", custom_error_message=_KINDS),
]
Spelling = Literal["dense", "raw"]
# A list or an object takes as much time and memory as so many numbers.
_LIST_WEIGHT = 16
_MOST_KEYS, _MOST_KEYS_OF_ALL = 10_000, 100_000


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class HistoryBody(_Body):
    """A history, oldest behavior first; all lists are equally long.

    Attributes:
        timestamp: unix seconds, ascending.
        features: ids of every behavior.
        cluster_size, cluster_time: of the clusters, for a model that searches clusters.
    """

    timestamp: Ints64
    features: dict[str, Ids]
    cluster_size: Ints64 | None = None
    cluster_time: Ints64 | None = None


class RequestBody(_Body):
    """One user and their candidates.

    Attributes:
        user_id: whose stored history is meant, where the server has histories: the log's number of the user;
            with raw values the user's own name, where the log has names. Beside a history, any name.
        history: sent along; without it, the stored one of `user_id`.
        time: of the request, unix seconds; only older behaviors are seen. Left out, all of them are.
        candidates: ids of every candidate.
        context: ids of the request.
        numeric: numbers of every candidate.
    """

    user_id: User | None = None
    history: HistoryBody | None = None
    time: Int64 | None = None
    candidates: dict[str, Ids]
    context: dict[str, Int64 | Text | Ints64 | Texts] = Field(default_factory=dict)
    numeric: dict[str, Annotated[list[Number], Field(fail_fast=True)]] = Field(default_factory=dict)


class ScoreBody(_Body):
    """What POST /score takes.

    Attributes:
        explain: tell which behaviors were kept for every candidate, and their weights.
        ids: `dense` ids of the log, or `raw` values as they were ingested.
    """

    requests: Annotated[list[RequestBody], Field(fail_fast=True)] = Field(min_length=1)
    explain: bool = False
    ids: Spelling = "dense"


def read_json(given: bytes | memoryview, limits: Limits) -> ScoreBody:
    """The body, parsed once it is known that this takes little memory.

    Raises:
        RequestError: 413 above a limit; 422 naming the place of the first mistake.
    """
    if len(given) > limits.json:
        problem = (
            f"JSON longer than {limits.json:,} bytes (--max-json); send Arrow, or fewer requests at once"
        )
        raise RequestError(413, problem)
    body = bytes(given)
    # Commas and brackets inside of texts are counted too; there are few.
    if body.count(b",") + _LIST_WEIGHT * (body.count(b"[") + body.count(b"{")) > limits.ids:
        raise RequestError(413, f"more values than the server takes, {limits.ids:,} (--max-ids)")
    # Without spaces, a quote and a colon stand behind every key, and now and then within a text.
    keys = body.translate(None, b" \t\r\n").count(b'":')
    if keys > _MOST_KEYS_OF_ALL:
        raise RequestError(413, f"more keys than the server takes, {_MOST_KEYS_OF_ALL:,}")
    try:
        tree = parsed(body)
    except ValueError as error:
        raise RequestError(422, f"Invalid JSON: {str(error)[:280]}") from None
    _check_sizes(tree, limits)
    _check_keys(body, keys, tree)
    try:
        return ScoreBody.model_validate(tree)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        place, problem = path_in(tree, first["loc"])[:200], words_of(dict(first), json=True)
        raise RequestError(422, f"{place}: {problem}"[:500] if place else problem[:300]) from None


def _check_sizes(tree: Any, limits: Limits) -> None:
    """Bounds what is reported one by one: requests, and keys of objects."""
    requests = tree.get("requests") if isinstance(tree, dict) else None
    if isinstance(requests, list) and len(requests) > limits.requests:
        found = f"{len(requests):,} requests, the server takes {limits.requests:,} (--max-requests)"
        raise RequestError(413, found)
    for part in _objects(tree):
        if len(part) > _MOST_KEYS:
            raise RequestError(413, f"an object of {len(part):,} keys, the server takes {_MOST_KEYS:,}")


def _objects(tree: Any) -> Iterator[dict[str, Any]]:
    """All objects that a body may hold: lists other than that of the requests have none."""
    if isinstance(tree, dict):
        yield tree
        requests = tree.get("requests")
        for value in (*tree.values(), *(requests if isinstance(requests, list) else ())):
            yield from _objects(value)


def _check_keys(body: bytes, keys: int, tree: Any) -> None:
    """Refuses a key that an object has twice, of which the parser keeps the last.

    Only where `keys` were seen and not as many are left, the body is parsed again.
    """
    if keys == sum(map(len, _objects(tree))):
        return
    try:
        json.loads(body, object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise RequestError(422, f"Invalid JSON: {str(error)[:280]}") from None


def _no_duplicates(pairs: list[tuple[str, Any]]) -> None:
    seen: set[str] = set()
    for key, _ in pairs:
        if key in seen:
            raise ValueError(f"the key {key[:80]!r} occurs twice in an object")
        seen.add(key)


def from_json(
    body: RequestBody,
    stored: Mapping[int, History],
    needs: Needs,
    limits: Limits,
    place: str,
    translation: Translation | None = None,
) -> Request:
    """Arrays of one request of a body that `read_json` has read, checked.

    Args:
        stored: histories by user id, in dense ids; place: of the request in the body, for messages.
        translation: of raw values to ids; None: the body holds dense ids.
    """
    _check_names(body, needs, place)
    reader = _Reader(needs, translation, place)
    user = reader.user(body.user_id)
    if body.history is not None:
        number, history = number_sent(user), reader.history(body.history)
    else:
        number, history = stored_history(stored, user, names_of(translation), place)
    candidates = reader.bags(body.candidates, needs.features, "candidates", "candidates")
    request = Request(
        user_id=number,
        history=history,
        time=time_of(body.time, history),
        candidates=candidates,
        count=max((size_of(bags) for bags in candidates.values()), default=0),
        context=reader.context(body.context),
        numeric={name: np.array(values, dtype=np.float64) for name, values in body.numeric.items()},
        unknown={} if translation is None else translation.unknown,
    )
    return checked(request, needs, limits, place)


def _check_names(body: RequestBody, needs: Needs, place: str) -> None:
    history = {} if body.history is None else body.history.features
    check_names(body.candidates, needs.features, needs.candidate, f"{place}.candidates")
    check_names(history, needs.features, needs.behavior, f"{place}.history.features")
    check_names(body.context, needs.context, needs.context, f"{place}.context")
    check_names(body.numeric, needs.numeric, needs.numeric, f"{place}.numeric")


def time_of(given: int | None, history: History) -> int:
    """The request's time; without one, all behaviors are older."""
    newest = int(history.time[-1]) if history.time.size else 0
    return min(newest, 2**63 - 2) + 1 if given is None else given


class _Reader:
    """Makes arrays of the lists of one request."""

    def __init__(self, needs: Needs, translation: Translation | None, place: str) -> None:
        self.needs, self.translation, self.place = needs, translation, place

    def user(self, given: int | str | None) -> pa.Array | None:
        if isinstance(given, str) and self.translation is None:
            raise self._text("user_id")
        return None if given is None else as_user(given)

    def history(self, body: HistoryBody) -> History:
        clusters = (body.cluster_size, body.cluster_time)
        size, time = (None if part is None else _ints(part) for part in clusters)
        features = self.bags(body.features, self.needs.features, "history.features", "history")
        return History(_ints(body.timestamp), features, size, time)

    def bags(self, given: Mapping[str, Any], known: Sequence[str], where: str, part: str) -> dict[str, Bags]:
        """Features that the snapshot knows, in its order."""
        return {n: self._bags(n, given[n], f"{where}.{n}", f"{part}.{n}") for n in known if n in given}

    def _bags(self, name: str, ids: Any, where: str, part: str) -> Bags:
        if not ids or not isinstance(ids[0], list):
            return Bags(self._values(name, ids, where, part))
        offsets = np.zeros(len(ids) + 1, dtype=np.int64)
        np.cumsum([len(bag) for bag in ids], out=offsets[1:])
        return Bags(self._values(name, list(chain.from_iterable(ids)), where, part), offsets)

    def context(self, given: Mapping[str, Any]) -> dict[str, Bags]:
        found = {}
        for name in self.needs.context:
            if name in given:
                ids = given[name] if isinstance(given[name], list) else [given[name]]
                values = self._values(name, ids, f"context.{name}", f"context.{name}")
                found[name] = Bags(values, np.array([0, values.size], dtype=np.int64))
        return found

    def _values(self, name: str, values: list[Any], where: str, part: str) -> Ints:
        text = bool(values) and isinstance(values[0], str)
        if self.translation is not None and values:
            raw = pa.array(values, pa.large_string() if text else pa.int64())
            return self.translation.ids(name, raw, part, f"{self.place}.{where}")
        if text:
            raise self._text(where)
        return _ints(values)

    def _text(self, where: str) -> RequestError:
        problem = 'holds text, and dense ids are integers; say "ids": "raw" for raw values'
        return RequestError(422, f"{self.place}.{where}: {problem}")


def _ints(values: Sequence[int]) -> Ints:
    return np.array(values, dtype=np.int64)
