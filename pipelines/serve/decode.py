"""Bodies of POST /score, and its answers, in JSON and in Arrow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic_core import to_json

from trainer.serving import arrow_body
from trainer.serving.asked import History, Limits, Request, RequestError
from trainer.serving.checks import newest
from trainer.serving.histories import HistoryStore
from trainer.serving.request import ScoreBody, from_json, read_json
from trainer.serving.scorer import Scored, Scorer
from trainer.serving.vocabulary import Translation

_ITEM = "item_id"


@dataclass(frozen=True)
class Decoded:
    """A body.

    Attributes:
        requests: checked, with the behaviors that the model reads; explain: whether kept ones are told.
        items: of each request, what to call its candidates in the answer; empty with dense ids.
        raw: whether it held raw values.
    """

    requests: Sequence[Request]
    explain: bool = False
    items: Sequence[Any] = ()
    raw: bool = False

    @property
    def bytes(self) -> int:
        """What its arrays take."""
        return sum(request.bytes for request in self.requests)


def decode(
    body: memoryview, content_type: str, scorer: Scorer, histories: HistoryStore | None, limits: Limits
) -> Decoded:
    """Requests of a body; RequestError for whatever cannot be scored."""
    if content_type == arrow_body.MEDIA_TYPE:
        users = None if histories is None else histories.users
        found = arrow_body.read_arrow(body, histories or {}, scorer.needs, limits, scorer.vocabularies, users)
        return Decoded([newest(request, scorer.needs) for request in found])
    if content_type != "application/json":
        kinds = f"application/json or {arrow_body.MEDIA_TYPE}"
        raise RequestError(415, f"content type {content_type[:80]!r} is not read; send {kinds}")
    return _of_json(read_json(body, limits), scorer, histories, limits)


def _of_json(read: ScoreBody, scorer: Scorer, histories: HistoryStore | None, limits: Limits) -> Decoded:
    raw, requests = read.ids == "raw", []
    users = None if histories is None else histories.users
    stored: Mapping[int, History] = histories or {}
    for r, each in enumerate(read.requests):
        translation = Translation(scorer.vocabularies, users) if raw else None
        found = from_json(each, stored, scorer.needs, limits, f"requests[{r}]", translation)
        requests.append(newest(found, scorer.needs))
    candidates = sum(request.count for request in requests)
    if read.explain and candidates > limits.explained:
        problem = f"{candidates:,} candidates to explain, the server takes {limits.explained:,} of a body"
        raise RequestError(413, problem)
    items = [each.candidates.get(_ITEM, []) for each in read.requests] if raw else []
    return Decoded(requests, read.explain, items, raw)


def encode(scored: Sequence[Scored], scorer: Scorer, decoded: Decoded, as_arrow: bool) -> bytes:
    """An answer, in the order of the requests."""
    if as_arrow:
        return arrow_body.write_arrow(scored, scorer.tasks, scorer.version)
    results = []
    for r, part in enumerate(scored):
        result: dict[str, Any] = {
            "scores": {task: part.probabilities[:, t].tolist() for t, task in enumerate(scorer.tasks)},
            "history_used": part.history_used,
        }
        if decoded.raw:
            result |= {"items": decoded.items[r], "unknown": part.unknown}
        if decoded.explain:
            result["kept"] = {
                branch: [{"behaviors": kept.places, "weights": kept.weights} for kept in found]
                for branch, found in part.kept.items()
            }
        results.append(result)
    return to_json({"version": scorer.version, "results": results})
