"""The average of dense weights that a phase asks for: begun with it, kept in its checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torchrec.distributed.model_parallel import DistributedModelParallel

from embeddings.errors import ConfigError
from trainer.checkpoint import save_load as checkpoint
from trainer.checkpoint.averages import AVERAGE
from trainer.loop.phases import Phase
from trainer.loop.position import Position
from trainer.update.averaging import Average


class Averaging:
    """What the loop tells of steps and checkpoints.

    Args:
        say: prints a line on rank 0.

    Attributes:
        average: of the present phase; None where it has none.
    """

    average: Average | None = None

    def __init__(self, model: DistributedModelParallel, say: Callable[[str], None]) -> None:
        self._model, self._say = model, say

    def begin(self, phase: Phase) -> None:
        """Average from here on as a phase says; that of the phase before ends."""
        self._phase, settings, self.average = phase, phase.settings.average, None
        if settings.on:
            weights = self._model.module.dense_tensors()
            self.average = Average(settings, phase.name, weights, phase.settings.steps)

    def after_step(self, at: Position, ends_pass: bool) -> None:
        """Add the weights of the step that was just done, with which `ends_pass` says a pass ends."""
        if self.average is None:
            return
        self.average.add()
        steps = self._phase.settings.steps
        over = at.steps_done == steps or (ends_pass and at.passes_done(self._phase, 1))
        if over and self._phase.settings.average.adopt:
            self.average.adopt()
            self._say(f"phase {self._phase.name}: its weights are now their average")

    def tensors(self) -> dict[str, Any]:
        """What a checkpoint holds of it."""
        return {} if self.average is None else {AVERAGE: self.average.averages}

    def state(self) -> dict[str, Any]:
        """The same of its state."""
        return {} if self.average is None else {AVERAGE: self.average.state()}

    def resume(self, path: Path, state: Mapping[str, Any]) -> None:
        """Go on with the average of a checkpoint, inside the phase that it stands in; collective.

        Raises:
            ConfigError: it has none, or one of another kind.
        """
        saved = state.get(AVERAGE)
        if self.average is None:
            if saved:
                self._say(f"phase {self._phase.name}: its average is no longer kept, as the config now says")
            return
        if not saved:
            raise ConfigError(
                f"{self._phase.key}.average: {path.name} stands inside this phase and has no average of its "
                'beginning; set average.kind = "none", or name another --out'
            )
        self.average.restore(saved)
        # In place.
        checkpoint.load_tensors(path, self.tensors())
