"""The number itself, without any table: it goes into the head beside the vectors."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import model_validator

from trainer.log.bags import Bags, Ints
from trainer.log.encoders.encoder import Encoder


class RawNumber(Encoder):
    """A number of candidates, which the log keeps as it is; there are no ids, and no code."""

    gives_ids: ClassVar[bool] = False

    kind: Literal["number"]

    @model_validator(mode="after")
    def _is_kept_as_it_is(self) -> Self:
        if self.step != 1:
            raise ValueError("step: a number is kept as it is; leave this out")
        return self

    def parts(self, name: str) -> dict[str, int]:
        return {}

    def most_ids(self, name: str) -> dict[str, int]:
        return {}

    def meanings(self, name: str) -> dict[str, str]:
        return {}

    def encode(self, codes: Ints) -> dict[str, Bags]:
        return {}
