"""The settings of `tandemrec serve`: one TOML file, section by section.

What a library of `trainer.serving` takes is made of a section by its method, so that a library knows no TOML.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from pipelines.serve.load import LoadLimits
from trainer.config.mistakes import NAME
from trainer.config.toml import Settings, load_settings
from trainer.serving.request import Limits
from trainer.serving.scheduler import BatchSettings
from trainer.serving.user_state.settings import UserStateSettings

Port = Annotated[int, Field(ge=0, le=65_535)]
Share = Annotated[float, Field(ge=0, le=1)]


class HttpSettings(Settings):
    """Where HTTP is served, and what its clients may take."""

    host: str = "127.0.0.1"
    """Address to listen on; `--host` says the same."""
    port: Port = 8000
    """Port to listen on, 0 = any free one; `--port` says the same."""
    connections: PositiveInt = 512
    """Connections that may be open at once. One more is answered 503."""
    client_seconds: Annotated[float, Field(ge=0.1)] = 30.0
    """Seconds that a client has to send the head of a request, then its body (408 each), and then to read the
    answer (the connection is closed). Over gRPC, to open a connection, and then for the message of a call."""


class GrpcSettings(Settings):
    """The open inference protocol (KServe v2) over gRPC."""

    port: Port | None = None
    """Port of gRPC on the host of `[http]`, 0 = any free one. Not set: there is no gRPC."""
    connections: PositiveInt = 512
    """Connections that may be open at once. One more is closed."""
    calls: PositiveInt = 128
    """Calls that may be under way at once over all connections. One more gets RESOURCE_EXHAUSTED."""
    body: PositiveInt = 8 << 20
    """Bytes of a message. gRPC reads a message whole before it is counted, so that `calls` times `body` may
    be in memory. A longer one gets RESOURCE_EXHAUSTED."""
    idle_seconds: Annotated[float, Field(ge=1)] = 600.0
    """Seconds after which a connection without calls is closed."""


class InferenceSettings(Settings):
    """How the model is called in the open inference protocol, over HTTP (`/v2`) and over gRPC."""

    model: Annotated[str, Field(pattern=NAME)] = "tandemrec"
    """The name of the model. Its versions are those of the snapshot."""


class LimitSettings(Settings):
    """What one body may hold, over HTTP and over gRPC. More is answered 413."""

    body: PositiveInt = Limits.body
    """Bytes of a body."""
    json_body: PositiveInt = Limits.json
    """Bytes of a body in JSON, which takes some ten times as many while it is parsed."""
    ids: PositiveInt = Limits.ids
    """Values of a body. Shared ones count each time; a list or object in JSON counts as 16."""
    requests: PositiveInt = Limits.requests
    """Requests of a body."""
    history: PositiveInt = Limits.history
    """Behaviors of a request that the model reads. Older ones are left out before they are counted."""
    candidates: PositiveInt = Limits.candidates
    """Candidates of a request."""
    bag: PositiveInt = Limits.bag
    """Ids of one behavior, of one candidate or of the context."""
    explained: PositiveInt = Limits.explained
    """Candidates of a body with `explain`."""
    cost: PositiveInt = Limits.cost
    """Pairs of candidates and behaviors of a body: the sum over its requests of candidates x (behaviors that
    the model reads + what a candidate costs by itself)."""
    in_flight: PositiveInt = LoadLimits.in_flight
    """Bytes of all bodies and answers, from the first byte of a body to the last of its answer. More is
    answered 503."""

    @model_validator(mode="after")
    def _has_room_for_one(self) -> LimitSettings:
        if self.in_flight < self.body:
            problem = f"is less than one body may have, body = {self.body}"
            raise ValueError(f"in_flight = {self.in_flight} {problem}")
        return self

    @staticmethod
    def of(limits: Limits) -> dict[str, int]:
        """Limits by their keys."""
        found = asdict(limits)
        return {"json_body" if name == "json" else name: most for name, most in found.items()}

    def limits(self) -> Limits:
        """As the readers of bodies take them."""
        own = self.model_dump(exclude={"in_flight", "json_body"})
        return Limits(json=self.json_body, **own)


class BatchingSettings(Settings):
    """How requests share calls of the model."""

    window_ms: NonNegativeFloat = 0.0
    """Milliseconds that a call waits for company. Every request waits that long."""
    requests: PositiveInt = BatchSettings.requests
    """Requests of one call."""
    behaviors: PositiveInt = BatchSettings.behaviors
    """Behaviors of one call. One request is always scored whole."""
    candidates: PositiveInt = BatchSettings.candidates
    """Candidates of one call. One request is always scored whole."""
    cost: PositiveInt = BatchSettings.cost
    """Pairs, as in `limits.cost`, of one call, which a small body may have to wait for. One request is always
    scored whole."""
    waiting: PositiveInt = BatchSettings.waiting
    """Bodies that may wait for the model. One more is answered 429."""
    deadline_ms: NonNegativeFloat = 1000 * BatchSettings.deadline
    """Milliseconds until a body must be scored whose client names no deadline; then it is answered 504. 0 =
    there is no such deadline."""
    inline: NonNegativeInt = BatchSettings.inline
    """Bytes of a body that is decoded at once, where the server has no histories. Longer ones wait for the
    thread that decodes them, one at a time."""
    at_once_ms: NonNegativeFloat = 1000 * BatchSettings.at_once
    """Milliseconds. A call of the model that takes no longer, by the calls before it, is made where clients
    are answered: to change threads twice is a twentieth of a small request. Nobody else is answered
    meanwhile. 0 = all calls are made by the model's thread."""
    threads: PositiveInt = BatchSettings.threads
    """Threads of the model's matrix products; of a model that searches, threads that share a request's
    candidates in the search."""

    def settings(self) -> BatchSettings:
        """As the library takes them."""
        own = self.model_dump(exclude={"window_ms", "deadline_ms", "at_once_ms"})
        window, deadline, at_once = (ms / 1000 for ms in (self.window_ms, self.deadline_ms, self.at_once_ms))
        return BatchSettings(window=window, deadline=deadline, at_once=at_once, **own)


class HotRowSettings(Settings):
    """Rows that are asked for most, side by side in memory, in front of tables that are larger than it."""

    bytes: NonNegativeInt = 0
    """Bytes for them, of all tables together; while others are chosen, twice as many. 0 = none are kept. They
    pay where tables do not fit into memory, and cost time where they do: see benchmarks/hot_rows.md."""


class UpdateSettings(Settings):
    """How newer versions of the snapshot are taken up."""

    poll_seconds: NonNegativeFloat = 2.0
    """Seconds between two looks at LATEST; 0 = only when POST /reload asks."""


class AccessSettings(Settings):
    """Tokens: files with one line of 16 or more plain characters, which a client brings as
    `Authorization: Bearer TOKEN`. A file that has changed is read again when the next client brings one."""

    reload_token_file: Path | None = None
    """Of POST /reload. Not set: nobody may ask for it."""
    users_token_file: Path | None = None
    """Of /users, which shows histories. Not set: it is open."""
    metrics_token_file: Path | None = None
    """Of /metrics. Not set: it is open."""


class LogSettings(Settings):
    """What the server writes to its standard output, one line an event."""

    format: Literal["text", "json"] = "text"
    """`text` for people, `json` for collectors of logs: one object a line."""
    requests: Share = 0.0
    """Share of the scored bodies that get a line: 0 none, 1 all. It never holds ids of users."""


class TraceSettings(Settings):
    """OpenTelemetry. It needs the packages opentelemetry-sdk and opentelemetry-exporter-otlp-proto-grpc."""

    endpoint: str = ""
    """Where traces are sent by OTLP over gRPC, such as `http://collector:4317`. Empty: there are none."""
    service: str = "tandemrec"
    """The name of the service in traces."""
    share: Share = 1.0
    """Share of the bodies that are traced where their client has not decided so (`traceparent`)."""


class DrainSettings(Settings):
    """What happens after SIGTERM: first not ready, then no new connection, then the end."""

    delay_seconds: NonNegativeFloat = 0.0
    """Seconds that connections are still accepted while /readyz says 503, so that a load balancer learns of
    it before the first client is refused."""
    seconds: PositiveFloat = 30.0
    """Seconds for bodies that have come whole. Bodies that have not are dropped at once."""


class ServeSettings(Settings):
    """Every key of `serve --config FILE`."""

    http: HttpSettings = HttpSettings()
    grpc: GrpcSettings = GrpcSettings()
    inference: InferenceSettings = InferenceSettings()
    limits: LimitSettings = LimitSettings()
    batching: BatchingSettings = BatchingSettings()
    user_states: UserStateSettings = UserStateSettings()
    hot_rows: HotRowSettings = HotRowSettings()
    updates: UpdateSettings = UpdateSettings()
    access: AccessSettings = AccessSettings()
    logs: LogSettings = LogSettings()
    traces: TraceSettings = TraceSettings()
    drain: DrainSettings = DrainSettings()

    def load(self) -> LoadLimits:
        """What all clients together may take."""
        return LoadLimits(self.http.connections, self.limits.in_flight, self.http.client_seconds)


def load_serve_settings(
    config: Path | None, overrides: Sequence[str] = (), host: str | None = None, port: int | None = None
) -> ServeSettings:
    """The file, then the overrides, then the options of the command line that say the same as a key.

    Raises:
        ConfigError: the file cannot be read, a key is unknown, or a value is wrong.
    """
    chosen = list(overrides)
    chosen += [] if host is None else [f'http.host="{host}"']
    chosen += [] if port is None else [f"http.port={port}"]
    return load_settings(ServeSettings, config, chosen)
