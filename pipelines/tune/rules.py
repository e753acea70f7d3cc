"""Optuna's samplers and pruners by the names that a space gives them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from optuna.pruners import BasePruner, HyperbandPruner, MedianPruner, NopPruner, SuccessiveHalvingPruner
from optuna.samplers import BaseSampler, RandomSampler, TPESampler

from pipelines.tune.settings import StudyConfig


def sampler_of(settings: StudyConfig, number: int) -> BaseSampler:
    """What draws for a trial. Its seed follows from the study's and the trial's number, so that it draws the
    same whichever worker asks, and after however many interruptions."""
    seed = int(np.random.SeedSequence([settings.seed, number]).generate_state(1)[0])
    return _SAMPLERS[settings.sampler](settings, seed)


def pruner_of(settings: StudyConfig, validate_every: int) -> BasePruner:
    """What ends trials; `validate_every`: steps between two validations."""
    # The first validation by which a trial may end.
    first = max(1, (settings.warmup + 1) * validate_every)
    return _PRUNERS[settings.pruner](settings, first)


def _tpe(settings: StudyConfig, seed: int) -> BaseSampler:
    return TPESampler(seed=seed, n_startup_trials=settings.random_trials)


def _random(settings: StudyConfig, seed: int) -> BaseSampler:
    return RandomSampler(seed=seed)


# Of a grid all is fixed but what the configuration as it is has outside of it.
_SAMPLERS: Mapping[str, Callable[[StudyConfig, int], BaseSampler]] = {
    "tpe": _tpe,
    "random": _random,
    "grid": _random,
}
_PRUNERS: Mapping[str, Callable[[StudyConfig, int], BasePruner]] = {
    "median": lambda settings, first: MedianPruner(settings.random_trials, first),
    "halving": lambda settings, first: SuccessiveHalvingPruner(min_resource=first, reduction_factor=3),
    "hyperband": lambda settings, first: HyperbandPruner(min_resource=first, reduction_factor=3),
    "none": lambda settings, first: NopPruner(),
}
