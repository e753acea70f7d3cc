"""Where training stands, and how far that is in its phase."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from trainer.data.cursor import Cursor
from trainer.loop.early_stopping import Best
from trainer.loop.phases import Phase
from trainer.update.schedule import progress_of


@dataclass(frozen=True)
class Began:
    """Where a phase began: steps done, passes over the data, and candidates trained, of the whole run."""

    step: int = 0
    epoch: int = 0
    candidates: int = 0


@dataclass(frozen=True)
class Beside:
    """Steps and candidates of a phase that do not count for its length: of branches beside the first."""

    steps: int = 0
    candidates: int = 0


@dataclass
class Position:
    """What a checkpoint keeps besides tensors.

    Attributes:
        step: steps done; cursor: next block to read; candidates: trained so far, over all ranks.
        wall_s, cpu_s: spent in training steps so far, by this rank (checkpoints keep cpu_s of all ranks).
        validated: step of the newest validation, -1 before the first; best: of the phase, see
            `early_stopping`.
        phase: number of the present one; began: where it did; beside: what of it does not count.
    """

    step: int = 0
    cursor: Cursor = field(default_factory=Cursor)
    candidates: int = 0
    wall_s: float = 0.0
    cpu_s: float = 0.0
    validated: int = -1
    best: Best = field(default_factory=Best)
    phase: int = 0
    began: Began = field(default_factory=Began)
    beside: Beside = field(default_factory=Beside)

    @staticmethod
    def of_state(state: dict[str, Any], world_size: int, best: Best) -> Position:
        """Of a checkpoint; older ones know of no phases."""
        return Position(
            step=state["step"],
            cursor=Cursor.of_state(state["cursor"]),
            candidates=state["candidates"],
            wall_s=state["wall_s"],
            cpu_s=state["cpu_s"] / world_size,
            validated=state["validated"],
            best=best,
            phase=state.get("phase", 0),
            began=Began(**state.get("began", {})),
            beside=Beside(**state.get("beside", {})),
        )

    def begin(self, phase: Phase, before: Phase) -> None:
        """Go on from the end of a phase to the next one."""
        self.cursor, self.best = phase.first_cursor(before, self.cursor), Best()
        self.phase, self.began = phase.number, Began(self.step, self.cursor.epoch, self.candidates)
        self.beside = Beside()

    def count_as(self, steps: int, candidates: int) -> None:
        """Have so many steps and candidates of the phase count so far, whatever was trained."""
        trained = self.candidates - self.began.candidates
        self.beside = Beside(self.step - self.began.step - steps, trained - candidates)

    def passes_done(self, phase: Phase, ahead: int = 0) -> bool:
        """Whether the phase has read its data as often as it is to, or will have after so many passes."""
        return self.cursor.epoch + ahead - self.began.epoch >= phase.train.epochs

    def phase_done(self, phase: Phase) -> bool:
        """Whether the phase has come to its own end."""
        by_steps = any(self.step >= end for end in self.ends(phase, 0))
        return by_steps or self.passes_done(phase) or self.best.over(phase.train.early_stopping)

    @property
    def steps_done(self) -> int:
        """Steps of the phase so far."""
        return self.step - self.began.step - self.beside.steps

    @property
    def candidates_done(self) -> int:
        """Candidates of the phase so far."""
        return self.candidates - self.began.candidates - self.beside.candidates

    def ends(self, phase: Phase, run_limit: int) -> list[int]:
        """The steps after which the phase, or the run, ends at the latest; `run_limit`: 0 = none."""
        first = self.began.step + self.beside.steps
        ends = [first + phase.train.max_steps] if phase.train.max_steps else []
        return ends + ([run_limit] if run_limit else [])

    def progress(self, phase: Phase, pass_candidates: int) -> float:
        """Share of the phase done; `pass_candidates`: of one pass over what it reads."""
        return progress_of(phase.train, self.steps_done, self.candidates_done, pass_candidates)
