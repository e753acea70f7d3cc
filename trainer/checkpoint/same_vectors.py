"""Whether the pre-trained vectors of a start are those that a checkpoint was trained with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trainer.data.similarity.loading import LoadedVectors


def changed_vectors(state: Mapping[str, Any], now: Mapping[str, LoadedVectors], where: str) -> list[str]:
    """A line for each of some pre-trained vectors that are others than those of a checkpoint.

    That is no error: a file grows with the items that come.

    Args:
        now: by name; where: name of the checkpoint.
    """
    before = state.get("vectors", {})
    return [
        f"data.vectors.{name}: the vectors are others than those that {where} was trained with"
        for name, each in now.items()
        if name in before and before[name] != each.digest
    ]


def vector_lines(state: Mapping[str, Any], now: Mapping[str, LoadedVectors], where: str) -> list[str]:
    """What was found in the files of vectors, and which of them are others than before."""
    return [*(each.line for each in now.values()), *changed_vectors(state, now, where)]
