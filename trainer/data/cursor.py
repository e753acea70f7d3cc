"""A position in the data of a run, which means the same at any number of ranks and workers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Cursor:
    """A position in the data: what all ranks together have consumed.

    The last three attributes say where to find it without a plan of what came before; they are no part of
    what it means. Cursors of older checkpoints lack them, and everything up to the position is planned again.

    Attributes:
        window: the windows of a stream that were trained before; 0 for a log, which is no stream.
        epoch: passes over the log, or over the window, that lie behind it.
        blocks: consumed in the present pass.
        place: the row groups of a pass are read some at a time; the number of those that it lies in.
        before: the blocks of all such places before that one.
        plan: `SequenceLogReader.plan` of the reader that made it; another one may cut other blocks.
    """

    window: int = 0
    epoch: int = 0
    blocks: int = 0
    place: int = field(default=0, compare=False)
    before: int = field(default=0, compare=False)
    plan: str = field(default="", compare=False)

    @staticmethod
    def of_state(state: Mapping[str, Any]) -> Cursor:
        """Of a checkpoint. Those that know of no streams call `window` what is `place` here."""
        if "place" not in state:
            state = {**state, "place": state.get("window", 0), "window": 0}
        return Cursor(**state)

    def next_pass(self) -> Cursor:
        """Where the next pass over the same data begins."""
        return Cursor(self.window, self.epoch + 1)

    def next_window(self) -> Cursor:
        """Where the next window of a stream begins."""
        return Cursor(self.window + 1)
