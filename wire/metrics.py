"""``GET /metrics``: what a daemon counts, in the Prometheus text format."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate

import msgspec
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.utils import floatToGoString
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from operations.hosts import Device
from wire.trunk.link import Counters

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)

Gauges = Callable[[], Iterable[tuple[str, str, dict[str, str], float]]]
"""Yields (name, help, labels, value) at each scrape, samples of one name together."""


Counts = Counter[tuple[str | int, ...]]
"""By the values of labels."""


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
    """The counters of one daemon: plain numbers, which become Prometheus's at each scrape."""

    def __init__(self, gauges: Gauges = tuple) -> None:
        self._gauges = gauges
        self._requests: Counts = Counter()
        self._ttft: defaultdict[str, _Times] = defaultdict(_Times)
        self._jobs: Counts = Counter()
        self._tokens: Counts = Counter()
        self._placed: Counts = Counter()
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def request_ended(self, route: str, seen: Seen) -> None:
        """Count one request on a route."""
        self._requests[route, seen.status] += 1
        if seen.ttft_s is not None:
            self._ttft[route].add(seen.ttft_s)
        if seen.model is not None and seen.tokens:
            self.tokens(seen.model, seen.tokens)

    def request_refused(self, route: str, status: int) -> None:
        """Count one request that was not let in."""
        self.request_ended(route, Seen(status, None, None, 0))

    def placed(self, operation: str, reason: str) -> None:
        self._placed[operation, reason] += 1

    def job_ended(self, operation: str, status: str) -> None:
        self._jobs[operation, status] += 1

    def tokens(self, model: str, count: int) -> None:
        self._tokens[(model,)] += count

    def collect(self) -> Iterator[Metric]:
        """See :class:`prometheus_client.registry.Collector`."""
        asked = "Inference requests."
        yield _counter("hive_requests", asked, ("route", "status"), self._requests)
        ttft = HistogramMetricFamily(
            "hive_ttft_seconds",
            "From a request's arrival to the first byte of its answer.",
            labels=["route"],
        )
        for route, times in self._ttft.items():
            ttft.add_metric([route], times.buckets(), times.sum_s)
        yield ttft
        jobs = "Jobs by how they ended."
        yield _counter("hive_jobs", jobs, ("operation", "status"), self._jobs)
        generated = "Tokens generated; of a stream, its events."
        yield _counter("hive_tokens_out", generated, ("model",), self._tokens)
        decided = "Decisions of the scheduler."
        yield _counter("hive_placements", decided, ("operation", "reason"), self._placed)
        yield from _gauged(self._gauges())

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


class _Times:
    """How often something took how long."""

    __slots__ = ("_counts", "sum_s")

    def __init__(self) -> None:
        self._counts = [0] * (len(SECONDS) + 1)  # the last: longer than all of them
        self.sum_s = 0.0

    def add(self, seconds: float) -> None:
        self._counts[bisect_left(SECONDS, seconds)] += 1
        self.sum_s += seconds

    def buckets(self) -> list[tuple[str, float]]:
        """Upper bound, and how many took no longer."""
        bounds = map(floatToGoString, (*SECONDS, math.inf))
        return list(zip(bounds, accumulate(self._counts), strict=True))


def _counter(
    name: str, help_text: str, labels: Sequence[str], counts: Counts
) -> CounterMetricFamily:
    family = CounterMetricFamily(name, help_text, labels=labels)
    for values, count in counts.items():
        family.add_metric([str(value) for value in values], count)
    return family


def _gauged(samples: Iterable[tuple[str, str, dict[str, str], float]]) -> Iterable[Metric]:
    families: dict[str, GaugeMetricFamily] = {}
    for name, help_text, labels, value in samples:
        family = families.get(name)
        if family is None:
            family = families[name] = GaugeMetricFamily(name, help_text, labels=list(labels))
        family.add_metric(list(labels.values()), value)
    return families.values()
