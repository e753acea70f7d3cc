"""`count`: an id gets a row when it was seen `admit_count` times."""

from __future__ import annotations

from embeddings.ids.admission.admission import Admission
from embeddings.ids.admission.exact import ExactCounter
from embeddings.ids.admission.sketch import SketchCounter
from embeddings.ids.rules import IdRules

# By their names in `ids.<feature>.counter`; a new one gets its line here.
COUNTERS: dict[str, type[Admission]] = {"exact": ExactCounter, "sketch": SketchCounter}


def count(rules: IdRules, buckets: range) -> Admission:
    """What counts as `ids.<feature>.counter` says."""
    return COUNTERS[rules.counter](rules, buckets)
