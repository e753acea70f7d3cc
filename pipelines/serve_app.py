"""The HTTP interface of `tandemrec serve`: paths, bodies, answers. Scoring is in `trainer.serving`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse
from pydantic import BaseModel
from pydantic_core import to_json
from starlette.exceptions import HTTPException

from embeddings.errors import TandemError
from pipelines.serve_metrics import Metrics
from pipelines.serve_users import UserBody, UsersBody, user_body, users_body
from trainer.serving import arrow_body
from trainer.serving.batcher import Batcher, BatchSettings
from trainer.serving.current import Current
from trainer.serving.request import History, Limits, RequestError, ScoreBody, from_json, read_json
from trainer.serving.request import Request as Asked
from trainer.serving.scorer import Scored, Scorer

_PAGE = Path(__file__).with_name("serve_page.html")
_CSP = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; "
    "img-src data:"
)


class ErrorBody(BaseModel):
    """Every answer that is no success."""

    error: str


class KeptBody(BaseModel):
    """What a branch kept for one candidate, heaviest first: places in the history, and weights."""

    behaviors: list[int]
    weights: list[float]


class ResultBody(BaseModel):
    """Of one request: a probability for every candidate and task; `kept` by branch where asked for."""

    scores: dict[str, list[float]]
    kept: dict[str, list[KeptBody]] | None = None


class AnswerBody(BaseModel):
    """What POST /score answers, results in the order of the requests."""

    version: str
    results: list[ResultBody]


class HealthBody(BaseModel):
    """Readiness, and what a client must know of the snapshot."""

    status: str
    version: str
    step: int
    tasks: list[str]
    features: dict[str, int]
    context: list[str]
    numeric: list[str]
    history_length: int
    histories: int
    uptime_seconds: float
    refused: dict[str, str] | None


class ReloadBody(BaseModel):
    """The version served now, and whether it is another than before."""

    version: str
    switched: bool


@dataclass
class Service:
    """All that a running server holds."""

    current: Current
    metrics: Metrics
    limits: Limits
    batching: BatchSettings
    poll_seconds: float = 0.0
    started: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.batcher = Batcher(self.batching, self.metrics.scored)
        self.metrics.serving(self.current.scorer)

    async def reload(self, retry: bool = True) -> bool:
        """Load in another thread; requests go on."""
        switched = await asyncio.to_thread(self.current.reload, retry)
        if switched:
            self.metrics.serving(self.current.scorer)
        return switched

    async def poll(self) -> None:
        """Switch to every newer version, for ever. A version that was refused is not tried again."""
        while self.poll_seconds:
            await asyncio.sleep(self.poll_seconds)
            try:
                if await asyncio.to_thread(self.current.newer) and await self.reload(retry=False):
                    print(f"now serving {self.current.scorer.snapshot.path}", flush=True)
            except TandemError as error:
                print(f"still serving {self.current.scorer.version}: {error}", flush=True)


def build_app(service: Service) -> FastAPI:
    """All paths of the server; its batcher runs as long as the app does."""

    @asynccontextmanager
    async def running(app: FastAPI) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(service.batcher.run()), asyncio.create_task(service.poll())]
        yield
        for task in tasks:
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
    """Every error is one line of JSON; what was not foreseen says no more than that."""

    def answer(status: int, problem: str, headers: Mapping[str, str] | None = None) -> Response:
        service.metrics.errors.labels(str(status)).inc()
        return _json({"error": problem}, status, headers)

    def of_request(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestError)
        retry = {"Retry-After": "1"} if error.status == 429 else None
        return answer(error.status, str(error), retry)

    def of_http(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return answer(error.status_code, str(error.detail), error.headers)

    def of_path(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        return answer(422, f"{'.'.join(map(str, first['loc']))}: {first['msg']}")

    def of_reload(_: Request, error: Exception) -> Response:
        return answer(409, " ".join(str(error).split()))

    app.add_exception_handler(RequestError, of_request)
    app.add_exception_handler(HTTPException, of_http)
    app.add_exception_handler(RequestValidationError, of_path)
    app.add_exception_handler(TandemError, of_reload)
    app.add_exception_handler(Exception, lambda _, __: answer(500, "internal error; see the server's log"))


def _add_score(app: FastAPI, service: Service) -> None:
    content = {
        "application/json": {
            "schema": ScoreBody.model_json_schema(ref_template="#/components/schemas/{model}")
        },
        arrow_body.MEDIA_TYPE: {"schema": {"type": "string", "format": "binary"}},
    }
    schemas = content["application/json"]["schema"].pop("$defs", {})
    body = {"required": True, "content": content}

    @app.post(
        "/score",
        response_model=AnswerBody,
        responses=_errors(400, 404, 413, 415, 422, 429),
        openapi_extra={"requestBody": body},
    )
    async def score(request: Request) -> Response:
        """Score the candidates of one or several requests."""
        content_type = (
            request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
        )
        given = await _body(request, service.limits.body)
        arrived = time.perf_counter()
        scorer = service.current.scorer
        asked, explain = _decode(given, content_type, scorer, service)
        service.metrics.stage.labels("decode").observe(time.perf_counter() - arrived)
        scored = await service.batcher.score(scorer, asked, explain)
        if arrow_body.MEDIA_TYPE in request.headers.get("accept", ""):
            content = arrow_body.write_arrow(scored, scorer.tasks, scorer.version)
            answer = Response(content, media_type=arrow_body.MEDIA_TYPE)
        else:
            answer = _json(_answer(scored, scorer, explain))
        service.metrics.latency.observe(time.perf_counter() - arrived)
        return answer

    _describe_body(app, schemas)


def _describe_body(app: FastAPI, schemas: Mapping[str, Any]) -> None:
    """The body of /score is read by hand, so its schemas are added by hand."""
    plain = app.openapi

    def openapi() -> dict[str, Any]:
        found = plain()
        found["components"]["schemas"].update(schemas)
        return found

    app.openapi = openapi  # type: ignore[method-assign]


async def _body(request: Request, most: int) -> bytes:
    """The whole body, or 413 as soon as it is seen to be too long."""
    problem = f"the body is longer than {most:,} bytes (--max-body)"
    announced = request.headers.get("content-length", "0")
    if announced.isascii() and announced.isdigit() and int(announced[:19]) > most:
        raise RequestError(413, problem)
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > most:
            raise RequestError(413, problem)
        parts.append(part)
    return b"".join(parts)


def _decode(body: bytes, content_type: str, scorer: Scorer, service: Service) -> tuple[list[Asked], bool]:
    stored: Mapping[int, History] = service.current.histories or {}
    if content_type == arrow_body.MEDIA_TYPE:
        return arrow_body.read_arrow(body, stored, scorer.needs, service.limits), False
    if content_type != "application/json":
        kinds = f"application/json or {arrow_body.MEDIA_TYPE}"
        raise RequestError(415, f"content type {content_type[:80]!r} is not read; send {kinds}")
    read = read_json(body)
    if len(read.requests) > service.limits.requests:
        problem = (
            f"{len(read.requests):,} requests, the server takes {service.limits.requests:,} (--max-requests)"
        )
        raise RequestError(413, problem)
    asked = [
        from_json(each, stored, scorer.needs, service.limits, f"requests[{r}]")
        for r, each in enumerate(read.requests)
    ]
    return asked, read.explain


def _answer(scored: Sequence[Scored], scorer: Scorer, explain: bool) -> dict[str, Any]:
    results = []
    for part in scored:
        result: dict[str, Any] = {
            "scores": {task: part.probabilities[:, t].tolist() for t, task in enumerate(scorer.tasks)}
        }
        if explain:
            result["kept"] = {
                branch: [{"behaviors": kept.places, "weights": kept.weights} for kept in found]
                for branch, found in part.kept.items()
            }
        results.append(result)
    return {"version": scorer.version, "results": results}


def _json(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(to_json(content), status, headers, "application/json")


def _add_state(app: FastAPI, service: Service) -> None:
    @app.get("/healthz", response_model=HealthBody)
    async def healthz() -> HealthBody:
        """Ready once it answers: a server without a checked snapshot does not listen."""
        scorer, refused = service.current.scorer, service.current.refused
        return HealthBody(
            status="ready",
            version=scorer.version,
            step=scorer.snapshot.manifest.step,
            tasks=list(scorer.tasks),
            features={name: scorer.needs.rows.get(name, 0) for name in scorer.needs.features},
            context=list(scorer.needs.context),
            numeric=list(scorer.needs.numeric),
            history_length=scorer.data.history_length,
            histories=len(service.current.histories or ()),
            uptime_seconds=time.monotonic() - service.started,
            refused={"version": refused[0], "problem": refused[1]} if refused else None,
        )

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(service.metrics.text(), headers={"content-type": service.metrics.content_type})

    @app.post("/reload", response_model=ReloadBody, responses=_errors(409))
    async def reload() -> ReloadBody:
        """Switch to the newest version; 409 if it is refused, and the old one stays."""
        switched = await service.reload()
        return ReloadBody(version=service.current.scorer.version, switched=switched)


def _add_page(app: FastAPI, service: Service) -> None:
    page = _PAGE.read_text(encoding="utf-8")

    @app.get("/", response_class=HTMLResponse)
    async def show() -> HTMLResponse:
        """The page."""
        return HTMLResponse(page, headers={"content-security-policy": _CSP})

    @app.get("/users", response_model=UsersBody)
    async def users() -> UsersBody:
        """Users whose histories the server has, those with requests to look at first."""
        return users_body(service.current.histories)

    @app.get("/users/{user_id}", response_model=UserBody, responses=_errors(404, 422))
    async def user(user_id: int) -> UserBody:
        """One user's history and logged requests, with names."""
        histories = service.current.histories
        if histories is None or user_id not in histories:
            raise RequestError(404, f"no stored history of user {str(user_id)[:20]}")
        return await asyncio.to_thread(user_body, histories, user_id, service.limits)
