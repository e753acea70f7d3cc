"""What a scoring core tells of its work to whoever counts it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from trainer.serving.scorer import Seconds

# Why a body was not answered:
#   abandoned  its client left
#   expired    its deadline passed
#   hopeless   it was refused, since by the measured pace it would not be scored before its deadline
#   full       it was refused, since too many waited
#   unsound    its scores were no numbers
Loss = Literal["abandoned", "expired", "hopeless", "full", "unsound"]


@dataclass(frozen=True)
class ModelCall:
    """A model call that has ended.

    Attributes:
        bodies: whose parts were scored; requests, candidates: of these parts.
        waited: of each body whose first part this was, how long it waited; seconds: what the call took.
    """

    bodies: int
    requests: int
    candidates: int
    waited: Sequence[float]
    seconds: Seconds


@dataclass(frozen=True)
class PartTimes:
    """When a part of a body was scored: just now.

    Attributes:
        waited: seconds that the body waited for its first part; None: this is a later one.
        seconds: what the model call took.
    """

    waited: float | None
    seconds: Seconds


Follow = Callable[[PartTimes], None]


class Observer:
    """Counts nothing; whoever counts replaces what matters to them. All is called by the event loop."""

    def decoded(self, seconds: float) -> None:
        """A body was decoded."""

    def follow(self) -> Follow | None:
        """Called in the task of a body before it waits; what it returns is told of each part of the body."""
        return None

    def called(self, call: ModelCall) -> None:
        """The model was called."""

    def answered(self, seconds: float, unknown: int) -> None:
        """A body was answered, so long after it arrived; `unknown`: raw values in it that stand for no id."""

    def lost(self, why: Loss) -> None:
        """A body was not answered."""

    def unsound(self, version: str, where: str) -> None:
        """A version was found to answer with what is no number; told once. `where`: of it, one line."""
