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
import secrets
import signal
import time
from collections import deque
from pathlib import Path

import aiohttp
import psutil

from hive_agent.processes import (
    group_lives,
    oom_kills,
    signal_group,
    signal_name,
    wait_for_group,
    without_secrets,
    write_private,
)
from hive_agent.workers.base import FREE_SPACE, BaseWorker, broke, full
from hive_agent.workers.command import launch
from hive_agent.workers.engine_log import KILLED_FOR_MEMORY, Failure, explain, last_words, progress
from hive_agent.workers.log_file import LogFile
from hive_agent.workers.records import (
    NONCE,
    REST_S,
    TERM_S,
    Records,
    WorkerRecord,
    remove_files,
)
from hive_agent.workers.spec import WorkerSpec
from hive_agent.workers.turns import Turns
from operations.errors import Unavailable, WorkerBroke
from wire.door.lines import HttpLine
from wire.http1.client import KEEP, Pool, unix

log = logging.getLogger(__name__)

CRASHES = 5  # this many deaths within CRASH_WINDOW_S and it is not started again
CRASH_WINDOW_S = 120.0
FIRST_POLL_S, LAST_POLL_S = 0.02, 0.5
HEALTH_MISSES = 3
JOBS_SHARE = 4  # of an engine's connections, jobs get one in so many
DISTURBED_RETRIES = 2  # of a load that failed because others gave back memory meanwhile


class Worker(BaseWorker):
    """A worker that is a process of ours, started again when it dies."""

    base_url = "http://worker"
    socket: Path
    log_path: Path

    def __init__(
        self,
        spec: WorkerSpec,
        *,
        folder: Path,
        logs: Path,
        records: Records,
        turns: Turns,
        hive_id: str,
        health_s: float,
    ) -> None:
        """
        :param folder: where its socket goes, mode 0700, on a short path
        :param turns: of all workers of this machine
        :param health_s: seconds between questions for its health, and for each answer
        """
        super().__init__(spec, hive_id=hive_id, health_s=health_s)
        self.socket = folder / f"{spec.worker_id}.sock"
        self.log_path = logs / f"{spec.worker_id}.log"
        self._log = LogFile(self.log_path)
        self._kills_before = 0
        self.failure: Failure | None = None
        self._given_up = False
        self._doubted = asyncio.Event()
        self._records = records
        self._turns = turns
        self._process: asyncio.subprocess.Process | None = None
        self._command = launch(spec, self.socket)
        # An idle connection would hold a thread of llama.cpp's server: none is kept open. Most
        # requests are relayed, so they get most of what it can have; jobs get the rest.
        limit = self._command.connections
        jobs = limit // JOBS_SHARE
        self.http = self._session(jobs)
        self._health = self._session(1)
        name = f"worker {spec.worker_id}"
        self.line = HttpLine(
            Pool(
                unix(str(self.socket)),
                host=b"worker",
                name=name,
                hop="worker",
                limit=limit - jobs,
                keep=0 if limit else KEEP,
            )
        )

    def give_up(self, why: str) -> None:
        """Fail now, and do not start again: its device is lost."""
        if self.state in ("failed", "stopping"):
            return
        self._given_up = True
        self._fail(why)
        if self._process is not None:
            signal_group(self._process.pid, signal.SIGKILL)

    def doubt(self) -> None:
        self._doubted.set()

    async def _hang_up(self) -> None:
        await self.http.close()
        await self._health.close()
        self.line.pool.close()

    def sample(self) -> None:
        """Measure the process's resident memory."""
        try:
            self.rss_mb = psutil.Process(self.pid).memory_info().rss >> 20 if self.pid else None
        except (psutil.Error, OSError):  # no descriptor left, for one
            self.rss_mb = None

    def log_tail(self, lines: int) -> list[str]:
        """The last lines of the engine's log."""
        return self._log.tail(lines)

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
                try:
                    loaded = await self._load()
                except OSError as error:
                    self.failure = not_started(error)
                    self._fail(str(self.failure))
                    return
                if isinstance(loaded, str):
                    died = loaded
                else:
                    self._enter("ready")
                    self._is_up()
                    died = await self._until_dead(loaded)
                if self._given_up:
                    return
                if not self.came_up.done() and not self._disturbed_again():
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
                self.told(f"starting again: {died}")
                await asyncio.sleep(backoff_s(len(crashes)))
        except asyncio.CancelledError:
            raise
        except Exception as error:
            log.exception("the owner of worker %s broke", self.spec.worker_id)
            self._fail(broke(error))
        finally:
            await self._end_group()
            remove_files(self.socket)
            self._records.remove(self.spec.worker_id)
            if not self.came_up.done():
                self._not_up(Unavailable(f"Worker {self.spec.worker_id} was stopped as it loaded."))

    async def _load(self) -> asyncio.subprocess.Process | str:
        """The engine once it is healthy, or why it is not; then nothing of it runs.

        :raises OSError: it cannot be started
        """
        async with self._turns.taken(self.spec, self._tell_step) as turn:
            loaded: asyncio.subprocess.Process | str = "it was given up"
            try:
                if not self._given_up:
                    process = await self._launch()
                    died = await self._until_ready(process)
                    if not self._given_up:
                        loaded = process if died is None else died
            finally:
                self.disturbed = turn.disturbed
                if isinstance(loaded, str):
                    await self._end_group()  # before the next turn: its memory comes back
        return loaded

    async def _launch(self) -> asyncio.subprocess.Process:
        command = self._command
        nonce = secrets.token_hex(16)
        self._log.begin()
        self.socket.unlink(missing_ok=True)  # vLLM fails if it is there
        self._kills_before = oom_kills()
        for path, text in command.files.items():
            write_private(path, text)
        with self.log_path.open("ab") as output:
            process = await asyncio.create_subprocess_exec(
                *command.argv,
                env={**command.environment(without_secrets(os.environ)), NONCE: nonce},
                cwd=self.socket.parent,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self._process, self.pid = process, process.pid
        if self._given_up:  # meanwhile
            signal_group(process.pid, signal.SIGKILL)
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
                self._tell_progress()
                pause = min(pause * 1.5, LAST_POLL_S)
        finally:
            exited.cancel()
        return await self._why(process.returncode)

    def _tell_progress(self) -> None:
        for step in progress(self._log.news()):
            self._tell_step(step)

    def _tell_step(self, step: str) -> None:
        self.progress = step
        self.told(step)
        self.changed()

    async def _until_dead(self, process: asyncio.subprocess.Process) -> str:
        """Watch a ready engine; why it must be started again.

        A doubt has it asked at once. Then it is lost if it says itself that it is not well; its
        silence counts only where it was asked by the clock, for it may be busy.
        """
        self._doubted.clear()
        exited = asyncio.create_task(process.wait())
        doubted = asyncio.create_task(self._doubted.wait())
        misses, due = 0, time.monotonic() + self._health_s
        try:
            while misses < HEALTH_MISSES:
                await asyncio.wait(
                    [exited, doubted],
                    timeout=max(0.0, due - time.monotonic()),
                    return_when=asyncio.FIRST_COMPLETED,
                )
                if exited.done():
                    return await self._why(process.returncode)
                by_clock, was_doubted = time.monotonic() >= due, doubted.done()
                if was_doubted:
                    self._doubted.clear()
                    doubted = asyncio.create_task(self._doubted.wait())
                status = await self._asked_for_health()
                if by_clock:
                    due = time.monotonic() + self._health_s
                if was_doubted and status is not None and status >= 500:
                    return await self._why_unwell(status)
                if status == 200:
                    misses = 0
                elif by_clock:
                    misses += 1
        finally:
            exited.cancel()
            doubted.cancel()
        return f"the engine did not answer its health check {HEALTH_MISSES} times"

    async def _healthy(self) -> bool:
        return await self._asked_for_health() == 200

    async def _asked_for_health(self) -> int | None:
        """The status that it answers with; None if it does not answer."""
        timeout = aiohttp.ClientTimeout(total=self._health_s)
        try:
            async with self._health.get("http://worker/health", timeout=timeout) as response:
                return response.status
        except (aiohttp.ClientError, TimeoutError, OSError):
            return None

    async def _end_group(self) -> None:
        """SIGTERM, then SIGKILL; returns when the process is reaped and its group is gone.

        The rest of the group ends by itself where it can: vLLM's processes would leave their shared
        memory behind otherwise.
        """
        process, self._process = self._process, None
        if process is not None:
            signal_group(process.pid, signal.SIGTERM)
            try:
                async with asyncio.timeout(TERM_S):
                    await process.wait()
            except TimeoutError:
                signal_group(process.pid, signal.SIGKILL)
                await process.wait()
            if group_lives(process.pid):
                await asyncio.to_thread(wait_for_group, process.pid, REST_S)
            signal_group(process.pid, signal.SIGKILL)  # stragglers
            self._turns.gave_back(self.spec)
        self.pid = None
        self.socket.unlink(missing_ok=True)

    async def _why(self, returncode: int | None) -> str:
        """Why the process ended, as the engine's log tells it."""
        self.failure, said_last = await asyncio.to_thread(self._read_log)
        if returncode is not None and returncode < 0:
            ended = f"the engine was ended by {signal_name(-returncode)}"
        else:
            ended = f"the engine exited with status {returncode}"
        killed = self.failure is not None and self.failure.kind == "process_killed"
        if (killed or returncode == -signal.SIGKILL) and oom_kills() > self._kills_before:
            self.failure = KILLED_FOR_MEMORY
        if self.failure is not None:
            return f"{ended}: {self.failure}"
        return ended if returncode and returncode < 0 else f"{ended}: {said_last}"

    async def _why_unwell(self, status: int) -> str:
        """Why an engine whose server still answers has to be started again."""
        self.failure, _ = await asyncio.to_thread(self._read_log)
        said = f"the engine's server says that the engine is lost ({status})"
        return f"{said}: {self.failure}" if self.failure else said

    def _read_log(self) -> tuple[Failure | None, str]:
        lines = self._log.of_last_start()
        return explain(lines), last_words(lines)

    def _disturbed_again(self) -> bool:
        """Whether its load failed for no fault of its own, and not too often yet."""
        disturbed = self.failure is not None and self.failure.kind == "gpu_disturbed"
        return disturbed and self.restarts < DISTURBED_RETRIES

    def _fail(self, why: str) -> None:
        self._enter("failed", why)
        self._not_up(
            WorkerBroke(
                f"Worker {self.spec.worker_id} did not come up: {why.rstrip('.')}. "
                f"The engine's log is {self.log_path}.",
                hop="worker",
                code=self.failure.kind if self.failure else None,
                retryable=False,
            )
        )


def not_started(error: OSError) -> Failure:
    """Why an engine's process could not be started at all."""
    about = f": {error.filename}" if error.filename else ""
    why = f"{error.strerror or error}{about}"
    if full(error):
        return Failure("disk_full", "the disk of the state folder is full", why, FREE_SPACE)
    return Failure(
        "engine_broken",
        "the engine could not be started",
        why,
        "See 'hive engines ls'; if its environment was removed, install it again with "
        "'hive engines install' and load the model again.",
    )


def backoff_s(crashes: int) -> float:
    """How long to wait before starting again, by the deaths within the window.

    Not at all after the first, then 0.5 s, doubling.
    """
    return 0.0 if crashes <= 1 else min(0.5 * 2 ** (crashes - 2), 30.0)
