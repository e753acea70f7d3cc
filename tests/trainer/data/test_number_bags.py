"""Codes of numbers become bags of ids when a batch is put together, against one number at a time."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from trainer.data.collate import _jagged, _Side
from trainer.data.row_group import FeatureIds
from trainer.log.bags import Bags
from trainer.log.encoders.buckets import Buckets
from trainer.log.encoders.code import codes_of_integers
from trainer.log.encoders.mnse import Mnse
from trainer.log.schema import FeatureInfo

INFOS = {
    "item_id": FeatureInfo(rows=50),
    "price": FeatureInfo(rows=1, encoder=Mnse(kind="mnse", range=(-20, 99), bases=(2, 10))),
    "band": FeatureInfo(rows=1, encoder=Buckets(kind="buckets", edges=(0, 10)), side="candidate"),
}
NUMBERS = st.none() | st.integers(-30, 120)


def side_of(prices: list[int | None], has: list[bool] | None, bands: list[int | None] | None) -> _Side:
    """Two row groups' worth of behaviors or candidates; `has`: who has a price at all."""
    cut, n = len(prices) // 2, len(prices)
    parts = []
    for piece in (slice(0, cut), slice(cut, n)):
        given_ = prices[piece]
        lengths = None if has is None else np.array(has[piece], dtype=np.int64)
        kept = given_ if has is None else [p for p, there in zip(given_, has[piece], strict=True) if there]
        multi = {"price": Bags.of_lengths(codes_of_integers(kept), lengths)}
        if bands is not None:
            multi["band"] = Bags(codes_of_integers(bands[piece]))
        parts.append(FeatureIds(["item_id"], np.arange(n, dtype=np.int32)[None, piece], multi))
    return _Side(parts, [slice(0, cut), slice(0, n - cut)], n)


@given(
    st.lists(st.tuples(NUMBERS, st.booleans()), max_size=8), st.lists(st.tuples(NUMBERS, NUMBERS), max_size=8)
)
def test_bags_are_those_of_one_number_at_a_time(
    past: list[tuple[int | None, bool]], shown: list[tuple[int | None, int | None]]
) -> None:
    """Behaviors without a price, as a request may have them, have empty bags, and all lack the band."""
    prices, has = [price for price, _ in past], [there for _, there in past]
    targets, bands = [price for price, _ in shown], [band for _, band in shown]
    sides = [side_of(prices, has, None), side_of(targets, None, bands)]
    found, most = _jagged(INFOS, sides)
    keys = ["item_id", "price_base_2", "price_base_10", "band"]
    assert found.keys() == keys and found.stride() == len(past) + len(shown)

    def one(name: str, suffix: str, value: int | None) -> list[int]:
        encoder = INFOS[name].encoder
        assert encoder is not None
        ids: list[int] = encoder.encode(codes_of_integers([value]))[suffix].values.tolist()
        return ids

    wanted = {
        key: [
            *(one("price", suffix, price) if there else [] for price, there in past),
            *(one("price", suffix, price) for price in targets),
        ]
        for key, suffix in (("price_base_2", "_base_2"), ("price_base_10", "_base_10"))
    }
    wanted["band"] = [*([] for _ in past), *(one("band", "", band) for band in bands)]
    for place, key in enumerate(keys):
        feature = found[key]
        offsets = feature.offsets().tolist()
        bags = [feature.values().tolist()[a:b] for a, b in itertools.pairwise(offsets)]
        if key in wanted:
            assert bags == wanted[key], key
        assert most[place] == max(map(len, bags), default=0)
