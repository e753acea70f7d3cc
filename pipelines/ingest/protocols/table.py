"""The request protocols by the names that `protocol` has in the settings."""

from __future__ import annotations

from pipelines.ingest.protocols.impressions import Impressions
from pipelines.ingest.protocols.leave_last import LeaveLast
from pipelines.ingest.protocols.next_basket import NextBasket
from pipelines.ingest.protocols.protocol import RequestProtocol
from pipelines.ingest.protocols.time_split import TimeSplit

PROTOCOLS: dict[str, RequestProtocol] = {
    "next-basket": NextBasket(),
    "impressions": Impressions(),
    "leave-last": LeaveLast(),
    "time-split": TimeSplit(),
}
"""The protocols, by their names in `protocol`."""
