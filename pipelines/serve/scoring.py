"""POST /score: a body in JSON or Arrow, read, scored and answered."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.routing import APIRoute

from pipelines.serve.bodies import AnswerBody, errors_of
from pipelines.serve.http_body import HeldAnswer, read_body
from pipelines.serve.load import Hold
from pipelines.serve.service import Service
from trainer.serving import arrow_body
from trainer.serving.call import JSON, Call, media_type_of
from trainer.serving.json_body import ScoreBody
from trainer.serving.request import RequestError

DEADLINE = "x-request-deadline-ms"
_MILLISECONDS = re.compile(r"[0-9]{1,9}(\.[0-9]{1,9})?")


class _Direct(APIRoute):
    """A path whose function takes the request alone: FastAPI has nothing to read or to check for it."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler: Callable[[Request], Coroutine[Any, Any, Response]] = self.endpoint
        return handler


def add_score(app: FastAPI, service: Service) -> None:
    schema = ScoreBody.model_json_schema(ref_template="#/components/schemas/{model}")
    schemas = schema.pop("$defs", {})
    binary = {"type": "string", "format": "binary"}
    content = {"application/json": {"schema": schema}, arrow_body.MEDIA_TYPE: {"schema": binary}}

    async def score(request: Request) -> Response:
        """Score the candidates of one or several requests."""
        hold = Hold(service.in_flight)
        try:
            with service.traced("POST /score", request.headers):
                return await _answer(request, service, hold)
        except BaseException:
            hold.release()
            raise

    app.router.add_api_route(
        "/score",
        score,
        methods=["POST"],
        response_model=AnswerBody,
        responses=errors_of(400, 404, 408, 413, 415, 422, 429, 503, 504),
        openapi_extra={"requestBody": {"required": True, "content": content}},
        route_class_override=_Direct,
    )
    plain = app.openapi

    def openapi() -> dict[str, Any]:
        """FastAPI does not read the body of /score itself, so its schemas are added to the description."""
        document = plain()
        document["components"]["schemas"].update(schemas)
        return document

    app.openapi = openapi  # type: ignore[method-assign]


async def _answer(request: Request, service: Service, hold: Hold) -> Response:
    """The answer. Its bytes count as held until the client has taken them."""
    deadline = deadline_of(request)
    content_type = media_type_of(request.headers.get("content-type", JSON))
    given = await read_body(request, service.limits, hold, service.load.seconds)
    as_arrow = arrow_body.MEDIA_TYPE in request.headers.get("accept", "")
    size, scoring = len(given), service.core.score(Call(given, content_type, as_arrow, deadline, hold.resize))
    # The core lets go of the body's bytes once it is decoded, so they must have no other name.
    del given
    reply = await scoring
    service.log.scored(body_bytes=size, answer_bytes=len(reply.content), version=reply.version)
    return HeldAnswer(reply.content, hold, reply.media_type)


def deadline_of(request: Request) -> float | None:
    """When the client no longer waits, by `time.monotonic`; None where it does not say.

    Raises:
        RequestError: 422 where the header is no number of milliseconds.
    """
    said = request.headers.get(DEADLINE)
    if said is None:
        return None
    if not _MILLISECONDS.fullmatch(said):
        raise RequestError(422, f"the header {DEADLINE} is {said[:40]!r}, expected milliseconds such as 250")
    return time.monotonic() + float(said) / 1000
