"""The rules of eviction by their names in `ids.<feature>.eviction`; a new one gets its line here."""

from __future__ import annotations

from embeddings.ids.eviction.eviction import Eviction
from embeddings.ids.eviction.lru import LeastRecent
from embeddings.ids.eviction.never import Never

EVICTIONS: dict[str, type[Eviction]] = {"lru": LeastRecent, "never": Never}
