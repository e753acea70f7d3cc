"""Crocodile against tables of domains, where two domains listen to different factors of a user, 12:1."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.planted.experiments.experiment import ByModel, Experiment, Measured, Values
from pipelines.synth.factors import HEAD, TAIL


def _measure(of: Measured) -> Values:
    domain = of.scored.domain
    assert domain is not None
    named = {"head": HEAD, "tail": TAIL}
    losses = {name: of.logloss("click", domain == number) for name, number in named.items()}
    return losses | {"covariance": of.covariance, "correlation": of.correlation}


_CROCODILE = [
    'groups.prior.features=["item_id", "domain_id"]',
    "groups.prior.dim=4",
    "groups.prior.learning_rate=0.1",
    'model.roles.prior="prior"',
    'model.mixer.axis="element"',
    'model.mixer.gate="prior"',
    'model.mixer.per="domain"',
    'tasks.click.mean="domain"',
    "groups.representation.sets=2",
]

# The tail has few users: half of the loss, which is theirs by domain, is mostly noise of the same few.
_BY_STEP = [*_CROCODILE, 'tasks.click.mean="step"']


def _claims(where: str, without: str, model: str) -> dict[str, Callable[[ByModel], bool]]:
    """What the paper expects of a model beside the same one without the covariance loss."""
    tables = "tables of each domain"
    return {
        f"{where}the covariance is 10 times lower": lambda v: (
            10 * v[model]["covariance"] <= v[without]["covariance"]
        ),
        f"{where}the tail is below that of tables of each domain": lambda v: (
            v[model]["tail"] < v[tables]["tail"]
        ),
        f"{where}the head is no higher than that of tables of each domain": lambda v: (
            v[model]["head"] <= v[tables]["head"]
        ),
        f"{where}the tail is below that without the covariance loss": lambda v: (
            v[model]["tail"] < v[without]["tail"]
        ),
    }


EXPERIMENT = Experiment(
    kind="domains",
    paper="Crocodile (arXiv 2405.12706)",
    overrides=[
        "train.early_stopping.patience=4",
        'data.domain="domain_id"',
        'model.towers.per="domain"',
        'groups.representation.features=["item_id"]',
        'groups.attention.features=["item_id", "domain_id"]',
    ],
    models={
        "tables of each domain": [
            'model.mixer.kind="mean"',
            'groups.representation.sets={unknown = {owner = "domain:0"}, head = {owner = "domain:1"}, '
            'tail = {owner = "domain:2"}}',
        ],
        "crocodile, alpha = 0": _CROCODILE,
        "crocodile, alpha = 4": [*_CROCODILE, "model.experts.covariance=4"],
        "mean by step, alpha = 0": _BY_STEP,
        "mean by step, alpha = 0.3": [*_BY_STEP, "model.experts.covariance=0.3"],
    },
    measure=_measure,
    claims=_claims("", "crocodile, alpha = 0", "crocodile, alpha = 4")
    | _claims("by step, ", "mean by step, alpha = 0", "mean by step, alpha = 0.3"),
)
