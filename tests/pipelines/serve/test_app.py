"""The server's interface, called in process: answers, errors, batching, switching, and hostile bodies."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pytest
import torch

import trainer.serving.versions as versions_module
from embeddings.errors import SnapshotError
from tests.helpers.models import preset
from tests.helpers.served import ROWS, WITH_CONTEXT
from tests.helpers.serving import (
    ARROW,
    Client,
    bodies,
    reference,
    service_of,
    serving,
    set_limits,
    snapshot_of,
    stream,
)
from trainer.log.schema import read_manifest
from trainer.snapshot import Snapshot

Patch = pytest.MonkeyPatch
Body = dict[str, Any]


@pytest.fixture(scope="module")
def asked(log: Path) -> list[tuple[tuple[int, int], Body]]:
    return bodies(read_manifest(log), ROWS)


@pytest.fixture(scope="module")
def expected(log: Path) -> dict[tuple[int, int], np.ndarray]:
    return reference(snapshot_of(preset("dare", log, *WITH_CONTEXT)))


def long_enough(asked: list[tuple[tuple[int, int], Body]]) -> Body:
    """A request with some history and candidates, that tests may change."""
    found = next(
        b for _, b in asked if len(b["history"]["timestamp"]) > 8 and len(b["candidates"]["item_id"]) > 2
    )
    return json.loads(json.dumps(found))


async def refused(client: Client, body: Any, **more: Any) -> tuple[int, str]:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"content-type": "application/json", **more}
    answer = await client.http.post("/score", content=content, headers=headers)
    assert set(answer.json()) == {"error"} and "\n" not in answer.json()["error"]
    return answer.status_code, answer.json()["error"]


def test_scores_are_those_of_evaluation(
    snapshot: Snapshot,
    monkeypatch: Patch,
    asked: list[tuple[tuple[int, int], Body]],
    expected: dict[tuple[int, int], np.ndarray],
) -> None:
    async def run() -> None:
        async with serving(service_of(snapshot, monkeypatch)) as client:
            answer = await client.score(*(body for _, body in asked[:20]))
            assert answer["version"] == "v00000001" and len(answer["results"]) == 20
            for (name, _), result in zip(asked, answer["results"], strict=False):
                assert set(result) == {"scores", "history_used"}
                for t, task in enumerate(("click", "buy")):
                    assert result["scores"][task] == pytest.approx(expected[name][:, t], abs=1e-6)

    asyncio.run(run())


def test_stored_histories_and_users(
    snapshot: Snapshot, monkeypatch: Patch, log: Path, asked: list[tuple[tuple[int, int], Body]]
) -> None:
    """A stored history gives the scores of the same history sent along; the page is told of it with names."""

    async def run() -> None:
        async with serving(service_of(snapshot, monkeypatch, log)) as client:
            for _, body in asked[::7]:
                stored = {key: part for key, part in body.items() if key != "history"}
                one, other = (await client.score(stored))["results"], (await client.score(body))["results"]
                assert one == other
            health = (await client.http.get("/healthz")).json()
            assert health["status"] == "ready" and health["histories"] == 10 and health["step"] == 7
            assert health["context"] == ["city", "segments"] and health["numeric"] == ["price"]
            users = (await client.http.get("/users")).json()
            assert users["total"] == 10 and [u["user_id"] for u in users["users"]] == list(range(10))
            found = (await client.http.get("/users/3")).json()
            assert found["timestamp"] == ROWS[3]["history_timestamp"]
            assert found["features"]["item_id"] == ROWS[3]["history_item_id"]
            assert found["names"]["item_id"][str(ROWS[3]["history_item_id"][0])]
            assert [r["time"] for r in found["requests"]] == ROWS[3]["request_timestamp"]
            assert found["requests"][0]["candidates"]["tags"] == ROWS[3]["candidate_tags"][0]
            assert [len(label) for label in found["requests"][0]["labels"].values()] == [
                ROWS[3]["request_num_candidates"][0]
            ] * 2
            for path, status in (("/users/99", 404), ("/users/x", 422), ("/users/9" + "9" * 30, 404)):
                answer = await client.http.get(path)
                assert answer.status_code == status and "error" in answer.json(), path
            gone = {**asked[0][1], "user_id": 99}
            del gone["history"]
            assert await refused(client, {"requests": [gone]}) == (
                404,
                "requests[0].user_id: no stored history of user 99",
            )

    asyncio.run(run())


def change(path: str, value: Any) -> Callable[[Body], None]:
    """Sets what lies at a dotted path; a value of None deletes it."""

    def apply(body: Body) -> None:
        *steps, last = path.split(".")
        part: Any = body
        for step in steps:
            part = part[int(step)] if step.isdigit() else part[step]
        if value is None:
            del part[last]
        else:
            part[int(last) if last.isdigit() else last] = value

    return apply


FEW = {"limits__history": 40, "limits__candidates": 6, "limits__body": 20_000}
REFUSED = [
    (
        change("candidates.item_id.1", 60),
        422,
        "requests[0].candidates.item_id[1]: id 60 lies outside [0, 60)",
    ),
    (
        change("candidates.item_id.1", -1),
        422,
        "requests[0].candidates.item_id[1]: id -1 lies outside [0, 60)",
    ),
    (
        change("history.features.category_id.2", 9),
        422,
        "requests[0].history.features.category_id[2]: id 9 lies outside [0, 9)",
    ),
    (change("context.city", 7), 422, "requests[0].context.city[0]: id 7 lies outside [0, 7)"),
    (
        change("candidates.item_id.0", 2**63),
        422,
        "requests[0].candidates.item_id[0]: must be a valid integer of 64 bits",
    ),
    (
        change("history.timestamp.0", -(2**63) - 1),
        422,
        "requests[0].history.timestamp[0]: must be a valid integer of 64 bits",
    ),
    (change("candidates.item_id.0", "1"), 422, "requests[0].candidates.item_id"),
    (change("candidates.item_id.0", 1.5), 422, "requests[0].candidates.item_id"),
    (change("candidates.item_id", None), 422, "requests[0].candidates.item_id: missing; the snapshot needs"),
    (change("candidates", {}), 422, "requests[0].candidates: there is none"),
    (
        change("candidates", {"product": [1]}),
        422,
        "requests[0].candidates: product is not known; this snapshot has item_id, category_id",
    ),
    (
        change("context", {"town": 1}),
        422,
        "requests[0].context: town is not known; this snapshot has city",
    ),
    (change("candidates.item_id", [1]), 422, "entries, expected"),
    (change("history.features.item_id", None), 422, "requests[0].history.features.item_id: missing"),
    (change("history.features.item_id", [1]), 422, "requests[0].history.features.item_id: 1 entries"),
    (
        change("history.timestamp.0", 10**9),
        422,
        "requests[0].history.timestamp[1]: older than the one before",
    ),
    (change("history", None), 422, "requests[0].history: missing, and this server was started without"),
    (change("context.city", None), 422, "requests[0].context.city: missing"),
    (change("numeric.price", None), 422, "requests[0].numeric.price: missing"),
    (change("numeric.price.0", 1e39), 422, "requests[0].numeric.price: holds a number that is not finite"),
    (change("numeric.price.0", float("nan")), 422, "requests[0].numeric.price[0]"),
    (change("colour", "red"), 422, "requests[0].colour: not known here"),
    (
        change("history.timestamp", [0] * 41),
        422,
        "requests[0].history.features.item_id: 29 entries, expected 41",
    ),
    (change("candidates.item_id", [1] * 7), 413, "requests[0].candidates: 7 candidates, the server takes 6"),
]


def test_refused_requests(
    snapshot: Snapshot, monkeypatch: Patch, asked: list[tuple[tuple[int, int], Body]]
) -> None:
    async def run() -> None:
        service = service_of(snapshot, monkeypatch, **FEW)
        async with serving(service) as client:
            fine = long_enough(asked)
            await client.score(fine)
            for apply, status, message in REFUSED:
                body = json.loads(json.dumps(fine))
                apply(body)
                found = await refused(client, {"requests": [body]})
                assert found[0] == status and message in found[1], (found, message)
            several = [fine, {**fine, "candidates": {**fine["candidates"], "item_id": [99, 1, 1, 1, 1]}}]
            assert "requests[1].candidates.item_id" in (await refused(client, {"requests": several}))[1]
            raw: list[tuple[bytes, dict[str, str], int, str]] = [
                (b"", {}, 422, "Invalid JSON"),
                (b"[" * 15_000, {}, 422, "Invalid JSON"),
                (b"x" * 20_001, {}, 413, "longer than 20,000 bytes"),
                (b"{}", {}, 422, "requests: missing, and it is needed"),
                (b'{"requests": []}', {}, 422, "requests: "),
                (b"a,b", {"content-type": "text/csv"}, 415, "content type 'text/csv' is not read"),
                (b"", {"content-type": ARROW}, 422, "no Arrow IPC stream"),
            ]
            for content, headers, status, message in raw:
                found = await refused(client, content, **headers)
                assert found[0] == status and message in found[1], (found, message)
            endless = client.http.post("/score", content=_endless())
            assert (await endless).status_code == 413
            many = {"requests": [fine] * 65}
            set_limits(service, replace(service.limits, body=10**7))
            assert await refused(client, many) == (
                413,
                "65 requests, the server takes 64 (limits.requests)",
            )
            for path, method in (("/nothing", "GET"), ("/score", "GET")):
                answer = await client.http.request(method, path)
                assert answer.status_code in (404, 405) and "error" in answer.json()
            assert await client.metric('tandemrec_errors_total{status="413"}') == 4

    asyncio.run(run())


async def _endless() -> Any:
    while True:
        yield b"x" * 4096


def test_arrow_bodies_that_are_refused(
    snapshot: Snapshot, monkeypatch: Patch, asked: list[tuple[tuple[int, int], Body]]
) -> None:
    good = {
        "history_timestamp": pa.array([[1, 2]], pa.list_(pa.int64())),
        "candidate_item_id": pa.array([[1, 2]], pa.list_(pa.int64())),
    }
    cases = [
        ({"candidate_item_id": pa.array([None], pa.list_(pa.int64()))}, "is null"),
        ({"candidate_item_id": pa.array([[1, None]], pa.list_(pa.int64()))}, "holds a null"),
        ({"candidate_item_id": pa.array([["a"]], pa.list_(pa.string()))}, "holds string, expected int64"),
        ({"candidate_item_id": pa.array([1], pa.int64())}, "is int64, expected a list"),
        ({"request_timestamp": pa.array(["x"])}, "is string, expected int64"),
        (
            {"context_town": pa.array([1])},
            "columns context_*: town is not known; this snapshot has city",
        ),
        ({"history_timestamp": pa.array([[2, 1]], pa.list_(pa.int64()))}, "older than the one before"),
    ]

    async def run() -> None:
        async with serving(service_of(snapshot, monkeypatch)) as client:
            for changes, message in cases:
                found = await refused(
                    client, stream(pa.table({**good, **changes})), **{"content-type": ARROW}
                )
                assert found[0] == 422 and message in found[1], (found, message)
            squeezed = stream(pa.table(good), compression="zstd")
            found = await refused(client, squeezed, **{"content-type": ARROW})
            assert found == (422, "compressed Arrow bodies are not accepted; write it uncompressed")
            rows = pa.table({"user_id": pa.array([1] * 65)})
            assert (await refused(client, stream(rows), **{"content-type": ARROW}))[0] == 413
            twice = pa.table([pa.array([1]), pa.array([1])], names=["user_id", "user_id"])
            assert (await refused(client, stream(twice), **{"content-type": ARROW}))[
                1
            ] == "a column occurs twice"

    asyncio.run(run())


def test_requests_that_wait_together_are_scored_by_one_call(
    snapshot: Snapshot,
    monkeypatch: Patch,
    asked: list[tuple[tuple[int, int], Body]],
    expected: dict[tuple[int, int], np.ndarray],
) -> None:
    async def run() -> None:
        async with serving(service_of(snapshot, monkeypatch, batching__window_ms=50)) as client:
            some = asked[:24]
            answers = await asyncio.gather(*(client.score(body) for _, body in some))
            for (name, _), answer in zip(some, answers, strict=True):
                assert answer["results"][0]["scores"]["click"] == pytest.approx(
                    expected[name][:, 0], abs=1e-6
                )
            assert await client.metric("tandemrec_requests_total") == 24
            assert await client.metric("tandemrec_batch_requests_count") < 6
            candidates = sum(len(body["candidates"]["item_id"]) for _, body in some)
            assert await client.metric("tandemrec_candidates_total") == candidates
            for stage, count in (("queue", 24), ("decode", 24)):
                assert await client.metric(f'tandemrec_stage_seconds_count{{stage="{stage}"}}') == count
            assert await client.metric("tandemrec_latency_seconds_count") == 24
            assert await client.metric('tandemrec_snapshot_version{version="v00000001"}') == 1

    asyncio.run(run())


def test_a_failing_request_fails_alone_and_says_nothing(
    snapshot: Snapshot, monkeypatch: Patch, asked: list[tuple[tuple[int, int], Body]]
) -> None:
    """Whatever breaks inside is an answer 500 without a traceback, and its company gets its scores."""
    plain = type(snapshot).score

    def breaks(self: Snapshot, batch: Any, *more: Any) -> torch.Tensor:
        if (batch.user_id == -5).any():
            raise RuntimeError("a secret of the inside")
        return plain(self, batch, *more)

    async def run() -> None:
        service = service_of(snapshot, monkeypatch, batching__window_ms=50)
        monkeypatch.setattr(type(snapshot), "score", breaks)
        async with serving(service) as client:
            sent = [{**body, "user_id": -5 if n == 3 else 1} for n, (_, body) in enumerate(asked[:8])]
            answers = await asyncio.gather(
                *(client.http.post("/score", json={"requests": [body]}) for body in sent)
            )
            assert [answer.status_code for answer in answers] == [200] * 3 + [500] + [200] * 4
            assert answers[3].json() == {"error": "internal error; see the server's log"}

    asyncio.run(run())


def test_too_many_waiting_is_429(
    snapshot: Snapshot, monkeypatch: Patch, asked: list[tuple[tuple[int, int], Body]]
) -> None:
    async def run() -> None:
        async with serving(
            service_of(snapshot, monkeypatch, batching__waiting=2, batching__window_ms=200)
        ) as client:
            answers = await asyncio.gather(
                *(client.http.post("/score", json={"requests": [asked[0][1]]}) for _ in range(9))
            )
            turned = [answer for answer in answers if answer.status_code == 429]
            assert len(turned) >= 5 and {a.status_code for a in answers} == {200, 429}
            assert turned[0].headers["retry-after"] == "1" and "are waiting" in turned[0].json()["error"]

    asyncio.run(run())


def test_switching_under_load_drops_and_mixes_nothing(
    log: Path, monkeypatch: Patch, asked: list[tuple[tuple[int, int], Body]]
) -> None:
    """Each answer is wholly of the version it names; a bad version is refused, and the old one stays."""
    known = {
        f"v0000000{n}": snapshot_of(
            preset("dare", log, *WITH_CONTEXT, f"train.seed={n}"), Path(f"snapshot/v0000000{n}")
        )
        for n in (1, 2, 4)
    }
    expected = {name: reference(each) for name, each in known.items()}
    latest = ["v00000001"]

    def load(path: Path, cache: Path | None) -> Snapshot:
        if path.name not in known:
            raise SnapshotError(path, "is corrupt")
        return known[path.name]

    async def run() -> None:
        service = service_of(known["v00000001"], monkeypatch, poll=0.02)
        monkeypatch.setattr(versions_module, "load_fetched", load)
        monkeypatch.setattr(versions_module, "resolve", lambda path: Path("snapshot") / latest[0])
        seen, done = set(), False

        async def one_client(client: Client, first: int) -> None:
            at = first
            while not done:
                name, body = asked[at % len(asked)]
                answer = await client.score(body)
                scores = answer["results"][0]["scores"]["click"]
                assert scores == pytest.approx(expected[answer["version"]][name][:, 0], abs=1e-6)
                seen.add(answer["version"])
                at += 1

        async def until(client: Client, version: str, refused: str | None) -> None:
            while True:
                health = (await client.http.get("/healthz")).json()
                if health["version"] == version and (health["refused"] or {}).get("version") == refused:
                    return
                await asyncio.sleep(0.01)

        async with serving(service) as client, asyncio.timeout(60):
            load_tasks = [asyncio.create_task(one_client(client, 11 * n)) for n in range(4)]
            latest[0] = "v00000002"
            await until(client, "v00000002", None)
            latest[0] = "v00000003"
            await until(client, "v00000002", "v00000003")
            answer = await client.reload()
            assert answer.status_code == 409 and answer.json() == {"error": "snapshot/v00000003: is corrupt"}
            latest[0] = "v00000004"
            answer = await client.reload()
            assert answer.json()["version"] == "v00000004"
            assert (await client.reload()).json() == {"version": "v00000004", "switched": False}
            await asyncio.sleep(0.1)
            done = True
            await asyncio.gather(*load_tasks)
            assert seen == {"v00000001", "v00000002", "v00000004"}
            assert await client.metric('tandemrec_reloads_total{outcome="switched"}') == 2
            assert await client.metric('tandemrec_snapshot_version{version="v00000004"}') == 1
            assert 'version="v00000001"' not in (await client.http.get("/metrics")).text

    asyncio.run(run())


def test_a_version_that_scores_its_records_otherwise_is_refused(
    snapshot: Snapshot, monkeypatch: Patch
) -> None:
    recorded = snapshot.recorded
    wrong = replace(snapshot, recorded=recorded._replace(trained=recorded.trained + 0.2))
    with pytest.raises(SnapshotError, match=r"differ from the trainer.s by up to 0\.2"):
        service_of(wrong, monkeypatch)
    changed = replace(snapshot, recorded=recorded._replace(own=recorded.own + 1e-4))
    with pytest.raises(SnapshotError, match=r"recorded candidates score otherwise than when it was"):
        service_of(changed, monkeypatch)


def mutated(rng: np.random.Generator, content: bytes, alien: bytes) -> bytes:
    """Some bytes flipped, cut out, doubled, or replaced by what means something elsewhere."""
    found = bytearray(content)
    for _ in range(int(rng.integers(1, 6))):
        at, kind = int(rng.integers(0, len(found) + 1)), rng.integers(0, 5)
        if kind == 0 and at < len(found):
            found[at] ^= 1 << int(rng.integers(0, 8))
        elif kind == 1:
            del found[at : at + int(rng.integers(1, 50))]
        elif kind == 2:
            found[at:at] = found[at : at + int(rng.integers(1, 200))]
        elif kind == 3:
            found[at:at] = bytes(rng.integers(0, 256, int(rng.integers(1, 9)), dtype=np.uint8))
        else:
            pieces = [
                b"null",
                b"-1",
                b"1e999",
                b"9" * 30,
                b'""',
                b"[]",
                b"{}",
                b"NaN",
                b"\\ud800",
                alien[:40],
            ]
            found[at : at + int(rng.integers(0, 4))] = pieces[int(rng.integers(len(pieces)))]
    return bytes(found)


def test_a_thousand_mutated_bodies_are_answered(
    snapshot: Snapshot, monkeypatch: Patch, log: Path, asked: list[tuple[tuple[int, int], Body]]
) -> None:
    """JSON and Arrow: an answer 200 or a 4xx with one line; afterwards the server scores as before."""
    rng = np.random.default_rng(0)
    fine = long_enough(asked)
    as_json = json.dumps({"requests": [fine], "explain": True}).encode()
    as_arrow = stream(pa.Table.from_pylist([flat(fine)]))

    async def run() -> None:
        async with serving(service_of(snapshot, monkeypatch, log)) as client:
            before, statuses = await client.score(fine), []
            for number in range(1000):
                arrow = number % 2
                content = mutated(rng, *((as_arrow, as_json) if arrow else (as_json, as_arrow)))
                headers = {"content-type": ARROW if arrow else "application/json"}
                answer = await client.http.post("/score", content=content, headers=headers)
                statuses.append(answer.status_code)
                assert answer.status_code in (200, 404, 413, 422), (number, answer.text)
                if answer.status_code != 200:
                    assert set(answer.json()) == {"error"} and "Traceback" not in answer.text
                    assert len(answer.text) < 500
            assert await client.score(fine) == before
            assert statuses.count(200) > 5 and statuses.count(422) > 500

    asyncio.run(run())


def flat(body: Body) -> Body:
    """A request as a row of an Arrow body."""
    row = {"user_id": body["user_id"], "request_timestamp": body["time"]}
    row["history_timestamp"] = body["history"]["timestamp"]
    sides = {"history": body["history"]["features"], "candidate": body["candidates"]}
    for side, part in {**sides, "context": body["context"], "numeric": body["numeric"]}.items():
        row |= {f"{side}_{name}": values for name, values in part.items()}
    return row


def test_bodies_made_from_the_interface_itself(snapshot: Snapshot, monkeypatch: Patch, log: Path) -> None:
    """Schemathesis: whatever the OpenAPI description allows or forbids, answers are as described."""
    import schemathesis
    from hypothesis import HealthCheck, given, settings

    service = service_of(snapshot, monkeypatch, log)
    loop = asyncio.new_event_loop()
    running = serving(service)
    client = loop.run_until_complete(running.__aenter__())
    described = loop.run_until_complete(client.http.get("/openapi.json")).json()
    schema = schemathesis.openapi.from_dict(described)
    calls = 0

    async def answered(case: Any) -> httpx.Response:
        words = case.as_transport_kwargs(base_url="http://here")
        words = {
            k: v for k, v in words.items() if k in ("method", "url", "headers", "params", "json", "data")
        }
        content = words.pop("data", None)
        if content is not None:
            words["content"] = content if isinstance(content, bytes | str) else json.dumps(content)
        return await client.http.request(**words)

    def check(case: Any) -> None:
        nonlocal calls
        calls += 1
        answer = loop.run_until_complete(answered(case))
        assert answer.status_code < 500, (case.method, case.path, answer.text)
        allowed = described["paths"][case.path][case.method.lower()]["responses"]
        assert str(answer.status_code) in allowed, (case.path, answer.status_code, answer.text)
        if answer.status_code >= 400:
            assert set(answer.json()) == {"error"}

    try:
        for operation in schema.get_all_operations():
            examples = 20 if operation.ok().path == "/score" else 5
            strategy = operation.ok().as_strategy()
            settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck))(
                given(case=strategy)(check)
            )()
    finally:
        loop.run_until_complete(running.__aexit__(None, None, None))
        loop.close()
    assert calls > 25
