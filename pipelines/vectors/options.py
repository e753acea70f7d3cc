"""What `tandemrec vectors` is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from embeddings.errors import ConfigError

Of = Literal["items", "users"]
Index = Literal["none", "flat", "hnsw", "ivf"]


@dataclass(frozen=True)
class VectorOptions:
    """What is written, and how an index is measured.

    Attributes:
        of, space, branch, task: whose vectors, see `trainer.snapshot.retrieval`; task empty: the first.
        item: the feature of candidates that names an item.
        index: over items; recall: the share of the 100 best rows that its setting shall find.
        split: whose users are written, and whose requests ask for items; queries: how many ask.
        groups: whose vectors of users are written; empty: all.
        seed: of every random draw; None: the `train.seed` of the snapshot.
        overwrite: whether older vectors may be replaced.
    """

    of: Of = "items"
    space: str = "attention"
    branch: str = "main"
    task: str = ""
    item: str = "item_id"
    index: Index = "none"
    recall: float = 0.95
    split: str = "test"
    queries: int = 1000
    groups: tuple[int, ...] = ()
    seed: int | None = None
    overwrite: bool = False


def groups_of(text: str) -> tuple[int, ...]:
    """Ids of groups, with commas between them.

    Raises:
        ConfigError: some are no ids.
    """
    words = [word.strip() for word in text.split(",") if word.strip()]
    for word in words:
        if not word.isdecimal():
            raise ConfigError(f"--groups {word}: must be ids, such as 3,7")
    return tuple(dict.fromkeys(int(word) for word in words))
