"""How sure a server says it is, in JSON and in Arrow, and the scores that explore."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from tests.helpers.models import preset
from tests.helpers.served import ROWS
from tests.helpers.serving import ARROW, bodies, model_body, service_of, serving, snapshot_of
from trainer.log.schema import read_manifest
from trainer.serving.exploration import Exploration, sureness
from trainer.serving.json_body import JsonForm
from trainer.serving.request import Limits
from trainer.serving.scorer import Scorer
from trainer.snapshot import Snapshot
from trainer.snapshot.laplace import curvature, posterior


@pytest.fixture
def snapshot(log: Path) -> Iterator[Snapshot]:
    """With posteriors of its recorded requests."""
    plain = snapshot_of(preset("dare", log))
    logits, phi = plain.features(plain.recorded.batch)
    posteriors = {
        task: posterior(curvature(phi[place], logits[:, place], np.ones(len(logits))), 1.0)
        for place, task in enumerate(plain.manifest.tasks)
    }
    yield replace(plain, posteriors=posteriors)


def test_answers_say_how_sure_they_are(
    snapshot: Snapshot, log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = [body for _, body in bodies(read_manifest(log), ROWS)][:4]

    async def run() -> None:
        async with serving(service_of(snapshot, monkeypatch)) as client:
            assert (await client.http.get("/healthz")).json()["uncertainty"] is True
            plain = (await client.score(*sent))["results"]
            assert all(result.get("uncertainty") is None for result in plain)
            sure = (await client.score(*sent, uncertainty=True))["results"]
            upper = (await client.score(*sent, explore="ucb", explore_factor=2.0))["results"]
            drawn = [
                (await client.score(*sent, explore="thompson", explore_seed=seed))["results"]
                for seed in (0, 0, 1)
            ]
            # Alone, and its candidates in another order: the draw is of the request.
            turned = {
                **sent[0],
                "candidates": {name: ids[::-1] for name, ids in sent[0]["candidates"].items()},
                "numeric": {name: numbers[::-1] for name, numbers in sent[0]["numeric"].items()},
            }
            (alone,) = (await client.score(turned, explore="thompson"))["results"]
        for r, (one, other) in enumerate(zip(plain, sure, strict=True)):
            assert one["scores"] == other["scores"]
            for task in snapshot.manifest.tasks:
                said = other["uncertainty"][task]
                assert said.keys() == {"mean", "deviation", "probability"}
                mean, deviation = np.array(said["mean"]), np.array(said["deviation"])
                np.testing.assert_allclose(1 / (1 + np.exp(-mean)), one["scores"][task], rtol=1e-5)
                assert (deviation > 0).all()
                bound = upper[r]["uncertainty"][task]["explore"]
                np.testing.assert_allclose(bound, mean + 2 * deviation, rtol=1e-5)
                first, again, another = (np.array(each[r]["uncertainty"][task]["explore"]) for each in drawn)
                np.testing.assert_allclose(first, again, atol=1e-6)
                assert np.abs(first - another).max() > 1e-4
        for task in snapshot.manifest.tasks:
            first = drawn[0][0]["uncertainty"][task]["explore"]
            np.testing.assert_allclose(alone["uncertainty"][task]["explore"][::-1], first, atol=1e-5)

    asyncio.run(run())


def test_arrow_says_what_json_says(snapshot: Snapshot, log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent = [body for _, body in bodies(read_manifest(log), ROWS)][:3]

    def arrow(metadata: dict[str, str]) -> bytes:
        columns: dict[str, Any] = {
            "user_id": [body["user_id"] for body in sent],
            "request_timestamp": [body["time"] for body in sent],
            "history_timestamp": [body["history"]["timestamp"] for body in sent],
        }
        parts = [("history_", [body["history"]["features"] for body in sent])]
        parts += [(f"{part}_", [body[key] for body in sent]) for part, key in
                  (("candidate", "candidates"), ("context", "context"), ("numeric", "numeric"))]  # fmt: skip
        for prefix, each in parts:
            columns |= {f"{prefix}{name}": [given[name] for given in each] for name in each[0]}
        table = pa.table(columns).replace_schema_metadata(metadata)
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        return bytes(sink.getvalue())

    async def run() -> None:
        async with serving(service_of(snapshot, monkeypatch)) as client:

            async def ask(accept: str, **metadata: str) -> Any:
                headers = {"content-type": ARROW, "accept": accept}
                return await client.http.post("/score", content=arrow(metadata), headers=headers)

            expected = (await client.score(*sent, explore="ucb", explore_factor=0.5))["results"]
            answer = await ask(ARROW, explore="ucb", explore_factor="0.5")
            found = pa.ipc.open_stream(answer.content).read_all().to_pydict()
            for task in snapshot.manifest.tasks:
                for name in ("mean", "deviation", "probability", "explore"):
                    own = [result["uncertainty"][task][name] for result in expected]
                    for mine, theirs in zip(found[f"{name}_{task}"], own, strict=True):
                        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-6)
            said = (await ask("application/json", uncertainty="true")).json()["results"]
            assert all("uncertainty" in result for result in said)
            nothing = await ask(ARROW, uncertainty="false")
            assert "mean_click" not in pa.ipc.open_stream(nothing.content).read_all().column_names
            for key, value in (("explore", "greedy"), ("explore_seed", "x"), ("uncertainty", "1")):
                refused = await ask(ARROW, **{key: value})
                assert refused.status_code == 422 and f"metadata: {key}" in refused.json()["error"]

    asyncio.run(run())


@pytest.mark.parametrize("asked", [{"explore": "greedy"}, {"explore_factor": 1e9}, {"uncertainty": 1}])
def test_what_is_no_exploration_is_refused(
    asked: dict[str, Any], snapshot: Snapshot, log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (_, body), *_ = bodies(read_manifest(log), ROWS)

    async def run() -> None:
        async with serving(service_of(snapshot, monkeypatch)) as client:
            answer = await client.http.post("/score", json={"requests": [body], **asked})
            assert answer.status_code == 422 and next(iter(asked)) in answer.json()["error"]

    asyncio.run(run())


def test_a_version_without_posteriors_says_so(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (_, body), *_ = bodies(read_manifest(log), ROWS)

    async def run() -> None:
        async with serving(service_of(snapshot_of(preset("dare", log)), monkeypatch)) as client:
            assert (await client.http.get("/healthz")).json()["uncertainty"] is False
            answer = await client.http.post("/score", json={"requests": [body], "uncertainty": True})
            assert answer.status_code == 422
            assert "cannot say how sure it is; export it with --uncertainty" in answer.json()["error"]

    asyncio.run(run())


def test_candidates_of_a_request_are_scored_by_one_draw(snapshot: Snapshot, log: Path) -> None:
    """Thompson sampling: logits differ from their means by phi . root z, with one z."""
    scorer = Scorer(snapshot)
    _, (_, body), *_ = bodies(read_manifest(log), ROWS)
    request = JsonForm(model_body(body), scorer.needs, None, "").request({}, Limits())
    judged = snapshot.judge(scorer.batch([request]))
    whole = slice(0, request.count)
    draws = [sureness(judged, whole, request, Exploration("thompson", seed=seed)) for seed in range(400)]
    off = np.stack([each.explore - each.mean for each in draws if each.explore is not None])
    for task, each in enumerate(judged.spread):
        spread = each.numpy().astype(np.float64)
        expected = spread @ spread.T
        found = np.cov(off[:, :, task].T).reshape(expected.shape)
        np.testing.assert_allclose(found, expected, atol=0.35 * expected.max())
        # Their differences lie in the space of phi alone.
        left = np.linalg.lstsq(spread, off[:, :, task].T, rcond=None)[1]
        assert not left.size or float(np.abs(left).max()) < 1e-6
