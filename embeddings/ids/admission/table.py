"""The rules of admission by their names in `ids.<feature>.admission`; a new one gets its line here."""

from __future__ import annotations

from collections.abc import Callable

from embeddings.ids.admission.admission import Admission
from embeddings.ids.admission.chance import Chance
from embeddings.ids.admission.count import count
from embeddings.ids.admission.everything import Everything
from embeddings.ids.rules import IdRules

ADMISSIONS: dict[str, Callable[[IdRules, range], Admission]] = {
    "all": Everything,
    "count": count,
    "chance": Chance,
}
