"""POST /score: a body in JSON or Arrow, read, scored and answered."""

from __future__ import annotations

import time
from typing import Any

from fastapi import FastAPI, Request, Response

from pipelines.serve.bodies import AnswerBody, errors_of
from pipelines.serve.http_body import HeldAnswer, read_body
from pipelines.serve.load import Hold
from pipelines.serve.service import Service
from trainer.serving import arrow_body
from trainer.serving.body import decode, encode
from trainer.serving.json_body import ScoreBody


def add_score(app: FastAPI, service: Service) -> None:
    schema = ScoreBody.model_json_schema(ref_template="#/components/schemas/{model}")
    schemas = schema.pop("$defs", {})
    binary = {"type": "string", "format": "binary"}
    content = {"application/json": {"schema": schema}, arrow_body.MEDIA_TYPE: {"schema": binary}}

    @app.post(
        "/score",
        response_model=AnswerBody,
        responses=errors_of(400, 404, 408, 413, 415, 422, 429, 503),
        openapi_extra={"requestBody": {"required": True, "content": content}},
    )
    async def score(request: Request) -> Response:
        """Score the candidates of one or several requests."""
        hold = Hold(service.in_flight)
        try:
            return await _answer(request, service, hold)
        except BaseException:
            hold.release()
            raise

    plain = app.openapi

    def openapi() -> dict[str, Any]:
        """FastAPI does not read the body of /score itself, so its schemas are added to the description."""
        document = plain()
        document["components"]["schemas"].update(schemas)
        return document

    app.openapi = openapi  # type: ignore[method-assign]


async def _answer(request: Request, service: Service, hold: Hold) -> Response:
    """The answer. Its bytes count as held until the client has taken them."""
    content_type = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    given = await read_body(request, service.limits, hold, service.load.seconds)
    service.batcher.check_room()
    arrived = time.perf_counter()
    scorer, histories = service.versions.scorer, service.versions.histories
    decoded = await service.in_thread(decode, given, content_type, scorer, histories, service.limits)
    del given
    hold.resize(sum(each.bytes for each in decoded.requests))
    service.metrics.stage.labels("decode").observe(time.perf_counter() - arrived)
    scored = await service.batcher.score(scorer, decoded.requests, decoded.explain, decoded.exploration)
    service.metrics.unknown.inc(sum(sum(part.unknown.values()) for part in scored))
    as_arrow = arrow_body.MEDIA_TYPE in request.headers.get("accept", "")
    content = encode(scored, scorer, decoded, as_arrow)
    hold.resize(len(content))
    service.metrics.latency.observe(time.perf_counter() - arrived)
    return HeldAnswer(content, hold, arrow_body.MEDIA_TYPE if as_arrow else "application/json")
