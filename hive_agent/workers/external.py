"""A worker that somebody else started: it is watched and asked, never started, stopped or killed.

============ ================================================== ==============================
state        meaning                                            next
============ ================================================== ==============================
starting     it was attached, and is asked for the first time   ready, restarting, stopping
ready        takes requests                                     restarting, stopping
restarting   it does not answer, refuses the key, or no longer  ready, stopping
             has the model; it is asked again and again
stopping     no new requests; running ones may finish           (gone)
============ ================================================== ==============================
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging

from hive_agent.workers import foreign
from hive_agent.workers.base import BaseWorker, broke
from hive_agent.workers.launch import DEFAULT_SLOTS
from hive_agent.workers.options import check
from hive_agent.workers.spec import WorkerSpec
from operations.errors import HiveError, InvalidRequest, Unavailable
from operations.hosts import ModelInfo
from operations.operations import WorkerOptions, WorkerSpawn

log = logging.getLogger(__name__)

DEVICE = "external"
MISSES = 3  # questions without a good answer, until requests go elsewhere
CERTAIN = {"engine_unreachable", "engine_key_refused", "model_not_found"}
"""What needs no second question: nothing listens there, the key is no good, the model is gone."""


def check_options(options: WorkerOptions) -> None:
    """:raises InvalidRequest: an option of another engine, or no ``url``"""
    check("external", options)
    if options.url is None:
        raise InvalidRequest(
            "An external engine is reached by its 'url'. Give http://host:port or unix:/path.",
            param="options.url",
        )


def decide(
    request: WorkerSpawn, address: foreign.Address, served: foreign.Served, *, worker_id: str
) -> WorkerSpec:
    """What a request for an external engine means, once its server has told what it serves."""
    options = request.options
    known = served.context_length
    return WorkerSpec(
        worker_id=worker_id,
        model=model_named(request.model, address, known),
        engine="external",
        devices=(DEVICE,),
        slots=options.slots or DEFAULT_SLOTS,
        context_length=options.context_length or known or 0,
        threads=0,
        options=options.model_copy(update={"url": str(address), "served_as": served.id}),
    )


def model_named(name: str, address: foreign.Address, context_length: int | None) -> ModelInfo:
    """The model of an external engine, identified by its name in Hive alone.

    No digest of its files can be had. So servers that are attached under one name are
    interchangeable because whoever attached them says so; ``name:latest`` is ``name``.
    """
    digest = hashlib.sha256(f"external\n{foreign.untagged(name)}".encode()).hexdigest()
    return ModelInfo(
        id=name,
        digest=f"sha256:{digest}",
        format="external",
        size_bytes=0,
        source="external",
        path=str(address),
        context_length=context_length,
        loaded=True,
    )


class External(BaseWorker):
    """A server that is attached. It is there until it is detached, however long it is away."""

    def __init__(self, spec: WorkerSpec, *, hive_id: str, health_s: float) -> None:
        super().__init__(spec, hive_id=hive_id, health_s=health_s)
        self._address = foreign.parse_address(spec.options.url or "")
        self._served_as = spec.options.served_as or spec.model.id
        self._others = 0
        self._lacks: set[str] = set()
        self._doubted = asyncio.Event()
        self.url = str(self._address)
        self.base_url = self._address.base_url
        self.http = foreign.session(self._address, spec.options.api_key)
        self.line = foreign.line(self._address, spec.options.api_key, f"worker {spec.worker_id}")

    @property
    def in_flight(self) -> int:
        """Requests of ours, and what others asked of it when it was last looked at."""
        return self.requests.count + self._others

    def doubt(self) -> None:
        if self.state == "ready":
            self._doubted.set()

    async def _hang_up(self) -> None:
        await self.http.close()
        self.line.pool.close()

    async def _own(self) -> None:
        misses = 0
        try:
            while True:
                try:
                    await self._look()
                except HiveError as error:
                    misses += 1
                    if misses >= MISSES or error.code in CERTAIN or not self.came_up.done():
                        self._lose(error)
                else:
                    misses = 0
                    if self.state != "ready":
                        self._enter("ready")
                        self._is_up()
                await self._pause()
        except asyncio.CancelledError:
            raise
        except Exception as error:
            log.exception("the owner of worker %s broke", self.spec.worker_id)
            self._enter("failed", broke(error))
        finally:
            self._not_up(Unavailable(f"Worker {self.spec.worker_id} was detached meanwhile."))

    async def _pause(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._health_s):
                await self._doubted.wait()
        self._doubted.clear()

    def _lose(self, error: HiveError) -> None:
        """No requests until it answers as it should."""
        self._others = 0
        self._lacks.clear()  # what comes back may be another server
        if self.state == "ready":
            self.restarts += 1
        if self.state != "restarting" or self.problem != error.message:
            self._enter("restarting", error.message)
        self._not_up(error)

    async def _look(self) -> None:
        """Ask for its health, its models and its load.

        :raises HiveError: it does not answer as it should
        """
        status, _ = await self._ask("/health")
        if status >= 500:
            raise Unavailable(
                f"{self._address} says that it is not well ({status}). Look at that server.",
                code="engine_unwell",
            )
        there = await foreign.models(self.http, self._address)
        foreign.find(self._served_as, there, str(self._address))
        status, metrics = await self._ask("/metrics")
        if status == 200:
            load = foreign.read_load(metrics.decode("utf-8", "replace"))
            others = max(0, load - self.requests.count)
            if others != self._others:
                self._others = others
                self.changed()

    async def _ask(self, path: str) -> tuple[int, bytes]:
        """What it answers, if it has the route; a server that lacks it is not asked again.

        :returns: status 404 where it lacks it
        """
        if path in self._lacks:
            return 404, b""
        status, body = await foreign.ask(self.http, self._address, path)
        if 300 <= status < 500 or status == 501:
            self._lacks.add(path)
            return 404, b""
        return status, body
