"""What an encoder of a number is: codes of numbers become bags of ids, each of its own small table."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Annotated, ClassVar

from pydantic import AfterValidator, Field

from trainer.config.toml import Settings
from trainer.log.bags import Bags, Ints
from trainer.log.encoders.code import LARGEST, integer_of


def _finite(value: float) -> float:
    try:
        finite = math.isfinite(value)
    except OverflowError:
        raise ValueError("is larger than all 64-bit floats") from None
    if not finite:
        raise ValueError(f"{value} is no finite number")
    return value


Number = Annotated[int | float, AfterValidator(_finite)]


class Encoder(Settings):
    """How a number becomes ids. Every kind has its own file; the table of them is in `table.py`.

    Attributes:
        gives_ids: whether there are ids; without, the log keeps the number itself.
    """

    gives_ids: ClassVar[bool] = True

    kind: str
    """Which encoder it is."""
    step: Annotated[Number, Field(gt=0)] = 1
    """The unit in which numbers are counted: what is encoded is floor(number / step + 1/2). With step 1,
    integers are taken exactly, whatever their size."""

    @property
    def limits(self) -> tuple[int, int]:
        """The least and the greatest quantised integer; numbers outside are overflow."""
        return -LARGEST, LARGEST

    @property
    def unit(self) -> str:
        """The step in words, the same for 1 and 1.0."""
        return f"steps of {int(self.step) if self.step == int(self.step) else self.step}"

    @abstractmethod
    def parts(self, name: str) -> dict[str, int]:
        """The name of each feature that a table has for the field `name` -> the rows of the table."""

    @abstractmethod
    def most_ids(self, name: str) -> dict[str, int]:
        """The name of each feature as in `parts` -> the most ids of a bag."""

    @abstractmethod
    def meanings(self, name: str) -> dict[str, str]:
        """The name of each feature as in `parts` -> what its rows stand for.

        Where that is the same of two encoders, rows of one number stand for what they do in the other; one
        may have more of them.
        """

    @abstractmethod
    def encode(self, codes: Ints) -> dict[str, Bags]:
        """One bag a code, for each part: its key is what the part's name has after that of the field."""

    def quantise(self, value: float) -> int:
        """The quantised integer of a finite number of the settings.

        Raises:
            ValueError: there are more steps to it than fit 64 bits.
        """
        try:
            whole = integer_of(value, self.step)
        except OverflowError:
            whole = 2**63
        if abs(whole) > LARGEST:
            raise ValueError(f"{value} is beyond +-(2^63 - 2) steps of {self.step}; take a larger step")
        return whole
