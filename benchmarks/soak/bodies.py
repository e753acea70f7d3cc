"""What clients of a soak send: bodies of users whose histories grow, of new users, and bad ones."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count

import numpy as np

from benchmarks.harness.http_client import request_of
from benchmarks.inputs.served_model import (
    FEATURE,
    JSON,
    ServedModel,
    arrow_body,
    content_types,
    draw,
    json_body,
)
from trainer.log.bags import Bags
from trainer.serving.request import History, Request

PATH = "/score"
# Behaviors that a user has gained from one body to the next.
_GROWTH = 3
# Candidates of every request.
_CANDIDATES = 50


@dataclass(frozen=True)
class Body:
    """A request over HTTP that the server must score.

    Attributes:
        name: of what it asks for: two bodies with one name must be answered alike. None: asked once.
        answers: requests in it; candidates: of each.
    """

    sent: bytes
    name: str | None
    answers: int = 1
    candidates: int = _CANDIDATES


def known_users(model: ServedModel, users: int, visits: int) -> list[Body]:
    """Bodies of users who come again and again with a history that has grown, in turn as JSON and Arrow.

    The first half of the users has long histories, and one body has eight requests.
    """
    found = []
    for user in range(users):
        length = model.length if user < users // 2 else model.length // 20
        whole = draw(model, user, length, _CANDIDATES)
        for visit in range(visits):
            form = ("json", "arrow")[(user + visit) % 2]
            request = _shortened(whole, length - _GROWTH * (visits - visit))
            body = json_body(request) if form == "json" else arrow_body(request)
            found.append(Body(request_of(PATH, content_types()[form], body), f"user {user}, visit {visit}"))
    several = json_body(draw(model, users, model.length // 20, _CANDIDATES), 8)
    return [*found, Body(request_of(PATH, JSON, several), "several", 8)]


def new_users(model: ServedModel, first: int) -> Iterator[Body]:
    """Bodies of users who were never seen before, without end."""
    for user in count(first):
        body = arrow_body(draw(model, user, 1000, _CANDIDATES))
        yield Body(request_of(PATH, content_types()["arrow"], body), None)


def bad_requests() -> list[bytes]:
    """Requests that a client may send by mistake, each of which has an answer from 400 to 499."""
    empty = {"timestamp": [], "features": {FEATURE: []}}
    request = {"history": empty, "candidates": {FEATURE: [1]}}
    late = {"timestamp": [5, 3], "features": {FEATURE: [1, 1]}}
    trees = [
        {"requests": []},
        {"requests": [{**request, "candidates": {FEATURE: ["no id"]}}]},
        {"requests": [{**request, "candidates": {FEATURE: [10**12]}}]},
        {"requests": [{**request, "history": late}]},
        {"requests": [{**request, "candidates": {"other": [1]}}]},
    ]
    bodies = [b"", b"{", b"\x00" * 100, b'{"requests": [1]}', *(json.dumps(tree).encode() for tree in trees)]
    arrow = content_types()["arrow"]
    return [
        *(request_of(PATH, JSON, body) for body in bodies),
        request_of(PATH, arrow, b"no arrow"),
        request_of(PATH, "text/plain", b"{}"),
        request_of("/nothing", JSON, b"{}"),
        request_of(PATH, JSON, b"{}", "content-encoding: gzip"),
        request_of(PATH, JSON, b"{}", "x-request-deadline-ms: soon"),
    ]


def _shortened(request: Request, length: int) -> Request:
    """The same request with its oldest behaviors alone, as it was asked earlier."""
    history = request.history
    ids = Bags(np.ascontiguousarray(history.features[FEATURE].values[:length]))
    earlier = History(history.time[:length], {FEATURE: ids})
    return Request(0, earlier, request.time, request.candidates, request.count, {}, {})
