"""`tandemrec serve`: a snapshot behind HTTP and gRPC, until SIGTERM."""

from __future__ import annotations

import gc
import logging
import signal
import socket
from contextlib import ExitStack
from pathlib import Path

import torch
import uvicorn

from embeddings.errors import ConfigError
from pipelines.console import quiet_third_parties
from pipelines.serve.app import build_app
from pipelines.serve.http_connection import Notices, protocol
from pipelines.serve.logs import LibraryErrors, Log
from pipelines.serve.metrics import Metrics
from pipelines.serve.server import Server
from pipelines.serve.service import Service
from pipelines.serve.settings import ServeSettings
from pipelines.serve.traces import Tracer
from trainer.serving.histories import HistoryStore
from trainer.serving.user_state.stores import open_second_level
from trainer.serving.versions import Versions


def serve(
    snapshot: Path,
    settings: ServeSettings,
    histories: Path | None = None,
    vocabulary: Path | None = None,
    cache: Path | None = None,
) -> None:
    """Serve the newest version of a snapshot; SIGTERM lets what was accepted finish, and returns.

    Args:
        snapshot: a version's folder or the folder of versions; the latter can be reloaded.
        histories: a sequence log whose users may be named instead of sending a history.
        vocabulary: a log whose values requests may name instead of ids, where the snapshot has none with it.
        cache: where a snapshot in an object store is fetched to, and where vocabularies and places of
            histories are kept that are too large for memory; None: the user's caches.

    Raises:
        SnapshotError, DataError, ConfigError: it cannot be served; see `trainer.serving.versions`.
    """
    quiet_third_parties()
    http, grpc = settings.http, settings.grpc
    check_address(http.host, http.port, "http.port")
    if grpc.port is not None:
        check_address(http.host, grpc.port, "grpc.port")
    torch.set_num_threads(settings.batching.threads)
    with ExitStack() as ended:
        service = _service(snapshot, settings, ended, histories, vocabulary, cache)
        config = _config(service)
        # All objects of now stay alive, so the collector need not walk them while a body becomes a million
        # lists.
        gc.collect()
        gc.freeze()
        # uvicorn puts these back when it is done: a signal that comes while the rest is closed is no error.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)
        Server(config, service).run()


def _service(
    snapshot: Path,
    settings: ServeSettings,
    ended: ExitStack,
    histories: Path | None,
    vocabulary: Path | None,
    cache: Path | None,
) -> Service:
    """All that the server holds; what must be closed goes on the stack."""
    tracer = Tracer(settings.traces) if settings.traces.endpoint else None
    if tracer is not None:
        ended.callback(tracer.close)
    shared = open_second_level(settings.user_states.store) if settings.user_states.bytes else None
    if shared is not None:
        ended.callback(shared.close)
    metrics, log = Metrics(tracer), Log(settings.logs)
    store = None if histories is None else HistoryStore(histories, cache=cache)
    versions = Versions(
        *(snapshot, store, lambda outcome: metrics.reloads.labels(outcome).inc(), vocabulary, cache),
        hot_rows=settings.hot_rows.bytes,
        user_states=settings.user_states,
        store=shared,
    )
    return Service(versions, metrics, settings, log, shared)


def _config(service: Service) -> uvicorn.Config:
    http, metrics = service.settings.http, service.metrics
    notices = Notices(lambda status: metrics.errors.labels(str(status)).inc(), metrics.disconnects.inc)
    _hear_libraries(service.log)
    return uvicorn.Config(
        build_app(service),
        host=http.host,
        port=http.port,
        http=protocol(service.load, notices),
        ws="none",
        proxy_headers=False,
        access_log=False,
        log_config=None,
    )


def _hear_libraries(log: Log) -> None:
    """Errors of uvicorn become lines of ours. Each client that sends what is no HTTP would else write one."""
    logger = logging.getLogger("uvicorn")
    logger.handlers, logger.propagate = [LibraryErrors(log)], False
    logger.setLevel(logging.ERROR)


def check_address(host: str, port: int, key: str) -> None:
    """Raises ConfigError where nothing can listen, before the snapshot is loaded.

    Args:
        key: that says the port, for messages.
    """
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise ConfigError(f"http.host = {host}: {error.strerror}") from None
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
                remedy = "name another one, or 0 for any free one"
                raise ConfigError(f"{key} = {port}: {problem}; {remedy}") from None
