"""One request of a body as arrays: which fields a request has is said here, for all forms of bodies."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import pyarrow as pa

from trainer.log.arrow import is_text
from trainer.log.bags import Bags, Ints
from trainer.log.encoders.encoder import Encoder
from trainer.serving.checks import check_request
from trainer.serving.histories import known_user
from trainer.serving.raw_ids import raw_ids
from trainer.serving.request import Doubles, History, Limits, Needs, Part, Request, RequestError
from trainer.serving.vocabulary import Translation


class RequestForm(ABC):
    """One request of a body. A subclass says how a form of bodies spells each field.

    Args:
        translation: of raw values to ids; None: the body holds dense ids.
        place: of the request in the body, for messages.
    """

    def __init__(self, needs: Needs, translation: Translation | None, place: str) -> None:
        self.needs, self.translation, self.place = needs, translation, place

    def at(self, path: str) -> str:
        """A place in this request as its client knows it, for messages.

        Args:
            path: as in JSON, such as `history.timestamp`.
        """
        return f"{self.place}.{path}"

    @abstractmethod
    def user(self) -> pa.Array | None:
        """One integer or one text; None: the request names no user."""

    @abstractmethod
    def time(self) -> int | None:
        """Unix seconds; None: the request names no time."""

    @abstractmethod
    def per_behavior(self, name: str) -> Ints | None:
        """`timestamp`, `cluster_size` or `cluster_time` of the history sent along: int64 [n], or None."""

    @abstractmethod
    def has(self, part: Part, name: str) -> bool:
        """Whether the part has this feature, or these numbers."""

    @abstractmethod
    def bags(self, part: Part, name: str) -> Bags:
        """Ids of a feature: of every behavior or candidate, or one bag of the context."""

    @abstractmethod
    def codes(self, part: Part, name: str, encoder: Encoder) -> Ints:
        """Codes of a feature that is a number: of every behavior or candidate, or one of the context."""

    @abstractmethod
    def numbers(self, name: str) -> Doubles:
        """Numbers of every candidate."""

    def request(self, stored: Mapping[int, History], limits: Limits) -> Request:
        """The request, checked.

        Args:
            stored: histories by user id, in dense ids.

        Raises:
            RequestError: 413 above a limit, 404 for an unknown user, 422 for anything else.
        """
        user, time, needs = self.user(), self.time(), self.needs
        timestamp = self.per_behavior("timestamp")
        if needs.users and timestamp is not None and (user is None or is_text(user.type)):
            problem = "give the user's number, since this model compares candidates with vectors of users"
            raise RequestError(422, f"{self.at('user_id')}: {problem}")
        if timestamp is None:
            if user is None:
                problem = "give a history, or a user_id where the server has histories"
                raise RequestError(422, f"{self.place}: {problem}")
            if not stored:
                problem = "missing, and this server was started without --histories"
                raise RequestError(422, f"{self.at('history')}: {problem}")
            names = None if self.translation is None else self.translation.users
            number = known_user(stored, user, names, self.at("user_id"))
            history = stored[number]
        else:
            # A user whose history is sent along need not be known: 0 stands for a name.
            number = 0 if user is None or is_text(user.type) else int(user[0].as_py())
            features = self._features(needs.history)
            clusters = (self.per_behavior("cluster_size"), self.per_behavior("cluster_time"))
            history = History(timestamp, features, *clusters)
        if time is None:
            # One at which all behaviors are in the past.
            time = min(int(history.time[-1]) if history.time.size else 0, 2**63 - 2) + 1
        candidates = self._features(needs.candidates)
        request = Request(
            user_id=number,
            history=history,
            time=time,
            candidates=candidates,
            count=max((bags.size for bags in candidates.values()), default=0),
            context=self._features(needs.context),
            numeric={n: self.numbers(n) for n in needs.numeric.known if self.has(needs.numeric, n)},
            unknown={} if self.translation is None else self.translation.unknown,
        )
        return check_request(request, needs, limits, self.at)

    def own_ids(self, feature: str, given: pa.Array, place: str) -> Ints | None:
        """Ids of a feature whose ids come and go; None: it has no such ids, or a vocabulary says them."""
        if feature not in self.needs.living:
            return None
        if self.translation is not None and feature in self.translation.vocabularies:
            return None
        # Among dense ids, text spells an id; among raw values, it is what the id is made of.
        hashes = self.translation is not None and feature in self.needs.hashed
        return raw_ids(given, hashes, place)

    def _features(self, part: Part) -> dict[str, Bags]:
        """Features that the snapshot knows, in its order."""
        encoders, found = self.needs.encoders, dict[str, Bags]()
        for name in part.known:
            if self.has(part, name):
                encoder = encoders.get(name)
                found[name] = Bags(self.codes(part, name, encoder)) if encoder else self.bags(part, name)
        return found
