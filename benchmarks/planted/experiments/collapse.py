"""Multi-Embedding against one set of four times the width, with a field of three ids among six."""

from __future__ import annotations

import numpy as np

from benchmarks.planted.experiments.experiment import Experiment, Floats, Measured, Values


def abundance(table: Floats) -> float:
    """Information abundance: the sum of the singular values over the largest one (arXiv 2310.04400)."""
    sizes = np.linalg.svd(table, compute_uv=False)
    return float(sizes.sum() / sizes.max())


def _measure(of: Measured) -> Values:
    drawn = np.random.default_rng(0)
    tables = of.tables.values()
    return {
        "logloss": of.logloss("click"),
        "abundance / width": float(np.mean([abundance(table) / table.shape[1] for table in tables])),
        "of random tables": float(
            np.mean([abundance(drawn.normal(size=table.shape)) / table.shape[1] for table in tables])
        ),
    }


SETS = ["groups.representation.sets=4"]

EXPERIMENT = Experiment(
    kind="collapse",
    paper="Multi-Embedding (ICML'24)",
    overrides=[
        "data.history_length=2",
        "model.k=2",
        'groups.attention.features=["topic_id"]',
        'model.mixer.kind="mean"',
        'model.experts.net="cross"',
        "model.target_aware=false",
        "groups.representation.dim=8",
    ],
    models={
        "one set": [],
        "one set, 4 x width": ["groups.representation.dim=32"],
        "four sets (ME)": SETS,
        "four sets, one interaction": SETS,
    },
    tied=frozenset({"four sets, one interaction"}),
    measure=_measure,
    claims={
        "ME is below one set of four times the width": lambda v: (
            v["four sets (ME)"]["logloss"] < v["one set, 4 x width"]["logloss"]
        ),
        "ME has more abundance per unit of width": lambda v: (
            v["four sets (ME)"]["abundance / width"] > v["one set, 4 x width"]["abundance / width"]
        ),
        "with one interaction the advantage shrinks": lambda v: (
            v["four sets (ME)"]["logloss"] < v["four sets, one interaction"]["logloss"]
        ),
    },
)
