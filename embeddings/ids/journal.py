"""What a change of arrays has overwritten, so that it can be taken back and made again."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


class Journal:
    """Parts of arrays as they were before each change, in order.

    `swap` puts back what was there, and keeps what it takes away: called again, it makes the change again.
    """

    def __init__(self) -> None:
        self._parts: list[tuple[Array, Array, Array]] = []
        self._changed = True

    def note(self, array: Array, places: npt.NDArray[np.int64]) -> None:
        """Keep the entries at some places, each named once, before they change."""
        self._parts.append((array, places, array[places]))

    def swap(self) -> None:
        """Take the change back, or make it again."""
        for array, places, values in self._parts if not self._changed else reversed(self._parts):
            now = array[places]
            array[places] = values
            values[...] = now
        self._changed = not self._changed
