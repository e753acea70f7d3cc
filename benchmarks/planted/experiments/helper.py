"""ForkMerge with a task that helps and one of random labels, against the target alone and equal weights."""

from __future__ import annotations

from statistics import fmean

from benchmarks.planted.experiments.experiment import ByModel, Experiment, Measured, Values

# A merge after each pass of 63 steps: shorter rounds differ by chance more than by what a task tells.
_PASSES, _EVERY = 4, 63
_BRANCHES = (
    '{name="target", weights={help=0.0, noise=0.0}}, {name="help", weights={noise=0.0}}, '
    '{name="noise", weights={help=0.0}}'
)


def _measure(of: Measured) -> Values:
    values = {"click": of.logloss("click")}
    if of.shares:
        half = len(of.shares) // 2
        for task in ("help", "noise"):
            shares = [each[task] for each in of.shares]
            values[f"share of {task}, first half"] = fmean(shares[:half])
            values[f"share of {task}, second half"] = fmean(shares[half:])
            values[f"largest share of {task}"] = max(shares)
    return values


def _shares(values: ByModel, task: str) -> list[float]:
    return [values["ForkMerge"][f"share of {task}, {half} half"] for half in ("first", "second")]


EXPERIMENT = Experiment(
    kind="helper",
    paper="ForkMerge (NeurIPS 2023)",
    overrides=[
        "data.batch_candidates=512",
        "model.experts.shared=2",
        "train.epochs=1",
        "train.early_stopping.patience=0",
        "train.validate_every=0",
        "tasks.click.weight=1",
        "tasks.help.weight=1",
        "tasks.noise.weight=1",
    ],
    models={
        "target alone": [f"phases=[{{passes={_PASSES}, weights={{help=0.0, noise=0.0}}}}]"],
        "equal weights": [f"phases=[{{passes={_PASSES}}}]"],
        "with help": [f"phases=[{{passes={_PASSES}, weights={{noise=0.0}}}}]"],
        "with noise": [f"phases=[{{passes={_PASSES}, weights={{help=0.0}}}}]"],
        "ForkMerge": [
            f'phases=[{{passes={_PASSES}, fork={{branches=[{_BRANCHES}], every={_EVERY}, task="click", '
            'metric="logloss"}}]'
        ],
    },
    measure=_measure,
    claims={
        "ForkMerge is below the target alone": lambda v: v["ForkMerge"]["click"] < v["target alone"]["click"],
        "ForkMerge is below equal weights": lambda v: v["ForkMerge"]["click"] < v["equal weights"]["click"],
        "help has a larger share than noise": lambda v: sum(_shares(v, "help")) > sum(_shares(v, "noise")),
        "noise has no share in any merge": lambda v: v["ForkMerge"]["largest share of noise"] == 0,
        "the share of help falls": lambda v: _shares(v, "help")[0] > _shares(v, "help")[1],
    },
    users=4_000,
)
