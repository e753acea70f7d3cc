"""The HTTP interface of `tandemrec serve`: paths, bodies, answers. Scoring is in `trainer.serving`."""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse
from pydantic_core import to_json
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from embeddings.errors import TandemError, UnavailableError
from pipelines.serve.bodies import AnswerBody, ErrorBody, HealthBody, ReadyBody, ReloadBody, UpdatesBody
from pipelines.serve.load import HeldAnswer, Hold, InFlight, LoadLimits, read_body
from pipelines.serve.metrics import Metrics
from pipelines.serve.updates import Updates
from pipelines.serve.users import UserBody, UsersBody, user_body, users_body
from trainer.config.mistakes import words_of
from trainer.serving import arrow_body
from trainer.serving.call import Call
from trainer.serving.core import CoreSettings, ScoringCore
from trainer.serving.json_body import ScoreBody
from trainer.serving.request import Limits, RequestError
from trainer.serving.scheduler import BatchSettings
from trainer.serving.versions import Versions

_PAGE = Path(__file__).with_name("page.html")
_CSP = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; "
    "img-src data:"
)


@dataclass
class Service:
    """All that a running server holds.

    Attributes:
        token: what POST /reload must bring; empty: nobody may ask for it.
    """

    versions: Versions
    metrics: Metrics
    limits: Limits
    batching: BatchSettings
    poll_seconds: float = 0.0
    load: LoadLimits = field(default_factory=LoadLimits)
    token: str = ""
    started: float = field(default_factory=time.monotonic)
    tasks: list[asyncio.Task[None]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.core = ScoringCore(self.versions, CoreSettings(self.limits, self.batching), self.metrics)
        self.in_flight = InFlight(self.load.in_flight)
        self.metrics.in_flight.set_function(lambda: self.in_flight.held)
        self.updates = Updates(self.versions, self.metrics, self.poll_seconds)
        self.metrics.serving(self.versions.scorer)


def build_app(service: Service) -> FastAPI:
    """All paths of the server; its core runs as long as the app does."""

    @asynccontextmanager
    async def running(app: FastAPI) -> AsyncIterator[None]:
        service.tasks = [asyncio.create_task(service.core.run())]
        service.tasks += [asyncio.create_task(service.updates.poll())] if service.poll_seconds else []
        yield
        for task in service.tasks:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    # Its interactive pages would load scripts from other hosts.
    app = FastAPI(title="tandemrec", docs_url=None, redoc_url=None, lifespan=running)
    _add_errors(app, service)
    _add_score(app, service)
    _add_state(app, service)
    _add_page(app, service)
    return app


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": ErrorBody} for status in statuses}


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


def _add_score(app: FastAPI, service: Service) -> None:
    schema = ScoreBody.model_json_schema(ref_template="#/components/schemas/{model}")
    schemas = schema.pop("$defs", {})
    binary = {"type": "string", "format": "binary"}
    content = {"application/json": {"schema": schema}, arrow_body.MEDIA_TYPE: {"schema": binary}}

    @app.post(
        "/score",
        response_model=AnswerBody,
        responses=_errors(400, 404, 408, 413, 415, 422, 429, 503, 504),
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
    as_arrow = arrow_body.MEDIA_TYPE in request.headers.get("accept", "")
    reply = await service.core.score(Call(given, content_type, as_arrow, hold=hold.resize))
    return HeldAnswer(reply.content, hold, reply.media_type)


def _health(service: Service) -> HealthBody:
    scorer, histories = service.versions.scorer, service.versions.histories
    users = None
    if histories is not None:
        users = "integers" if histories.users is None else histories.users.kind
    refused, updates = service.versions.refused, service.updates
    failing = UpdatesBody(failures=updates.failures, problem=updates.problem) if updates.problem else None
    return HealthBody(
        status="ready",
        version=scorer.version,
        step=scorer.snapshot.manifest.step,
        tasks=list(scorer.tasks),
        features={name: scorer.needs.rows.get(name, 0) for name in scorer.needs.candidates.known},
        context=list(scorer.needs.context.known),
        numeric=list(scorer.needs.numeric.known),
        numbers={name: encoder.model_dump() for name, encoder in scorer.needs.encoders.items()},
        history_length=scorer.data.history_length,
        histories=len(histories or ()),
        raw=sorted(scorer.vocabularies),
        living=sorted(name for name in scorer.needs.living if "@" not in name),
        hashed=sorted(name for name in scorer.needs.hashed if "@" not in name),
        users=users,
        uncertainty=bool(scorer.snapshot.posteriors),
        uptime_seconds=time.monotonic() - service.started,
        refused={"version": refused[0], "problem": refused[1]} if refused else None,
        updates=failing,
    )


def _add_state(app: FastAPI, service: Service) -> None:
    @app.get("/healthz", response_model=HealthBody)
    async def healthz() -> HealthBody:
        """State; a server without a checked snapshot does not listen."""
        return _health(service)

    @app.get("/readyz", response_model=ReadyBody, responses=_errors(503))
    async def readyz() -> ReadyBody:
        """Whether requests are scored: 503 where what scores them has ended."""
        if any(task.done() for task in service.tasks):
            raise RequestError(503, "the server's own work has ended; start it anew")
        if not service.core.state.ready:
            raise RequestError(503, "; ".join(service.core.state.problems))
        updates = service.updates
        looks = f"failing: {updates.problem}" if updates.problem else "working"
        return ReadyBody(status="ready", updates=looks if updates.seconds else "off")

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(service.metrics.text(), headers={"content-type": service.metrics.content_type})

    @app.post("/reload", response_model=ReloadBody, responses=_errors(403, 409, 503))
    async def reload(request: Request) -> ReloadBody:
        """Switch to the newest version, with the token; 409 if it is refused, 503 if it cannot be read."""
        if not service.token:
            raise RequestError(403, "/reload is off; start the server with --reload-token-file FILE")
        brought = request.headers.get("authorization", "").encode()
        if not hmac.compare_digest(brought, f"Bearer {service.token}".encode()):
            raise RequestError(403, "/reload wants the header `Authorization: Bearer TOKEN`")
        switched = await service.updates.reload()
        return ReloadBody(version=service.versions.scorer.version, switched=switched)


def _add_page(app: FastAPI, service: Service) -> None:
    page = _PAGE.read_text(encoding="utf-8")

    @app.get("/", response_class=HTMLResponse)
    async def show() -> HTMLResponse:
        """The page."""
        return HTMLResponse(page, headers={"content-security-policy": _CSP})

    @app.get("/users", response_model=UsersBody, responses=_errors(404, 422))
    async def users(name: str | None = None) -> UsersBody:
        """The first users whose histories the server has, or the one of a name."""
        return await service.core.in_thread(users_body, service.versions.histories, name)

    @app.get("/users/{user_id}", response_model=UserBody, responses=_errors(404, 422))
    async def user(user_id: int) -> UserBody:
        """One user's history and logged requests, with names."""
        histories = service.versions.histories
        if histories is None or user_id not in histories:
            raise RequestError(404, f"no stored history of user {str(user_id)[:20]}")
        scorer = service.versions.scorer
        given = histories, user_id, scorer.columns.labels.tasks, service.limits, scorer.needs.living
        return await service.core.in_thread(user_body, *given)
