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
from collections.abc import Mapping
from pathlib import Path

import aiohttp
import psutil

from hive_agent.workers.base import BaseWorker
from hive_agent.workers.command import launch
from hive_agent.workers.engine_log import KILLED_FOR_MEMORY, Failure, explain, last_words, progress
from hive_agent.workers.log_file import LogFile
from hive_agent.workers.records import (
    NONCE,
    TERM_S,
    Records,
    WorkerRecord,
    remove_files,
    signal_group,
)
from hive_agent.workers.spec import WorkerSpec
from operations.errors import Unavailable, WorkerBroke

log = logging.getLogger(__name__)

CRASHES = 5  # this many deaths within CRASH_WINDOW_S and it is not started again
CRASH_WINDOW_S = 120.0
FIRST_POLL_S, LAST_POLL_S = 0.02, 0.5
HEALTH_MISSES = 3

SECRET = re.compile(r"^HIVE_|TOKEN|SECRET|PASSWORD|API_KEY|CREDENTIAL")


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
        hive_id: str,
        health_s: float,
    ) -> None:
        """
        :param folder: where its socket goes, mode 0700, on a short path
        :param health_s: seconds between questions for its health, and for each answer
        """
        super().__init__(spec, hive_id=hive_id, health_s=health_s)
        self.socket = folder / f"{spec.worker_id}.sock"
        self.log_path = logs / f"{spec.worker_id}.log"
        self._log = LogFile(self.log_path)
        self._kills_before = 0
        self.failure: Failure | None = None
        self._given_up = False
        self._records = records
        self._process: asyncio.subprocess.Process | None = None
        self._command = launch(spec, self.socket)
        # An idle connection would hold a thread of llama.cpp's server: none is kept open.
        self.http = self._session(self._command.connections)
        self._health = self._session(1)

    def give_up(self, why: str) -> None:
        """Fail now, and do not start again: its device is lost."""
        if self.state in ("failed", "stopping"):
            return
        self._given_up = True
        self._fail(why)
        if self._process is not None:
            signal_group(self._process.pid, signal.SIGKILL)

    async def _hang_up(self) -> None:
        await self.http.close()
        await self._health.close()

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
                process = await self._launch()
                died = await self._until_ready(process)
                if died is None and not self._given_up:
                    self._enter("ready")
                    self._is_up()
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
            remove_files(self.socket)
            self._records.remove(self.spec.worker_id)
            if not self.came_up.done():
                self._not_up(Unavailable(f"Worker {self.spec.worker_id} was stopped as it loaded."))

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
        return self._why(process.returncode)

    def _tell_progress(self) -> None:
        for step in progress(self._log.news()):
            self.progress = step
            self.told(step)
            self.changed()

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
        """Why the process ended, as the engine's log tells it."""
        lines = self._log.of_last_start()
        self.failure = explain(lines)
        if returncode is not None and returncode < 0:
            ended = f"the engine was ended by {signal_name(-returncode)}"
            if returncode == -signal.SIGKILL and oom_kills() > self._kills_before:
                self.failure = KILLED_FOR_MEMORY
        else:
            ended = f"the engine exited with status {returncode}"
        if self.failure is not None:
            return f"{ended}: {self.failure}"
        return ended if returncode and returncode < 0 else f"{ended}: {last_words(lines)}"

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


def write_private(path: Path, text: str) -> None:
    """Write a file that only its owner can read, over one that is there."""
    path.unlink(missing_ok=True)
    private = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with open(private, "w", encoding="utf-8") as file:
        file.write(text)


def oom_kills() -> int:
    """How many processes the kernel has killed for want of memory since it started."""
    with contextlib.suppress(OSError, ValueError), open("/proc/vmstat", encoding="ascii") as file:
        for line in file:
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0


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
