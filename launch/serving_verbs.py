"""The verb that serves; `launch.cli` adds it to the others."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Option
from typer.core import TyperCommand

from launch.options import At, Cache, Overrides, Snapshot
from launch.quick_imports import quick_imports

# Options of earlier versions -> the key that took their place.
_KEYS = {
    "--max-body": "limits.body",
    "--max-json": "limits.json",
    "--max-requests": "limits.requests",
    "--max-history": "limits.history",
    "--max-candidates": "limits.candidates",
    "--max-bag": "limits.bag",
    "--max-ids": "limits.ids",
    "--max-in-flight": "limits.in_flight",
    "--max-waiting": "batching.waiting",
    "--max-connections": "http.connections",
    "--client-seconds": "http.client_seconds",
    "--batch-requests": "batching.requests",
    "--batch-window-ms": "batching.window_ms",
    "--threads": "batching.threads",
    "--poll-seconds": "updates.poll_seconds",
    "--reload-token-file": "access.reload_token_file",
}


class ServeCommand(TyperCommand):
    """Names the key where an option of an earlier version is given."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Raises typer.BadParameter for such an option."""
        for word in args:
            option = word.partition("=")[0]
            if option in _KEYS:
                key = _KEYS[option]
                raise typer.BadParameter(
                    f"{option} is the key {key} now: --set {key}=VALUE, or in --config", ctx
                )
        return super().parse_args(ctx, args)


def serve(
    snapshot: Snapshot,
    config: Annotated[
        Path | None, At(metavar="FILE", help="TOML configuration; every key has a default.")
    ] = None,
    overrides: Overrides = None,
    host: Annotated[str | None, Option(help="Address to listen on; the key http.host.")] = None,
    port: Annotated[
        int | None, Option(min=0, max=65535, help="The key http.port, 8000; 0: any free one.")
    ] = None,
    histories: Annotated[
        Path | None, At(metavar="LOG", help="A sequence log whose users requests may name.")
    ] = None,
    vocabulary: Annotated[
        Path | None, At(metavar="LOG", help="Whose values requests may name where the snapshot has none.")
    ] = None,
    cache: Cache = None,
) -> None:
    """Serve a snapshot over HTTP and gRPC, with a page to look at."""
    with quick_imports():
        from pipelines.serve.serve import serve as run
        from pipelines.serve.settings import load_serve_settings

    settings = load_serve_settings(config, overrides or [], host, port)
    run(snapshot, settings, histories, vocabulary, cache)
