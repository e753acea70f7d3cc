"""Hostile clients of a real server, at small size: its memory stays, it answers, and goes on after."""

from __future__ import annotations

import json
import select
import socket
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from tests.helpers.logs import Shape, random_rows, write_log
from tests.helpers.models import preset
from tests.helpers.serving import ARROW, bodies, published, stream
from tests.pipelines.serve.test_process import call, server, until
from trainer.log.schema import read_manifest

ROWS = random_rows(4, Shape(users=8))
# A body may have 1 MB, all clients 4 MB, and each a second.
LIMITS = {
    "limits.body": 1_000_000,
    "limits.json_body": 500_000,
    "limits.in_flight": 4_000_000,
    "http.connections": 30,
    "http.client_seconds": 1,
}
# What attacks may add to the memory of a server at work, far below what each added once. What scoring a
# large body takes is no attack's doing: the C library keeps some of it or not, as it comes.
ROOM = 48 << 20


class Served:
    """The running server; `good` and `large` are bodies as ordinary clients send them.

    `usual` is the most memory, in bytes, that it takes to answer the large one.
    """

    usual: int

    def __init__(self, pid: int, url: str, body: dict[str, Any]) -> None:
        self.pid, self.url, self.port = pid, url, int(url.rpartition(":")[2])
        self.good = json.dumps({"requests": [body]}).encode()
        large = {**body, "candidates": {name: [1] * 3_000 for name in body["candidates"]}}
        self.large = json.dumps({"requests": [large] * 20}).encode()

    def memory(self) -> int:
        """Largest resident bytes since the last call."""
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        (peak,) = (line.split()[1] for line in lines if line.startswith("VmHWM"))
        Path(f"/proc/{self.pid}/clear_refs").write_text("5")
        return 1024 * int(peak)

    def post(self, content: bytes, kind: str = "application/json", **more: str) -> tuple[int, str]:
        request = urllib.request.Request(f"{self.url}/score", content, {"content-type": kind, **more})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                found = json.load(error)
                assert set(found) == {"error"} and "\n" not in found["error"]
                return error.code, found["error"]

    def open(self, content: bytes = b"") -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=30)
        connection.sendall(content)
        return connection

    def metric(self, name: str) -> float:
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=60) as answer:
            lines = answer.read().decode().splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("attacks")
    log = write_log(folder / "log", {"train": ROWS})
    snapshot = published(preset("dare", log), folder / "snapshot").parent
    body = next(b for _, b in bodies(read_manifest(log), ROWS) if len(b["history"]["timestamp"]) > 20)
    words = [word for name, value in LIMITS.items() for word in ("--set", f"{name}={value}")]
    with server(snapshot, *words) as (process, url):
        assert process.pid is not None
        running = Served(process.pid, url, body)
        running.memory()
        for _ in range(2):
            assert running.post(running.large)[0] == 200
        running.usual = running.memory()
        yield running
        assert process.exitcode is None


@pytest.fixture(autouse=True)
def unharmed(served: Served) -> Iterator[None]:
    """Every test here leaves the server as it was."""
    assert served.post(served.good)[0] == 200
    served.memory()
    yield
    assert served.memory() - served.usual < ROOM
    until(lambda: served.metric("tandemrec_in_flight_bytes") == 0, 20)
    assert served.post(served.good)[0] == 200 and call(f"{served.url}/readyz")[0] == 200


def one_bag_of_all_rows() -> bytes:
    """5,000 candidates that share one bag of 50,000 ids: 2 GB once each has its own."""
    sizes = pa.array(np.full(5_000, 50_000), pa.int32())
    shared = pa.ListViewArray.from_arrays(
        pa.array(np.zeros(5_000), pa.int32()), sizes, pa.array([1] * 50_000)
    )
    column = pa.ListArray.from_arrays(pa.array([0, 5_000], pa.int32()), shared)
    return stream(pa.table({"history_timestamp": pa.array([[1]]), "candidate_item_id": column}))


def compressed_dictionary() -> bytes:
    """160 MB of zeros in some kilobytes."""
    zeros = pa.DictionaryArray.from_arrays(pa.array([0]), pa.array(np.zeros(20_000_000, np.int64)))
    return stream(pa.table({"candidate_item_id": zeros}), compression="zstd")


def listed(item: bytes, count: int) -> bytes:
    return b'{"requests": [{"candidates": {"item_id": [' + b",".join([item] * count) + b"]}}]}"


@pytest.mark.parametrize(
    ("content", "kind", "status"),
    [
        (one_bag_of_all_rows, ARROW, 413),
        (compressed_dictionary, ARROW, 422),
        (lambda: listed(b'""', 160_000), "application/json", 422),
        (lambda: listed(b"[]", 160_000), "application/json", 422),
        (lambda: listed(b"{}", 160_000), "application/json", 422),
        (lambda: listed(b'""', 300_000), "application/json", 413),
    ],
)
def test_small_bodies_that_would_become_large(
    served: Served, content: Callable[[], bytes], kind: str, status: int
) -> None:
    found, problem = served.post(content(), kind)
    assert found == status, problem


def test_uploads_that_never_end_hold_no_more_than_the_budget(served: Served) -> None:
    """Meanwhile others are scored, and in the end each is told 408 or 503."""
    head = (
        b"POST /score HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: 999999\r\n\r\n"
    )
    with ExitStack() as open_:
        uploads = [open_.enter_context(served.open(head + b"x" * 600_000)) for _ in range(20)]
        assert served.metric("tandemrec_in_flight_bytes") <= LIMITS["limits.in_flight"]
        assert call(f"{served.url}/healthz")[0] == 200
        said = [upload.recv(400) for upload in uploads]
        assert {answer.split()[1] for answer in said} == {b"408", b"503"}
    assert served.metric('tandemrec_errors_total{status="503"}') > 0


def test_connections_are_counted_and_have_their_time(served: Served) -> None:
    """Half a head is answered after a second, and one connection more than there may be at once."""
    half = [b"", b"GET /healthz HTTP/1.1\r\nx: "]
    with ExitStack() as open_:
        idle = [open_.enter_context(served.open(half[n % 2])) for n in range(LIMITS["http.connections"])]
        more = open_.enter_context(served.open())
        assert b" 503 " in more.recv(400)
        assert b" 408 " in idle[0].recv(400) and b" 408 " in idle[1].recv(400)
    until(lambda: _answers(served), 20)
    again = served.open(b"GET /readyz HTTP/1.1\r\nhost: a\r\n\r\n")
    with again:
        said = b""
        while b'"ready"' not in said:
            said += again.recv(400)
        again.sendall(b"G")
        assert b" 408 " in again.recv(400)
    # A body that was answered before its end, and never ends.
    early = served.open(b"POST /nowhere HTTP/1.1\r\nhost: a\r\ncontent-length: 900\r\n\r\n")
    with early:
        assert b" 404 " in early.recv(400)
        early.sendall(b"{")
        until(lambda: b" 408 " in early.recv(400), 20)


def _answers(served: Served) -> bool:
    try:
        return call(f"{served.url}/readyz")[0] == 200
    except (OSError, ValueError):
        return False


@pytest.mark.parametrize(
    "content",
    [
        b"\x16\x03\x01 no HTTP\r\n\r\n",
        b"POST /score HTTP/1.1\r\nhost: a\r\ncontent-length: -1\r\n\r\n{}",
        b"POST /score HTTP/1.1\r\nhost: a\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n{}",
        b"POST /score HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n" + b"1\r\nx\r\n" * 20_000,
    ],
)
def test_what_is_no_http_is_one_line_of_json(served: Served, content: bytes) -> None:
    """Crumbs of a body too, each of which costs as much time as a chunk of some kilobytes."""
    with served.open() as connection:
        connection.settimeout(30)
        try:
            connection.sendall(content)
        except OSError:
            assert len(content) > 50_000
        try:
            answer = connection.recv(400)
        except ConnectionResetError:
            # What was sent behind the mistake ended the connection before its answer was read.
            answer = b""
            assert len(content) > 50_000
        if answer or len(content) <= 50_000:
            assert answer.startswith(b"HTTP/1.1 400 ") and b'{"error": "' in answer


@pytest.mark.parametrize(("size", "status"), [(65_536, 200), (65_537, 400), (100_000, 400), (300_000, 400)])
def test_a_head_has_64_kib_and_who_sends_more_reads_why(served: Served, size: int, status: int) -> None:
    head = b"GET /readyz HTTP/1.1\r\nhost: a\r\nx: "
    with served.open() as connection:
        connection.settimeout(30)
        connection.sendall(head + b"y" * (size - len(head) - 4) + b"\r\n\r\n")
        answer = connection.recv(400)
        assert answer.startswith(b"HTTP/1.1 %d " % status)
        assert (b"longer than 65,536 bytes" in answer) == (status == 400)


def test_requests_behind_each_other_and_upgrades_are_answered(served: Served) -> None:
    head = b"POST /score HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    one = head % len(served.good) + served.good
    last = b"GET /readyz HTTP/1.1\r\nhost: a\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n"
    with served.open(one * 5 + last) as connection:
        said = b""
        while said.count(b"HTTP/1.1 200") < 6:
            assert select.select([connection], [], [], 30)[0]
            said += connection.recv(1 << 16)


def test_clients_that_leave_or_do_not_read_are_forgotten(served: Served) -> None:
    """In the middle of their body, and before their answer, which lies in memory until then.

    Eight answers are more than may be held at once, so some clients are told 503.
    """

    def answers() -> float:
        scored = served.metric("tandemrec_latency_seconds_count")
        return scored + served.metric('tandemrec_errors_total{status="503"}')

    before, content, left = answers(), served.large, served.metric("tandemrec_disconnects_total")
    head = b"POST /score HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    served.open(head % len(content) + content).close()
    until(lambda: served.metric("tandemrec_disconnects_total") == left + 1, 20)
    with ExitStack() as open_:
        for _ in range(8):
            served.open(head % 5_000 + b"{").close()
            client = open_.enter_context(socket.socket())
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
            client.connect(("127.0.0.1", served.port))
            client.sendall(head % len(content) + content)
        until(lambda: answers() >= before + 8, 60)
        until(lambda: served.metric("tandemrec_in_flight_bytes") == 0, 20)
