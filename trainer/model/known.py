"""What is known of a batch's behaviors before it is scored, so that no table need be asked for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class KnownBehaviors:
    """Of the N behaviors of a batch, at least 1.

    Attributes:
        rows: group -> its vectors, [N, width]; of the groups of the representation that are known.
        of_branch: branch -> name -> [N, *], all that `Branch.of_behaviors` gives.
        selects: whether some groups of the representation are not known, and must be asked for what is kept.
    """

    rows: Mapping[str, Tensor]
    of_branch: Mapping[str, Mapping[str, Tensor]]
    selects: bool = False
