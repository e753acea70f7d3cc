"""Crocodile against tables of domains, where two domains listen to different factors of a user, 12:1."""

from __future__ import annotations

from benchmarks.planted.experiments.experiment import Experiment, Measured, Values
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
    claims={
        "the covariance is 10 times lower": lambda v: (
            10 * v["crocodile, alpha = 4"]["covariance"] <= v["crocodile, alpha = 0"]["covariance"]
        ),
        "the tail is below that of tables of each domain": lambda v: (
            v["crocodile, alpha = 4"]["tail"] < v["tables of each domain"]["tail"]
        ),
        "the head is no higher than that of tables of each domain": lambda v: (
            v["crocodile, alpha = 4"]["head"] <= v["tables of each domain"]["head"]
        ),
        "the tail is below that without the covariance loss": lambda v: (
            v["crocodile, alpha = 4"]["tail"] < v["crocodile, alpha = 0"]["tail"]
        ),
        "by step, the covariance is 10 times lower": lambda v: (
            10 * v["mean by step, alpha = 0.3"]["covariance"] <= v["mean by step, alpha = 0"]["covariance"]
        ),
        "by step, the tail is below that of tables of each domain": lambda v: (
            v["mean by step, alpha = 0.3"]["tail"] < v["tables of each domain"]["tail"]
        ),
        "by step, the head is no higher than that of tables of each domain": lambda v: (
            v["mean by step, alpha = 0.3"]["head"] <= v["tables of each domain"]["head"]
        ),
        "by step, the tail is below that without the covariance loss": lambda v: (
            v["mean by step, alpha = 0.3"]["tail"] < v["mean by step, alpha = 0"]["tail"]
        ),
    },
)
