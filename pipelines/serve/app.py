"""The HTTP interface of `tandemrec serve`: what all paths share. Scoring is in `trainer.serving`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic_core import to_json
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from embeddings.errors import TandemError, UnavailableError
from pipelines.serve.http_connection import LEFT
from pipelines.serve.oip.http import add_inference
from pipelines.serve.page import add_page
from pipelines.serve.scoring import add_score
from pipelines.serve.service import Service
from pipelines.serve.state import add_state
from trainer.config.mistakes import words_of
from trainer.serving.request import RequestError


def build_app(service: Service) -> FastAPI:
    """All paths of the server; its core runs as long as the app does."""

    @asynccontextmanager
    async def running(app: FastAPI) -> AsyncIterator[None]:
        async with service.running():
            yield

    # Its interactive pages would load scripts from other hosts; a redirect would go where the client's own
    # Host header says.
    app = FastAPI(title="tandemrec", docs_url=None, redoc_url=None, redirect_slashes=False, lifespan=running)
    app.add_middleware(_Edge)
    _add_errors(app, service)
    add_score(app, service)
    add_state(app, service)
    add_inference(app, service)
    add_page(app, service)
    return app


class _Edge:
    """Around all paths: HEAD is GET without its body, and work for a client that has left just ends."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "HEAD":
            scope, send = {**scope, "method": "GET"}, _without_body(send)
        try:
            await self._app(scope, receive, send)
        except asyncio.CancelledError as error:
            # Nobody waits for an answer.
            if error.args != (LEFT,):
                raise


def _without_body(send: Send) -> Send:
    async def sending(message: Message) -> None:
        await send({**message, "body": b""} if message["type"] == "http.response.body" else message)

    return sending


def _add_errors(app: FastAPI, service: Service) -> None:
    """Every error is one line of JSON; one that was not foreseen tells a client nothing more."""

    def answer(status: int, problem: str, headers: Mapping[str, str] | None = None) -> Response:
        service.metrics.errors.labels(str(status)).inc()
        return Response(to_json({"error": problem}), status, headers, "application/json")

    def of_error(_: Request, error: Exception) -> Response:
        if isinstance(error, RequestError):
            seconds = error.retry_after or (1 if error.status in (429, 503) else None)
            retry = {"Retry-After": str(seconds)} if seconds else None
            return answer(error.status, str(error), retry)
        if isinstance(error, HTTPException):
            return answer(error.status_code, str(error.detail), error.headers)
        if isinstance(error, RequestValidationError):
            first = error.errors()[0]
            return answer(422, f"{'.'.join(map(str, first['loc']))}: {words_of(first, json=True)}")
        if isinstance(error, TandemError):  # a version that POST /reload refuses, or cannot read now
            status = 503 if isinstance(error, UnavailableError) else 409
            return answer(status, " ".join(str(error).split()))
        if isinstance(error, ClientDisconnect):  # nobody sees this answer
            return Response(status_code=499)
        return answer(500, "internal error; see the server's log")

    known = (RequestError, HTTPException, RequestValidationError, TandemError, ClientDisconnect)
    for kind in (*known, Exception):
        app.add_exception_handler(kind, of_error)
