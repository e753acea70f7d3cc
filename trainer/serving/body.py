"""Bodies of POST /score, and its answers, in JSON and in Arrow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic_core import to_json

from trainer.serving import arrow_body
from trainer.serving.checks import cut_history
from trainer.serving.exploration import Exploration, Sureness, check_exploration
from trainer.serving.histories import HistoryStore
from trainer.serving.json_body import JsonForm, read_json
from trainer.serving.raw_ids import with_unknown
from trainer.serving.request import History, Limits, Request, RequestError
from trainer.serving.scorer import MOST_EXPLAINED, Answer, Scorer
from trainer.serving.vocabulary import Translation

# Of a candidate and task: its probability, and what `Sureness` has.
_LISTS_OF_SURENESS = 5
# A place and a weight as objects of Python, and what refers to them.
_BYTES_OF_KEPT = 72


@dataclass(frozen=True)
class Body:
    """The requests of a body, and what its answer must have.

    Attributes:
        scorer: the requests were checked for it, so no other may score them.
        requests: checked, with only the behaviors that the model reads.
        explain: whether the answer says which behaviors were kept for each candidate.
        items: of each request, what to call its candidates in the answer; empty with dense ids.
        raw: whether it held raw values.
        exploration: what is asked of how sure the model is, None = nothing.
    """

    scorer: Scorer
    requests: Sequence[Request]
    explain: bool = False
    items: Sequence[Any] = ()
    raw: bool = False
    exploration: Exploration | None = None


def decode(
    body: memoryview, content_type: str, scorer: Scorer, histories: HistoryStore | None, limits: Limits
) -> Body:
    """Requests of a body; RequestError for whatever cannot be scored."""
    users = None if histories is None else histories.users
    stored: Mapping[int, History] = histories or {}
    if content_type == arrow_body.MEDIA_TYPE:
        given = (body, stored, scorer.needs, limits, scorer.vocabularies, users)
        requests, exploration = arrow_body.read_arrow(*given)
        if exploration is not None:
            check_exploration(scorer.snapshot)
        return Body(scorer, [as_read(request, scorer) for request in requests], exploration=exploration)
    if content_type != "application/json":
        kinds = f"application/json or {arrow_body.MEDIA_TYPE}"
        raise RequestError(415, f"content type {content_type[:80]!r} is not read; send {kinds}")
    sent = read_json(body, limits, scorer.needs.encoders)
    if sent.asked is not None:
        check_exploration(scorer.snapshot)
    raw, requests = sent.ids == "raw", []
    for r, each in enumerate(sent.requests):
        translation = Translation(scorer.vocabularies, users) if raw else None
        form = JsonForm(each, scorer.needs, translation, f"requests[{r}]")
        requests.append(as_read(form.request(stored, limits), scorer))
    candidates = sum(request.count for request in requests)
    if sent.explain and candidates > limits.explained:
        problem = f"{candidates:,} candidates to explain, the server takes {limits.explained:,} of a body"
        raise RequestError(413, problem)
    items = [each.candidates.get("item_id", []) for each in sent.requests] if raw else []
    return Body(scorer, requests, sent.explain, items, raw, sent.asked)


def as_read(request: Request, scorer: Scorer) -> Request:
    """A checked request with only the behaviors that the model reads; what it does not know is counted."""
    return with_unknown(cut_history(request, scorer.needs), scorer.needs, scorer.snapshot.id_maps)


def held_bytes(body: Body) -> int:
    """What a body takes until it is answered: its arrays, and the answers once they are there."""
    candidates = sum(request.count for request in body.requests)
    of_candidate = 4 * len(body.scorer.tasks) * (1 if body.exploration is None else _LISTS_OF_SURENESS)
    if body.explain:
        searches = (branch.search for branch in body.scorer.branches.values())
        kept = sum(MOST_EXPLAINED if s is None else min(s.k, MOST_EXPLAINED) for s in searches)
        of_candidate += kept * _BYTES_OF_KEPT
    return sum(request.bytes for request in body.requests) + candidates * of_candidate


def encode(answers: Sequence[Answer], body: Body, as_arrow: bool) -> bytes:
    """The answers to a body, in the order of its requests."""
    scorer = body.scorer
    if as_arrow:
        return arrow_body.write_arrow(answers, scorer.tasks, scorer.version)
    results = []
    for r, answer in enumerate(answers):
        result: dict[str, Any] = {
            "scores": {task: answer.probabilities[:, t].tolist() for t, task in enumerate(scorer.tasks)},
            "history_used": answer.history_used,
        }
        if body.raw:
            result["items"] = body.items[r]
        if body.raw or scorer.needs.living:
            result["unknown"] = answer.unknown
        if body.explain:
            result["kept"] = answer.explanations
            result["user_state"] = answer.user_state or None
        if answer.sureness is not None:
            result["uncertainty"] = _by_task(answer.sureness, scorer.tasks)
        results.append(result)
    return to_json({"version": scorer.version, "results": results})


def _by_task(sure: Sureness, tasks: Sequence[str]) -> dict[str, dict[str, list[float]]]:
    """Task -> what is said of each candidate, by name."""
    named = sure.by_name()
    return {
        task: {name: values[:, place].tolist() for name, values in named.items()}
        for place, task in enumerate(tasks)
    }
