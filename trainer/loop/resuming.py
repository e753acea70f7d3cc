"""Where a start goes on from: everything that a training takes out of a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from trainer.checkpoint.compatible import check_reshardable, check_same_order
from trainer.checkpoint.save_load import ResumePoint
from trainer.loop.fork import go_on
from trainer.loop.phases import place_of_phase
from trainer.loop.position import Began, Position

if TYPE_CHECKING:
    from trainer.loop.loop import Trainer


def take_up(trainer: Trainer, path: Path, start: ResumePoint) -> None:
    """Have a training stand where a verified checkpoint does; collective.

    Raises:
        ConfigError: it stands inside an epoch, and the log's rows lie in another order since.
        CheckpointError: the tables' optimizer state has no meaning for how they lie now, or its maps of ids
            have other rows.
    """
    state = start.state
    phase = trainer.course.phases[place_of_phase(trainer.course.phases, state, path.name)]
    trainer.course.take_up(phase, Began(**state.get("began", {})).epoch)
    check_reshardable(path, state, trainer.plan)
    check_same_order(path, state, trainer.course.order, trainer.config.data.log)
    go_on(trainer.course.fork, state, path.name)
    trainer.load_from(path)
    trainer.course.averaging.resume(path, state)
    best, why = trainer.validation.resume(path, state, phase, trainer.course.reader.columns.tasks)
    if why:
        trainer.say(why)
    trainer.at = Position.of_state(state, trainer.ranks.world_size, best)
    trainer.saver.saved = trainer.step.number = trainer.at.step
    trainer.saver.refused = set(start.refused_names)
    trainer.saver.follow(path, state.get("base", {}).get("links", 0))
    if trainer.course.fork is not None:
        trainer.course.train_as(trainer.course.fork.branch)
        trainer.course.fork.resume(path, trainer.at)
    where = ""
    if phase.name:
        line = phase.line(len(trainer.course.phases))
        where = f"; {trainer.at.steps_done:,} step(s) done of {line}"
    trainer.say(f"resumed from {path}{where}")
