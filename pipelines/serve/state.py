"""Paths that tell how the server is: for orchestrators, for Prometheus, and for people."""

from __future__ import annotations

import time

from fastapi import FastAPI, Request, Response

from pipelines.serve.bodies import (
    HealthBody,
    LatestBody,
    LiveBody,
    ReadyBody,
    ReloadBody,
    StatesBody,
    UpdatesBody,
    errors_of,
)
from pipelines.serve.service import Service
from pipelines.serve.tokens import check_token
from trainer.serving.request import RequestError


def _health(service: Service) -> HealthBody:
    scorer, histories = service.versions.scorer, service.versions.histories
    users = None
    if histories is not None:
        users = "integers" if histories.users is None else histories.users.kind
    refused, updates = service.versions.refused, service.updates
    failing = UpdatesBody(failures=updates.failures, problem=updates.problem) if updates.problem else None
    return HealthBody(
        status="ready" if service.problem() is None else "not ready",
        problem=service.problem(),
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
        latest=LatestBody(problem=service.versions.latest_problem, looks=dict(service.versions.looks)),
        exported_at=service.versions.exported_at,
        served_since=service.versions.served_since,
        limits=service.settings.limits.of(service.limits),
        queue=service.core.queue._asdict(),
        user_states=_states(service),
    )


def _states(service: Service) -> StatesBody | None:
    found = service.state_statistics()
    if found is None:
        return None
    return StatesBody(outcomes=found.outcomes, entries=found.entries, bytes=found.bytes)


def add_state(app: FastAPI, service: Service) -> None:
    @app.get("/healthz", response_model=HealthBody)
    async def healthz() -> HealthBody:
        """State; a server without a checked snapshot does not listen."""
        return _health(service)

    @app.get("/livez", response_model=LiveBody, responses=errors_of(503))
    async def livez() -> LiveBody:
        """Whether the process works: 503 where only a new one helps."""
        if not service.live():
            raise RequestError(503, service.problem() or "")
        return LiveBody(status="live")

    @app.get("/readyz", response_model=ReadyBody, responses=errors_of(503))
    async def readyz() -> ReadyBody:
        """Whether requests should be sent here: 503 while it ends, and where nothing can be scored."""
        if (problem := service.problem()) is not None:
            raise RequestError(503, problem)
        updates = service.updates
        looks = f"failing: {updates.problem}" if updates.problem else "working"
        return ReadyBody(status="ready", updates=looks if updates.seconds else "off")

    plain = {200: {"content": {"text/plain": {}}}, **errors_of(403)}

    @app.get("/metrics", response_class=Response, responses=plain)
    async def metrics(request: Request) -> Response:
        """For Prometheus."""
        check_token(service.metrics_token, request)
        return Response(service.metrics.text(), headers={"content-type": service.metrics.content_type})

    @app.post("/reload", response_model=ReloadBody, responses=errors_of(403, 409, 503))
    async def reload(request: Request) -> ReloadBody:
        """Switch to the newest version, with the token; 409 if it is refused, 503 if it cannot be read."""
        if service.reload_token is None:
            raise RequestError(403, "/reload is off; name a file by the key access.reload_token_file")
        check_token(service.reload_token, request)
        switched = await service.updates.reload()
        return ReloadBody(version=service.versions.scorer.version, switched=switched)
