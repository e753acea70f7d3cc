"""The experiments by name."""

from __future__ import annotations

from typing import Final

from benchmarks.planted.experiments import agree, collapse, domains, funnel, helper, signs
from benchmarks.planted.experiments.sparse import sparse

EXPERIMENTS: Final = {
    "collapse": collapse.EXPERIMENT,
    "agree": agree.EXPERIMENT,
    "domains": domains.EXPERIMENT,
    "funnel": funnel.EXPERIMENT,
    "signs": signs.EXPERIMENT,
    "helper": helper.EXPERIMENT,
    "sparse_25": sparse("25"),
    "sparse_5": sparse("5"),
    "sparse_1": sparse("1", users=20_000),
}
