"""The client of load tests: an open loop does not wait for answers, a closed one asks again after each."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.harness.http_client import HttpConnection, request_of
from benchmarks.serve import client
from benchmarks.serve.client import Load, LoadSpec
from benchmarks.serve.measure import _row

RATE, SECONDS = 200.0, 0.1
SENT = int(RATE * SECONDS)


class Asker:
    """Answers as a function says, and keeps what it was asked."""

    asked: list[bytes]

    def __init__(self, answer: Callable[[int], Any]) -> None:
        self._answer = answer
        self.closed = False

    async def ask(self, request: bytes) -> str:
        Asker.asked.append(request)
        status: str = await self._answer(len(Asker.asked))
        return status

    def close(self) -> None:
        self.closed = True


def load_of(folder: Path, monkeypatch: pytest.MonkeyPatch, answer: Callable[[int], Any], **more: Any) -> Load:
    for name in ("a", "b"):
        (folder / name).mkdir()
        for number in range(2):
            (folder / name / str(number)).write_bytes(f"{name}{number}".encode())
    Asker.asked = []
    monkeypatch.setitem(client.ASKERS, "http", lambda port: Asker(answer))
    facts = {"kind": "http", "port": 1, "bodies": [folder / "a", folder / "b"], "share": [1.0, 0.0]}
    facts |= {"connections": 1, "seconds": SECONDS, "warm": 0.0}
    return Load(LoadSpec.model_validate(facts | more))


def test_an_open_loop_counts_from_the_intended_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server stalls until the last request is due: those before it have waited longer, the first most."""

    async def stalls(number: int) -> str:
        while len(load.late) < SENT:
            await asyncio.sleep(0.001)
        return "200"

    load = load_of(tmp_path, monkeypatch, stalls, rate=RATE)
    found = asyncio.run(load.run())
    assert found["outcomes"] == {"200": SENT} and len(found["late"]) == SENT
    # A waiting request may be passed by one that comes just then.
    for number, latency in enumerate(sorted(found["latencies"], reverse=True)):
        assert latency >= (SENT - 1 - number) / RATE


def test_a_closed_loop_has_one_request_a_connection_under_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    under_way, most = 0, 0

    async def notes(number: int) -> str:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        await asyncio.sleep(0.001)
        under_way -= 1
        if number == 5:
            raise ConnectionResetError
        return "503" if number == 6 else "200"

    load = load_of(tmp_path, monkeypatch, notes, connections=3, first=1)
    found = asyncio.run(load.run())
    assert most == 3
    assert found["outcomes"].pop("ConnectionResetError") == found["outcomes"].pop("503") == 1
    assert found["outcomes"] == {"200": len(found["latencies"])}
    # Files of the first folder in turn, from the second on; the other one has no share.
    assert Asker.asked[:4] == [b"a0", b"a1", b"a0", b"a1"]
    assert len(load._askers) == 4 and all(asker.closed for asker in load._askers)  # type: ignore[attr-defined]


def test_a_row_says_what_failed_and_what_both_sides_took() -> None:
    found = {
        "latencies": [0.001, 0.003, 0.002], "outcomes": {"200": 3, "503": 1}, "seconds": 2.0, "answered": 5,
        "client_cores": 0.25, "late": [],
    }  # fmt: skip
    row = _row(found, 0.1)
    assert (row["rate"], row["p50_ms"], row["errors"], row["asked"]) == (1.5, 2.0, 1, 4)
    assert row["error_kinds"] == {"503": 1}
    # Two more were answered before the measurement, or after it.
    assert row["cpu_ms"] == pytest.approx(20)


def test_a_connection_stays_until_the_server_ends_it() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        opened.append(writer)
        for more in (b"", b"Connection: close\r\n"):
            await reader.readexactly(len(sent))
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n" + more + b"\r\nhel")
            writer.write(b"lo")
            await writer.drain()
        writer.close()

    async def ask() -> None:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        async with server:
            connection = HttpConnection("127.0.0.1", server.sockets[0].getsockname()[1])
            answers = [await connection.ask(sent) for _ in range(4)]
            connection.close()
        assert [answer.closes for answer in answers] == [False, True] * 2
        assert {(answer.status, answer.content) for answer in answers} == {(200, b"hello")}

    opened: list[Any] = []
    sent = request_of("/score", "text/plain", b"x", "x-more: 1")
    assert sent.endswith(b"content-length: 1\r\nx-more: 1\r\n\r\nx")
    asyncio.run(ask())
    assert len(opened) == 2
