"""What an adapter hands to the scoring core, and what it gets back, whatever the protocol."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

JSON = "application/json"


def media_type_of(said: str) -> str:
    """A content type as `Call` has it."""
    return said.partition(";")[0].strip().lower()


@dataclass(frozen=True)
class Call:
    """A body to be scored.

    Attributes:
        content: the bytes of the body; content_type: JSON or Arrow, in lower case and without parameters.
        as_arrow: whether the answer is to be in Arrow instead of JSON.
        deadline: by `time.monotonic`; None: as the server's settings say.
        hold: told how many bytes the server holds for this body from now on, as often as that changes. It
            may raise RequestError where this is too much for all bodies together.
    """

    content: memoryview
    content_type: str = JSON
    as_arrow: bool = False
    deadline: float | None = None
    hold: Callable[[int], None] | None = None


@dataclass(frozen=True)
class Reply:
    """The answer to a body.

    Attributes:
        version: of the snapshot that scored it.
    """

    content: bytes
    media_type: str
    version: str
