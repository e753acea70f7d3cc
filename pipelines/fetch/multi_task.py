"""The impressions of the multi-task log: candidates with several labels, of two domains.

| domain | a request is | labels |
|---|---|---|
| `purchase` | a basket | `bought`, `discounted`; of what was bought `on_discount`, `several`, `with_coupon` |
| `offer` | a campaign that was mailed to a household | `bought` (any product of the coupon), `redeemed` |

A label is null where it is not defined, or was not observed. `discounted` says the same as `bought` and
`on_discount` together: it is 0, not null, where nothing was bought.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.fetch.offers import NOTE, OfferDraw, offers
from pipelines.fetch.purchases import PurchaseDraw, purchases

SEED = 7
PURCHASES, OFFERS = PurchaseDraw(), OfferDraw()
PROMOTIONS = "promotions"
_OF_OFFERS = ("campaigns", "campaign_descriptions", "coupons", "coupon_redemptions")
TABLES = ("transactions", "products", PROMOTIONS, *_OF_OFFERS)
DRAWN = {"seed": SEED, **asdict(PURCHASES), **asdict(OFFERS)}
"""What another fetch must have drawn by, so that its impressions are these."""


def impressions(files: Mapping[str, pq.ParquetFile]) -> tuple[pa.Table, dict[str, Any]]:
    """user_id, request_id, timestamp, item_id, domain, shown_as and the labels, and what source.json says.

    Args:
        files: those of `TABLES`.
    """
    tables = {name: file.read() for name, file in files.items() if name != PROMOTIONS}
    bought, of_baskets = purchases(
        tables["transactions"], tables["products"], files[PROMOTIONS].iter_batches(1 << 20), PURCHASES, SEED
    )
    offered, of_campaigns = offers(tables, OFFERS, SEED)
    everything = pa.concat_tables([bought, offered.cast(bought.schema)])
    keys = ("user_id", "timestamp", "request_id", "item_id")
    ordered = everything.sort_by([(name, "ascending") for name in keys])
    return ordered, {"drawn": DRAWN, "purchase": of_baskets, "offer": of_campaigns, "note": NOTE}
