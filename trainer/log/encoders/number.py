"""The number itself, without any table: it goes into the head beside the vectors."""

from __future__ import annotations

from typing import ClassVar, Literal

from trainer.log.bags import Bags, Ints
from trainer.log.encoders.encoder import Encoder


class RawNumber(Encoder):
    """A number of candidates, which the log keeps as it is; there are no ids, and no code."""

    gives_ids: ClassVar[bool] = False

    kind: Literal["number"]

    def parts(self, name: str) -> dict[str, int]:
        return {}

    def most_ids(self, name: str) -> dict[str, int]:
        return {}

    def encode(self, codes: Ints) -> dict[str, Bags]:
        return {}
