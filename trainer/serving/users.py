"""Whose stored history a request means: users by number, or by the names that the raw tables gave them."""

from __future__ import annotations

from collections.abc import Mapping

import pyarrow as pa
import pyarrow.compute as pc

from trainer.log.arrow_types import is_text
from trainer.serving.asked import History, RequestError
from trainer.serving.vocabulary import Translation, Vocabulary, found_in

# Of a name in a message.
_SHOWN = 80


def as_user(given: int | str) -> pa.Array:
    """A user as an array of one value."""
    return pa.array([given], pa.large_string() if isinstance(given, str) else pa.int64())


def names_of(translation: Translation | None) -> Vocabulary | None:
    """The names that a request may use: those of the log, in a body of raw values."""
    return None if translation is None else translation.users


def number_sent(user: pa.Array | None) -> int:
    """What stands for a user whose history is sent along, and who need not be known: 0 for a name."""
    return 0 if user is None or is_text(user.type) else int(user[0].as_py())


def stored_history(
    stored: Mapping[int, History], user: pa.Array | None, names: Vocabulary | None, place: str
) -> tuple[int, History]:
    """The number and the history of a user.

    Args:
        user: one value; None: the request names nobody.
        names: of the users of the log; None: the request, or the log, has numbers.
        place: of the request, for messages.

    Raises:
        RequestError: 422 without a user or of another type than the log's, 404 for an unknown one.
    """
    if user is None:
        raise RequestError(422, f"{place}: give a history, or a user_id where the server has histories")
    if not stored:
        raise RequestError(422, f"{place}.history: missing, and this server was started without --histories")
    number = known_user(stored, user, names, f"{place}.user_id")
    return number, stored[number]


def known_user(stored: Mapping[int, History], user: pa.Array, names: Vocabulary | None, place: str) -> int:
    """The log's number of a user that has a history.

    Raises:
        RequestError: 422 where it is of another type than the log's users, 404 where there is no such user.
    """
    number = _number_of(user, names, place)
    if number not in stored or (names is not None and not number):
        raise RequestError(404, f"{place}: no stored history of user {_spelled(user)}")
    return number


def _number_of(user: pa.Array, names: Vocabulary | None, place: str) -> int:
    text = is_text(user.type)
    if text != (names is not None and names.text):
        mine, theirs = ("text", "integers") if text else ("an integer", "text")
        raise RequestError(422, f"{place}: is {mine}, and the users of the histories' log are {theirs}")
    return int(user[0].as_py() if names is None else found_in(names, user, place)[0])


def _spelled(user: pa.Array) -> str:
    if not is_text(user.type):
        return str(user[0])
    name: str = pc.utf8_slice_codeunits(user, 0, _SHOWN)[0].as_py()
    return repr(name)
