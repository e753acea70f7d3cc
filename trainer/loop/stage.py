"""Brings a sharded model and what trains it into a phase."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.keyed import CombinedOptimizer

from embeddings.errors import ConfigError
from embeddings.groups import TableGroup
from embeddings.private import BatchNorm
from trainer.data.reader import SequenceLogReader
from trainer.loop.heads_of_domains import HeadsOfDomains
from trainer.loop.phases import Phase, branches_of
from trainer.update.freezing import freeze, keep_statistics
from trainer.update.kept import KeptWeights
from trainer.update.parts import Parts
from trainer.update.reset import FreshDense, reset_state, reset_weights
from trainer.update.step import RateSetter, TrainStep, dense_optimizer, dense_weights


@dataclass(frozen=True)
class Supply:
    """What phases need of a run besides its model.

    Attributes:
        groups: of the model, by name, with their lanes; fresh: what its dense weights begin with.
        reader: of the candidates that a phase reads, given the epoch that counts as its first; domains: ids
            that have candidates in the train split.
    """

    groups: Mapping[str, TableGroup]
    fresh: FreshDense
    reader: Callable[[Phase, int], SequenceLogReader]
    domains: Sequence[int] = ()


class Stage:
    """What phases change about a model and about what trains it.

    Args:
        phases: of the run; seed: `train.seed`; supply: None where the run has no phases.

    Raises:
        ConfigError: a phase names a part or a task that there is not, or leaves nothing to train.
    """

    def __init__(
        self,
        phases: Sequence[Phase],
        model: DistributedModelParallel,
        optimizer: CombinedOptimizer,
        step: TrainStep,
        seed: int,
        supply: Supply | None,
    ) -> None:
        self._model, self._optimizer, self._step = model, optimizer, step
        self._seed, self._supply = seed, supply
        self._rates = RateSetter(model, optimizer)
        self._dense = dense_weights(model)
        self.whole = Parts(frozenset(model.module.lookups.groups), frozenset(self._dense))
        self._heads, self._frozen_now = HeadsOfDomains(model, optimizer), Parts()
        for phase in phases if supply is not None else ():
            for each in (phase, *branches_of(phase)):
                self._check(each)

    @property
    def moves_tables(self) -> bool:
        """Whether some table is trained in the present phase."""
        return self._frozen_now.groups != self.whole.groups

    def set_rates(self, dense: float, tables: float) -> None:
        """Multiples of the phase's learning rates, see `RateSetter.set`."""
        self._rates.set(dense, tables)

    def take_up(self, phase: Phase) -> bool:
        """Train as a phase says from now on; -> whether the model was wrapped anew. Collective.

        No weight and no state changes.
        """
        if self._supply is None:
            return False
        settings = phase.settings
        self._rates.rebase(settings.learning_rate, settings.table_learning_rates)
        self._step.weigh(settings.weights)
        self._step.follow(phase.train.update)
        self._step.tied = self._heads.tied if settings.heads == "tied" else None
        self._frozen_now = self.frozen(phase)
        return freeze(self._model, self._dense, self._frozen_now)

    def enter(self, phase: Phase) -> list[str]:
        """Do what a phase begins with, before it is taken up; -> lines that say what."""
        if self._supply is None:
            return []
        settings, lines = phase.settings, []
        new = self._parts(phase, "reset")
        if new:
            reset_weights(self._model, self._supply.groups, new, self._supply.fresh, phase.seed(self._seed))
            lines.append(f"new random weights: {', '.join(settings.reset)}")
            frozen = self.frozen(phase)
            if stays := [*sorted(new.groups & frozen.groups), *sorted(new.dense & frozen.dense)]:
                more = f" and {len(stays) - 1} more" if len(stays) > 1 else ""
                lines.append(f"frozen in the same phase, so that it stays random: {stays[0]}{more}")
        anew = self._parts(phase, "reset_state")
        if new or anew:
            reset_state(self._optimizer, new | anew)
        if anew - new:
            lines.append(f"new states of optimizers: {', '.join(settings.reset_state)}")
        return lines + self._heads.enter(phase, self.whole - self.frozen(phase))

    def kept(self, phase: Phase) -> KeptWeights | None:
        """Where the best weights of a phase are kept, if it looks for them and moves no table."""
        frozen = self.frozen(phase)
        if self._supply is None or not phase.train.early_stopping.on or frozen.groups != self.whole.groups:
            return None
        weights = [weight for name, weight in self._dense.items() if name not in frozen.dense]
        norms = [module for module in self._model.modules() if isinstance(module, BatchNorm)]
        buffers = [buffer for module in norms for buffer in module.buffers()]
        return KeptWeights(weights, dense_optimizer(self._optimizer), buffers)

    def settle_mode(self) -> None:
        """Called once somebody has set the mode of the whole model: frozen statistics stay."""
        if self._supply is not None:
            keep_statistics(self._model.module, self._frozen_now)

    def frozen(self, phase: Phase) -> Parts:
        """What does not move in a phase."""
        moving = self._parts(phase, "train")
        return self.whole - moving if moving else self._parts(phase, "freeze")

    def _parts(self, phase: Phase, key: str) -> Parts:
        return Parts.of(getattr(phase.settings, key), self.whole, f"{phase.key}.{key}")

    def _check(self, phase: Phase) -> None:
        frozen = self.frozen(phase)
        for key in ("reset", "reset_state"):
            self._parts(phase, key)
        if not self.whole - frozen:
            raise ConfigError(f"{phase.key}: everything is frozen, so nothing would be trained")
        anew = self._parts(phase, "reset_state") | self._parts(phase, "reset")
        self._heads.check(phase, self.whole - frozen, anew)
        try:
            self._step.weigh(phase.settings.weights)
        except ConfigError as error:
            raise ConfigError(f"{phase.key}.weights: {error}") from None
        self._step.weigh({})
