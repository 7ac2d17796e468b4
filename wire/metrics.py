"""``GET /metrics``: what a daemon counts, in the Prometheus text format."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import cache

import msgspec
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from operations.hosts import Device
from wire.trunk.link import Counters

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)

Gauges = Callable[[], Iterable[tuple[str, str, dict[str, str], float]]]
"""Yields (name, help, labels, value) at each scrape, samples of one name together."""


class Seen(msgspec.Struct, frozen=True):
    """What is counted of one request.

    :param ttft_s: seconds to the first byte of the answer; None if none came
    :param model: the model's own name; None if nobody had it
    :param tokens: generated; of a stream, its events
    """

    status: int
    ttft_s: float | None
    model: str | None
    tokens: int


class Metrics:
    """The counters of one daemon, in a registry of their own."""

    def __init__(self, gauges: Gauges = tuple) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "hive_requests", "Inference requests.", ["route", "status"], registry=self._registry
        )
        self._ttft = Histogram(
            "hive_ttft_seconds",
            "From a request's arrival to the first byte of its answer.",
            ["route"],
            buckets=SECONDS,
            registry=self._registry,
        )
        self._jobs = Counter(
            "hive_jobs", "Jobs by how they ended.", ["operation", "status"], registry=self._registry
        )
        self._tokens = Counter(
            "hive_tokens_out",
            "Tokens generated; of a stream, its events.",
            ["model"],
            registry=self._registry,
        )
        self._placed = Counter(
            "hive_placements",
            "Decisions of the scheduler.",
            ["operation", "reason"],
            registry=self._registry,
        )
        self._registry.register(_Gauges(gauges))
        # A label's own counter is looked up once, not at each request.
        self._requests_of = cache(lambda route, status: self._requests.labels(route, str(status)))
        self._ttft_of = cache(self._ttft.labels)
        self._tokens_of = cache(self._tokens.labels)
        self._placed_of = cache(self._placed.labels)

    def request_ended(self, route: str, seen: Seen) -> None:
        """Count one request on a route."""
        self._requests_of(route, seen.status).inc()
        if seen.ttft_s is not None:
            self._ttft_of(route).observe(seen.ttft_s)
        if seen.model is not None and seen.tokens:
            self.tokens(seen.model, seen.tokens)

    def request_refused(self, route: str, status: int) -> None:
        """Count one request that was not let in."""
        self.request_ended(route, Seen(status, None, None, 0))

    def placed(self, operation: str, reason: str) -> None:
        self._placed_of(operation, reason).inc()

    def job_ended(self, operation: str, status: str) -> None:
        self._jobs.labels(operation, status).inc()

    def tokens(self, model: str, count: int) -> None:
        self._tokens_of(model).inc(count)

    def route(self) -> Route:
        async def scrape(request: Request) -> Response:
            return Response(
                generate_latest(self._registry), headers={"content-type": CONTENT_TYPE_LATEST}
            )

        return Route("/metrics", scrape, methods=["GET"])


def device_gauges(
    devices: Iterable[Device], of: dict[str, str]
) -> Iterator[tuple[str, str, dict[str, str], float]]:
    """The memory of devices; see :data:`Gauges`. :param of: labels beside the device's own"""
    for device in devices:
        labels = {**of, "device": device.id, "name": device.name}
        yield "hive_device_memory_total_mib", "Memory.", labels, device.vram_total_mb
        yield "hive_device_memory_free_mib", "Free memory.", labels, device.vram_free_mb


def trunk_gauges(trunks: Iterable[Counters]) -> Iterator[tuple[str, str, dict[str, str], float]]:
    """What all trunks of a daemon hold together; see :data:`Gauges`."""
    each = list(trunks)
    streams = sum(one.streams for one in each)
    yield "hive_trunks", "Trunks that are open.", {}, len(each)
    yield "hive_trunk_streams", "Requests on trunks.", {}, streams
    owed, held = sum(one.owed for one in each), sum(one.held for one in each)
    yield "hive_trunk_owed_bytes", "Bytes of answers that callers have not taken.", {}, owed
    yield "hive_trunk_held_bytes", "Bytes of answers that wait for a trunk.", {}, held


class _Gauges:
    def __init__(self, gauges: Gauges) -> None:
        self._gauges = gauges

    def collect(self) -> Iterable[Metric]:
        families: dict[str, GaugeMetricFamily] = {}
        for name, help_text, labels, value in self._gauges():
            family = families.get(name)
            if family is None:
                family = families[name] = GaugeMetricFamily(name, help_text, labels=list(labels))
            family.add_metric(list(labels.values()), value)
        return families.values()
