"""What a body may hold, in process: one id where there is one, seconds, newest behaviors, so many values."""

from __future__ import annotations

import asyncio
import errno
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

import pipelines.serve.updates as updates_module
from embeddings.errors import DataError
from tests.helpers.logs import INFOS
from tests.helpers.served import ROWS
from tests.helpers.serving import ARROW, Client, bodies, service_of, serving, set_limits, stream
from trainer.log.schema import read_manifest
from trainer.serving.arrow_body import read_arrow
from trainer.serving.core import CoreSettings
from trainer.serving.request import Limits, Needs, RequestError
from trainer.serving.scheduler import BatchSettings
from trainer.snapshot import Snapshot

LISTS = pa.list_(pa.int64())
Patch = pytest.MonkeyPatch
Body = dict[str, Any]


@pytest.fixture(scope="module")
def needs(snapshot: Snapshot) -> Needs:
    return Needs.of(snapshot)


@pytest.fixture
def fine(log: Path) -> Body:
    """A request with more behaviors than the model reads; every test gets its own."""
    found = next(
        b
        for _, b in bodies(read_manifest(log), ROWS)
        if len(b["history"]["timestamp"]) > 20 and b["time"] > max(b["history"]["timestamp"])
    )
    copy: Body = json.loads(json.dumps(found))
    return copy


def row_of(body: Body) -> dict[str, Any]:
    row = {"request_timestamp": body["time"], "history_timestamp": body["history"]["timestamp"]}
    sides = {"history": body["history"]["features"], "candidate": body["candidates"]}
    for side, part in {**sides, "context": body["context"], "numeric": body["numeric"]}.items():
        row |= {f"{side}_{name}": values for name, values in part.items()}
    return row


def arrow(body: Body, **columns: pa.Array) -> pa.Table:
    """A row with some columns of other types."""
    table = pa.Table.from_pylist([row_of(body)])
    for name, values in columns.items():
        table = table.set_column(table.column_names.index(name), name, values)
    return table


async def post(
    client: Client, content: bytes, kind: str = "application/json", **more: str
) -> tuple[int, str]:
    answer = await client.http.post("/score", content=content, headers={"content-type": kind, **more})
    assert answer.status_code == 200 or set(answer.json()) == {"error"}
    return answer.status_code, "" if answer.status_code == 200 else answer.json()["error"]


def of(*requests: Body, **more: Any) -> bytes:
    return json.dumps({"requests": list(requests), **more}).encode()


@pytest.mark.parametrize("ids", [[3, 4], []])
def test_a_feature_of_one_id_has_exactly_one(
    snapshot: Snapshot, monkeypatch: Patch, fine: Body, ids: list[int]
) -> None:
    """Of behaviors, candidates and the request, in both forms; lists of one are as good as one."""

    def lists(values: list[int], changed: bool) -> list[list[int]]:
        return [ids if changed and at == 1 else [i] for at, i in enumerate(values)]

    async def run() -> None:
        async with serving(service_of(snapshot, monkeypatch)) as client:
            expected = (await client.score(fine))["results"]
            for changed in (False, True):
                for part, where, column in (
                    (fine["history"]["features"], "history.features", "history"),
                    (fine["candidates"], "candidates", "candidate"),
                ):
                    plain = part["item_id"]
                    part["item_id"] = lists(plain, changed)
                    values = pa.array([part["item_id"]], pa.list_(LISTS))
                    table = arrow(fine, **{f"{column}_item_id": values})
                    said = [await post(client, of(fine)), await post(client, stream(table), ARROW)]
                    if changed:
                        assert [status for status, _ in said] == [422, 422]
                        assert f"requests[0].{where}.item_id[1]: " in said[0][1]
                        assert f"requests[0], column {column}_item_id[1]: " in said[1][1]
                        assert all("the feature has exactly one" in text for _, text in said)
                    else:
                        assert (await client.score(fine))["results"] == expected
                        assert said[1][0] == 200
                    part["item_id"] = plain
            fine["context"]["city"] = ids
            table = arrow({**fine, "context": {**fine["context"], "city": 1}})
            table = table.drop_columns("context_city").append_column("context_city", pa.array([ids], LISTS))
            for said, where in (
                (await post(client, of(fine)), ".context.city"),
                (await post(client, stream(table), ARROW), ", column context_city"),
            ):
                assert said[0] == 422 and f"requests[0]{where}[0]: " in said[1]

    asyncio.run(run())


def test_a_log_with_lists_is_refused_where_the_model_has_one_id(log: Path, snapshot: Snapshot) -> None:
    known = {**read_manifest(log).features, **read_manifest(log).context}
    snapshot.check_vocabularies(known, log)
    known["item_id"] = INFOS["item_id"].model_copy(update={"multi": True})
    with pytest.raises(DataError, match="has lists of 'item_id', and the model was trained with one each"):
        snapshot.check_vocabularies(known, log)


@pytest.mark.parametrize(
    ("time", "hint"),
    [
        (1_700_000_000_000, "milliseconds, so divide by 1,000"),
        (1_700_000_000_000_000, "microseconds"),
        (1_700_000_000_000_000_000, "nanoseconds"),
        (-1, "before 1970"),
        (-(2**63), "before 1970"),
        (2**33 + 1, "too far in the future"),
        (2**63 - 1, "nanoseconds"),
    ],
)
def test_times_are_seconds(snapshot: Snapshot, monkeypatch: Patch, fine: Body, time: int, hint: str) -> None:
    async def run() -> None:
        async with serving(service_of(snapshot, monkeypatch)) as client:
            times = [*fine["history"]["timestamp"][:-1], time]
            history = {**fine, "history": {**fine["history"], "timestamp": times}}
            for body, where, column in (
                ({**fine, "time": time}, "time: ", "request_timestamp: "),
                (history, "history.timestamp[", "history_timestamp["),
            ):
                said = [await post(client, of(body)), await post(client, stream(arrow(body)), ARROW)]
                places = (f"requests[0].{where}", f"requests[0], column {column}")
                for (status, text), place in zip(said, places, strict=True):
                    assert status == 422 and place in text and hint in text

    asyncio.run(run())


def test_a_long_history_is_cut_to_what_the_model_reads(
    snapshot: Snapshot, monkeypatch: Patch, fine: Body, needs: Needs
) -> None:
    """The newest behaviors score as all do; places are those of what was sent; the answer says how many."""
    assert needs.length == 12
    short = json.loads(json.dumps(fine))
    short["history"]["timestamp"] = short["history"]["timestamp"][-12:]
    for name, ids in short["history"]["features"].items():
        short["history"]["features"][name] = ids[-12:]
    ahead = len(fine["history"]["timestamp"]) - 12
    later = json.loads(json.dumps(fine))
    later["history"]["timestamp"].append(later["time"] + 5)
    for ids in later["history"]["features"].values():
        ids.append(ids[-1])

    async def run() -> None:
        async with serving(service_of(snapshot, monkeypatch, limits__history=12)) as client:
            found = [(await client.score(b, explain=True))["results"][0] for b in (fine, short, later)]
            assert [part["history_used"] for part in found] == [12, 12, 12]
            assert found[0] == found[2] and found[0]["scores"] == found[1]["scores"]
            for whole, cut in zip(found[0]["kept"]["main"], found[1]["kept"]["main"], strict=True):
                assert whole["behaviors"] == [place + ahead for place in cut["behaviors"]]
                assert whole["weights"] == cut["weights"] and whole["behaviors"]
            headers = {"content-type": ARROW, "accept": ARROW}
            answer = await client.http.post("/score", content=stream(arrow(fine)), headers=headers)
            assert pa.ipc.open_stream(answer.content).read_all()["history_used"].to_pylist() == [12]
            set_limits(client.service, Limits(history=11))
            assert await post(client, of(fine)) == (
                413,
                "requests[0].history: 12 behaviors, the server takes 11 (limits.history)",
            )

    asyncio.run(run())


BAD_JSON = [
    (b'{"requests": [{"time": 1, "time": 2, "candidates": {}}]}', 422, "the key 'time' occurs twice"),
    (b'{"requests": [{"candidates": {"item_id" : [1], "item_id" : [2]}}]}', 422, "'item_id' occurs twice"),
    (b'{"requests": [{"candidates": {"item_id": [' + b",".join([b'""'] * 9_000) + b"]}}]}", 422, "requests"),
    (b'{"requests": [' + b",".join([b"{}"] * 300) + b"]}", 413, "300 requests, the server takes 64"),
    (b'{"requests": [{"candidates": {"item_id": [' + b"1," * 25_000 + b"1]}}]}", 413, "limits.ids"),
    (b'{"requests": [{"candidates": {"tags": [' + b"[]," * 2_000 + b"[]]}}]}", 413, "limits.ids"),
    (b'{"requests": "' + b"x" * 100_000 + b'"}', 413, "JSON longer than 90,000 bytes (limits.json_body)"),
    (b'{"requests": [{"time": ' + b"9" * 50_000 + b"}]}", 422, "Invalid JSON: number out of range"),
    (b'{"requests": [{"time": 1e400}]}', 422, "requests[0].time"),
    (b'{"requests": [{"time": NaN}]}', 422, "requests[0].time"),
    (b'{"a":' * 900, 422, "Invalid JSON: recursion limit"),
]


def test_json_is_weighed_before_it_is_parsed(snapshot: Snapshot, monkeypatch: Patch, fine: Body) -> None:
    async def run() -> None:
        limits = {"limits__json_body": 90_000, "limits__ids": 20_000, "limits__bag": 9}
        async with serving(service_of(snapshot, monkeypatch, **limits)) as client:
            await client.score(fine)
            for content, status, message in BAD_JSON:
                found = await post(client, content)
                assert found[0] == status and message in found[1], (found, message)
            fine["candidates"]["tags"][1] = [1] * 10
            assert await post(client, of(fine)) == (
                413,
                "requests[0].candidates.tags[1]: 10 ids, the server takes 9 of one (limits.bag)",
            )
            found = await post(client, b"\x1f\x8b", **{"content-encoding": "gzip"})
            assert found == (415, "content encoding 'gzip' is not read; send the body as it is")
            keys = {f"feature {n}": [""] for n in range(10_001)}
            set_limits(client.service, Limits())
            found = await post(client, of({**fine, "candidates": keys}))
            assert found == (413, "an object of 10,001 keys, the server takes 10,000")
            keys = {f"k{n}": 1 for n in range(100_001)}
            found = await post(client, of({**fine, **keys}))
            assert found == (413, "more keys than the server takes, 100,000")
            # A quote and a colon within a text are no second key.
            assert "requests[0].time" in (await post(client, b'{"requests": [{"time": "\\":"}]}'))[1]
            assert client.service.in_flight.held == 0

    asyncio.run(run())


def refusal(content: bytes, needs: Needs, **limits: int) -> tuple[int, str]:
    with pytest.raises(RequestError) as caught:
        read_arrow(content, {}, needs, Limits(**limits))
    return caught.value.status, str(caught.value)


@pytest.mark.parametrize("name", ["request_time", "histroy_x", "request_tiemstamp", "something"])
def test_misspelled_columns_are_refused(fine: Body, needs: Needs, name: str) -> None:
    table = arrow(fine).append_column(name, pa.array([1]))
    status, problem = refusal(stream(table), needs)
    assert status == 422 and problem.startswith(f"column {name}: no such column is known; ")
    near = {"histroy_x": "", "something": ""}.get(name, "did you mean 'request_timestamp'?")
    assert near in problem


def test_columns_of_a_log_and_features_of_other_versions_pass(fine: Body, needs: Needs) -> None:
    names = ("request_id", "request_history_end", "request_num_candidates", "num_behaviors", "weight")
    table = arrow(fine)
    for name in (*names, "label_click", "weight_click", "candidate_other", "cluster_size"):
        table = table.append_column(name, pa.array([[1]]))
    table = table.replace_schema_metadata({"pandas": "{}"})
    assert len(read_arrow(stream(table), {}, needs, Limits())[0]) == 1


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("explain", "true", "explain is for bodies in JSON alone"),
        ("explor", "ucb", "did you mean explore?"),
        ("ids", "rwa", "ids: 'rwa'; dense and raw are known"),
    ],
)
def test_unknown_keys_of_the_metadata_are_refused(
    fine: Body, needs: Needs, key: str, value: str, problem: str
) -> None:
    table = arrow(fine).replace_schema_metadata({key: value})
    status, said = refusal(stream(table), needs)
    assert status == 422 and said.startswith("the schema's metadata") and said.endswith(problem)


def views(sizes: list[int]) -> pa.Array:
    """Lists that all begin with the first of 100 ids."""
    starts = pa.array([0] * len(sizes), pa.int32())
    return pa.ListViewArray.from_arrays(starts, pa.array(sizes, pa.int32()), pa.array(np.ones(100, np.int64)))


def test_arrow_lists_of_any_kind_are_the_same(fine: Body, needs: Needs) -> None:
    items = fine["candidates"]["item_id"]
    expected = read_arrow(stream(arrow(fine)), {}, needs, Limits())[0][0]
    indices = pa.array(range(len(items)), pa.int8())
    dictionary = pa.DictionaryArray.from_arrays(indices, pa.array(items, pa.int32()))
    offsets = pa.array([0, len(items)], pa.int32())
    for column in (
        pa.array([items], pa.large_list(pa.int32())),
        pa.array([items], pa.list_view(pa.int64())),
        pa.array([items], pa.list_(pa.int64(), len(items))),
        pa.ListArray.from_arrays(offsets, dictionary),
    ):
        found = read_arrow(stream(arrow(fine, candidate_item_id=column)), {}, needs, Limits())[0][0]
        assert np.array_equal(found.candidates["item_id"].values, expected.candidates["item_id"].values)
    short = {
        **fine,
        "history": {"timestamp": [], "features": {name: [] for name in fine["history"]["features"]}},
    }
    assert read_arrow(stream(arrow(short)), {}, needs, Limits())[0][0].history.time.size == 0
    tags = pa.ListArray.from_arrays(pa.array([0, len(items)], pa.int32()), views([2] * len(items)))
    found = read_arrow(stream(arrow(fine, candidate_tags=tags)), {}, needs, Limits())[0][0]
    assert found.candidates["tags"].values.tolist() == [1] * 2 * len(items)


def test_arrow_that_would_grow_is_refused(fine: Body, needs: Needs) -> None:
    """Shared lists, compression wherever it lies, pieces of dictionaries, and schemas of many columns."""
    count = len(fine["candidates"]["item_id"])
    shared = pa.ListArray.from_arrays(pa.array([0, count], pa.int32()), views([100] * count))
    found = refusal(stream(arrow(fine, candidate_tags=shared)), needs, ids=100 + 50 * count)
    assert found[0] == 413 and "limits.ids" in found[1]
    found = refusal(stream(arrow(fine, candidate_tags=shared)), needs, bag=99)
    assert found[0] == 413 and "100 ids, the server takes 99 of one (limits.bag)" in found[1]
    zeros = pa.DictionaryArray.from_arrays(pa.array([0]), pa.array(np.zeros(200_000, np.int64)))
    content = stream(pa.table({"anything": zeros}), compression="zstd")
    assert len(content) < 5_000 and "compressed Arrow" in refusal(content, needs)[1]
    long = pa.array(["y" * 100_000], pa.string_view())
    texts = pa.Array.from_buffers(
        pa.string_view(),
        1_000,
        [None, pa.py_buffer(long.buffers()[1].to_pybytes()[:16] * 1_000), *long.buffers()[2:]],
    )
    column = pa.ListArray.from_arrays(pa.array([0, 1_000], pa.int32()), texts)
    found = refusal(stream(arrow(fine, candidate_item_id=column)), needs)
    assert found == (413, "column candidate_item_id: more than 67,108,864 bytes of text")
    listed = pa.ListViewArray.from_arrays(pa.array([0]), pa.array([1]), pa.array(["a"]))
    assert "list views" in refusal(stream(arrow(fine, candidate_item_id=listed)), needs)[1]
    wide = pa.schema([(f"c{n}", pa.int64()) for n in range(10_001)])
    assert refusal(stream(wide.empty_table()), needs) == (413, "more than 10,000 columns")
    told = pa.schema([("user_id", pa.int64())], metadata={"x": "y" * (4 << 20)})
    assert "bytes of names and metadata" in refusal(stream(told.empty_table()), needs)[1]
    sink, kind = pa.BufferOutputStream(), pa.dictionary(pa.int32(), pa.string())
    options = pa.ipc.IpcWriteOptions(emit_dictionary_deltas=True)
    with pa.ipc.new_stream(sink, pa.schema([("c", kind)]), options=options) as writer:
        for values in (["a"], ["a", "b"]):
            part = pa.DictionaryArray.from_arrays(pa.array([0], pa.int32()), pa.array(values))
            writer.write_batch(pa.record_batch([part], ["c"]))
    assert "(deltas) are not read" in refusal(sink.getvalue().to_pybytes(), needs)[1]


def test_newer_versions_are_looked_for_whatever_is_raised(
    snapshot: Snapshot, monkeypatch: Patch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A full disk under the log or the snapshots is said once and shown; then updates go on."""
    monkeypatch.setattr(updates_module, "_LONGEST_WAIT", 0.02)

    async def until(client: Client, failing: bool) -> dict[str, Any]:
        while True:
            health: dict[str, Any] = (await client.http.get("/healthz")).json()
            if bool(health["updates"] and health["updates"]["failures"] > 3) is failing:
                return health
            await asyncio.sleep(0.01)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    async def run() -> None:
        async with serving(service_of(snapshot, monkeypatch, poll=0.01)) as client, asyncio.timeout(30):
            assert (await client.http.get("/readyz")).json() == {"status": "ready", "updates": "working"}
            plain = client.service.versions.newer
            monkeypatch.setattr(client.service.versions, "newer", full)
            health = await until(client, True)
            assert "No space left" in health["updates"]["problem"] and health["status"] == "ready"
            assert "failing: OSError" in (await client.http.get("/readyz")).json()["updates"]
            assert await client.metric("tandemrec_poll_failing") == 1
            assert await client.metric("tandemrec_poll_failures_total") > 3
            monkeypatch.setattr(client.service.versions, "newer", plain)
            assert (await until(client, False))["updates"] is None
            assert await client.metric("tandemrec_poll_failing") == 0
            assert capsys.readouterr().out.count("No space left") == 1
            # A line that cannot be written ends nothing either.
            monkeypatch.setattr("builtins.print", full)
            monkeypatch.setattr(client.service.versions, "newer", full)
            await until(client, True)
            client.service.tasks[0].cancel()
            await asyncio.wait(client.service.tasks[:1])
            for path in ("/readyz", "/livez", "/v2/health/live"):
                assert (await client.http.get(path)).status_code == 503

    asyncio.run(run())


def test_reload_wants_the_token(snapshot: Snapshot, monkeypatch: Patch) -> None:
    async def run() -> None:
        service = service_of(snapshot, monkeypatch)
        async with serving(service) as client:
            for headers in ({}, {"authorization": "Bearer x"}, {"authorization": "Bearer \u00e9".encode()}):
                answer = await client.http.post("/reload", headers=headers)
                assert answer.status_code == 403 and "Bearer TOKEN" in answer.json()["error"]
            service.reload_token = None
            answer = await client.http.post("/reload", headers={"authorization": "Bearer "})
            assert answer.status_code == 403 and "access.reload_token_file" in answer.json()["error"]

    asyncio.run(run())


def test_what_breaks_beside_scoring_is_answered_and_ends_nothing(
    snapshot: Snapshot, monkeypatch: Patch, fine: Body
) -> None:
    async def run() -> None:
        service = service_of(snapshot, monkeypatch)
        async with serving(service) as client:

            def breaks(*_: Any) -> None:
                raise OSError("full")

            monkeypatch.setattr(service.metrics, "called", breaks)
            assert (await client.http.post("/score", content=of(fine))).status_code == 500
            monkeypatch.undo()
            await client.score(fine)
            assert service.in_flight.held == 0

    asyncio.run(run())


def test_a_large_body_is_scored_in_several_calls(snapshot: Snapshot, monkeypatch: Patch, fine: Body) -> None:
    """Their memory grows with the candidates; the answer is the same."""

    async def run() -> None:
        count = len(fine["candidates"]["item_id"])
        found = []
        for candidates in (10_000, 2 * count):
            calls: list[int] = []
            async with serving(service_of(snapshot, monkeypatch)) as client:
                batching = BatchSettings(candidates=candidates)
                client.service.core.settings = CoreSettings(Limits(explained=6 * count), batching)
                plain = client.service.versions.scorer.score

                def noting(requests: Any, *more: Any, to: Any = (plain, calls)) -> Any:
                    to[1].append(len(requests))
                    return to[0](requests, *more)

                monkeypatch.setattr(client.service.versions.scorer, "score", noting)
                found.append((await client.score(*[fine] * 5))["results"])
                assert calls == ([5] if candidates == 10_000 else [2, 2, 1])
                status, text = await post(client, of(*[fine] * 7, explain=True))
                assert status == 413 and "candidates to explain" in text
        for one, other in zip(*found, strict=True):
            for task, scores in one["scores"].items():
                assert scores == pytest.approx(other["scores"][task], abs=1e-6)

    asyncio.run(run())


def test_bytes_in_flight_are_one_budget(snapshot: Snapshot, monkeypatch: Patch, fine: Body) -> None:
    """Bodies beyond it are turned away at once, and what a client left behind counts no longer."""

    async def run() -> None:
        service = service_of(
            snapshot,
            monkeypatch,
            limits__body=100_000,
            limits__in_flight=100_000,
            http__client_seconds=0.3,
        )
        async with serving(service) as client:
            go = asyncio.Event()

            async def slow() -> Any:
                yield b"x" * 70_000
                await go.wait()

            waiting = asyncio.create_task(client.http.post("/score", content=slow()))
            while not service.in_flight.held:
                await asyncio.sleep(0)
            answer = await client.http.post("/score", content=b"x" * 50_000)
            assert answer.status_code == 503 and "limits.in_flight" in answer.json()["error"]
            assert answer.headers["retry-after"] == "1"
            assert await client.metric("tandemrec_in_flight_bytes") == 70_000
            assert (await waiting).status_code == 408
            await client.score(fine)
            assert service.in_flight.held == 0

    asyncio.run(run())


def test_one_long_name_referred_to_by_every_column_is_refused(needs: Needs) -> None:
    """Many columns of a schema may be the same bytes, and each would become a column of its own."""
    names = [f"c{n}" for n in range(500)] + ["long" * 4_000]
    content = bytearray(stream(pa.schema([(name, pa.int64()) for name in names]).empty_table()))
    start = 8
    message = start + _u32(content, start)
    schema = _slot(content, message, 2)
    schema += _u32(content, schema)
    vector = _slot(content, schema, 1)
    vector += _u32(content, vector)
    assert _u32(content, vector) == 501
    places = range(vector + 4, vector + 4 + 4 * 501, 4)
    last = places[-1] + _u32(content, places[-1])
    for place in places:
        content[place : place + 4] = (last - place).to_bytes(4, "little")
    found = refusal(bytes(content), needs)
    assert found == (413, "more than 4,194,304 bytes of names and metadata")


def _u32(content: bytearray, at: int) -> int:
    return int.from_bytes(content[at : at + 4], "little")


def _slot(content: bytearray, table: int, number: int) -> int:
    """Where a field of a table lies."""
    vtable = table - int.from_bytes(content[table : table + 4], "little", signed=True)
    at = vtable + 4 + 2 * number
    return table + int.from_bytes(content[at : at + 2], "little")
