"""The central daemon: what it owns, and what it does with each operation."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncGenerator, Callable, Collection, Iterable
from functools import partial
from typing import Any, assert_never

from pydantic import SecretStr, ValidationError
from pydantic_core import to_json
from starlette.types import ASGIApp

from operations import events
from operations.errors import HiveError, InvalidRequest, NotFound
from operations.hosts import (
    VERSION,
    Fit,
    Health,
    HealthWorker,
    Heartbeat,
    HiveInfo,
    Info,
    Ready,
    Task,
    Welcome,
)
from operations.operations import (
    DeviceList,
    EngineDelete,
    EngineInstall,
    EngineList,
    EngineModels,
    HiveCheck,
    Infer,
    ModelDelete,
    ModelDownload,
    ModelFit,
    ModelGet,
    ModelList,
    ModelLoad,
    ModelUnload,
    Operation,
    QueenCheck,
    Status,
    WorkerProcessDelete,
    WorkerProcessGet,
    WorkerProcessList,
    WorkerSpawn,
)
from queen.app import build
from queen.direct import Direct
from queen.jobs import Forward, QueenJobs
from queen.lines import HiveLines
from queen.processes import Processes
from queen.queue_house import Opened, QueueHouse, Work
from queen.registry import Registry, gathered
from queen.routes import Routes
from queen.scheduler import (
    Placement,
    full_name,
    named,
    place,
    place_worker,
    to_be_asked,
    verdict_for,
)
from queen.settings import QueenSettings
from queen.spread import Spread
from queen.tasks_api import task_routes
from queen.trunks import Trunks
from wire import sse
from wire.door import Doorway
from wire.door.quick import Quick
from wire.door.relay import Lease, Upstream, relaying
from wire.gate import Gate
from wire.inflight import InFlight
from wire.jobs import Job, JobTable, Runner, tell
from wire.keys import Caller
from wire.mdns import Browser
from wire.metrics import Metrics, device_gauges, trunk_gauges
from wire.openai import RELAYED
from wire.serve import Listening, Stop
from wire.trust import Tokens

log = logging.getLogger(__name__)

LAST_WORDS_S = 3.0
VERDICT_S = 4.0
"""What a hive gets to say whether a worker fits; it reads a header and looks at its devices."""


class Queen:
    """Implements :class:`wire.serve.Daemon` and :class:`wire.openai.Backend`."""

    role = "queen"

    def __init__(self, settings: QueenSettings, listening: Listening, stop: Stop) -> None:
        """:raises CannotStart: the secret, or the list of revoked keys, cannot be read"""
        self.settings = settings
        self.stop = stop
        stop.at_once = self._refuse_work
        self.metrics = Metrics(self._gauges)
        self.name = f"queen-{secrets.token_hex(4)}"
        self.table = JobTable(None, ended=self.metrics.job_ended)
        self._passing = InFlight()
        self.trust = settings.trust(
            listening,
            role="queen",
            id=self.name,
            instance=secrets.token_hex(8),
            kept=settings.state_dir,
        )
        self.registry = Registry(
            self.name, self.trust.secret, self.trust.refusals, self._heard, self._doubted
        )
        self.routes = Routes(self.registry)
        self.trunks = Trunks() if settings.trunks else None
        self.lines = HiveLines(self.trunks)
        self.registry.forgotten = self.lines.forget
        self._upstreams: dict[tuple[str, str], Upstream] = {}
        self._upstreams_at = -1
        self.jobs = QueenJobs(
            self.table, self.route, self.registry, self.lines, self.metrics.placed, self._passing
        )
        self.targets = settings.targets()
        self.house = QueueHouse(settings, self.trust.secret, self._queue_opened)
        self.task_routes = task_routes(self.house, self.targets)
        self.trust.tokens = Tokens(plain(settings.internal_token), plain(settings.callback_secret))
        self.gate = Gate(self.trust, settings.max_body)
        relay = relaying(self.lease, "queen", self.metrics)
        self.direct = Direct(self.trust.secret, self.registry, self.jobs.placed)
        routes = dict.fromkeys(RELAYED, self.direct.before(relay, self._chosen, self.metrics))
        self.processes = Processes(self, listening) if listening.others else None
        opened = self.processes.start if self.processes else lambda front: None
        self.doorway = Doorway(
            self.gate,
            "queen",
            routes,
            streams=self.jobs.streams,
            quick=Quick(self.task_routes, self.trust.tell),
            opened=opened,
            refused=self.metrics.request_refused,
        )
        self._spread = Spread(self.registry, self.trust.revocations)
        self._browser: Browser | None = None
        if self.trust.secret is not None:
            self._browser = Browser(
                self.registry.sighted, self.registry.withdrawn, wanted=settings.interface
            )
        self._cascade = False
        self.info = Info(
            role="queen",
            id=self.name,
            version=VERSION,
            base_url=listening.url,
            port=listening.port,
            features=["jobs", "openai", "hives", "metrics", "queue"],
        )

    async def start(self) -> ASGIApp:
        for hive_url in self.settings.hives:
            self.registry.add(hive_url, "flag")
        if self._browser is not None:
            await self._browser.start()
        await self.house.start()
        return build(self)

    async def drain(self) -> None:
        """Streams that pass through may finish until the deadline."""
        if self._cascade:
            await self._shut_hives_down()
        # Her hives drain as long as she does: a little longer, and their last words pass, too.
        patience_s = self.settings.drain_seconds + LAST_WORDS_S
        settled, _ = await asyncio.gather(
            self._passing.settled(patience_s), self.house.drain(patience_s)
        )
        if not settled:
            log.warning("%d streams were cut at the deadline", self._passing.count)
        self.jobs.close()

    def _refuse_work(self) -> None:
        self.table.closed = True
        self.house.stop()

    async def close(self) -> None:
        await self.house.close()
        self.jobs.close()
        await self.table.close(0)
        if self._browser is not None:
            await self._browser.stop()
        await self._spread.close()
        if self.processes is not None:
            self.processes.stop()
        if self.trunks is not None:
            await self.trunks.close()
        await self.registry.close()
        if self.processes is not None:
            await self.processes.close()
        self.lines.close()

    # -- operations --------------------------------------------------------------------------

    async def route(
        self, operation: Operation, failed: frozenset[str] = frozenset()
    ) -> Runner | Forward:
        """The queen's own work as a runner; anything else goes to a hive.

        :param failed: hives that could not be reached for it, each taken only if it is the last

        :raises HiveError: no hive can do it, and why
        """
        hives = self.registry.hives()
        hive_id = operation.hive_id
        match operation:
            case Infer():
                chosen = place(
                    operation.model,
                    hives,
                    hive_id=hive_id,
                    device=operation.device,
                    worker_id=operation.worker_id,
                    avoid=failed,
                )
                return Forward(chosen.hive_id, chosen.hive_url, chosen.reason, chosen)
            case WorkerSpawn() if hive_id is None and operation.options.engine != "external":
                return await self._place_worker(operation, hives)
            case Status() if hive_id is None:
                return tell(self.status)
            case QueenCheck() if hive_id is None:
                return self._check
            case WorkerProcessList() if hive_id is None:
                return tell(lambda: {"workers": gathered(self.registry.hives(), "workers")})
            case ModelList() if hive_id is None:
                return tell(lambda: {"models": gathered(self.registry.hives(), "models")})
            case DeviceList() if hive_id is None:
                return tell(lambda: {"devices": gathered(self.registry.hives(), "devices")})
            case EngineList() if hive_id is None:
                return lambda job: self._engines(job, operation)
            case ModelFit() if hive_id is None:
                return lambda job: self._fit(job, operation)
            case WorkerProcessGet() | WorkerProcessDelete() if hive_id is None:
                return forward(self._holder_of_worker(operation, hives), "holds_worker")
            case (
                Status()
                | WorkerSpawn()
                | WorkerProcessList()
                | WorkerProcessGet()
                | WorkerProcessDelete()
                | ModelDownload()
                | ModelList()
                | ModelGet()
                | ModelDelete()
                | ModelLoad()
                | ModelUnload()
                | ModelFit()
                | EngineList()
                | EngineModels()
                | EngineInstall()
                | EngineDelete()
                | DeviceList()
                | HiveCheck()
                | QueenCheck()
            ):
                return forward(self._asked_for(operation, hives), "named")
        assert_never(operation)

    async def _place_worker(self, operation: WorkerSpawn, hives: list[HiveInfo]) -> Forward:
        """The hive for a new worker, by what each says that would have to load it."""
        model, kind = operation.model, operation.worker
        asked = to_be_asked(model, kind, hives)
        question = ModelFit(model=model, options=operation.options)

        async def verdict(hive: HiveInfo) -> Fit | None:
            try:
                async with asyncio.timeout(VERDICT_S):
                    fits = await self._ask(hive, question, "fits")
                return verdict_for(operation, [Fit.model_validate(fit) for fit in fits])
            except (HiveError, TimeoutError, ValidationError):
                return None  # it may be chosen all the same, and then says itself what is wrong

        answers = await asyncio.gather(*map(verdict, asked))
        verdicts = {fit.hive_id: fit for fit in answers if fit is not None}
        chosen = place_worker(model, kind, hives, verdicts, force=operation.force)
        return forward(chosen, "fits" if chosen.hive_id in verdicts else "placed")

    def _asked_for(self, operation: Operation, hives: list[HiveInfo]) -> HiveInfo:
        """The hive that the operation names, or the only one there is."""
        if operation.hive_id is not None:
            return named(operation.hive_id, hives)
        online = [hive for hive in hives if hive.state == "online"]
        if len(online) == 1:
            return online[0]
        there = ", ".join(hive.hive_id for hive in online)
        if not online:
            return named("localhost", [])  # says that there is none, and what to do
        raise InvalidRequest(
            f"{operation.operation} needs a 'hive_id' where there are several hives: {there}. "
            "Name one of them (--hive).",
            param="hive_id",
        )

    def _holder_of_worker(
        self, operation: WorkerProcessGet | WorkerProcessDelete, hives: list[HiveInfo]
    ) -> HiveInfo:
        holders = [
            hive
            for hive in hives
            for worker in hive.workers
            if worker.worker_id == operation.worker_id
            or (operation.pid is not None and worker.pid == operation.pid)
        ]
        return holders[0] if len(holders) == 1 else self._asked_for(operation, hives)

    def status(self) -> dict[str, Any]:
        return {
            "role": "queen",
            "version": VERSION,
            "queen_id": self.name,
            "base_url": self.info.base_url,
            "hives": self.registry.hives(),
            "unheard": self.registry.unheard(),
            "jobs_in_flight": len(self.table.running) - 1,  # this job itself left out
        }

    async def _check(self, job: Job) -> Any:
        problems: list[str] = []
        hives = self.registry.hives()
        if not hives:
            problems.append("no hive is known; start one with 'hive agent'")
        for hive in hives:
            if hive.state != "online":
                problems.append(f"hive {hive.hive_id} is {hive.state}: {hive.problem}")
        for problem in problems:
            job.warn(problem)
        for hive in hives:
            if hive.state == "online":
                problems += await self._check_hive(job, hive)
        return {"ok": not problems, "problems": problems}

    async def _engines(self, job: Job, operation: EngineList) -> Any:
        """The engines of all hives."""
        return {"engines": await self._asked_of_all(job, operation, "engines")}

    async def _asked_of_all(
        self, job: Job, operation: EngineList | ModelFit, what: str
    ) -> list[Any]:
        """What all hives that are heard answer, in one list; who cannot say it, is warned of."""
        online = [hive for hive in self.registry.hives() if hive.state == "online"]

        async def ask(hive: HiveInfo) -> list[Any]:
            try:
                return await self._ask(hive, operation, what)
            except HiveError as error:
                job.warn(f"{hive.hive_id}: {error.message}")
                return []

        return [one for all_ in await asyncio.gather(*map(ask, online)) for one in all_]

    async def _ask(self, hive: HiveInfo, operation: EngineList | ModelFit, what: str) -> list[Any]:
        asked = operation.model_copy(update={"hive_id": hive.hive_id})
        answer = await self.registry.client(hive.hive_url).run(asked)
        return list(answer[what])

    async def _fit(self, job: Job, operation: ModelFit) -> Any:
        """What each hive says of its devices: from its disk, or from the hub."""
        name = full_name(operation.model, self.registry.hives())
        asked = operation.model_copy(update={"model": name})
        found = await self._asked_of_all(job, asked, "fits")
        if not found:
            raise NotFound(
                f"No hive can say what '{operation.model}' would take; the lines above say why. "
                "'hive models pull' fetches a model.",
                code="model_not_found",
                param="model",
            )
        return {"fits": found}

    async def _check_hive(self, job: Job, hive: HiveInfo) -> list[str]:
        """A hive's own check, its lines passed on under its name; the problems it found."""
        job.info(f"hive {hive.hive_id} at {hive.hive_url}, heard {hive.last_heard_s:.1f} s ago")

        def pass_on(line: str) -> None:
            for prefix, say in ((events.INFO, job.info), (events.WARN, job.warn)):
                if line.startswith(prefix):
                    say(f"{hive.hive_id}: {line.removeprefix(prefix).strip()}")

        try:
            client = self.registry.client(hive.hive_url)
            found = (await client.submit_and_stream(HiveCheck(), pass_on)).value()["problems"]
            return [f"{hive.hive_id}: {problem}" for problem in found]
        except HiveError as error:
            job.warn(f"{hive.hive_id}: {error.message}")
            return [f"{hive.hive_id}: {error.message}"]

    # -- for the routes ----------------------------------------------------------------------

    async def health(self) -> Health:
        """``queued``: requests for which no worker has a slot, and tasks of the durable queue."""
        heard = [hive for hive in self.registry.hives() if hive.state != "gone"]
        workers = [worker for hive in heard for worker in hive.workers]
        return Health(
            role="queen",
            version=VERSION,
            workers=[HealthWorker(id=worker.worker_id, free=worker.free) for worker in workers],
            queued=sum(max(0, worker.in_flight - worker.slots) for worker in workers)
            + await self.house.queued(),
        )

    def welcome(self, hello: Ready, caller: Caller) -> Welcome:
        """:raises HiveError: that hive is not taken in"""
        if hello.hive_url.rstrip("/") == self.info.base_url:
            raise InvalidRequest("ready: this URL is the queen's own.", param="hive_url")
        self.registry.ready(hello, caller)
        return Welcome(message=f"welcome, {hello.hive_id}", queen_id=self.name)

    async def heartbeats(self) -> AsyncGenerator[sse.Event, None]:
        """The queen's status every second, as her hives tell it, until she stops."""
        while not self.table.closed:
            yield sse.Event(to_json(self.status(), exclude_none=True).decode(), event="heartbeat")
            await asyncio.sleep(1)

    def shut_down(self) -> None:
        """Stop the hives, and then the queen."""
        self._cascade = True
        self.stop.ask("POST /v1/shutdown")

    def placed(
        self, model: str, task: Task, failed: Collection[str]
    ) -> tuple[Placement, Callable[[], None]]:
        """Choose a worker for an inference request, and count it there; what ends that.

        :param failed: ids of hives that could not be reached for it
        :raises HiveError: no hive can serve it, or the queen takes no work any more
        """
        chosen = self._chosen(model, task, failed)
        return chosen, self._counted(chosen)

    def lease(self, model: str, task: Task, failed: frozenset[str]) -> Lease:
        """See :data:`wire.door.relay.Find`."""
        avoid = {name.removeprefix("hive ") for name in failed} if failed else failed
        chosen = self._chosen(model, task, avoid)
        upstream = self._upstream(chosen)
        end = self._counted(chosen)
        return Lease(upstream, lambda error: end())

    def _counted(self, chosen: Placement) -> Callable[[], None]:
        self.metrics.placed("openai", chosen.reason)
        unload = self.registry.load(chosen)
        self._passing.begin()

        def end() -> None:
            unload()
            self._passing.end()

        return end

    def _upstream(self, chosen: Placement) -> Upstream:
        """The way to a hive for one of its models, made once and not for each request.

        :raises Unavailable: it is known no more
        """
        if self._upstreams_at != self.registry.changes:
            self._upstreams_at = self.registry.changes
            self._upstreams.clear()
        known = self._upstreams.get((chosen.hive_url, chosen.model))
        if known is None:
            peer = self.registry.peer(chosen.hive_url)
            known = self._upstreams[chosen.hive_url, chosen.model] = Upstream(
                line=self.lines.to(peer, chosen.hive_id),
                hop="hive",
                name=f"hive {chosen.hive_id}",
                model=chosen.model,
                tags={b"x-hive-id": chosen.hive_id.encode()},
                watch=partial(self.registry.watch, chosen.hive_url),
                renew=peer.renew,
            )
        return known

    def _chosen(self, model: str, task: Task, failed: Collection[str] = ()) -> Placement:
        self.table.check_open()
        return self.routes.place(model, task, failed)

    def served_models(self) -> list[dict[str, Any]]:
        served: dict[str, dict[str, Any]] = {}
        for hive in self.registry.hives():
            for worker in hive.workers if hive.state != "gone" else ():
                for name, _ in worker.answers_for if worker.state != "failed" else ():
                    entry = served.setdefault(
                        name,
                        {
                            "id": name,
                            "object": "model",
                            "created": int(worker.started_at),
                            "owned_by": "hive",
                            "hives": [],
                        },
                    )
                    if hive.hive_id not in entry["hives"]:
                        entry["hives"].append(hive.hive_id)
        return list(served.values())

    async def _shut_hives_down(self) -> None:
        async def shut(hive: HiveInfo) -> None:
            try:
                await self.registry.client(hive.hive_url).post("/v1/shutdown", timeout_s=5)
            except HiveError as error:
                log.warning("hive %s could not be shut down: %s", hive.hive_id, error.message)

        await asyncio.gather(*(shut(h) for h in self.registry.hives() if h.state != "gone"))

    def _heard(self, hive: HiveInfo, beat: Heartbeat) -> None:
        self._spread.heard(hive, beat)
        if self.trunks is not None:
            self.trunks.keep(self.registry.peer(hive.hive_url), hive.hive_id)
        if self.processes is not None:
            self.processes.heard(hive.hive_url, hive.hive_id)
        self.house.heard(hive.hive_id, beat.instance, partial(self.registry.watch, hive.hive_url))

    def _doubted(self, hive_url: str) -> None:
        if self.processes is not None:
            self.processes.doubted(hive_url)

    def _queue_opened(self, opened: Opened) -> list[Work]:
        """What goes on for the queue as long as it is open."""
        from queen.callbacks import Deliverer
        from queen.task_jobs import TaskJobs

        secret = plain(self.settings.callback_secret)
        return [
            Deliverer(opened.store, self.targets, secret=secret, key=opened.signing_key),
            TaskJobs(opened, self.name, self.jobs, self.registry, self.settings.task_jobs),
        ]

    def _gauges(self) -> Iterable[tuple[str, str, dict[str, str], float]]:
        if self.processes is not None:
            running = 1 + self.processes.ready
            yield "hive_queen_processes", "Processes that answer at the port.", {}, running
        for hive in self.registry.hives():
            tag = {"hive": hive.hive_id}
            up = 1.0 if hive.state == "online" else 0.0
            yield "hive_hive_online", "Whether a hive is heard from.", tag, up
            yield "hive_hive_workers", "Workers of a hive.", tag, len(hive.workers)
            yield "hive_hive_in_flight", "Requests on a hive.", tag, hive.in_flight
            yield from device_gauges(hive.devices, tag)
        if self.trunks is not None:
            yield from trunk_gauges(self.trunks.counters())
        for role in self.house.counted:
            for state, count in (
                ("queued", role.queued),
                ("delayed", role.delayed),
                ("leased", role.leased),
            ):
                labels = {"role": role.role, "state": state}
                yield "hive_tasks", "Tasks of the durable queue.", labels, count


def plain(secret: SecretStr | None) -> str | None:
    return None if secret is None else secret.get_secret_value()


def forward(hive: HiveInfo, reason: str) -> Forward:
    return Forward(hive.hive_id, hive.hive_url, reason)
