"""One number from the raw tables to a score: ingest, log, reader, snapshot and server have the same ids."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from embeddings.errors import CheckpointError, ConfigError, DataError
from pipelines.export_version import ExportOptions, publish_version
from pipelines.ingest.ingest import ingest, report_lines
from pipelines.serve.users import user_body
from tests.helpers.models import preset
from tests.helpers.rawlogs import START, Row, config, ids_of_values, rows
from tests.helpers.snapshots import save_run
from trainer.assemble import id_bounds, resolve_groups
from trainer.checkpoint.warm_start import _row_map, vocabularies
from trainer.config.sections import SearchConfig
from trainer.config.tasks import resolve_tasks
from trainer.data.reader import SequenceLogReader
from trainer.data.rows import Columns, read_rows
from trainer.log.encoders.code import MISSING, number_of
from trainer.log.encoders.mnse import Mnse
from trainer.log.schema import FeatureInfo, LogManifest
from trainer.ranks.process_group import process_group
from trainer.run_config import Config
from trainer.serving.arrow_body import read_arrow
from trainer.serving.checks import cut_history
from trainer.serving.histories import HistoryStore
from trainer.serving.json_body import JsonForm, ScoreBody, read_json
from trainer.serving.request import Limits, Request, RequestError
from trainer.serving.scorer import Scorer
from trainer.snapshot import Snapshot, load_snapshot
from trainer.step_size import lookups, step_size

# Negative, zero, missing, beyond 2^53, at the end of the range, beyond it, beyond 64 bits.
PRICES = ["-5", "0", None, "9007199254740993", "4611686018427387904", "4611686018427387905", "-" + "9" * 30]
AGES = [15, None, 60]
SHARES = [0.25, -1.5, None, float("nan"), 0.004, 7.0, 1e300]
ENCODERS: dict[str, Any] = {
    "price": {"kind": "mnse", "range": [-100, 2**62]},
    "share": {"kind": "mnse", "range": [-2, 8], "step": 0.01, "combine": "sum"},
    "fifths": {"kind": "buckets", "count": 5, "step": 0.01},
    "age": {"kind": "buckets", "edges": [20, 40, 60]},
}
USERS = range(1, 7)
OVERRIDES = ("model.roles.context=context", "groups.context.dim=8", 'groups.context.features=["age"]')


def number(place: int, values: list[Any]) -> Any:
    return values[place % len(values)]


def event(user: int, item: int, second: int) -> Row:
    """The numbers of an event follow from who, what and when."""
    place = 3 * user + 5 * item + second
    numbers = {"price": number(place, PRICES), "share": number(place, SHARES), "age": number(user, AGES)}
    return {"user_id": user, "item_id": item, "timestamp": START + second * 86_400, **numbers}


def shown(user: int, request: int, item: int) -> Row:
    place = user + request + item
    # Where an impression lacks a number of its item, it would have that of the item's newest event.
    prices = [price for price in PRICES if price is not None]
    shares = [share for share in SHARES if as_json(share) is not None]
    numbers = {"price": number(place, prices), "share": number(place, shares), "fee": number(place, PRICES)}
    times = {"timestamp": START + (2 * request + 3) * 86_400, "request": request}
    others = {"click": float(place % 2), "gap": place / 4}
    return {"user_id": user, "item_id": item, **times, **numbers, **others}


@dataclass(frozen=True)
class Made:
    """A log of numbers, and a snapshot of a run on it."""

    log: Path
    manifest: LogManifest
    config: Config
    snapshot: Snapshot


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("numbers")
    manifest = write_numbers(folder, folder / "log")
    run = save_run(folder / "run", folder / "log", "dare", *OVERRIDES)
    with process_group(device="cpu") as ranks:
        options = ExportOptions("fp32", "fp32", parity_requests=5)
        version = publish_version(run, folder / "out", ranks, options)
    assert version.parity.worst == 0.0
    settings = preset("dare", folder / "log", *OVERRIDES)
    return Made(folder / "log", manifest, settings, load_snapshot(version.path))


def write_numbers(folder: Path, log: Path, **encoders: Any) -> LogManifest:
    every = [event(user, item, second) for user in USERS for item in range(1, 6) for second in range(user)]
    asked_ = [(user, request) for user in USERS for request in range(4)]
    requests = [shown(user, request, item) for user, request in asked_ for item in range(1, 4 + user % 2)]
    pq.write_table(pa.Table.from_pylist(every), folder / "events.parquet")
    pq.write_table(pa.Table.from_pylist(requests), folder / "shown.parquet")
    used = ENCODERS | encoders
    plan = config(
        "impressions",
        events={"taxonomy": []},
        features=[
            {"name": "price", "encoder": used["price"]},
            {"name": "share", "encoder": used["share"]},
            {"name": "fifths", "column": "share", "encoder": used["fifths"], "side": "history"},
            {"name": "fee", "encoder": used["price"], "side": "candidate"},
            {"name": "gap", "encoder": {"kind": "number"}, "side": "candidate"},
        ],
        context=[{"name": "age", "table": "events", "encoder": used["age"]}],
        impressions={"request": "request", "labels": {"click": "click"}, "weight": "", "numeric": []},
        requests={"min_history": 0},
        split={"validation": "2017-01-06", "test": "2017-01-08"},
    )
    return ingest(folder / "events.parquet", log, plan, impressions=folder / "shown.parquet", overwrite=True)


def asked(made: Made, split: str) -> list[tuple[tuple[int, int], dict[str, Any]]]:
    """Every request as a client sends it, with numbers as the raw tables have them; all spellings in turn."""
    items = {id_: item for item, id_ in ids_of_values(made.log, "item_id").items()}
    found = []
    for row in rows(made.log, split):
        user = row["user_id"]
        times = [(time - START) // 86_400 for time in row["history_timestamp"]]
        past = [event(user, items[i], t) for i, t in zip(row["history_item_id"], times, strict=True)]
        for r, name in enumerate(row["request_id"]):
            chosen = [shown(user, name, items[i]) for i in row["candidate_item_id"][r]]
            end = row["request_history_end"][r]
            # The age of the newest event strictly before the request.
            age = number(user, AGES) if end else None
            found.append(
                (
                    (user, name),
                    {
                        "user_id": user,
                        "time": row["request_timestamp"][r],
                        "history": {
                            "timestamp": row["history_timestamp"],
                            "features": {
                                "item_id": row["history_item_id"],
                                "price": [as_sent(e["price"], r) for e in past],
                                "share": [as_json(e["share"]) for e in past],
                                "fifths": [as_json(e["share"]) for e in past],
                            },
                        },
                        "candidates": {
                            "item_id": row["candidate_item_id"][r],
                            "price": [as_sent(c["price"], r + 1) for c in chosen],
                            "share": [as_json(c["share"]) for c in chosen],
                            "fee": [as_sent(c["fee"], r) for c in chosen],
                        },
                        "context": {"age": age},
                        "numeric": {"gap": [c["gap"] for c in chosen]},
                    },
                )
            )
    return found


def as_sent(price: str | None, how: int) -> Any:
    """As an integer of JSON, or as text."""
    return price if price is None or how % 2 else int(price)


def as_json(share: float | None) -> float | None:
    return None if share is None or np.isnan(share) else share


def of_trainer(made: Made, split: str) -> dict[tuple[int, int], torch.Tensor]:
    """(user, request) -> probabilities, read from the log and scored by the snapshot's model.

    One request at a time, as the server scores them here: more rows may round the last bit otherwise.
    """
    rows_ = id_bounds(resolve_groups(made.config, made.manifest), made.config)
    alone = made.config.data.model_copy(update={"batch_candidates": 1, "requests_per_block": 1})
    found = {}
    for step in SequenceLogReader(alone, split, rows_).steps():
        scores = made.snapshot.score(step.batch)
        for r, user in enumerate(step.batch.user_id.tolist()):
            name = (user, int(step.batch.request_id[r]))
            found[name] = scores[step.batch.candidate_request == r]
    return found


def test_the_log_holds_codes_and_the_manifest_encoders(made: Made) -> None:
    known = {None: MISSING, "-5": -5, "0": 1, "9007199254740993": 2**53 + 2, str(2**62): 2**62 + 1}
    codes = {code for row in rows(made.log) for code in row["history_price"]}
    assert set(known.values()) <= codes and len(codes) == 7
    over = number_of(np.array(sorted(codes - set(known.values()))))
    assert over.overflow.all() and over.value.tolist() == [2**63 - 1, -(2**63) + 1]
    fifths = made.manifest.features["fifths"].encoder
    assert fifths is not None and fifths.kind == "buckets" and fifths.edges is not None
    assert made.manifest.numeric == ["gap"] and "gap" not in made.manifest.features
    assert [file.name for file in (made.log / "vocab").iterdir()] == ["item_id.parquet"]
    told = "\n".join(report_lines(made.manifest))
    assert "price: numbers, -5 to 4,611,686,018,427,387,904;" in told
    beyond = made.manifest.report["numbers"]["price"]
    sides = f"({beyond['below']} below, {beyond['overflow'] - beyond['below']} above)"
    assert 0 < beyond["below"] < beyond["overflow"]
    assert (
        f"more than 1% of price lies beyond the range of its encoder {sides}; widen it if they are real"
        in told
    )
    assert made.manifest.report["numbers"]["context_age"]["missing"] > 0


def test_tables_are_those_of_the_parts(made: Made) -> None:
    groups = resolve_groups(made.config, made.manifest)
    parts = ["price_base_2", "price_base_3", "price_base_10"]
    fees = [part.replace("price", "fee") for part in parts]
    assert groups["attention"].features == ["item_id", *parts, "share_digits", "fifths", *fees]
    assert groups["context"].features == ["age"]
    named = preset("dare", made.log, 'groups.attention.features=["price","item_id"]')
    assert resolve_groups(named, made.manifest)["attention"].features == [*parts, "item_id"]


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_server_gives_the_bits_of_the_trainer(made: Made, split: str) -> None:
    expected = of_trainer(made, split)
    scorer = Scorer(made.snapshot)
    requests = asked(made, split)
    assert expected.keys() == {name for name, _ in requests} and len(requests) > 3
    for name, body in requests:
        (sent,) = ScoreBody.model_validate({"requests": [body]}).requests
        request = JsonForm(sent, scorer.needs, None, "requests[0]").request({}, Limits())
        (as_arrow,), _ = read_arrow(arrow_of(body), {}, scorer.needs, Limits())
        for each in (request, as_arrow):
            answer, _ = scorer.score([cut_history(each, scorer.needs)])
            assert np.array_equal(answer[0].probabilities, expected[name].numpy()), name
    same_ids(scorer, made, split, requests)


def same_ids(scorer: Scorer, made: Made, split: str, requests: list[Any]) -> None:
    """The batch of all requests of a user, as the reader lays it, and as the server does."""
    (name, body), *_ = requests
    (sent,) = ScoreBody.model_validate({"requests": [body]}).requests
    mine: Request = JsonForm(sent, scorer.needs, None, "requests[0]").request({}, Limits())
    served = scorer.batch([mine])
    for step in SequenceLogReader(made.config.data, split, None).steps():
        batch = step.batch
        at = [r for r in range(batch.requests) if (int(batch.user_id[r]), int(batch.request_id[r])) == name]
        if not at:
            continue
        candidates = batch.behaviors + (batch.candidate_request == at[0]).nonzero()[:, 0]
        for key in served.features.keys():  # noqa: SIM118 - no dict
            wanted = [bag(batch.features[key], int(c)) for c in candidates]
            found = [bag(served.features[key], served.behaviors + c) for c in range(served.candidates)]
            assert found == wanted, key
        return
    raise AssertionError(name)


def bag(feature: Any, place: int) -> list[int]:
    offsets = feature.offsets()
    ids: list[int] = feature.values()[int(offsets[place]) : int(offsets[place + 1])].tolist()
    return ids


def arrow_of(body: dict[str, Any]) -> bytes:
    """The same request as an Arrow stream: prices as text, shares as doubles."""
    history, candidates = body["history"], body["candidates"]

    def prices(values: list[Any]) -> pa.Array:
        return pa.array([[None if value is None else str(value) for value in values]], pa.list_(pa.string()))

    doubles = pa.list_(pa.float64())
    columns: dict[str, pa.Array] = {
        "user_id": pa.array([body["user_id"]]),
        "request_timestamp": pa.array([body["time"]]),
        "history_timestamp": pa.array([history["timestamp"]], pa.list_(pa.int64())),
        "history_item_id": pa.array([history["features"]["item_id"]], pa.list_(pa.int64())),
        "history_price": prices(history["features"]["price"]),
        "history_share": pa.array([history["features"]["share"]], doubles),
        "history_fifths": pa.array([history["features"]["fifths"]], doubles),
        "candidate_item_id": pa.array([candidates["item_id"]], pa.list_(pa.int64())),
        "candidate_price": prices(candidates["price"]),
        "candidate_share": pa.array([candidates["share"]], doubles),
        "candidate_fee": prices(candidates["fee"]),
        "context_age": pa.array([body["context"]["age"]], pa.int64()),
        "numeric_gap": pa.array([body["numeric"]["gap"]], pa.list_(pa.float32())),
    }
    table, sink = pa.table(columns), pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


def test_a_request_as_the_page_shows_it_scores_like_the_logged_one(made: Made) -> None:
    scorer, stored = Scorer(made.snapshot), HistoryStore(made.log)
    expected = {
        name: found for split in made.manifest.splits for name, found in of_trainer(made, split).items()
    }
    for user in (1, 4):
        shown_ = user_body(stored, user, resolve_tasks(made.config.tasks, made.manifest.tasks), Limits())
        assert {None, "9007199254740993"} & set(shown_.features["price"]) and "price" not in shown_.names
        for line in shown_.requests:
            body = {"user_id": user, **line.model_dump(exclude={"labels"})}
            sent = ScoreBody.model_validate_json(json.dumps({"requests": [body]})).requests[0]
            request = JsonForm(sent, scorer.needs, None, "requests[0]").request(stored, Limits())
            answer, _ = scorer.score([cut_history(request, scorer.needs)])
            name = next(each for each in expected if each[0] == user and times(made)[each] == line.time)
            assert np.array_equal(answer[0].probabilities, expected[name].numpy())


def times(made: Made) -> dict[tuple[int, int], int]:
    return {
        (row["user_id"], name): time
        for row in rows(made.log)
        for name, time in zip(row["request_id"], row["request_timestamp"], strict=True)
    }


@pytest.mark.parametrize(
    ("values", "place"),
    [
        ("[9.99, Infinity]", "[1]"),
        ("[9.99, 1e999]", "[1]"),
        ("[null, 1, NaN]", "[2]"),
        ("[9.99, true]", "[1]"),
        ('["1", {}]', "[1]"),
    ],
)
def test_what_is_no_number_of_json_is_told_with_its_place(values: str, place: str) -> None:
    for part in (
        '"candidates": {%s}',
        '"context": {%s}, "candidates": {}',
        '"history": {"timestamp": [], "features": {%s}}',
    ):
        body = '{"requests": [{' + part % f'"price": {values}' + "}]}"
        where = part.split('"')[1] + (".features" if "history" in part else "")
        with pytest.raises(RequestError) as refused:
            read_json(body.encode(), Limits(), {"price"})
        assert str(refused.value) == f"requests[0].{where}.price{place}: must be a number or null"


@pytest.mark.parametrize(
    ("part", "name", "values", "problem"),
    [
        ("candidates", "price", ["1", "12x"], r"requests\[0\].candidates.price\[1\]: '12x' is no number"),
        ("candidates", "price", [[1], [2]], r"candidates.price\[0\]: the feature has one number each"),
        ("candidates", "item_id", [1, 1.5], r"candidates.item_id\[1\]: must be a valid integer of 64 bits"),
        ("candidates", "item_id", [2**70, 1], r"candidates.item_id\[0\]: must be a valid integer"),
        ("candidates", "share", [0.5], r"candidates.share: 1 entries, expected 2"),
    ],
)
def test_a_bad_number_is_told_with_its_place(
    made: Made, part: str, name: str, values: list[Any], problem: str
) -> None:
    body = next(body for _, body in asked(made, "train") if len(body["candidates"]["item_id"]) > 1)
    sides = {"price": [1, 2], "share": [0, None], "fee": [0, 0], "item_id": [1, 2]}
    tree = {**body, part: {**sides, name: values}, "numeric": {"gap": [0, 0]}}
    (sent,) = ScoreBody.model_validate({"requests": [tree]}).requests
    scorer = Scorer(made.snapshot)
    with pytest.raises(RequestError, match=problem):
        JsonForm(sent, scorer.needs, None, "requests[0]").request({}, Limits())


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("data.domain=price", "it holds numbers, and a domain is an id"),
        ("tables.price_base_2.rows=500", "tables.price_base_2: it is a number, whose encoder says its rows"),
        ("ids.fifths.capacity=500", "ids.fifths: it is a number"),
        ('groups.attention.kind="sequence"', "needs one id in every bag, but feature 'price_base_2'"),
    ],
)
def test_what_a_number_cannot_be(made: Made, override: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        resolve_groups(preset("dare", made.log, *OVERRIDES, override), made.manifest)


def test_a_hard_search_matches_no_numbers(made: Made) -> None:
    data = made.config.data.model_copy(update={"search": SearchConfig(levels=("price",))})
    with pytest.raises(ConfigError, match="which must be a feature with one id"):
        SequenceLogReader(data, "train", None)


def test_a_log_with_another_encoder_is_not_scored(made: Made) -> None:
    features = {**made.manifest.features, **made.manifest.context}
    made.snapshot.check_vocabularies(features, made.log)
    other = features["price"].model_copy(update={"encoder": Mnse(kind="mnse", range=(0, 9))})
    with pytest.raises(DataError, match="its numbers 'price' are encoded otherwise"):
        made.snapshot.check_vocabularies({**features, "price": other}, made.log)


def test_row_groups_hold_one_integer_a_number(made: Made) -> None:
    file = made.log / made.manifest.splits["train"].files[0].path
    found = read_rows(file, 0, Columns.of(made.manifest))
    for name in ("price", "share", "fifths"):
        bags = found.history[name]
        assert bags.offsets is None and bags.values.dtype == np.int64
    assert found.history["item_id"].values.dtype == np.int32


def test_a_plan_knows_the_ids_of_a_bag(made: Made) -> None:
    groups, data = resolve_groups(made.config, made.manifest), made.config.data
    size = step_size(data, made.manifest)
    asked_ = lookups(made.config, groups, made.manifest, size, "full")
    one, digits = (asked_[f"attention__{name}"] for name in ("item_id", "price_base_2"))
    assert one.bags == digits.bags == size.behaviors + size.candidates
    # 63 places, and a sign.
    assert digits.ids == 64 * one.ids


def test_rows_go_on_where_they_stand_for_the_same_digits(made: Made) -> None:
    """A wider range has more places, whose rows come after the old ones; other bases have other rows."""

    def digests(**settings: Any) -> dict[str, str]:
        encoder = Mnse(kind="mnse", **{"range": (0, 99), **settings})
        known = {"price": FeatureInfo(rows=1, encoder=encoder)}
        manifest = made.manifest.model_copy(update={"features": known, "context": {}})
        return {name: entry.digest for name, entry in vocabularies(manifest, made.log / "vocab").items()}

    assert digests() == digests(range=(-5, 10**9))
    assert not set(digests().values()) & set(digests(step=0.5).values())
    assert digests(combine="sum") != digests(combine="sum", range=(0, 1000))
    manifest = made.manifest.model_copy(update={"context": {}})
    new = vocabularies(manifest, made.log / "vocab")["price_base_2"]
    before = SimpleNamespace(
        name="old",
        manifest=SimpleNamespace(vocabularies={"price_base_2": "encoded: x"}, rows={"price_base_2": 9}),
    )
    with pytest.raises(CheckpointError, match="price_base_2 was encoded otherwise: encoded: x, and here"):
        _row_map("price_base_2", new, before, set())  # type: ignore[arg-type]
