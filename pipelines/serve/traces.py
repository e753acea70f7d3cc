"""Traces of single bodies, by OpenTelemetry, whose packages are imported only where traces are wanted."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from embeddings.errors import ConfigError
from pipelines.serve.settings import TraceSettings
from trainer.ranks.machine import installed
from trainer.serving.observer import Follow, PartTimes

_BILLION = 1_000_000_000


class Tracer:
    """Makes a span for each body, and below it `decode`, `queue`, `search` and `ranking`.

    A body's trace is the one that its client's `traceparent` names (W3C), or a new one. Spans go to a
    collector from a thread of their own; where it does not answer, they are dropped.

    Args:
        exporter: where spans go; None: to the collector of the settings.

    Raises:
        ConfigError: OpenTelemetry is not installed.
    """

    def __init__(self, settings: TraceSettings, exporter: Any = None) -> None:
        try:
            from opentelemetry import trace
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

            exporter = exporter or _collector(settings.endpoint)
        except ImportError as error:
            packages = "opentelemetry-sdk and opentelemetry-exporter-otlp-proto-grpc"
            raise ConfigError(f"traces.endpoint: wants the packages {packages}: {error}") from None
        resource = Resource.create(
            {"service.name": settings.service, "service.version": installed("tandemrec") or ""}
        )
        self._trace, self._headers = trace, TraceContextTextMapPropagator()
        self._provider = TracerProvider(ParentBased(TraceIdRatioBased(settings.share)), resource)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("tandemrec.serve")

    @contextmanager
    def body(self, name: str, headers: Mapping[str, str]) -> Iterator[None]:
        """The span of a body, for as long as it is open; an error inside is noted without its text.

        Args:
            headers: of the request, with lower-case names.
        """
        context = self._headers.extract(headers)
        kind = self._trace.SpanKind.SERVER
        with self._tracer.start_as_current_span(
            name, context, kind, record_exception=False, set_status_on_exception=False
        ) as span:
            try:
                yield
            except BaseException as error:
                span.set_attribute("error.type", type(error).__name__)
                if (status := getattr(error, "status", None)) is not None:
                    span.set_attribute("http.response.status_code", status)
                span.set_status(self._trace.StatusCode.ERROR)
                raise

    def decoded(self, seconds: float) -> None:
        """The body of this task was decoded just now."""
        self._past("decode", self._trace.get_current_span(), seconds, 0.0)

    def follow(self) -> Follow | None:
        """What is told of the parts of this task's body; None where it is not traced."""
        span = self._trace.get_current_span()
        if not span.is_recording():
            return None

        def note(times: PartTimes) -> None:
            search, ranking = times.seconds
            if times.waited is not None:
                self._past("queue", span, times.waited, search + ranking)
            self._past("search", span, search, ranking)
            self._past("ranking", span, ranking, 0.0)

        return note

    def close(self) -> None:
        """Send what is left."""
        self._provider.shutdown()

    def _past(self, name: str, parent: Any, seconds: float, ago: float) -> None:
        """A span that took so long and ended so long ago."""
        if not parent.is_recording():
            return
        end = time.time_ns() - int(ago * _BILLION)
        context = self._trace.set_span_in_context(parent)
        span = self._tracer.start_span(name, context, start_time=end - int(seconds * _BILLION))
        span.end(end)


def _collector(endpoint: str) -> Any:
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

    return OTLPSpanExporter(endpoint=endpoint, insecure=not endpoint.startswith("https://"))
