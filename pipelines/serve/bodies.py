"""The answers of `tandemrec serve`, as its OpenAPI description has them."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel


class ErrorBody(BaseModel):
    """Every answer that is no success."""

    error: str


class KeptBody(BaseModel):
    """What a branch kept for one candidate, heaviest first: places in the history, and weights."""

    behaviors: list[int]
    weights: list[float]


class SurenessBody(BaseModel):
    """How sure the model is of the logit of every candidate, for one task.

    Attributes:
        mean, deviation: of the logit; probability: with the deviation in it.
        explore: logits to rank by, where asked for.
    """

    mean: list[float]
    deviation: list[float]
    probability: list[float]
    explore: list[float] | None = None


class ResultBody(BaseModel):
    """Of one request: a probability for every candidate and task; `kept` by branch and `uncertainty` by
    task where asked for.

    Attributes:
        history_used: behaviors that the model could see: older than the request, and at most as many as it
            reads; the newest of those that were sent.
        items: of a body with raw ids, the candidates' `item_id` as they were sent.
        user_state: with `explain`, what was known of the user: `hit`, `extended`, `miss` or `stale`; None:
            no state is kept of the user.
        unknown: of a body with raw ids, how many stand for nothing the model was trained on, by place; of
            features whose ids come and go, how many have no row of their own.
    """

    scores: dict[str, list[float]]
    history_used: int
    items: list[int | str] | None = None
    unknown: dict[str, int] | None = None
    kept: dict[str, list[KeptBody]] | None = None
    user_state: str | None = None
    uncertainty: dict[str, SurenessBody] | None = None


class AnswerBody(BaseModel):
    """What POST /score answers, results in the order of the requests."""

    version: str
    results: list[ResultBody]


class UpdatesBody(BaseModel):
    """Looking for newer versions fails: how often in a row, and why."""

    failures: int
    problem: str | None


class ReadyBody(BaseModel):
    """Requests are scored; `updates`: off, working, or failing and why."""

    status: str
    updates: str


class LatestBody(BaseModel):
    """What LATEST says of newer versions.

    Attributes:
        problem: why the version that it names is not the one that is served; None where it is.
        looks: how often a look found what.
    """

    problem: str | None
    looks: dict[str, int]


class StatesBody(BaseModel):
    """What is kept of users between their requests.

    Attributes:
        outcomes: of scored requests, what was known of their users.
        entries, bytes: that are held in memory now.
    """

    outcomes: dict[str, int]
    entries: int
    bytes: int


class HealthBody(BaseModel):
    """State, and what a client must know of the snapshot.

    Attributes:
        problem: why no requests should be sent here, as `/readyz` says.
        numbers: features that are numbers, which are sent as such, and the settings of their encoders.
        raw: features whose raw values may be sent instead of ids.
        living: features whose ids come and go, and may be any 64-bit integers; hashed: those of them that may
            be sent as text in a body of raw values.
        uncertainty: whether it can say how sure it is.
        users: what a raw `user_id` is, `text` or `integers`; None: the server has no histories.
        refused: the newest version that was refused; updates: why newer ones cannot be looked for.
        exported_at, served_since: of the version, in seconds since 1970; older versions do not say the first.
        limits: of one body, by the keys of `[limits]`.
        queue: bodies that are not answered; of those that wait, calls of the model and their cost.
        user_states: None where none are kept.
    """

    status: str
    problem: str | None
    version: str
    step: int
    tasks: list[str]
    features: dict[str, int]
    context: list[str]
    numeric: list[str]
    numbers: dict[str, dict[str, Any]]
    history_length: int
    histories: int
    raw: list[str]
    living: list[str]
    hashed: list[str]
    users: str | None
    uncertainty: bool
    uptime_seconds: float
    refused: dict[str, str] | None
    updates: UpdatesBody | None
    latest: LatestBody
    exported_at: float | None
    served_since: float
    limits: dict[str, int]
    queue: dict[str, int]
    user_states: StatesBody | None


class ReloadBody(BaseModel):
    """The version served now, and whether it is another than before."""

    version: str
    switched: bool


class LiveBody(BaseModel):
    """The process works."""

    status: str


def errors_of(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The errors that a path may answer, for its description."""
    return {status: {"model": ErrorBody} for status in statuses}
