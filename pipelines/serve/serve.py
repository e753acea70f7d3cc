"""`tandemrec serve`: a snapshot behind HTTP, until SIGTERM."""

from __future__ import annotations

import gc
import signal
import socket
from pathlib import Path
from typing import Any

import torch
import uvicorn

from embeddings.errors import ConfigError
from pipelines.console import quiet_third_parties
from pipelines.serve.app import Service, build_app
from pipelines.serve.load import LoadLimits, protocol
from pipelines.serve.metrics import Metrics
from pipelines.serve.updates import read_token
from trainer.serving.histories import HistoryStore
from trainer.serving.request import Limits
from trainer.serving.scheduler import BatchSettings
from trainer.serving.versions import Versions


def serve(
    snapshot: Path,
    host: str,
    port: int,
    histories: Path | None,
    limits: Limits,
    batching: BatchSettings,
    load: LoadLimits,
    poll_seconds: float = 0.0,
    token_file: Path | None = None,
    vocabulary: Path | None = None,
    grace_seconds: int = 30,
    cache: Path | None = None,
) -> None:
    """Serve the newest version of a snapshot; SIGTERM lets what was accepted finish, and returns.

    Args:
        snapshot: a version's folder or the folder of versions; the latter can be reloaded.
        histories: a sequence log whose users may be named instead of sending a history.
        poll_seconds: look for a newer version that often; 0 = only when asked by POST /reload.
        token_file: holds what POST /reload must bring; without it, nobody may ask.
        vocabulary: a log whose values requests may name instead of ids, where the snapshot has none with it.
        cache: where a snapshot in an object store is fetched to, and where vocabularies and places of
            histories are kept that are too large for memory; None: the user's caches.
        grace_seconds: after SIGTERM, for requests under way.

    Raises:
        SnapshotError, DataError, ConfigError: it cannot be served; see `trainer.serving.versions`.
    """
    quiet_third_parties()
    if load.in_flight < limits.body:
        problem = f"is less than one body may have, {limits.body:,} (--max-body)"
        raise ConfigError(f"--max-in-flight: {load.in_flight:,} bytes {problem}")
    _check_address(host, port)
    torch.set_num_threads(batching.threads)
    metrics = Metrics()
    store = None if histories is None else HistoryStore(histories, cache=cache)
    token = "" if token_file is None else read_token(token_file)
    versions = Versions(
        snapshot, store, lambda outcome: metrics.reloads.labels(outcome).inc(), vocabulary, cache
    )
    service = Service(versions, metrics, limits, batching, poll_seconds, load, token)
    config = uvicorn.Config(
        build_app(service),
        host=host,
        port=port,
        http=protocol(load, lambda status: metrics.errors.labels(str(status)).inc()),
        ws="none",
        proxy_headers=False,
        access_log=False,
        # Each client that sends what is no HTTP would else write a line.
        log_level="error",
        timeout_graceful_shutdown=grace_seconds,
    )
    # All objects of now stay alive, so the collector need not walk them while a body becomes a million lists.
    gc.collect()
    gc.freeze()
    # uvicorn raises the signal that stopped it once more when it is done: here that is no error.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    _Server(config, f"serving {versions.shown()} on http://{host}").run()


def _check_address(host: str, port: int) -> None:
    """Raises ConfigError where nothing can listen, before the snapshot is loaded."""
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise ConfigError(f"--host {host}: {error.strerror}") from None
    for family, kind, protocol_, _, address in addresses:
        with socket.socket(family, kind, protocol_) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            try:
                probe.bind(address)
                probe.listen()
            except OSError as error:
                problem = f"{(error.strerror or str(error)).lower()} on {host}"
                remedy = "name another --port, or 0 for any free one"
                raise ConfigError(f"--port {port}: {problem}; {remedy}") from None


class _Server(uvicorn.Server):
    """Says where it listens, once it does: with port 0 only then is it known."""

    def __init__(self, config: uvicorn.Config, notice: str) -> None:
        super().__init__(config)
        self._notice = notice

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        if self.started:
            port = self.servers[0].sockets[0].getsockname()[1]
            print(f"{self._notice}:{port}", flush=True)
