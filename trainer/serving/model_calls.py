"""One model call for parts of several bodies, of which none fails for another."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from trainer.serving.exploration import Exploration
from trainer.serving.request import Request
from trainer.serving.scorer import Answer, Scorer, Seconds
from trainer.serving.soundness import error_of

Outcome = list[Answer] | Exception


@dataclass(frozen=True, eq=False)
class Portion:
    """Some requests of a body; see `trainer.serving.body.Body`.

    Attributes:
        unsound: whether the scorer is known to answer with what is no number.
    """

    scorer: Scorer
    requests: Sequence[Request]
    explain: bool = False
    exploration: Exploration | None = None
    unsound: bool = False


def score_portions(portions: Sequence[Portion]) -> tuple[list[Outcome], Seconds]:
    """The answers to each portion, or what went wrong with it; all have one scorer and one `explain`.

    If the call fails, each portion is scored alone, so that none fails for another.
    """
    scorer, explain = portions[0].scorer, portions[0].explain
    requests = [request for portion in portions for request in portion.requests]
    explore = [portion.exploration for portion in portions for _ in portion.requests]
    try:
        answers, seconds = scorer.score(requests, explain, explore)
    except Exception as error:
        if len(portions) == 1:
            return [error], Seconds(0.0, 0.0)
        alone = [score_portions([portion]) for portion in portions]
        return [outcomes[0] for outcomes, _ in alone], _total(each for _, each in alone)
    following = iter(answers)
    return [_checked(portion, following) for portion in portions], seconds


def _checked(portion: Portion, following: Iterator[Answer]) -> Outcome:
    """The next answers, which are those of the portion, or the error that stands for them."""
    answers = [next(following) for _ in portion.requests]
    for request, answer in zip(portion.requests, answers, strict=True):
        if not is_finite(answer):
            try:
                return error_of(portion.scorer, request, portion.unsound)
            except Exception as error:
                return error
    return answers


def is_finite(answer: Answer) -> bool:
    """Whether all that is said of candidates is a number."""
    said = [answer.probabilities, *(answer.sureness.by_name().values() if answer.sureness else ())]
    return all(bool(np.isfinite(values).all()) for values in said)


def _total(calls: Iterable[Seconds]) -> Seconds:
    search, ranking = map(sum, zip(*calls, strict=True))
    return Seconds(search, ranking)
