"""A server of S3's protocol (moto) that fails as it is told to: `python -m tests.programs.object_store`.

It prints its port. `POST /-/faults` takes a JSON list of rules, each {"method", "path", "kind", "count",
"skip"}: requests of that method whose path and query the regular expression finds, after `skip` of them,
`count` times. `GET /-/seen` answers with what was asked for, and forgets it: [method, path and query, range,
bytes answered].

Kinds: `error:STATUS:CODE`, `slow:SECONDS`, `truncated` (half of a body), `reset` (no answer at all), `lost`
(done, but no answer), `hold` (no answer until the client has gone).
"""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server


class Faulty:
    """moto with faults in front of it."""

    def __init__(self) -> None:
        self._app = DomainDispatcherApplication(create_backend_app)
        self._lock = threading.Lock()
        self._rules: list[dict[str, Any]] = []
        self._seen: list[list[Any]] = []

    def __call__(self, environ: dict[str, Any], start: Any) -> Iterable[bytes]:
        path = environ["PATH_INFO"] + ("?" + environ["QUERY_STRING"] if environ["QUERY_STRING"] else "")
        method, size = environ["REQUEST_METHOD"], int(environ.get("CONTENT_LENGTH") or 0)
        if path.startswith("/-/"):
            return self._control(path, environ["wsgi.input"].read(size), start)
        entry = [method, path, environ.get("HTTP_RANGE", ""), 0]
        with self._lock:
            self._seen.append(entry)
            kind, *words = self._fault(method, path).split(":")
        if kind in ("error", "reset", "hold") and size:
            environ["wsgi.input"].read(size)
        if kind == "error":
            body = f"<Error><Code>{words[1]}</Code><Message>told to fail</Message></Error>".encode()
            sent = b"" if method == "HEAD" else body
            start(
                f"{words[0]} FAULT", [("Content-Type", "application/xml"), ("Content-Length", str(len(sent)))]
            )
            return [sent]
        if kind == "lost":
            list(self._app(environ, start))
        if kind in ("reset", "lost", "hold"):
            connection: socket.socket = environ["werkzeug.socket"]
            with suppress(OSError):
                while kind == "hold" and connection.recv(1):
                    pass
                connection.shutdown(socket.SHUT_RDWR)
            raise ConnectionResetError
        if kind == "slow":
            time.sleep(float(words[0]))
        answer = list(self._app(environ, start))
        entry[3] = sum(map(len, answer))
        return [b"".join(answer)[: entry[3] // 2]] if kind == "truncated" else answer

    def _fault(self, method: str, path: str) -> str:
        for rule in self._rules:
            if method in rule["method"] and re.search(rule["path"], path):
                if rule["skip"] > 0:
                    rule["skip"] -= 1
                elif rule["count"] > 0:
                    rule["count"] -= 1
                    return str(rule["kind"])
        return ""

    def _control(self, path: str, body: bytes, start: Any) -> Iterable[bytes]:
        answer = b"{}"
        with self._lock:
            if path == "/-/faults":
                self._rules = json.loads(body)
            else:
                answer, self._seen = json.dumps(self._seen).encode(), []
        start("200 OK", [("Content-Type", "application/json"), ("Content-Length", str(len(answer)))])
        return [answer]


class _Quiet(WSGIRequestHandler):
    protocol_version = "HTTP/1.1"

    def log(self, type: str, message: str, *args: Any) -> None:
        """Say nothing, of faults least of all."""


def main() -> None:
    server = make_server("127.0.0.1", 0, Faulty(), threaded=True, request_handler=_Quiet)
    print(server.port, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
