"""A server in a process of its own, as users start it: what it says, what it takes, and how it ends."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from embeddings.errors import TandemError

_ROOT = Path(__file__).parents[2]
_LISTENS = re.compile(r"http://([\w.]+):(\d+)")
_GRPC = re.compile(r"gRPC on ([\w.]+:\d+)")
_TICKS = os.sysconf("SC_CLK_TCK")


class ServerProcess:
    """A process that has said where it listens.

    Attributes:
        host, port: of HTTP. grpc: host:port of gRPC, or None.
    """

    def __init__(self, process: subprocess.Popen[bytes], said: Path, seconds: float) -> None:
        self.process, self.said = process, said
        self.host, self.port, self.grpc = self._address(seconds)

    def _address(self, seconds: float) -> tuple[str, int, str | None]:
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.process.poll() is None:
            text = self.said.read_text(errors="replace")
            if found := _LISTENS.search(text):
                grpc = _GRPC.search(text)
                return found[1], int(found[2]), grpc[1] if grpc else None
            time.sleep(0.05)
        self.process.kill()
        raise TandemError(f"the server did not start: {self.said.read_text(errors='replace')[-1000:]}")

    def cpu_seconds(self) -> float:
        """Processor seconds of all its threads."""
        ticks = (self._proc / "stat").read_text().rpartition(")")[2].split()
        return (int(ticks[11]) + int(ticks[12])) / _TICKS

    def memory(self) -> dict[str, float]:
        """Resident memory and its private part in MB; mapped files that are gone; open files; threads."""
        pairs = [line.partition(":") for line in (self._proc / "status").read_text().splitlines()]
        status = {name: value.split() for name, _, value in pairs}
        gone = {
            line.split()[5]
            for line in (self._proc / "maps").read_text().splitlines()
            if line.endswith("(deleted)") and "/v0" in line
        }
        return {
            "resident_mb": int(status["VmRSS"][0]) / 1000,
            "private_mb": int(status["RssAnon"][0]) / 1000,
            "deleted_files_mapped": len(gone),
            "open_files": len(list((self._proc / "fd").iterdir())),
            "threads": int(status["Threads"][0]),
        }

    def end(self, seconds: float) -> tuple[int, float]:
        """SIGTERM: the exit code, and how long it took."""
        started = time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            code = self.process.wait()
        return code, time.monotonic() - started

    @property
    def _proc(self) -> Path:
        return Path("/proc") / str(self.process.pid)


@contextmanager
def served(
    command: Sequence[str], said: Path, environment: Mapping[str, str] | None = None, seconds: float = 120
) -> Iterator[ServerProcess]:
    """A server for as long as the block is open; what it says goes to the file `said`.

    Raises:
        TandemError: it does not listen within `seconds`.
    """
    with said.open("wb") as file:
        process = _started(command, file, environment)
        try:
            yield ServerProcess(process, said, seconds)
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()


def _started(
    command: Sequence[str], file: IO[bytes], environment: Mapping[str, str] | None
) -> subprocess.Popen[bytes]:
    variables = {**os.environ, **(environment or {})}
    return subprocess.Popen(command, cwd=_ROOT, env=variables, stdout=file, stderr=subprocess.STDOUT)


def serve_command(snapshot: Path, *settings: str) -> list[str]:
    """`tandemrec serve` on any free port; `settings`: of its file, as KEY=VALUE."""
    words = [word for each in settings for word in ("--set", each)]
    launcher = [sys.executable, "-m", "launch.cli", "serve", "--snapshot", str(snapshot), "--port", "0"]
    return [*launcher, *words]
