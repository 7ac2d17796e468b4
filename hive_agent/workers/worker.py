"""One worker: a process, the task that owns it, and what is known of it.

============ ================================================== ==============================
state        meaning                                            next
============ ================================================== ==============================
starting     the process runs for the first time, not healthy   ready, failed, stopping
ready        takes requests                                     restarting, stopping
restarting   it died or hung; it is being started again         ready, failed, stopping
failed       did not come up, or died too often; nothing runs   stopping
stopping     no new requests; running ones may finish           (gone)
============ ================================================== ==============================
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import secrets
import signal
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path

import aiohttp
import psutil

from hive_agent.workers.command import launch
from hive_agent.workers.records import NONCE, TERM_S, Records, WorkerRecord, signal_group
from hive_agent.workers.spec import WorkerSpec
from operations.errors import HiveError, Unavailable, WorkerBroke
from operations.hosts import WorkerInfo, WorkerState
from wire.inflight import InFlight
from wire.log import outcome

log = logging.getLogger(__name__)

CRASHES = 5  # this many deaths within CRASH_WINDOW_S and it is not started again
CRASH_WINDOW_S = 120.0
FIRST_POLL_S, LAST_POLL_S = 0.02, 0.5
HEALTH_MISSES = 3
LOG_LIMIT_BYTES = 16 * 1024 * 1024

SECRET = re.compile(r"^HIVE_|TOKEN|SECRET|PASSWORD|API_KEY|CREDENTIAL")


class Worker:
    """A supervised worker. All methods belong to the agent's event loop."""

    def __init__(
        self,
        spec: WorkerSpec,
        *,
        folder: Path,
        logs: Path,
        records: Records,
        hive_id: str,
        health_s: float,
    ) -> None:
        """
        :param folder: where its socket goes, mode 0700, on a short path
        :param health_s: seconds between questions for its health, and for each answer
        """
        self.spec = spec
        self.state: WorkerState = "starting"
        self.problem: str | None = None
        self.pid: int | None = None
        self.requests = InFlight()
        self.restarts = 0
        self.rss_mb: int | None = None  # MiB, as last sampled
        self.created_at = time.time()
        self.socket = folder / f"{spec.worker_id}.sock"
        self.log_path = logs / f"{spec.worker_id}.log"
        self.changed: Callable[[], None] = lambda: None
        self.gone: Callable[[], None] = lambda: None
        self._given_up = False
        self.ready_at: float | None = None  # monotonic; None while it is not ready
        self.came_up: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.came_up.add_done_callback(_retrieved)
        self._records = records
        self._hive_id = hive_id
        self._health_s = health_s
        self._process: asyncio.subprocess.Process | None = None
        self._owner: asyncio.Task[None] | None = None
        self._stopping: asyncio.Task[None] | None = None
        self._hurry = asyncio.Event()
        self._command = launch(spec, self.socket)
        # An idle connection would hold a thread of llama.cpp's server: none is kept open.
        self.http = self._session(self._command.connections)
        self._health = self._session(1)

    def start(self) -> None:
        self._owner = asyncio.create_task(self._own(), name=self.spec.worker_id)

    async def stop(self, drain_s: float) -> None:
        """No new requests; running ones may finish for ``drain_s`` seconds; then the group ends.

        Fine before the start has finished, and fine twice: there is one stop, which everybody
        waits for and nobody cancels. ``drain_s`` of 0 cuts short one that drains.
        """
        if drain_s <= 0:
            self._hurry.set()
        if self._stopping is None:
            self._enter("stopping")
            name = f"stop {self.spec.worker_id}"
            self._stopping = asyncio.create_task(self._stop(drain_s), name=name)
        await asyncio.shield(self._stopping)

    def give_up(self, why: str) -> None:
        """Fail now, and do not start again: its device is lost."""
        if self.state in ("failed", "stopping"):
            return
        self._given_up = True
        self._fail(why)
        if self._process is not None:
            signal_group(self._process.pid, signal.SIGKILL)

    async def _stop(self, drain_s: float) -> None:
        waits = [
            asyncio.create_task(self.requests.settled(drain_s)),
            asyncio.create_task(self._hurry.wait()),
        ]
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
        if self._owner is not None:
            self._owner.cancel()  # once: its end is the end of the process group
            await asyncio.wait([self._owner])
        await self.http.close()
        await self._health.close()
        self.gone()

    def info(self) -> WorkerInfo:
        return WorkerInfo(
            worker_id=self.spec.worker_id,
            pid=self.pid,
            model=self.spec.model.id,
            digest=self.spec.model.digest,
            engine=self.spec.engine,
            device=self.spec.device,
            devices=self.spec.devices,
            state=self.state,
            slots=self.spec.slots,
            in_flight=self.requests.count,
            restarts=self.restarts,
            started_at=self.created_at,
            rss_mb=self.rss_mb,
            context_length=self.spec.context_length,
            tasks=self.spec.tasks,
            problem=self.problem,
            hive_id=self._hive_id,
            socket=str(self.socket),
            log=str(self.log_path),
        )

    def sample(self) -> None:
        """Measure the process's resident memory."""
        try:
            self.rss_mb = psutil.Process(self.pid).memory_info().rss >> 20 if self.pid else None
        except (psutil.Error, OSError):  # no descriptor left, for one
            self.rss_mb = None

    def log_tail(self, lines: int) -> list[str]:
        """The last lines of the engine's log."""
        if not lines:
            return []
        try:
            with self.log_path.open("rb") as file:
                file.seek(0, os.SEEK_END)
                file.seek(max(0, file.tell() - 512 * lines))
                return file.read().decode("utf-8", "replace").splitlines()[-lines:]
        except OSError:
            return []

    def _session(self, connections: int) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(
            connector=aiohttp.UnixConnector(str(self.socket), limit=connections, force_close=True),
            timeout=aiohttp.ClientTimeout(total=None),
            auto_decompress=False,
        )

    # -- the owner ---------------------------------------------------------------------------

    async def _own(self) -> None:
        crashes: deque[float] = deque()
        try:
            while not self._given_up:
                process = await self._launch()
                died = await self._until_ready(process)
                if died is None and not self._given_up:
                    self._enter("ready")
                    if not self.came_up.done():
                        self.came_up.set_result(None)
                    died = await self._until_dead(process)
                if self._given_up:
                    return
                if died is not None and not self.came_up.done():
                    self._fail(died)
                    return
                await self._end_group()
                now = time.monotonic()
                crashes.append(now)
                while now - crashes[0] > CRASH_WINDOW_S:
                    crashes.popleft()
                if len(crashes) >= CRASHES:
                    self._fail(f"{died}; it died {CRASHES} times within {CRASH_WINDOW_S:.0f} s")
                    return
                self.restarts += 1
                self._enter("restarting", died)
                await asyncio.sleep(backoff_s(len(crashes)))
        except asyncio.CancelledError:
            raise
        except Exception as error:
            log.exception("the owner of worker %s broke", self.spec.worker_id)
            self._fail(f"{type(error).__name__} in the agent; see its log")
        finally:
            await self._end_group()
            self._records.remove(self.spec.worker_id)
            if not self.came_up.done():
                self._not_up(Unavailable(f"Worker {self.spec.worker_id} was stopped as it loaded."))

    async def _launch(self) -> asyncio.subprocess.Process:
        command = self._command
        nonce = secrets.token_hex(16)
        if self.log_path.exists() and self.log_path.stat().st_size > LOG_LIMIT_BYTES:
            self.log_path.replace(self.log_path.with_suffix(".log.1"))
        with self.log_path.open("ab") as output:
            process = await asyncio.create_subprocess_exec(
                *command.argv,
                env={**without_secrets(os.environ), **command.env, NONCE: nonce},
                cwd=self.socket.parent,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self._process, self.pid = process, process.pid
        with contextlib.suppress(psutil.Error):
            self._records.write(
                WorkerRecord(
                    worker_id=self.spec.worker_id,
                    pid=process.pid,
                    started=psutil.Process(process.pid).create_time(),
                    nonce=nonce,
                    socket=str(self.socket),
                    model=self.spec.model.id,
                    device=self.spec.device,
                )
            )
        self.changed()
        return process

    async def _until_ready(self, process: asyncio.subprocess.Process) -> str | None:
        """Wait until the engine is healthy; why it died otherwise."""
        exited = asyncio.create_task(process.wait())
        pause = FIRST_POLL_S
        try:
            while not exited.done():
                if await self._healthy():
                    return None
                await asyncio.wait([exited], timeout=pause)
                pause = min(pause * 1.5, LAST_POLL_S)
        finally:
            exited.cancel()
        return self._why(process.returncode)

    async def _until_dead(self, process: asyncio.subprocess.Process) -> str:
        """Watch a ready engine; why it must be started again."""
        exited = asyncio.create_task(process.wait())
        misses = 0
        try:
            while misses < HEALTH_MISSES:
                done, _ = await asyncio.wait([exited], timeout=self._health_s)
                if done:
                    return self._why(process.returncode)
                misses = 0 if await self._healthy() else misses + 1
        finally:
            exited.cancel()
        return f"the engine did not answer its health check {HEALTH_MISSES} times"

    async def _healthy(self) -> bool:
        timeout = aiohttp.ClientTimeout(total=self._health_s)
        try:
            async with self._health.get("http://worker/health", timeout=timeout) as response:
                return response.status == 200
        except (aiohttp.ClientError, TimeoutError, OSError):
            return False

    async def _end_group(self) -> None:
        """SIGTERM, then SIGKILL; returns when the process is reaped."""
        process, self._process = self._process, None
        if process is not None:
            signal_group(process.pid, signal.SIGTERM)
            try:
                async with asyncio.timeout(TERM_S):
                    await process.wait()
            except TimeoutError:
                signal_group(process.pid, signal.SIGKILL)
                await process.wait()
            signal_group(process.pid, signal.SIGKILL)  # stragglers of the group
        self.pid = None
        self.socket.unlink(missing_ok=True)

    def _why(self, returncode: int | None) -> str:
        """Why the process ended, as the engine's last words tell it."""
        if returncode is not None and returncode < 0:
            return f"the engine was ended by {signal_name(-returncode)}"
        words = [line.strip() for line in self.log_tail(20) if line.strip()]
        errors = [line for line in words if line.startswith("error:")]
        last = (errors or words or ["it said nothing"])[-1].removeprefix("error: ")
        return f"the engine exited with status {returncode}: {last[:300]}"

    def _fail(self, why: str) -> None:
        self._enter("failed", why)
        self._not_up(
            WorkerBroke(
                f"Worker {self.spec.worker_id} did not come up: {why}. "
                f"The engine's log is {self.log_path}.",
                hop="worker",
                retryable=False,
            )
        )

    def _not_up(self, error: HiveError) -> None:
        if not self.came_up.done():
            self.came_up.set_exception(error)

    def _enter(self, state: WorkerState, problem: str | None = None) -> None:
        if self.state == "stopping":
            return
        self.state, self.problem = state, problem
        self.ready_at = time.monotonic() if state == "ready" else None
        level = logging.WARNING if problem else logging.INFO
        outcome(
            "worker",
            level=level,
            worker=self.spec.worker_id,
            state=state,
            model=self.spec.model.id,
            device=self.spec.device,
            pid=self.pid,
            why=problem,
        )
        self.changed()


def without_secrets(environment: Mapping[str, str]) -> dict[str, str]:
    """What an engine may know of the agent's environment: it parses other people's files."""
    return {name: value for name, value in environment.items() if not SECRET.search(name)}


def signal_name(signum: int) -> str:
    try:
        return signal.Signals(signum).name
    except ValueError:  # a real-time signal
        return f"signal {signum}"


def backoff_s(crashes: int) -> float:
    """How long to wait before starting again, by the deaths within the window.

    Not at all after the first, then 0.5 s, doubling.
    """
    return 0.0 if crashes <= 1 else min(0.5 * 2 ** (crashes - 2), 30.0)


def _retrieved(came_up: asyncio.Future[None]) -> None:
    """Nobody may be waiting; then a failure is in the worker's state and needs no warning."""
    if not came_up.cancelled():
        came_up.exception()
