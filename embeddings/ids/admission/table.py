"""The rules of admission by their names in `ids.<feature>.admission`; a new one gets its line here."""

from __future__ import annotations

from embeddings.ids.admission.admission import Admission
from embeddings.ids.admission.chance import Chance
from embeddings.ids.admission.count import Count
from embeddings.ids.admission.everything import Everything

ADMISSIONS: dict[str, type[Admission]] = {"all": Everything, "count": Count, "chance": Chance}
