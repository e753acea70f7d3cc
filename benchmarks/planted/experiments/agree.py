"""STEM against single tasks and MMoE, where two tasks want one vector of a user or orthogonal ones."""

from __future__ import annotations

from typing import Final

import numpy as np

from benchmarks.planted.experiments.experiment import ByModel, Experiment, Measured, Values

SEGMENTS: Final = {"agreeing": 0, "conflicting": 1}


def _measure(of: Measured) -> Values:
    values = {task: of.logloss(task) for task in of.scored.tasks}
    for task in of.scored.tasks:
        for name, number in SEGMENTS.items():
            values[f"{task}, {name}"] = of.logloss(task, np.asarray(of.truth["segment"] == number))
    return values


def _single(by_model: ByModel) -> Values:
    return {**by_model["single click"], **by_model["single like"]}


EXPERIMENT = Experiment(
    kind="agree",
    paper="STEM (AAAI'24)",
    models={
        "single click": ["tasks.click={}", "model.experts.shared=2"],
        "single like": ["tasks.like={}", "model.experts.shared=2"],
        "mmoe": ["model.experts.shared=3"],
        "mmoe, 3 x width": ["model.experts.shared=3", "groups.representation.dim=12"],
        "stem": [
            "model.experts.own=1",
            'model.experts.foreign="stopped"',
            'groups.representation.sets="tasks"',
        ],
    },
    measure=_measure,
    claims={
        "STEM is below single-task on click": lambda v: v["stem"]["click"] <= _single(v)["click"],
        "STEM is below single-task on like": lambda v: v["stem"]["like"] <= _single(v)["like"],
        "MMoE is above single-task on click, conflicting half": lambda v: (
            v["mmoe"]["click, conflicting"] > _single(v)["click, conflicting"]
        ),
        "MMoE is above single-task on like, conflicting half": lambda v: (
            v["mmoe"]["like, conflicting"] > _single(v)["like, conflicting"]
        ),
        "STEM is below MMoE of three times the width on both": lambda v: all(
            v["stem"][task] < v["mmoe, 3 x width"][task] for task in ("click", "like")
        ),
    },
)
