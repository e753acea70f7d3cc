"""Requests whose ids come and go: any integers, exact in every form, by the map of the version."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from embeddings.ids.stage import IdStage
from pipelines.export_version import ExportOptions, publish_version
from pipelines.serve.metrics import Metrics
from pipelines.serve.service import Service
from pipelines.serve.settings import ServeSettings, UpdateSettings
from tests.helpers.living import RAW, raw_id, raw_rows, see, stage_of
from tests.helpers.logs import Shape, write_log
from tests.helpers.models import preset
from tests.helpers.serving import ARROW, Client, bodies, serving, stream
from tests.helpers.snapshots import save_run
from trainer.data.reader import SequenceLogReader
from trainer.log.hashed_ids import hash_text
from trainer.log.schema import read_manifest
from trainer.ranks.process_group import process_group
from trainer.serving.histories import HistoryStore
from trainer.serving.raw_ids import raw_ids
from trainer.serving.request import RequestError
from trainer.serving.versions import Versions
from trainer.snapshot import load_snapshot

ROWS = raw_rows(4, Shape(users=8))
IDS = ("ids.item_id.capacity=40", "ids.item_id.shared_rows=4")
NAMES = [f"sku {number}" for number in range(60)]


def add_version(root: Path, log: Path, stage: IdStage, since: str = "") -> Path:
    """Train a step more, and publish it."""
    save_run(root / "run", log, "dare", *IDS, step=int(stage.clock[1]), ids=stage)
    with process_group(device="cpu") as ranks:
        options = ExportOptions("fp32", "fp32", since, parity_requests=0)
        return publish_version(root / "run", root / "out", ranks, options).path


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A log with raw ids, and a version that knows items 10 to 39."""
    root = tmp_path_factory.mktemp("living")
    write_log(root / "log", {"train": ROWS}, more=RAW)
    stage = stage_of(preset("dare", root / "log", *IDS))
    see(stage, range(10, 40), 1000)
    add_version(root, root / "log", stage)
    return root


def service_at(root: Path, poll: float = 0.0) -> Service:
    return Service(
        Versions(root / "out"), Metrics(), ServeSettings(updates=UpdateSettings(poll_seconds=poll))
    )


def spelled(body: dict[str, Any]) -> dict[str, Any]:
    """The same with its items as decimal text."""
    changed: dict[str, Any] = json.loads(json.dumps(body))
    for part in (changed["history"]["features"], changed["candidates"]):
        part["item_id"] = [str(item) for item in part["item_id"]]
    return changed


def as_arrow(body: dict[str, Any]) -> bytes:
    columns = {
        "request_timestamp": pa.array([body["time"]], pa.int64()),
        "history_timestamp": pa.array([body["history"]["timestamp"]], pa.list_(pa.int64())),
    }
    for side, part in (("history", body["history"]["features"]), ("candidate", body["candidates"])):
        columns |= {f"{side}_{name}": pa.array([ids], pa.list_(pa.int64())) for name, ids in part.items()}
    return stream(pa.table(columns))


def unknown_of(body: dict[str, Any], known: range) -> dict[str, int]:
    """Of behaviors that the model reads."""
    ids, seen = {raw_id(item) for item in known}, body["history"]
    before = [i for i, time in enumerate(seen["timestamp"]) if time < body["time"]][-12:]
    read = [seen["features"]["item_id"][i] for i in before]
    counts = {
        "candidates.item_id": sum(item not in ids for item in body["candidates"]["item_id"]),
        "history.item_id": sum(item not in ids for item in read),
    }
    return {place: count for place, count in counts.items() if count}


def test_requests_score_as_rows_of_the_log(root: Path) -> None:
    """As numbers, as text and in Arrow, dense or raw; unknown ones are counted in answer and metrics."""
    loaded = load_snapshot(root / "out")
    steps = SequenceLogReader(loaded.manifest.config.data, "train", loaded.id_bounds()).steps()
    expected: dict[tuple[int, int], np.ndarray] = {}
    for step in steps:
        batch, scores = step.batch, loaded.score(step.batch)
        for r, name in enumerate(zip(batch.user_id.tolist(), batch.request_id.tolist(), strict=True)):
            expected[name] = scores[batch.candidate_request == r, 0].numpy()

    async def run() -> None:
        service, total = service_at(root), 0
        async with serving(service) as client:
            for name, body in bodies(read_manifest(root / "log"), ROWS):
                unknown = unknown_of(body, range(10, 40))
                for sent, more in ((body, {}), (spelled(body), {})):
                    (result,) = (await client.score(sent, **more))["results"]
                    assert np.allclose(result["scores"]["click"], expected[name], atol=1e-6)
                    assert result["unknown"] == unknown
                    total += sum(unknown.values())
                answer = await client.http.post(
                    "/score", content=as_arrow(body), headers={"content-type": ARROW}
                )
                (result,) = answer.json()["results"]
                assert np.allclose(result["scores"]["click"], expected[name], atol=1e-6)
                total += sum(unknown.values())
            assert total and await client.metric("tandemrec_unknown_values_total") == total
            health = (await client.http.get("/healthz")).json()
            assert (health["living"], health["hashed"]) == (["item_id"], [])

    asyncio.run(run())


def test_a_page_sends_back_what_it_was_told(root: Path) -> None:
    """Ids as text, which a browser does not round; history and candidates are scored as they stand."""

    async def run() -> None:
        store = HistoryStore(root / "log")
        service = Service(Versions(root / "out", store), Metrics())
        async with serving(service) as client:
            user = max(ROWS, key=lambda row: row["num_behaviors"])["user_id"]
            told = (await client.http.get(f"/users/{user}")).json()
            assert all(isinstance(item, str) for item in told["features"]["item_id"])
            assert all(isinstance(item, int) for item in told["features"]["category_id"])
            request = {key: told["requests"][0][key] for key in ("time", "candidates", "context", "numeric")}
            by_text = await client.score({"user_id": user, **request})
            numbers = [int(item) for item in request["candidates"]["item_id"]]
            assert max(map(abs, numbers)) > 1 << 53
            request["candidates"]["item_id"] = numbers
            assert by_text == await client.score({"user_id": user, **request})

    asyncio.run(run())


def test_what_is_no_id_is_refused(root: Path) -> None:
    async def run() -> None:
        async with serving(service_at(root)) as client:
            _, body = bodies(read_manifest(root / "log"), ROWS)[0]
            for wrong in ("sku-1", "1.5", "", " 7", str(1 << 63), "0x1F"):
                sent = {**body, "candidates": {**body["candidates"], "item_id": ["7"] * 9 + [wrong]}}
                answer = await client.http.post("/score", json={"requests": [sent]})
                assert answer.status_code == 422, wrong
                assert "requests[0].candidates.item_id" in answer.json()["error"], answer.text

    asyncio.run(run())


def test_text_is_hashed_where_ids_are_hashes() -> None:
    """Plain, in a dictionary, and as the number itself."""
    ids = hash_text(NAMES)
    text = pa.array([*NAMES, *NAMES[:3]])
    for given in (text, text.dictionary_encode(), pa.array([*ids, *ids[:3]])):
        assert raw_ids(given, True, "here").tolist() == [*ids, *ids[:3]]
    assert raw_ids(pa.array([str(i) for i in ids]), False, "here").tolist() == ids.tolist()
    assert raw_ids(pa.array([], pa.null()), True, "here").size == 0
    for wrong in (pa.array([1.5]), pa.array([1 << 63], pa.uint64()), pa.array(["x"]).dictionary_encode()):
        with pytest.raises(RequestError, match="here"):
            raw_ids(wrong, False, "here")


async def asked_until(client: Client, body: dict[str, Any], version: str) -> list[dict[str, Any]]:
    """Answers to one request sent again and again, until a version has given one."""
    answers: list[dict[str, Any]] = []
    while not answers or answers[-1]["version"] != version:
        answers.append(await client.score(body))
    return answers


def test_a_delta_is_served_while_requests_go_on(root: Path) -> None:
    """No request is dropped, each has the answer of one whole version, and ids live and die with it."""

    async def run() -> None:
        stage = stage_of(preset("dare", root / "log", *IDS))
        see(stage, range(10, 40), 1000)
        known = set(stage.maps["item_id"].entries()[0].tolist())
        see(stage, range(30, 60), 2000)
        gone = sorted(known - set(stage.maps["item_id"].entries()[0].tolist()))
        _, body = bodies(read_manifest(root / "log"), ROWS)[0]
        body = {**body, "candidates": {"item_id": [gone[0], raw_id(55)], "category_id": [1, 1]}}
        async with serving(service_at(root, poll=0.05)) as client:
            (before,) = await asked_until(client, body, "v00000001")
            # Meanwhile another thread publishes.
            asking = asyncio.create_task(asked_until(client, body, "v00000002"))
            await asyncio.to_thread(add_version, root, root / "log", stage, "1")
            answers = await asyncio.wait_for(asking, 60)
        manifest = load_snapshot(root / "out").manifest
        assert manifest.base is not None and manifest.tombstones == len(gone) > 0
        scores = {answer["version"]: answer["results"][0]["scores"]["click"] for answer in answers}
        assert set(scores) <= {"v00000001", "v00000002"} and len(answers) > 1
        old, new = before["results"][0], answers[-1]["results"][0]
        assert old["unknown"]["candidates.item_id"] == new["unknown"]["candidates.item_id"] == 1
        # The first candidate has lost its row, the second one has got its own.
        assert all(
            abs(a - b) > 1e-6 for a, b in zip(*(each["scores"]["click"] for each in (old, new)), strict=True)
        )
        for answer in answers:
            expected = old if answer["version"] == "v00000001" else new
            assert np.allclose(
                answer["results"][0]["scores"]["click"], expected["scores"]["click"], atol=1e-6
            )

    asyncio.run(run())
