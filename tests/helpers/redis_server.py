"""A real server of the Redis protocol, for as long as a test wants it."""

from __future__ import annotations

import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import redis

PROGRAM = shutil.which("redis-server") or shutil.which("valkey-server")
LACKING = "no redis-server here (apt-get install redis-server)"


@dataclass
class RedisServer:
    """A server behind a socket in a folder. It keeps nothing when it ends."""

    folder: Path
    process: subprocess.Popen[bytes] | None = None
    clients: list[redis.Redis] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"unix://{self.folder / 'redis.sock'}"

    @property
    def client(self) -> redis.Redis:
        """One that waits as long as it takes."""
        self.clients.append(redis.Redis.from_url(self.url, socket_timeout=10))
        return self.clients[-1]

    def start(self) -> None:
        assert PROGRAM is not None
        words = ["--port", "0", "--save", "", "--appendonly", "no", "--unixsocket", "redis.sock"]
        with (self.folder / "redis.log").open("ab") as log:
            self.process = subprocess.Popen([PROGRAM, *words], cwd=self.folder, stdout=log, stderr=log)
        deadline = time.monotonic() + 20
        while True:
            try:
                self.client.ping()
                return
            except redis.ConnectionError:
                assert time.monotonic() < deadline, (self.folder / "redis.log").read_text()
                time.sleep(0.01)

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait(20)

    def stop(self) -> None:
        """It keeps its connections, and answers nothing."""
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)


@contextmanager
def redis_server(folder: Path) -> Iterator[RedisServer]:
    """`folder`: an empty one, of a short path: that of a socket has at most 107 characters."""
    server = RedisServer(folder)
    try:
        server.start()
        yield server
    finally:
        for client in server.clients:
            client.close()
        if server.process is not None:
            server.kill()
