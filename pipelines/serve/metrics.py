"""What the server counts, for Prometheus; in a registry of its own, so that two servers do not mix.

Whoever traces single bodies is told of the same events.
"""

from __future__ import annotations

from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

from pipelines.serve.logs import Log
from pipelines.serve.traces import Tracer
from trainer.serving.observer import Follow, Loss, ModelCall, Observer
from trainer.serving.scorer import Scorer

_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
_SIZES = (1, 2, 4, 8, 16, 32, 64)


class Metrics(Observer):
    """Counters and histograms of one server."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self, tracer: Tracer | None = None) -> None:
        self.tracer = tracer
        # Set by the service.
        self.log: Log | None = None
        self._registry = CollectorRegistry()
        counter = partial(Counter, registry=self._registry)
        gauge = partial(Gauge, registry=self._registry)
        histogram = partial(Histogram, registry=self._registry)
        self.requests = counter("tandemrec_requests", "Requests scored")
        self.candidates = counter("tandemrec_candidates", "Candidates scored")
        self.errors = counter("tandemrec_errors", "Answers that are errors, by HTTP status", ["status"])
        latency = "From the end of a body's arrival to its answer"
        self.latency = histogram("tandemrec_latency_seconds", latency, buckets=_SECONDS)
        stage = "Decoding and waiting of each body; search and ranking of each model call"
        self.stage = histogram("tandemrec_stage_seconds", stage, ["stage"], buckets=_SECONDS)
        # Looked up once: each look-up takes as long as what is counted then.
        self._stages = {name: self.stage.labels(name) for name in ("decode", "queue", "search", "ranking")}
        self.batch = histogram("tandemrec_batch_requests", "Requests of a model call", buckets=_SIZES)
        self.version = gauge("tandemrec_snapshot_version", "1 for the version served", ["version"])
        self.step = gauge("tandemrec_snapshot_step", "Training step of the version served")
        self.reloads = counter("tandemrec_reloads", "Attempts to reload, by outcome", ["outcome"])
        self.poll_failures = counter("tandemrec_poll_failures", "Looks for a newer version that failed")
        self.poll_failing = gauge("tandemrec_poll_failing", "1 while looking for a newer version fails")
        self.losses = counter("tandemrec_lost", "Bodies that were not answered, by cause", ["why"])
        self.unknown = counter("tandemrec_unknown_values", "Values that the model does not know")
        self.grpc_calls = counter("tandemrec_grpc_calls", "Calls over gRPC, by code", ["method", "code"])
        self.disconnects = counter("tandemrec_disconnects", "Clients that left before their answer")

    def watch(self, state: Collector) -> None:
        """Tell besides what is so when somebody asks."""
        self._registry.register(state)

    def serving(self, scorer: Scorer) -> None:
        """Another version is served from now on."""
        self.version.clear()
        self.version.labels(scorer.version).set(1)
        self.step.set(scorer.snapshot.manifest.step)

    def decoded(self, seconds: float) -> None:
        self._stages["decode"].observe(seconds)
        if self.tracer is not None:
            self.tracer.decoded(seconds)

    def follow(self) -> Follow | None:
        return None if self.tracer is None else self.tracer.follow()

    def called(self, call: ModelCall) -> None:
        self.requests.inc(call.requests)
        self.candidates.inc(call.candidates)
        self.batch.observe(call.requests)
        for wait in call.waited:
            self._stages["queue"].observe(wait)
        self._stages["search"].observe(call.seconds.search)
        self._stages["ranking"].observe(call.seconds.ranking)

    def answered(self, seconds: float, unknown: int) -> None:
        self.latency.observe(seconds)
        self.unknown.inc(unknown)

    def unsound(self, version: str, where: str) -> None:
        if self.log is not None:
            problem = f"not ready: the version {version} answers with what is no number: {where}"
            self.log.say("unsound", problem, version=version)

    def lost(self, why: Loss) -> None:
        self.losses.labels(why).inc()

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self._registry)
