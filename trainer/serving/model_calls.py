"""One model call for parts of several bodies, of which none fails for another."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

from trainer.serving.exploration import Exploration
from trainer.serving.request import Request
from trainer.serving.scorer import Answer, Scorer, Seconds


@dataclass(frozen=True, eq=False)
class Scored:
    """Some requests of a body; see `trainer.serving.body.Body`."""

    scorer: Scorer
    requests: Sequence[Request]
    explain: bool = False
    exploration: Exploration | None = None


def score_parts(parts: Sequence[Scored]) -> tuple[list[list[Answer] | Exception], Seconds]:
    """The answers to each part, or what went wrong with it; all have one scorer and one `explain`.

    If the call fails, each part is scored alone, so that none fails for another.
    """
    requests = [request for part in parts for request in part.requests]
    explore = [part.exploration for part in parts for _ in part.requests]
    try:
        answers, seconds = parts[0].scorer.score(requests, parts[0].explain, explore)
    except Exception as error:
        if len(parts) == 1:
            return [error], Seconds(0.0, 0.0)
        alone = [score_parts([part]) for part in parts]
        return [outcomes[0] for outcomes, _ in alone], _total(each for _, each in alone)
    following = chain(answers)
    return [[next(following) for _ in part.requests] for part in parts], seconds


def _total(calls: Iterable[Seconds]) -> Seconds:
    search, ranking = map(sum, zip(*calls, strict=True))
    return Seconds(search, ranking)
