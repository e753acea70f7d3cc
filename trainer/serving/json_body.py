"""Requests to score in JSON: their form, and how their fields become arrays.

A request is one user's history, oldest first, and the candidates to score. Ids are the dense ids of the log
that the snapshot was trained on, or raw values where the body says so and the server has the vocabularies.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Container, Iterator, Mapping, Sequence
from functools import reduce
from itertools import chain, islice
from operator import getitem
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError
from pydantic_core import from_json as parsed

from trainer.config.mistakes import path_in, with_unique_keys, words_of
from trainer.log.bags import Bags, Ints
from trainer.log.encoders.encoder import Encoder
from trainer.serving.checks import check_names
from trainer.serving.exploration import ExplorationFields
from trainer.serving.form import RequestForm
from trainer.serving.histories import as_user
from trainer.serving.numbers import codes_of_values
from trainer.serving.request import Doubles, Limits, Needs, Part, RequestError
from trainer.serving.vocabulary import Translation

Int64 = Annotated[int, Field(strict=True, ge=-(2**63), lt=2**63)]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Text = Annotated[str, Field(strict=True)]
# Of a list. Whether it has 64 bits is seen as the list becomes an array: to compare each number with both
# bounds takes four times as long as all else that is done with it here.
_BOUNDS: dict[str, Any] = {"minimum": -(2**63), "exclusiveMaximum": 2**63}
_Item = Annotated[int, Field(strict=True, json_schema_extra=_BOUNDS)]
# The first mistake ends a list: a report of each would take a thousand times the room of what is wrong.
Ints64 = Annotated[list[_Item], Field(fail_fast=True)]
Texts = Annotated[list[Text], Field(fail_fast=True)]
# One id each, or several each; which of the two, the first item says. Raw values may be text.
ManyInts64 = Annotated[list[Annotated[list[Int64], Field(fail_fast=True)]], Field(fail_fast=True)]
ManyTexts = Annotated[list[Texts], Field(fail_fast=True)]
# A feature that is a number: integers of any size, reals, text that spells one, null where it is missing.
# A tuple, so that it is known from lists of ids.
Integer = Annotated[int, Field(strict=True)]
Value = Annotated[Integer | Number | Text | None, Field(union_mode="left_to_right")]
Values = Annotated[tuple[Value, ...], Field(fail_fast=True)]
Ids = Annotated[Ints64 | Texts | ManyInts64 | ManyTexts | Values, Field(union_mode="left_to_right")]


def _kind_of_user(given: Any) -> str | None:
    if isinstance(given, str):
        return "text"
    return "integer" if isinstance(given, int) and not isinstance(given, bool) else None


_KINDS = "Input should be a valid integer, or text in a body of raw values"
User = Annotated[
    Annotated[Int64, Tag("integer")] | Annotated[Text, Tag("text")],
    Discriminator(_kind_of_user, custom_error_type="user", custom_error_message=_KINDS),
]
# A list or an object takes as much time and memory as so many numbers.
_LIST_WEIGHT = 16
_MOST_KEYS, _MOST_KEYS_OF_ALL = 10_000, 100_000
_KEY_END = re.compile(rb'"[ \t\r\n]*:')


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class HistoryBody(_Body):
    """A history, oldest behavior first; all lists are equally long.

    Attributes:
        timestamp: unix seconds, ascending.
        features: ids of every behavior; of a feature that is a number, numbers, or null where it is missing.
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
        candidates: ids of every candidate; numbers as in a history.
        context: ids of the request, or a number.
        numeric: numbers of every candidate.
    """

    user_id: User | None = None
    history: HistoryBody | None = None
    time: Int64 | None = None
    candidates: dict[str, Ids]
    context: dict[str, Int64 | Text | Ints64 | Texts | Value | Values] = Field(default_factory=dict)
    numeric: dict[str, Annotated[list[Number], Field(fail_fast=True)]] = Field(default_factory=dict)


class ScoreBody(ExplorationFields):
    """What POST /score takes, besides the fields of `ExplorationFields`.

    Attributes:
        explain: tell which behaviors were kept for every candidate, and their weights.
        ids: `dense` ids of the log, or `raw` values as they were ingested.
    """

    requests: Annotated[list[RequestBody], Field(fail_fast=True)] = Field(min_length=1)
    explain: bool = False
    ids: Literal["dense", "raw"] = "dense"


def read_json(given: bytes | memoryview, limits: Limits, numbers: Container[str] = ()) -> ScoreBody:
    """The body, parsed once it is known that this takes little memory.

    Args:
        numbers: the features that are numbers, for messages.

    Raises:
        RequestError: 413 above a limit; 422 naming the place of the first mistake.
    """
    tree = parsed_json(given, limits, "requests")
    try:
        return ScoreBody.model_validate(tree)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        place, problem = path_in(tree, first["loc"]), words_of(dict(first), json=True)
        place, problem = _of_number(tree, first["loc"], numbers) or (place, problem)
        place = place[:200]
        raise RequestError(422, f"{place}: {problem}"[:500] if place else problem[:300]) from None


def parsed_json(given: bytes | memoryview, limits: Limits, *lists: str) -> Any:
    """A body as a tree, parsed once it is known that this takes little memory.

    Args:
        lists: keys of objects that are lists of objects.

    Raises:
        RequestError: 413 above a limit; 422 where it is no JSON, or has a key twice.
    """
    if len(given) > limits.json:
        problem = f"JSON longer than {limits.json:,} bytes (limits.json_body)"
        raise RequestError(413, f"{problem}; send Arrow, or fewer requests at once")
    body = bytes(given)
    # Commas and brackets inside of texts are counted too; there are few.
    if body.count(b",") + _LIST_WEIGHT * (body.count(b"[") + body.count(b"{")) > limits.ids:
        raise RequestError(413, f"more values than the server takes, {limits.ids:,} (limits.ids)")
    # A quote and a colon stand behind every key, and now and then within a text.
    keys = sum(1 for _ in islice(_KEY_END.finditer(body), _MOST_KEYS_OF_ALL + 1))
    if keys > _MOST_KEYS_OF_ALL:
        raise RequestError(413, f"more keys than the server takes, {_MOST_KEYS_OF_ALL:,}")
    try:
        tree = parsed(body)
    except ValueError as error:
        raise RequestError(422, f"Invalid JSON: {str(error)[:280]}") from None
    # Bounds what is reported one by one: requests, and keys of objects.
    requests = tree.get("requests") if isinstance(tree, dict) else None
    if isinstance(requests, list) and len(requests) > limits.requests:
        problem = f"{len(requests):,} requests, the server takes {limits.requests:,} (limits.requests)"
        raise RequestError(413, problem)
    sizes = [len(part) for part in _objects(tree, lists)]
    for size in sizes:
        if size > _MOST_KEYS:
            raise RequestError(413, f"an object of {size:,} keys, the server takes {_MOST_KEYS:,}")
    if keys != sum(sizes):
        # An object may have a key twice, of which the parser kept the last: parsed again to tell.
        try:
            json.loads(body, object_pairs_hook=with_unique_keys)
        except (ValueError, RecursionError) as error:
            raise RequestError(422, f"Invalid JSON: {str(error)[:280]}") from None
    return tree


def _objects(tree: Any, lists: Sequence[str]) -> Iterator[dict[str, Any]]:
    """All objects that a body may hold: other lists than these have none."""
    if isinstance(tree, dict):
        yield tree
        for name, value in tree.items():
            inner = value if name in lists and isinstance(value, list) else ()
            for each in (value, *inner):
                yield from _objects(each, lists)


def _of_number(tree: Any, location: Sequence[int | str], numbers: Container[str]) -> tuple[str, str] | None:
    """Place and problem of the first wrong value of a feature that is a number; None for all else.

    Pydantic compares a list with all forms that a feature may have, and reports the first form, that of ids.
    """
    keys = list(location)
    end = 5 if keys[2:4] == ["history", "features"] else 4
    parts = (["candidates"], ["context"], ["history", "features"])
    if len(keys) < end or keys[2 : end - 1] not in parts or keys[end - 1] not in numbers:
        return None
    place, given = path_in(tree, keys[:end]), reduce(getitem, keys[:end], tree)
    if not isinstance(given, list):
        return place, _NO_NUMBER if keys[2] == "context" else "must be a list"
    wrong = (at for at, value in enumerate(given) if not _is_number(value))
    return next(((f"{place}[{at}]", _NO_NUMBER) for at in wrong), None)


def _is_number(value: Any) -> bool:
    """Whether JSON may say a number so: true and false are none, and JSON has no infinity and no NaN."""
    if isinstance(value, float):
        return math.isfinite(value)
    return value is None or (isinstance(value, int | str) and not isinstance(value, bool))


_NO_NUMBER = "must be a number or null"
_NO_ID = "must be a valid integer of 64 bits"


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and -(2**63) <= value < 2**63


def _array(values: Sequence[int], place: str) -> Ints:
    """int64 [n]; RequestError (422) for the first of them that has more than 64 bits."""
    try:
        return np.fromiter(values, np.int64, len(values))
    except OverflowError:
        at = next(at for at, value in enumerate(values) if not _is_id(value))
        raise RequestError(422, f"{place}[{at}]: {_NO_ID}") from None


class JsonForm(RequestForm):
    """A request of a body that `read_json` has read."""

    def __init__(self, body: RequestBody, needs: Needs, translation: Translation | None, place: str) -> None:
        super().__init__(needs, translation, place)
        self._body = body
        history = {} if body.history is None else body.history.features
        self._parts: dict[str, Mapping[str, Any]] = {
            "candidates": body.candidates,
            "history": history,
            "context": body.context,
            "numeric": body.numeric,
        }
        for part in needs.parts:
            check_names(self._parts[part.name], part, f"{place}.{part.path}")

    def user(self) -> pa.Array | None:
        user = self._body.user_id
        if isinstance(user, str) and self.translation is None:
            raise self._text("user_id")
        return None if user is None else as_user(user)

    def time(self) -> int | None:
        return self._body.time

    def per_behavior(self, name: str) -> Ints | None:
        values = None if self._body.history is None else getattr(self._body.history, name)
        return None if values is None else _array(values, f"{self.place}.history.{name}")

    def has(self, part: Part, name: str) -> bool:
        return name in self._parts[part.name]

    def bags(self, part: Part, name: str) -> Bags:
        ids: Any = self._parts[part.name][name]
        if part is self.needs.context:
            if not isinstance(ids, list | str) and not _is_id(ids):
                raise RequestError(422, f"{self.place}.context.{name}: {_NO_ID}")
            ids = [ids if isinstance(ids, list) else [ids]]
        if isinstance(ids, tuple):
            at = next(at for at, value in enumerate(ids) if not _is_id(value))
            raise RequestError(422, f"{self.place}.{part.path}.{name}[{at}]: {_NO_ID}")
        if not ids or not isinstance(ids[0], list):
            return Bags(self._ids(part, name, ids))
        values = self._ids(part, name, list(chain.from_iterable(ids)))
        return Bags.of_lengths(values, [len(bag) for bag in ids])

    def codes(self, part: Part, name: str, encoder: Encoder) -> Ints:
        where, given = f"{self.place}.{part.path}.{name}", self._parts[part.name][name]
        if part is self.needs.context and not isinstance(given, list | tuple):
            given = [given]
        for at, value in enumerate(given):
            if isinstance(value, list):
                raise RequestError(422, f"{where}[{at}]: the feature has one number each")
        return codes_of_values(given, encoder, where)

    def numbers(self, name: str) -> Doubles:
        return np.array(self._body.numeric[name], dtype=np.float64)

    def _ids(self, part: Part, name: str, values: list[Any]) -> Ints:
        where = f"{part.path}.{name}"
        text = bool(values) and isinstance(values[0], str)
        given: Any = values if text else _array(values, f"{self.place}.{where}")
        living, raw = name in self.needs.living, self.translation is not None and bool(values)
        arrow = pa.array(given, pa.large_string() if text else pa.int64()) if living or raw else None
        if living and (own := self.own_ids(name, arrow, f"{self.place}.{where}")) is not None:
            return own
        if self.translation is not None and raw:
            return self.translation.ids(name, arrow, f"{part.name}.{name}", f"{self.place}.{where}")
        if text:
            raise self._text(where)
        ids: Ints = given
        return ids

    def _text(self, where: str) -> RequestError:
        problem = 'holds text, and dense ids are integers; say "ids": "raw" for raw values'
        return RequestError(422, f"{self.place}.{where}: {problem}")
