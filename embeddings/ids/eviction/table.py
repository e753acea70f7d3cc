"""The rules of eviction by their names in `ids.<feature>.eviction`; a new one gets its line here."""

from __future__ import annotations

from embeddings.ids.eviction.eviction import Eviction
from embeddings.ids.eviction.lfu import LeastFrequent
from embeddings.ids.eviction.lfu_decay import DecayingFrequency
from embeddings.ids.eviction.lru import LeastRecent
from embeddings.ids.eviction.never import Never

EVICTIONS: dict[str, type[Eviction]] = {
    "lru": LeastRecent,
    "lfu": LeastFrequent,
    "lfu_decay": DecayingFrequency,
    "never": Never,
}
