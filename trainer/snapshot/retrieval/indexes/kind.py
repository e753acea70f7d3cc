"""What a kind of index is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

from trainer.snapshot.retrieval.vector_files import Floats

# Gives about so many vectors, spread over all rows: float32 [n, width].
Sample = Callable[[int], Floats]
Setting = dict[str, int]


class IndexKind(ABC):
    """An index over some rows, with the number of a row as its id.

    Args:
        rows: how many there will be; width: of a vector; seed: of every random draw.
    """

    name: ClassVar[str]
    # Whether several threads build the same index as one.
    repeatable: ClassVar[bool] = True

    def __init__(self, rows: int, width: int, seed: int) -> None:
        self.rows, self.width, self.seed = rows, width, seed

    @abstractmethod
    def empty(self, sample: Sample) -> Any:
        """A `faiss.Index` that vectors can be added to."""

    @property
    def parameters(self) -> dict[str, int]:
        """How it is built, for the manifest."""
        return {}

    @property
    def settings(self) -> list[Setting]:
        """Settings to measure, those that look at the fewest rows first."""
        return [{}]

    def options(self, setting: Setting, chosen: Any = None) -> Any:
        """FAISS's parameters of one search; `chosen`: an IDSelector, None = all rows."""
        import faiss

        return None if chosen is None else faiss.SearchParameters(sel=chosen)  # type: ignore[call-arg]

    def apply(self, index: Any, setting: Setting) -> None:
        """Make a setting that of the index itself, which its file keeps."""
        for name, value in setting.items():
            setattr(index, name, value)
