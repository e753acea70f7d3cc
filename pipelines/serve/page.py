"""The page that shows a user, and the paths that it asks."""

from __future__ import annotations

from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse

from pipelines.serve.bodies import errors_of
from pipelines.serve.service import Service
from pipelines.serve.tokens import check_token
from pipelines.serve.users import UserBody, UsersBody, user_body, users_body
from trainer.serving.request import RequestError

_PAGE = Path(__file__).with_name("page.html")
_CSP = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; "
    "img-src data:"
)


def add_page(app: FastAPI, service: Service) -> None:
    page = _PAGE.read_text(encoding="utf-8")

    @app.get("/", response_class=HTMLResponse)
    async def show() -> HTMLResponse:
        """The page."""
        return HTMLResponse(page, headers={"content-security-policy": _CSP})

    @app.get("/users", response_model=UsersBody, responses=errors_of(403, 404, 422))
    async def users(request: Request, name: str | None = None) -> UsersBody:
        """The first users whose histories the server has, or the one of a name."""
        check_token(service.users_token, request)
        return await service.core.in_thread(users_body, service.versions.histories, name)

    @app.get("/users/{user_id}", response_model=UserBody, responses=errors_of(403, 404, 422))
    async def user(request: Request, user_id: int) -> UserBody:
        """One user's history and logged requests, with names."""
        check_token(service.users_token, request)
        histories = service.versions.histories
        if histories is None or user_id not in histories:
            raise RequestError(404, f"no stored history of user {str(user_id)[:20]}")
        scorer = service.versions.scorer
        given = histories, user_id, scorer.columns.labels.tasks, service.limits, scorer.needs.living
        return await service.core.in_thread(user_body, *given)
