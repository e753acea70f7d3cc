"""D-Train against its controls, where a feature speaks the other way in a domain with one request of 51."""

from __future__ import annotations

from itertools import pairwise

from benchmarks.planted.experiments.experiment import ByModel, Experiment, Measured, Values
from pipelines.synth.factors import HEAD, TAIL

# Passes of a backbone, in every model.
_PASSES = 12
_HEAD_MAPS = '["head.towers.*.layers"]'


def _measure(of: Measured) -> Values:
    domain = of.scored.domain
    assert domain is not None
    losses = {name: of.logloss("click", domain == at) for name, at in (("head", HEAD), ("tail", TAIL))}
    return losses | {"worst": max(losses.values())}


def _ordered(values: ByModel, *models: str) -> bool:
    worst = [values[model]["worst"] for model in models]
    return all(before < after for before, after in pairwise(worst))


EXPERIMENT = Experiment(
    kind="signs",
    paper="D-Train (arXiv 2309.10302)",
    overrides=[
        'data.domain="domain_id"',
        'model.towers.per="domain"',
        'groups.representation.features=["item_id", "band"]',
        'groups.attention.features=["item_id", "domain_id"]',
        "train.epochs=1",
        "train.early_stopping.patience=0",
        "train.validate_every=20",
        "train.decay=none",
    ],
    models={
        "pooled": [f'phases=[{{name="pooled", passes={_PASSES}, heads="tied"}}]'],
        "joint": [f'phases=[{{name="joint", passes={_PASSES}}}]'],
        "D-Train": [
            f'phases=[{{name="pretrain", passes={_PASSES // 2}, heads="tied"}}, '
            f'{{name="posttrain", passes={_PASSES // 2}}}, '
            f'{{name="finetune", steps=600, each="domain", train={_HEAD_MAPS}, reset_state={_HEAD_MAPS}, '
            'early_stopping={metric="logloss", patience=6}}]'
        ],
    },
    measure=_measure,
    claims={
        "worst domain: D-Train below joint below pooled": lambda v: _ordered(v, "D-Train", "joint", "pooled"),
        "worst domain: D-Train below joint": lambda v: _ordered(v, "D-Train", "joint"),
        "worst domain: joint below pooled": lambda v: _ordered(v, "joint", "pooled"),
    },
)
