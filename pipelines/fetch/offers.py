"""Requests of the domain `offer`: the coupons that a campaign mailed to a household.

A coupon is for many products. It is represented by the one that all households together had bought most
before the campaign began; coupons of a campaign that come to the same product are one offer. Campaigns of
type A mail 16 coupons of a pool to each household, and the data do not say which. Those that were redeemed
surely were among them; the others are drawn from the pool until there are 16: offers that may have been made.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.fetch.sold import draw_of_each, seconds

_DAY = 86_400
NOTE = (
    "Campaigns of type A mail 16 coupons of a pool to each household, and the data do not say which: offers"
    " of type A are those that were redeemed, and others of the pool drawn by chance until there are 16. So"
    " they are an upper bound of what was offered, and not redeemed may mean not mailed. Campaigns that began"
    " before the transactions, or end after them, are left out."
)


@dataclass(frozen=True)
class OfferDraw:
    """mailed: the coupons of its pool that a campaign of type A mails to a household."""

    mailed: int = 16


# What a campaign is to a household, from coupons, campaigns and purchases; ties go to the smaller product.
_OFFERS = """
WITH pool AS (
    SELECT DISTINCT campaign_id, coupon_upc, product_id, starts, ends
    FROM coupons JOIN kept USING (campaign_id)
),
before AS (
    SELECT campaign_id, coupon_upc, product_id, count(*) AS times
    FROM pool JOIN sold ON sold.item = product_id AND sold.time < starts GROUP BY ALL
),
representative AS (
    SELECT campaign_id, coupon_upc, arg_max(product_id, (times, -product_id)) AS item_id
    FROM before GROUP BY ALL
),
offer AS (
    SELECT campaign_id, item_id, count(DISTINCT product_id) AS products
    FROM representative JOIN pool USING (campaign_id, coupon_upc) GROUP BY ALL
),
mailed AS (SELECT DISTINCT household_id, campaign_id FROM campaigns JOIN kept USING (campaign_id)),
redeemed AS (
    SELECT DISTINCT household_id, campaign_id, item_id
    FROM coupon_redemptions JOIN representative USING (campaign_id, coupon_upc)
),
bought AS (
    SELECT DISTINCT sold.user AS household_id, campaign_id, item_id
    FROM pool JOIN representative USING (campaign_id, coupon_upc)
    JOIN sold ON sold.item = product_id AND sold.time >= starts AND sold.time < ends
)
SELECT household_id, campaign_id, starts, letter, item_id, products,
    redeemed.item_id IS NOT NULL AS redeemed, bought.item_id IS NOT NULL AS bought
FROM mailed JOIN kept USING (campaign_id) JOIN offer USING (campaign_id)
    LEFT JOIN redeemed USING (household_id, campaign_id, item_id)
    LEFT JOIN bought USING (household_id, campaign_id, item_id)
ORDER BY household_id, campaign_id, item_id
"""
_COUNTS = """
SELECT
    (SELECT count(*) FROM campaign_descriptions) AS campaigns,
    (SELECT count(*) FROM kept) AS campaigns_kept,
    (SELECT count(DISTINCT (campaign_id, coupon_upc)) FROM coupons JOIN kept USING (campaign_id)) AS coupons,
    (SELECT count(DISTINCT (household_id, campaign_id, coupon_upc))
        FROM coupon_redemptions JOIN kept USING (campaign_id)) AS redemptions
"""
_LETTER = "Type "


def offers(tables: dict[str, pa.Table], draw: OfferDraw, seed: int) -> tuple[pa.Table, dict[str, int]]:
    """The candidates of campaigns, with labels, and counts of what became of the coupons."""
    found, counts = _query(tables)
    is_redeemed = found["redeemed"].to_numpy()
    request = np.asarray(found["household_id"].to_numpy()) << 32 | found["campaign_id"].to_numpy()
    is_pool = np.asarray(pc.equal(found["letter"], "A").to_numpy())
    kept = np.ones(request.size, dtype=bool)
    generator = np.random.default_rng([seed, 2])
    kept[is_pool] = draw_of_each(request[is_pool], draw.mailed, generator, is_redeemed[is_pool])
    found = found.filter(pa.array(kept))
    counts |= {
        "requests": len(np.unique(request)),
        "offers": found.num_rows,
        "offers_of_type_A": int(is_pool[kept].sum()),
        "redeemed_offers": int(pc.sum(found["redeemed"]).as_py() or 0),
        "bought_offers": int(pc.sum(found["bought"]).as_py() or 0),
    }
    size = 1 << np.floor(np.log2(found["products"].to_numpy())).astype(np.int64)
    letters, sizes = found["letter"].to_pylist(), size.tolist()
    nothing = pa.nulls(found.num_rows, pa.bool_())
    table = {
        "user_id": found["household_id"],
        "request_id": found["campaign_id"],
        "timestamp": found["starts"],
        "item_id": found["item_id"],
        "domain": pa.array(["offer"] * found.num_rows, pa.string()),
        "shown_as": pa.array(
            [
                f"offer {letter}, {least} products or more"
                for letter, least in zip(letters, sizes, strict=True)
            ],
            pa.string(),
        ),
        "bought": found["bought"],
        "discounted": nothing,
        "on_discount": nothing,
        "several": nothing,
        "with_coupon": nothing,
        "redeemed": found["redeemed"],
    }
    return pa.table(table), counts


def _query(tables: dict[str, pa.Table]) -> tuple[pa.Table, dict[str, int]]:
    import duckdb  # the demo's events need none

    transactions, told = tables["transactions"], tables["campaign_descriptions"]
    bought = transactions.filter(pc.greater(transactions["quantity"], 0))
    time = seconds(bought["transaction_timestamp"])
    starts, ends = (seconds(told[name]) for name in ("start_date", "end_date"))
    ends = ends + _DAY  # the last day counts
    inside = (starts > time.min()) & (ends <= time.max())
    with duckdb.connect(config={"threads": 1}) as engine:
        for name in ("coupons", "campaigns", "coupon_redemptions", "campaign_descriptions"):
            engine.register(name, tables[name])
        columns: dict[str, Any] = {"user": bought["household_id"], "item": bought["product_id"], "time": time}
        engine.register("sold", pa.table(columns))
        letter = pc.replace_substring(told["campaign_type"], _LETTER, "")
        campaigns = {"campaign_id": told["campaign_id"], "letter": letter, "starts": starts, "ends": ends}
        engine.register("kept", pa.table(campaigns).filter(pa.array(inside)))
        found = engine.sql(_OFFERS).to_arrow_table()
        counts = engine.sql(_COUNTS).to_arrow_table().to_pylist()[0]
    return found, counts
