"""Heads that domains have: one for all of them, clones of it, and each by itself (D-Train)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.keyed import CombinedOptimizer

from embeddings.errors import ConfigError
from trainer.loop.phases import Phase
from trainer.model.frame import TwoStageModel
from trainer.model.heads.grouped import DomainLinear
from trainer.update.parts import Parts
from trainer.update.step import dense_optimizer
from trainer.update.tied import TiedMaps


class HeadsOfDomains:
    """What phases ask of the weights that have a row for each domain.

    Attributes:
        tied: the maps of towers, to be held equal.
    """

    def __init__(self, model: DistributedModelParallel, optimizer: CombinedOptimizer) -> None:
        shell = model.module
        assert isinstance(shell, TwoStageModel)
        self._optimizer = dense_optimizer(optimizer)
        self._of_towers = shell.head.domain_parameters()
        self.tied = TiedMaps(self._of_towers, self._optimizer)
        self._by_domain = _by_domain(shell)

    def check(self, phase: Phase, moving: Parts, anew: Parts) -> None:
        """Args: moving: what the phase trains; anew: whose optimizer's state it begins anew.

        Raises:
            ConfigError: the model has no such heads, or domains would move heads of one another.
        """
        settings = phase.settings
        if settings.heads == "tied" and not self._of_towers:
            raise ConfigError(
                f'{phase.key}.heads = "tied" is about towers of domains, and the model has none: set '
                'model.head = "experts" and model.towers.per = "domain"'
            )
        if phase.each is None or settings.heads == "tied":
            return
        rows = moving.dense & self._by_domain.keys()
        if unset := sorted(rows - anew.dense):
            raise ConfigError(
                f'{phase.key}: each = "domain" trains {unset[0]}, whose rows of other domains would go on by '
                "what the optimizer remembers of them: name it in reset_state, too"
            )
        decays = any(group.get("weight_decay") for group in self._optimizer.param_groups)
        if rows and decays:
            raise ConfigError(
                f'{phase.key}: each = "domain" with train.weight_decay would draw the heads of all other '
                'domains to zero; set train.optimizer = "adam" and leave weight_decay out'
            )

    def enter(self, phase: Phase, moving: Parts) -> list[str]:
        """Do what a phase begins with; -> lines that say what.

        Args:
            moving: what it trains.
        """
        if phase.settings.heads == "tied":
            differed = self.tied.differ()
            self.tied.spread()
            return ["the heads of all domains are now that of domain 0"] if differed else []
        shared = sorted((moving.dense - self._by_domain.keys()) | moving.groups)
        if phase.each is not None and shared:
            more = f" and {len(shared) - 1} more" if len(shared) > 1 else ""
            return [f"also trains what domains share, so that their order matters: {shared[0]}{more}"]
        return []


def _by_domain(shell: TwoStageModel) -> Mapping[str, nn.Parameter]:
    """The dense weights with a row for each domain, by name."""
    found = dict[str, nn.Parameter]()
    for name, module in shell.named_modules():
        if isinstance(module, DomainLinear):
            found |= {f"{name}.{own}": weight for own, weight in module.named_parameters()}
    return found
