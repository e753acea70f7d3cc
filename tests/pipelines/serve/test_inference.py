"""The open inference protocol: the same request as tensors, over gRPC and over HTTP, scores the same."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tritonclient.grpc import service_pb2 as triton
from tritonclient.grpc.aio import InferenceServerClient, InferInput
from tritonclient.utils import InferenceServerException

from pipelines.serve.oip import inference_pb2
from pipelines.serve.oip.grpc_server import SERVICE, GrpcServer
from pipelines.serve.oip.tensors import Output, Shaped
from tests.helpers.launching import ROOT
from tests.helpers.served import ROWS
from tests.helpers.serving import ARROW, Client, bodies, service_of, serving
from trainer.log.schema import read_manifest
from trainer.serving.request import RequestError
from trainer.snapshot import Snapshot

Patch = pytest.MonkeyPatch
Body = dict[str, Any]
TYPES = {"INT64": np.int64, "FP32": np.float32}


@pytest.fixture(scope="module")
def asked(log: Path) -> list[Body]:
    found = [body for _, body in bodies(read_manifest(log), ROWS)]
    assert any(len(tags) != 1 for body in found for tags in body["candidates"]["tags"])
    return found


def tensors(body: Body) -> dict[str, tuple[str, list[Any]]]:
    """A request as tensors: data type and values by name."""
    found: dict[str, tuple[str, list[Any]]] = {
        "user_id": ("INT64", [body["user_id"]]),
        "request_timestamp": ("INT64", [body["time"]]),
        "history_timestamp": ("INT64", body["history"]["timestamp"]),
    }
    for prefix, part in (("history", body["history"]["features"]), ("candidate", body["candidates"])):
        for name, ids in part.items():
            if ids and isinstance(ids[0], list):
                found[f"{prefix}_{name}"] = ("INT64", [one for bag in ids for one in bag])
                found[f"{prefix}_{name}.lengths"] = ("INT64", [len(bag) for bag in ids])
            else:
                found[f"{prefix}_{name}"] = ("INT64", ids)
    for name, ids in body["context"].items():
        found[f"context_{name}"] = ("INT64", ids if isinstance(ids, list) else [ids])
    for name, numbers in body["numeric"].items():
        found[f"numeric_{name}"] = ("FP32", numbers)
    return found


def inputs(body: Body) -> list[InferInput]:
    """As tritonclient sends them, in raw bytes."""
    found = []
    for name, (kind, values) in tensors(body).items():
        one = InferInput(name, [len(values)], kind)
        one.set_data_from_numpy(np.array(values, TYPES[kind]))
        found.append(one)
    return found


def in_json(body: Body) -> Body:
    return {
        "id": "7",
        "inputs": [
            {"name": name, "datatype": kind, "shape": [1, len(values)], "data": [values]}
            for name, (kind, values) in tensors(body).items()
        ],
    }


@asynccontextmanager
async def calling(service: Any) -> AsyncIterator[tuple[Client, InferenceServerClient, int]]:
    """The app, a client over gRPC, and its port."""
    async with serving(service) as client:
        server = GrpcServer(service)
        await server.start()
        try:
            async with InferenceServerClient(f"127.0.0.1:{server.port}") as triton_client:
                yield client, triton_client, server.port
        finally:
            await server.stop(1)


def test_tensors_score_as_a_body_does(snapshot: Snapshot, monkeypatch: Patch, asked: list[Body]) -> None:
    """Raw bytes over gRPC and JSON over HTTP give the scores of POST /score, to the last bit."""

    async def run() -> None:
        async with calling(service_of(snapshot, monkeypatch, grpc__port=0)) as (client, remote, _):
            assert await remote.is_server_live() and await remote.is_server_ready()
            assert await remote.is_model_ready("tandemrec")
            for body in asked[:6]:
                expected = (await client.score(body))["results"][0]
                found = await remote.infer("tandemrec", inputs(body), request_id="n")
                answer = await client.http.post("/v2/models/tandemrec/infer", json=in_json(body))
                assert answer.status_code == 200, answer.text
                listed = {each["name"]: each for each in answer.json()["outputs"]}
                for task, scores in expected["scores"].items():
                    as_sent = np.array(scores, np.float32)
                    assert np.array_equal(found.as_numpy(f"score_{task}"), as_sent)
                    assert np.array_equal(np.array(listed[f"score_{task}"]["data"], np.float32), as_sent)
                assert found.as_numpy("history_used").tolist() == [expected["history_used"]]
                assert found.get_response().model_version == answer.json()["model_version"] == "v00000001"
                assert (found.get_response().id, answer.json()["id"]) == ("n", "7")
            assert await client.metric('tandemrec_grpc_calls_total{code="OK",method="ModelInfer"}') == 6
            assert client.service.in_flight.held == 0

    asyncio.run(run())


def test_a_whole_body_is_one_tensor(snapshot: Snapshot, monkeypatch: Patch, asked: list[Body]) -> None:
    async def run() -> None:
        async with calling(service_of(snapshot, monkeypatch, grpc__port=0)) as (client, remote, _):
            content = json.dumps({"requests": asked[:3], "explain": True}).encode()
            one = InferInput("body", [1], "BYTES")
            one.set_data_from_numpy(np.array([content], object))
            found = await remote.infer("tandemrec", [one], parameters={"content_type": "application/json"})
            same = await client.http.post("/score", content=content)
            assert json.loads(found.as_numpy("body")[0]) == same.json()
            found = await remote.infer("tandemrec", [one], parameters={"accept": ARROW})
            same = await client.http.post("/score", content=content, headers={"accept": ARROW})
            assert found.as_numpy("body")[0] == same.content

    asyncio.run(run())


def test_the_model_tells_its_tensors(snapshot: Snapshot, monkeypatch: Patch, asked: list[Body]) -> None:
    async def run() -> None:
        async with calling(service_of(snapshot, monkeypatch, grpc__port=0)) as (client, remote, port):
            metadata = await remote.get_model_metadata("tandemrec", as_json=True)
            listed = (await client.http.get("/v2/models/tandemrec/versions/v00000001")).json()
            known = {each["name"]: each["datatype"] for each in metadata["inputs"]}
            assert known == {each["name"]: each["datatype"] for each in listed["inputs"]}
            for name, (kind, _) in tensors(asked[0]).items():
                assert known[name] == kind
            assert {each["name"] for each in listed["outputs"]} == {
                *("score_click", "score_buy", "history_used", "unknown", "body")
            }
            assert (await remote.get_server_metadata()).name == "tandemrec"
            for path in ("/v2", "/v2/health/live", "/v2/health/ready", "/v2/models/tandemrec/ready"):
                assert (await client.http.get(path)).status_code == 200
            client.service.core.begin_drain()
            assert await remote.is_server_live() and not await remote.is_server_ready()
            assert not await remote.is_model_ready("tandemrec")
            assert (await client.http.get("/v2/health/ready")).status_code == 503
            assert await _health(port) == 2

    asyncio.run(run())


async def _health(port: int) -> int:
    """As an orchestrator's gRPC probe asks."""
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        check = channel.unary_unary(
            "/grpc.health.v1.Health/Check",
            request_serializer=inference_pb2.HealthCheckRequest.SerializeToString,
            response_deserializer=inference_pb2.HealthCheckResponse.FromString,
        )
        status: int = (await check(inference_pb2.HealthCheckRequest())).status
        return status


async def _code(port: int, message: bytes) -> str:
    """The code that a call with these bytes ends with."""
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        try:
            await channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")(message)
        except grpc.aio.AioRpcError as error:
            return error.code().name
    return "OK"


def drop(name: str) -> Callable[[Body], None]:
    def apply(body: Body) -> None:
        body["inputs"] = [each for each in body["inputs"] if each["name"] != name]

    return apply


def change(tensor: str, /, **parts: Any) -> Callable[[Body], None]:
    def apply(body: Body) -> None:
        next(each for each in body["inputs"] if each["name"] == tensor).update(parts)

    return apply


REFUSED: list[tuple[Callable[[Body], None], int, str]] = [
    (drop("candidate_item_id"), 422, "tensor candidate_item_id: missing"),
    (drop("candidate_tags"), 422, "tensor candidate_tags.lengths: there is no tensor candidate_tags"),
    (drop("candidate_tags.lengths"), 422, "entries, expected"),
    (change("candidate_item_id", shape=[2, 2]), 422, "a call is one request, expected [n] or [1, n]"),
    (change("candidate_item_id", shape=[-1]), 422, "a call is one request"),
    (change("candidate_item_id", shape=[99]), 422, "values, expected 99"),
    (change("candidate_item_id", datatype="FP64"), 422, "tensor candidate_item_id: holds double"),
    (change("candidate_item_id", datatype="INT4"), 422, "data type 'INT4' is not read"),
    (change("candidate_item_id", data=["a"], shape=[1]), 422, "tensor candidate_item_id"),
    (change("candidate_item_id", data=[None], shape=[1]), 422, "holds a null"),
    (change("candidate_item_id", data=[2**70], shape=[1]), 422, "tensor candidate_item_id"),
    (change("candidate_item_id", data=[-4], shape=[1]), 422, "id -4 lies outside"),
    (change("candidate_tags.lengths", data=[-1], shape=[1]), 422, "must be sizes that add up"),
    (change("user_id", data=[1, 2], shape=[2]), 422, "tensor user_id: 2 values, expected 1"),
    (change("candidate_item_id", name="user_id"), 422, "tensor user_id is there twice"),
    (lambda body: body.update(inputs=[]), 422, "inputs"),
    (lambda body: body.update(outputs=[{"name": "score"}]), 422, "no output 'score'; there are score_click"),
    (lambda body: body.update(outputs=[{"name": "score_click"}] * 2), 422, "score_click is there twice"),
    (lambda body: body.update(inputs=body["inputs"][:1] * 10_001), 413, "10,001 tensors; a call may have"),
    (lambda body: body.update(parameters={"ids": "row"}), 422, "the parameter ids is 'row'"),
    (lambda body: body.update(parameters={"explore": "x"}), 422, "explore"),
    (
        lambda body: body.update(parameters={"explain": True}),
        422,
        "the parameters: explain is for bodies in JSON",
    ),
    (change("history_timestamp", name="histroy_timestamp"), 422, "tensor histroy_timestamp: no such tensor"),
]


def test_what_is_no_request_is_refused(snapshot: Snapshot, monkeypatch: Patch, asked: list[Body]) -> None:
    async def run() -> None:
        async with calling(service_of(snapshot, monkeypatch, grpc__port=0)) as (client, remote, port):
            fine = next(body for body in asked if sum(map(len, body["candidates"]["tags"])) > 1)
            for apply, status, message in REFUSED:
                body = in_json(fine)
                apply(body)
                answer = await client.http.post("/v2/models/tandemrec/infer", json=body)
                assert answer.status_code == status and message in answer.json()["error"], answer.text
            for path in ("/v2/models/other/infer", "/v2/models/tandemrec/versions/v2/infer"):
                assert (await client.http.post(path, json=in_json(fine))).status_code == 404
            with pytest.raises(InferenceServerException, match="no model 'other'") as found:
                await remote.infer("other", inputs(fine))
            assert found.value.status() == "StatusCode.NOT_FOUND"
            one = InferInput("body", [1], "BYTES")
            one.set_data_from_numpy(np.array([b"{"], object))
            with pytest.raises(InferenceServerException, match="Invalid JSON") as found:
                await remote.infer("tandemrec", [one])
            assert found.value.status() == "StatusCode.INVALID_ARGUMENT"
            assert await _code(port, b"\xff\xff") == "INVALID_ARGUMENT"
            many = inference_pb2.ModelInferRequest(model_name="tandemrec")
            many.inputs.extend([many.InferInputTensor(name="a", datatype="INT64", shape=[0])] * 10_001)
            assert await _code(port, many.SerializeToString()) == "INVALID_ARGUMENT"
            assert (
                await client.http.post("/v2/models/tandemrec/infer", json=in_json(fine))
            ).status_code == 200

    asyncio.run(run())


def test_deadlines_limits_and_clients_that_leave_reach_the_core(
    snapshot: Snapshot, monkeypatch: Patch, asked: list[Body]
) -> None:
    async def run() -> None:
        own = {"grpc__port": 0, "grpc__body": 30_000, "grpc__connections": 2, "batching__window_ms": 400}
        service = service_of(snapshot, monkeypatch, **own)
        async with calling(service) as (client, remote, port):
            with pytest.raises(InferenceServerException) as found:
                await remote.infer("tandemrec", inputs(asked[0]), client_timeout=0.1)
            assert found.value.status() == "StatusCode.DEADLINE_EXCEEDED"
            answer = await client.http.post(
                "/score", json={"requests": asked[:1]}, headers={"x-request-deadline-ms": "50"}
            )
            assert answer.status_code in (503, 504)
            answer = await client.http.post(
                "/score", json={"requests": asked[:1]}, headers={"x-request-deadline-ms": "soon"}
            )
            assert answer.status_code == 422 and "x-request-deadline-ms" in answer.json()["error"]
            answer = await client.http.post(
                "/score", json={"requests": asked[:1]}, headers={"x-request-deadline-ms": "0.01"}
            )
            assert answer.status_code in (503, 504)
            leaving = asyncio.ensure_future(remote.infer("tandemrec", inputs(asked[0])))
            await asyncio.sleep(0.2)
            leaving.cancel()
            async with asyncio.timeout(20):
                while 'tandemrec_lost_total{why="abandoned"}' not in (await client.http.get("/metrics")).text:
                    await asyncio.sleep(0.02)
            one = InferInput("body", [1], "BYTES")
            one.set_data_from_numpy(np.array([b"x" * 40_000], object))
            with pytest.raises(InferenceServerException) as found:
                await remote.infer("tandemrec", [one])
            assert found.value.status() == "StatusCode.RESOURCE_EXHAUSTED"
            assert service.in_flight.held == 0
            one.set_data_from_numpy(np.array([b"x" * 4_000_000], object))
            with pytest.raises(InferenceServerException, match="Decompressed message larger"):
                await remote.infer("tandemrec", [one], compression_algorithm="gzip")
            others = [await asyncio.open_connection("127.0.0.1", port) for _ in range(3)]
            async with asyncio.timeout(20):
                # A server's first words, or the end: two connections may be open, and one is.
                said = [await reader.read(9) for reader, _ in others]
            assert said.count(b"") == 2
            for _, writer in others:
                writer.close()

    asyncio.run(run())


def test_a_message_that_never_comes_ends_its_call(snapshot: Snapshot, monkeypatch: Patch) -> None:
    async def run() -> None:
        service = service_of(snapshot, monkeypatch, grpc__port=0, http__client_seconds=0.2)
        async with calling(service) as (_, remote, port):
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                never = channel.stream_unary(f"/{SERVICE}/ModelInfer")()
                with pytest.raises(grpc.aio.AioRpcError, match=r"the message did not arrive within 0\.2 s"):
                    await never
                none = channel.stream_unary(f"/{SERVICE}/ModelInfer")()
                await none.done_writing()
                with pytest.raises(grpc.aio.AioRpcError, match="the call has no message"):
                    await none
            assert await remote.is_server_live()

    asyncio.run(run())


def test_a_call_under_way_is_answered_when_the_server_ends(
    snapshot: Snapshot, monkeypatch: Patch, asked: list[Body]
) -> None:
    async def run() -> None:
        service = service_of(snapshot, monkeypatch, grpc__port=0, batching__window_ms=300)
        async with serving(service):
            server = GrpcServer(service)
            await server.start()
            async with InferenceServerClient(f"127.0.0.1:{server.port}") as remote:
                call = asyncio.ensure_future(remote.infer("tandemrec", inputs(asked[0])))
                async with asyncio.timeout(20):
                    while not service.core.queue.parts:
                        await asyncio.sleep(0.005)
                await server.stop(20)
                assert (await call).as_numpy("score_click").size == len(asked[0]["candidates"]["item_id"])
                with pytest.raises(InferenceServerException):
                    await remote.is_server_live(client_timeout=1)

    asyncio.run(run())


def test_the_generated_messages_are_fresh_and_those_of_the_protocol(tmp_path: Path) -> None:
    """They are what protoc makes of the .proto, and every field has the number and type of Triton's."""
    proto = "pipelines/serve/oip/inference.proto"
    words = [sys.executable, "-m", "grpc_tools.protoc", "-I.", f"--python_out={tmp_path}", proto]
    subprocess.run(words, cwd=ROOT, check=True, timeout=60)
    made, kept = (folder / "pipelines/serve/oip/inference_pb2.py" for folder in (tmp_path, ROOT))
    assert made.read_text() == kept.read_text()

    def fields(message: Any) -> dict[str, Any]:
        own = {field.name: (field.number, field.type, field.is_repeated) for field in message.fields}
        return own | {part.name: fields(part) for part in message.nested_types}

    theirs, compared = triton.DESCRIPTOR.message_types_by_name, 0
    for name, message in inference_pb2.DESCRIPTOR.message_types_by_name.items():
        if name.startswith("HealthCheck"):
            continue
        assert fields(message).items() <= fields(theirs[name]).items(), name
        compared += 1
    assert compared == 14


NUMBERS = {"INT8": np.int8, "UINT64": np.uint64, "INT64": np.int64, "FP16": np.float16, "FP64": np.float64}


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(NUMBERS)), st.binary(max_size=64), st.integers(0, 9))
def test_raw_numbers_are_those_of_numpy(kind: str, raw: bytes, count: int) -> None:
    """Little-endian bytes; another number of them than the shape says is refused."""
    dtype = np.dtype(NUMBERS[kind])
    shaped = Shaped("x", kind, [count])
    if len(raw) == count * dtype.itemsize:
        assert shaped.of_bytes(raw).to_numpy(zero_copy_only=False).tobytes() == raw
        assert Output("x", np.frombuffer(raw, dtype)).raw() == raw
    else:
        with pytest.raises(RequestError, match="bytes, expected"):
            shaped.of_bytes(raw)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.binary(max_size=6), max_size=5), st.integers(0, 5), st.binary(max_size=5))
def test_raw_texts_come_back_or_are_refused(texts: list[bytes], count: int, more: bytes) -> None:
    raw = b"".join(len(text).to_bytes(4, "little") + text for text in texts)
    assert Shaped("x", "BYTES", [1, len(texts)]).of_bytes(raw).to_pylist() == texts
    if more or count != len(texts):
        try:
            found = Shaped("x", "BYTES", [count]).of_bytes(raw + more)
        except RequestError as error:
            assert error.status == 422
        else:
            rest = b"".join(len(text).to_bytes(4, "little") + text for text in found.to_pylist())
            assert len(found) == count and rest == raw + more
