"""The kinds of planted logs by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from pipelines.synth import (
    collapse,
    digits,
    factors,
    fields,
    flip,
    orders,
    relevance,
    similar,
    temporal,
    uncertain,
)
from pipelines.synth.log import PlantedLog, Worth


@dataclass(frozen=True)
class Kind:
    """A generator.

    Attributes:
        generate: (seed, users) -> the log.
        worth: what a behavior contributes to a candidate's logit; non-zero where it matters.
        users: to generate unless told otherwise.
        history_length: L, behaviors that a request depends on.
    """

    generate: Callable[[int, int], PlantedLog]
    worth: Worth
    users: int
    history_length: int


KINDS: Final = {
    "relevance": Kind(relevance.generate, relevance.worth, 4_000, relevance.LENGTH),
    "xor": Kind(temporal.xor, temporal.xor_worth, 15_000, temporal.BEHAVIORS),
    "profiles": Kind(temporal.profiled, temporal.profile_worth, 15_000, temporal.BEHAVIORS),
    "interference": Kind(fields.interference, fields.interference_worth, 15_000, fields.BEHAVIORS),
    "decoupled": Kind(fields.decoupled, fields.decoupled_worth, 15_000, fields.BEHAVIORS),
    "far": Kind(temporal.far, temporal.far_worth, 10_000, temporal.OLD + temporal.RECENT),
    "pair": Kind(orders.pair, orders.pair_worth, 15_000, orders.PAIR_BEHAVIORS),
    "opposite": Kind(orders.opposite, orders.opposite_worth, 15_000, orders.OPPOSITE_BEHAVIORS),
    "agree": Kind(factors.agree, factors.affinity, 10_000, factors.BEHAVIORS),
    "domains": Kind(factors.domains, factors.listened, 10_000, factors.BEHAVIORS),
    "signs": Kind(factors.signs, factors.turned_sign, 10_000, factors.BEHAVIORS),
    "funnel": Kind(factors.funnel, factors.affinity, 10_000, factors.BEHAVIORS),
    "helper": Kind(factors.helper, factors.affinity, 10_000, factors.BEHAVIORS),
    "sparse_25": Kind(factors.sparse_25, factors.affinity, 10_000, factors.BEHAVIORS),
    "sparse_5": Kind(factors.sparse_5, factors.affinity, 10_000, factors.BEHAVIORS),
    "sparse_1": Kind(factors.sparse_1, factors.affinity, 10_000, factors.BEHAVIORS),
    "collapse": Kind(collapse.collapse, collapse.worth, 10_000, collapse.BEHAVIORS),
    "uncertain": Kind(uncertain.uncertain, uncertain.worth, 3_000, uncertain.BEHAVIORS),
    "digits": Kind(digits.digits, digits.worth, 10_000, digits.BEHAVIORS),
    "digits_number": Kind(digits.digits_number, digits.worth, 10_000, digits.BEHAVIORS),
    "flip": Kind(flip.flip, flip.worth, 24_000, flip.BEHAVIORS),
    "similar": Kind(similar.similar, similar.worth, 10_000, similar.BEHAVIORS),
}
