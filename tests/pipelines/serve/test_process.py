"""The real thing: `tandemrec serve` in a process of its own, its page in a browser, its end by SIGTERM."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest

from launch.cli import main
from tests.helpers.browser import CHROMIUM, browser
from tests.helpers.launching import ROOT, started, tandemrec, train
from tests.helpers.logs import Shape, random_rows, write_log

ROWS = random_rows(4, Shape(users=12))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A log and a published snapshot."""
    folder = tmp_path_factory.mktemp("serve")
    write_log(folder / "log", {"train": ROWS, "validation": ROWS[:6], "test": ROWS})
    train(folder / "log", folder / "run", train__max_steps=4)
    export(folder, folder / "snapshot")
    return folder


def export(made: Path, out: Path) -> None:
    done = tandemrec("export", "--run", str(made / "run"), "--out", str(out))
    assert done.returncode == 0, done.stdout + done.stderr


@contextmanager
def server(snapshot: Path, *words: str) -> Iterator[tuple[ForkServerProcess, str]]:
    """The process and its address, once it listens."""
    with started("serve", "--snapshot", str(snapshot), "--port", "0", *words) as (process, out, err):
        until(lambda: process.exitcode is not None or "\n" in out.read_text())
        line = out.read_text().splitlines()[:1]
        assert line and line[0].startswith("serving "), err.read_text()
        yield process, line[0].rsplit(" ", 1)[1]


@contextmanager
def server_alone(snapshot: Path, *words: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The same started as users do, with an interpreter of its own."""
    process = subprocess.Popen(
        [sys.executable, "-m", "launch.cli", "serve", "--snapshot", str(snapshot), "--port", "0", *words],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stderr is not None
    try:
        line = process.stdout.readline()
        assert line.startswith("serving "), process.stderr.read()
        yield process, line.rsplit(" ", 1)[1].strip()
    finally:
        process.kill()
        process.communicate(timeout=30)


def call(url: str, body: Any = None, **more: str) -> tuple[int, Any]:
    content = None if body is None else json.dumps(body).encode()
    headers = {"content-type": "application/json", **more}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, content, headers), timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


def asked(count: int = 4) -> dict[str, Any]:
    row = next(row for row in ROWS if row["num_behaviors"] > 20)
    features = ("item_id", "category_id")
    return {
        "requests": [
            {
                "history": {
                    "timestamp": row["history_timestamp"],
                    "features": {name: row[f"history_{name}"] for name in features},
                },
                "candidates": {name: [1 + c % 8 for c in range(count)] for name in features},
            }
        ]
    }


def test_a_new_version_is_taken_and_a_bad_one_refused_while_requests_go_on(
    made: Path, tmp_path: Path
) -> None:
    root = tmp_path / "snapshot"
    shutil.copytree(made / "snapshot", root)
    token = tmp_path / "token"
    token.write_text("a token for the tests\n")
    words = ("--set", "updates.poll_seconds=0.1", "--set", f"access.reload_token_file={token}")
    with server(root, *words) as (process, url):
        seen: list[tuple[int, str]] = []
        over = threading.Event()

        def client() -> None:
            while not over.is_set():
                status, answer = call(f"{url}/score", asked())
                seen.append((status, answer.get("version", "")))

        clients = [threading.Thread(target=client) for _ in range(3)]
        for each in clients:
            each.start()
        export(made, root)
        until(lambda: call(f"{url}/healthz")[1]["version"] == "v00000002")
        bad = shutil.copytree(root / "v00000002", root / "v00000003")
        content = bytearray((bad / "dense.safetensors").read_bytes())
        content[-9] ^= 4
        (bad / "dense.safetensors").write_bytes(content)
        (root / "LATEST").write_text("v00000003\n")
        until(lambda: (call(f"{url}/healthz")[1]["refused"] or {}).get("version") == "v00000003")
        for wrong in ({}, {"authorization": "Bearer a token for the test"}):
            assert call(f"{url}/reload", {}, **wrong)[0] == 403
        status, answer = call(f"{url}/reload", {}, authorization="Bearer a token for the tests")
        assert status == 409 and "does not match" in answer["error"]
        over.set()
        for each in clients:
            each.join(30)
        assert {status for status, _ in seen} == {200} and len(seen) > 20
        assert {version for _, version in seen} == {"v00000001", "v00000002"}
        process.terminate()
        process.join(30)
        assert process.exitcode == 0


def until(true: Any, limit: float = 60) -> None:
    end = time.monotonic() + limit
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


def look_at_the_page_without_histories(url: str) -> None:
    """It says what to do."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile, browser(Path(profile)) as page:
        page.open(url)
        page.wait("document.body.dataset.ready === 'without'")
        text = page.value("document.body.innerText")
        assert "--histories runs/demo/log" in text and "item_id, category_id" in text
        assert page.value("$('work').hidden") is True and not page.errors


def test_sigterm_finishes_what_was_accepted(made: Path) -> None:
    """First not ready, then no new connection; what came whole is answered, then it ends with 0, silently.

    A body that never comes whole holds nothing up, and neither it nor a client that left is an error.
    """
    keys = ("batching.window_ms=1500", "drain.delay_seconds=1", "drain.seconds=600", "grpc.port=0")
    words = [word for key in keys for word in ("--set", key)]
    with server_alone(made / "snapshot", *words) as (process, url):
        if CHROMIUM is not None:
            look_at_the_page_without_histories(url)
        answers: list[tuple[int, Any]] = []
        clients = [
            threading.Thread(target=lambda: answers.append(call(f"{url}/score", asked()))) for _ in range(4)
        ]
        for each in clients:
            each.start()
        content, address = json.dumps(asked()).encode(), ("127.0.0.1", int(url.rpartition(":")[2]))
        head = b"POST /score HTTP/1.1\r\nhost: a\r\ncontent-length: %d\r\n\r\n" % len(content)
        with socket.create_connection(address) as half, socket.create_connection(address) as idle:
            half.sendall(head + content[:9])
            before = metric(url, "tandemrec_disconnects_total")
            with socket.create_connection(address) as leaving:
                leaving.sendall(head + content)
            until(lambda: metric(url, "tandemrec_disconnects_total") == before + 1)
            time.sleep(0.5)
            assert not answers
            process.send_signal(signal.SIGTERM)
            until(lambda: call(f"{url}/readyz")[0] == 503)
            assert call(f"{url}/livez")[0] == 200
            for each in clients:
                each.join(30)
            half.settimeout(60)
            said = half.recv(400)
            assert said.startswith(b"HTTP/1.1 503 ") and b"the body has not come whole" in said
            assert idle.recv(400) == b""
            out, err = process.communicate(timeout=60)
        assert [status for status, _ in answers] == [200] * 4
        assert process.returncode == 0 and err == "" and "Traceback" not in out
        said = out.splitlines()
        assert said[-2].startswith("draining v00000001: ") and said[-1] == "the server has ended"


def metric(url: str, name: str) -> float:
    with urllib.request.urlopen(f"{url}/metrics", timeout=60) as answer:
        lines = [line.decode().rpartition(" ") for line in answer]
    return float(next(value for key, _, value in lines if key == name))


def test_a_port_in_use_is_said_before_the_snapshot_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        assert main(["serve", "--snapshot", "none", "--port", port]) == 2
    expected = (
        f"http.port = {port}: address already in use on 127.0.0.1; name another one, or 0 for any free one"
    )
    assert capsys.readouterr().err == f"tandemrec: error: {expected}\n"


def test_what_cannot_be_served_is_one_line(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    snapshot = str(made / "snapshot")
    token = "access.reload_token_file"
    for words, message in (
        (["--snapshot", "nowhere"], "no snapshot here"),
        (["--snapshot", snapshot, "--histories", "nowhere"], "not a sequence log"),
        (["--snapshot", snapshot, "--port", "70000"], "--port"),
        (["--snapshot", snapshot, "--max-in-flight", "5"], "is the key limits.in_flight now"),
        (
            ["--snapshot", snapshot, "--set", "limits.in_flight=5"],
            "in_flight = 5 is less than one body",
        ),
        (
            ["--snapshot", snapshot, "--set", f"{token}=nowhere"],
            "nowhere: the token cannot be read",
        ),
        (
            ["--snapshot", snapshot, "--set", f"{token}={os.devnull}"],
            "16 or more plain characters",
        ),
    ):
        assert main(["serve", "--port", "0", *words]) == 2
        said = capsys.readouterr().err
        assert message in said and said.count("\n") == 1


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_the_page_shows_a_user_his_candidates_and_what_was_kept(made: Path, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("a token for the page")
    words = ("--set", "user_states.least=1", "--set", f"access.users_token_file={token}")
    with (
        server(made / "snapshot", "--histories", str(made / "log"), *words) as (_, url),
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile,
        browser(Path(profile)) as page,
    ):
        user = max(ROWS, key=lambda row: row["num_behaviors"])
        page.open(url)
        page.wait("!$('pick-token').hidden && $('problem').innerText.includes('Bearer TOKEN')")
        page.value("$('token').value = 'a token for the page'; $('token').onchange()")
        page.wait("document.body.dataset.ready")
        page.wait("$('candidates-note').innerText.endsWith('state of the user: made for this request')")
        page.value("$('request').onchange()")
        page.wait("$('candidates-note').innerText.endsWith('state of the user: known from before')")
        page.value(f"$('user').value = {user['user_id']}; $('user').onchange()")
        page.wait(f"document.body.dataset.ready.startsWith('{user['user_id']}/')")
        visible = sum(t < user["request_timestamp"][-1] for t in user["history_timestamp"])
        kept = min(visible, 4)
        assert page.value("document.querySelectorAll('#timeline circle:not(.kept)').length") == visible
        assert page.value("document.querySelectorAll('#timeline circle.kept').length") == kept
        assert page.value("$('kept').rows.length") == kept
        shown = "[...document.querySelectorAll('#candidates .value')].map(cell => Number(cell.innerText))"
        scores = page.value(shown)
        assert len(scores) == user["request_num_candidates"][-1] and scores == sorted(scores, reverse=True)
        status, answer = call(
            f"{url}/score",
            {
                "requests": [
                    {
                        "user_id": user["user_id"],
                        "time": user["request_timestamp"][-1],
                        "candidates": {n: user[f"candidate_{n}"][-1] for n in ("item_id", "category_id")},
                    }
                ]
            },
        )
        own = sorted(answer["results"][0]["scores"]["click"], reverse=True)
        assert status == 200 and scores == pytest.approx(own, abs=1e-4)
        before = page.value("$('kept-title').innerText")
        page.value("$('candidates').rows[$('candidates').rows.length - 1].click()")
        assert len(scores) == 1 or page.value("$('kept-title').innerText") != before
        page.value("$('user').value = '12345'; $('user').onchange()")
        page.wait("$('problem').innerText.endsWith('no stored history of user 12345')")
        assert all(address.startswith(url) or address.startswith("data:") for address in page.requested)
        assert not [error for error in page.errors if "404" not in error and "403" not in error], page.errors
        page.screenshot(tmp_path / "page.png")
        assert (tmp_path / "page.png").stat().st_size > 20_000
