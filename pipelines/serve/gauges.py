"""What is so at the moment that Prometheus asks: read then, and counted nowhere before."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from trainer.ranks.machine import heap_bytes
from trainer.serving.latest import Outcome

if TYPE_CHECKING:
    from pipelines.serve.service import Service

# Of /proc/self/status, in KiB -> what it is called here.
_MEMORY = {"RssAnon": "private", "RssFile": "mapped", "RssShmem": "shared"}
_MAPPED = "VmSize"


class Gauges(Collector):
    """The queue, the version, the connections and the memory of a service."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def describe(self) -> Iterator[Metric]:
        """Nothing: a registry would else ask for all of it when this is registered."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        yield from self._queue()
        yield from self._version()
        yield from self._states()
        yield from self._shared()
        yield from self._hot_rows()
        yield from _memory()
        yield from _heap()

    def _queue(self) -> Iterator[Metric]:
        service, queue = self._service, self._service.core.queue
        text = "Bodies that were taken and are not answered"
        yield GaugeMetricFamily("tandemrec_queue_bodies", text, queue.bodies)
        yield GaugeMetricFamily("tandemrec_queue_parts", "Model calls that wait, at most", queue.parts)
        text = "Pairs of candidates and behaviors that wait, as in limits.cost"
        yield GaugeMetricFamily("tandemrec_queue_cost", text, queue.cost)
        yield GaugeMetricFamily("tandemrec_connections", "Connections of HTTP", len(service.connections))
        yield GaugeMetricFamily("tandemrec_in_flight_bytes", _IN_FLIGHT, service.in_flight.held)
        text = "1 while requests should be sent here"
        yield GaugeMetricFamily("tandemrec_ready", text, int(service.problem() is None))

    def _version(self) -> Iterator[Metric]:
        versions, now = self._service.versions, time.time()
        looks = CounterMetricFamily(
            "tandemrec_looks", "Looks at LATEST, by what they found", labels=["outcome"]
        )
        for outcome in get_args(Outcome):
            looks.add_metric([outcome], versions.looks[outcome])
        yield looks
        text = "1 while LATEST names no version that could be taken"
        yield GaugeMetricFamily("tandemrec_latest_failing", text, int(versions.latest_problem is not None))
        if versions.exported_at is not None:
            text, age = "Since the version that is served was exported", now - versions.exported_at
            yield GaugeMetricFamily("tandemrec_snapshot_age_seconds", text, age)
        text = "Since the version that is served was taken up"
        yield GaugeMetricFamily("tandemrec_snapshot_served_seconds", text, now - versions.served_since)

    def _states(self) -> Iterator[Metric]:
        statistics = self._service.state_statistics()
        if statistics is None:
            return
        text = "Users of scored requests, by what was known of them"
        outcomes = CounterMetricFamily("tandemrec_user_states", text, labels=["outcome"])
        for outcome, count in statistics.outcomes.items():
            outcomes.add_metric([outcome], count)
        yield outcomes
        text = "Users whose states are held in memory"
        yield GaugeMetricFamily("tandemrec_user_state_entries", text, statistics.entries)
        text = "Bytes of the states that are held in memory"
        yield GaugeMetricFamily("tandemrec_user_state_bytes", text, statistics.bytes)
        text = "States that gave way to others"
        yield CounterMetricFamily("tandemrec_user_states_evicted", text, statistics.evicted)

    def _shared(self) -> Iterator[Metric]:
        if self._service.shared is None:
            return
        found = self._service.shared.statistics()
        asked = {"look_up": found.look_ups, "write": found.writes}
        text = "States that were asked of or given to the store that processes share, by outcome"
        calls = CounterMetricFamily("tandemrec_user_state_store", text, labels=["call", "outcome"])
        for call, outcomes in asked.items():
            for outcome, count in outcomes.items():
                calls.add_metric([call, outcome], count)
        yield calls
        text = "Bytes of states that are to be written to the store"
        yield GaugeMetricFamily("tandemrec_user_state_store_waiting_bytes", text, found.waiting)

    def _hot_rows(self) -> Iterator[Metric]:
        counts = self._service.versions.hot_counts
        text = "Rows that were looked up in tables with hot rows since the version is served"
        looked_up = CounterMetricFamily("tandemrec_hot_rows_looked_up", text, labels=["hot"])
        looked_up.add_metric(["yes"], counts.hot)
        looked_up.add_metric(["no"], counts.looked_up - counts.hot)
        yield looked_up
        yield GaugeMetricFamily("tandemrec_hot_rows", "Rows that are kept side by side", counts.kept)


_IN_FLIGHT = "Bytes held for bodies and answers"


def _memory() -> Iterator[Metric]:
    """Resident memory by kind, and addresses that are mapped; nothing where the system does not tell."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        files = len(os.listdir("/proc/self/fd"))
    except OSError:
        return
    found = {
        key: int(rest.split()[0]) << 10
        for key, _, rest in (line.partition(":") for line in lines)
        if key in (*_MEMORY, _MAPPED)
    }
    text = "Resident memory: private to the process, pages of mapped files, and shared memory"
    resident = GaugeMetricFamily("tandemrec_resident_bytes", text, labels=["kind"])
    for key, kind in _MEMORY.items():
        if key in found:
            resident.add_metric([kind], found[key])
    yield resident
    if _MAPPED in found:
        text = "Addresses that are mapped, in memory or not"
        yield GaugeMetricFamily("tandemrec_mapped_bytes", text, found[_MAPPED])
    yield GaugeMetricFamily("tandemrec_open_files", "Files and connections that are open", files)


def _heap() -> Iterator[Metric]:
    """What the C library has of the private memory; nothing where it does not tell."""
    found = heap_bytes()
    if found is None:
        return
    text = "The C library's heaps: in use, and free, of which the system may have the pages back"
    heaps = GaugeMetricFamily("tandemrec_heap_bytes", text, labels=["kind"])
    heaps.add_metric(["used"], found.used)
    heaps.add_metric(["free"], found.free)
    yield heaps
