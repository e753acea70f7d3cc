"""What operators meet: probes, tokens, logs, traces, odd requests, and numbers for Prometheus."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from embeddings.errors import ConfigError
from pipelines.serve.logs import Log
from pipelines.serve.service import Service
from pipelines.serve.settings import LogSettings, ServeSettings, TraceSettings, load_serve_settings
from pipelines.serve.tokens import Token
from pipelines.serve.traces import Tracer
from pipelines.serve.users import users_body
from tests.helpers.served import ROWS
from tests.helpers.serving import bodies, service_of, serving
from trainer.log.schema import read_manifest
from trainer.serving.histories import HistoryStore
from trainer.snapshot import Snapshot

Patch = pytest.MonkeyPatch
Body = dict[str, Any]
SECRET = "0123456789abcdef"


@pytest.fixture(scope="module")
def body(log: Path) -> Body:
    return bodies(read_manifest(log), ROWS)[0][1]


def token_file(folder: Path, text: str = SECRET) -> Path:
    file = folder / "token"
    file.write_text(text + "\n")
    return file


def test_probes_and_odd_requests(snapshot: Snapshot, monkeypatch: Patch) -> None:
    """Liveness and readiness are apart; HEAD is GET without a body; nothing is redirected."""

    async def run() -> None:
        async with serving(service_of(snapshot, monkeypatch)) as client:
            for path in ("/livez", "/readyz", "/healthz", "/metrics", "/v2/health/ready", "/"):
                got, head = await client.http.get(path), await client.http.head(path)
                assert got.status_code == head.status_code == 200 and got.content and not head.content, path
                assert head.headers["content-type"] == got.headers["content-type"]
            assert (await client.http.head("/score")).status_code == 405
            for path in ("/score/", "/healthz/", "//evil.example/score/"):
                answer = await client.http.get(path, headers={"host": "evil.example"})
                assert answer.status_code == 404 and "location" not in answer.headers, path
            client.service.core.begin_drain()
            assert (await client.http.get("/livez")).status_code == 200
            answer = await client.http.get("/readyz")
            assert answer.status_code == 503 and "about to end" in answer.json()["error"]
            health = (await client.http.get("/healthz")).json()
            assert health["status"] == "not ready" and "about to end" in health["problem"]
            assert await client.metric("tandemrec_ready") == 0

    asyncio.run(run())


def test_users_and_metrics_may_want_tokens(
    snapshot: Snapshot, monkeypatch: Patch, log: Path, tmp_path: Path
) -> None:
    file = token_file(tmp_path)
    own = {"access__users_token_file": f'"{file}"', "access__metrics_token_file": f'"{file}"'}

    async def run() -> None:
        async with serving(service_of(snapshot, monkeypatch, log, **own)) as client:
            for path in ("/users", "/users?name=1", "/users/1", "/metrics"):
                for headers in ({}, {"authorization": SECRET}, {"authorization": "Bearer \u00e9".encode()}):
                    answer = await client.http.get(path, headers=headers)
                    assert answer.status_code == 403 and "Bearer TOKEN" in answer.json()["error"]
                answer = await client.http.get(path, headers={"authorization": f"Bearer {SECRET}"})
                assert answer.status_code == 200, path
            for path in ("/", "/healthz", "/livez"):
                assert (await client.http.get(path)).status_code == 200

    asyncio.run(run())


def test_a_token_follows_its_file(tmp_path: Path) -> None:
    """A new one counts at once; a file that is no token, or is gone, leaves the old one and is told once."""
    file, said = token_file(tmp_path), list[str]()
    token = Token(file, said.append)
    assert token.is_in(f"Bearer {SECRET}") and not token.is_in(f"Bearer {SECRET}x") and not token.is_in("")
    token_file(tmp_path, "another token of 16")
    assert token.is_in("Bearer another token of 16") and not token.is_in(f"Bearer {SECRET}")
    file.write_text("short")
    for _ in range(2):
        assert token.is_in("Bearer another token of 16")
    file.unlink()
    assert token.is_in("Bearer another token of 16")
    assert len(said) == 2 and "16 or more" in said[0] and "cannot be read" in said[1]
    with pytest.raises(ConfigError, match="the token cannot be read"):
        Token(file, said.append)


def test_logs_are_lines_of_json_where_asked(capsys: pytest.CaptureFixture[str]) -> None:
    own = Log(LogSettings(format="json", requests=1.0))
    own.say("version served", "now serving\n v2", version="v2")
    own.scored(version="v2", body_bytes=7)
    own.failure("internal error", "it broke", ValueError("inside"))
    out, err = capsys.readouterr()
    lines = [json.loads(line) for line in out.splitlines()]
    assert [line["event"] for line in lines] == ["version served", "scored"]
    assert lines[0]["message"] == "now serving v2" and lines[1]["body_bytes"] == 7 and "time" in lines[0]
    (error,) = map(json.loads, err.splitlines())
    assert error["level"] == "error" and "ValueError: inside" in error["traceback"]
    Log().failure("internal error", "it broke", ValueError("inside"))
    out, err = capsys.readouterr()
    assert not out and err.startswith("it broke\n") and err.rstrip().endswith("ValueError: inside")


def test_request_lines_name_no_user(
    snapshot: Snapshot, monkeypatch: Patch, body: Body, capsys: pytest.CaptureFixture[str]
) -> None:
    """None by default; with a share of 1 one each, of sizes and the version."""

    async def run() -> None:
        for share in (0, 1):
            own = service_of(snapshot, monkeypatch, logs__requests=share, logs__format="json")
            async with serving(own) as client:
                await client.score({**body, "user_id": 77123991})
                said = capsys.readouterr().out
                assert said.count("\n") == share and "77123991" not in said
                if share:
                    assert json.loads(said)["version"] == "v00000001"

    asyncio.run(run())


def test_spans_of_a_body_are_in_its_clients_trace(snapshot: Snapshot, monkeypatch: Patch, body: Body) -> None:
    """decode, queue, search and ranking below the body's own; a body that is refused is marked so."""
    exporter = InMemorySpanExporter()
    tracer = Tracer(TraceSettings(endpoint="http://nowhere:4317"), exporter)
    trace, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"

    async def run() -> None:
        service = service_of(snapshot, monkeypatch)
        service.metrics.tracer = tracer
        async with serving(service) as client:
            headers = {"traceparent": f"00-{trace}-{parent}-01"}
            answer = await client.http.post("/score", json={"requests": [body]}, headers=headers)
            assert answer.status_code == 200
            assert (await client.http.post("/score", content=b"{")).status_code == 422
            unsampled = {"traceparent": f"00-{trace}-{parent}-00"}
            await client.http.post("/score", json={"requests": [body]}, headers=unsampled)

    asyncio.run(run())
    tracer.close()
    spans = {(span.name, span.attributes.get("error.type")): span for span in exporter.get_finished_spans()}
    root = spans.pop(("POST /score", None))
    assert f"{root.context.trace_id:032x}" == trace and f"{root.parent.span_id:016x}" == parent
    wrong = spans.pop(("POST /score", "RequestError"))
    assert wrong.attributes["http.response.status_code"] == 422 and not wrong.status.is_ok
    assert {name for name, _ in spans} == {"decode", "queue", "search", "ranking"}
    for span in spans.values():
        assert span.parent.span_id == root.context.span_id and span.start_time <= span.end_time


def test_traces_without_their_packages_are_one_clear_error(monkeypatch: Patch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(ConfigError, match=r"traces\.endpoint: wants the packages opentelemetry-sdk"):
        Tracer(TraceSettings(endpoint="http://nowhere:4317"))


def test_numbers_for_prometheus(snapshot: Snapshot, monkeypatch: Patch, body: Body) -> None:
    async def run() -> None:
        async with serving(service_of(snapshot, monkeypatch, user_states__least=1)) as client:
            for _ in range(2):
                await client.score(body)
            text = (await client.http.get("/metrics")).text
            for name in (
                *("queue_bodies", "queue_parts", "queue_cost", "connections", "ready", "mapped_bytes"),
                *("latest_failing", "snapshot_served_seconds", "open_files", "in_flight_bytes"),
                *('looks_total{outcome="broken"}', 'resident_bytes{kind="private"}', "disconnects_total"),
                *('heap_bytes{kind="used"}', 'heap_bytes{kind="free"}'),
            ):
                assert f"\ntandemrec_{name} " in text, name
            assert await client.metric('tandemrec_resident_bytes{kind="private"}') > 1e7
            for outcome in ("miss", "hit"):
                assert await client.metric(f'tandemrec_user_states_total{{outcome="{outcome}"}}') == 1
            health = (await client.http.get("/healthz")).json()
            states = health["user_states"]
            assert states["outcomes"]["hit"] == states["entries"] == 1
            assert await client.metric("tandemrec_user_state_bytes") == states["bytes"] > 0
            assert health["limits"]["json_body"] == 8 << 20 and health["limits"]["cost"] > 0
            assert await client.metric("tandemrec_queue_bodies") == 0
            assert await client.metric("tandemrec_ready") == 1

    asyncio.run(run())


class _Counted(dict[int, Any]):
    """Users by number who count how many of them were looked at."""

    users = None
    looked = 0

    def __len__(self) -> int:
        return 10**12

    def first(self, count: int) -> list[int]:
        return HistoryStore.first(self, count)  # type: ignore[arg-type]

    def __iter__(self) -> Any:
        for user in range(10**12):
            self.looked += 1
            yield user

    def name(self, user: int) -> str:
        return str(user)

    def behaviors(self, user: int) -> int:
        return 1


def test_the_list_of_users_is_bounded_work() -> None:
    store = _Counted()
    found = users_body(store)  # type: ignore[arg-type]
    assert found.total == 10**12 and len(found.users) == 500 and store.looked <= 501


def test_settings_are_keys(tmp_path: Path) -> None:
    """A file, overrides and the options of the command line; what is wrong names file and key."""
    file = tmp_path / "serve.toml"
    file.write_text("[http]\nport = 9\n[limits]\nbody = 1000\nin_flight = 5000\n[batching]\nwindow_ms = 2\n")
    found = load_serve_settings(file, ["limits.body=2000"], host="::1", port=10)
    assert (found.http.host, found.http.port, found.limits.limits().body) == ("::1", 10, 2000)
    assert found.batching.settings().window == 0.002 and found.load().in_flight == 5000
    defaults = ServeSettings()
    assert defaults.grpc.port is None and defaults.batching.settings().deadline == 30
    file.write_text('[data]\nlog = "x"\n')
    with pytest.raises(ConfigError, match=r"serve.toml: this is a config of `train`; `serve` wants one with"):
        load_serve_settings(file)
    for override, problem in (
        ("limits.bodies=1", "unknown key 'limits.bodies'; did you mean 'limits.body'"),
        ("limits.in_flight=1", "in_flight = 1 is less than one body"),
        ("http.port=70000", "http.port"),
        ("logs.format=xml", "logs.format"),
    ):
        with pytest.raises(ConfigError, match=problem):
            load_serve_settings(None, [override])


def test_work_for_a_client_that_left_ends_at_once(snapshot: Snapshot, monkeypatch: Patch, body: Body) -> None:
    """In process a client leaves by cancelling: nothing is held or queued for it any longer."""

    async def run(service: Service) -> None:
        async with serving(service) as client:
            leaving = asyncio.create_task(client.http.post("/score", json={"requests": [body]}))
            async with asyncio.timeout(20):
                while not service.core.queue.parts:
                    await asyncio.sleep(0.005)
                leaving.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await leaving
            assert service.core.queue.bodies == 0 and service.in_flight.held == 0
            answer: httpx.Response = await client.http.get("/metrics")
            assert 'tandemrec_lost_total{why="abandoned"} 1.0' in answer.text

    asyncio.run(run(service_of(snapshot, monkeypatch, batching__window_ms=60_000)))
