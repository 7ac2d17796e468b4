"""A real cluster for tests: a queen, hives and workers as processes on free loopback ports.

Daemons are started as a user starts them (``python -m keeper …``) and stop when their standard
input closes, so that nothing survives a test run, however it ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

from hive_agent.workers.records import Records
from job_client.client import JobClient

START_S = 30.0
STOP_S = 40.0
WAIT_S = 15.0

_LISTENS = re.compile(rb"^(queen|hive) (\S+) listens on (https?://\S+)")


@dataclass(eq=False)
class Daemon:
    """A running daemon. ``log`` is its standard error."""

    name: str
    url: str
    process: asyncio.subprocess.Process
    log_path: Path
    client: JobClient

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def log(self) -> str:
        return self.log_path.read_text()

    async def stop(self, signum: int = signal.SIGTERM) -> int:
        """Signal it, and wait until it has ended; its exit status."""
        if self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(signum)
        await self.client.close()
        try:
            return await asyncio.wait_for(self.process.wait(), STOP_S)
        except TimeoutError:
            self.process.send_signal(signal.SIGABRT)  # its threads' stacks go to the log
            await self.process.wait()
            raise AssertionError(f"{self.name} did not stop:\n{self.log}") from None


@dataclass
class Cluster:
    """Starts daemons; ends every one of them, and every worker, when it is left."""

    folder: Path
    daemons: list[Daemon] = field(default_factory=list)
    state_dirs: set[Path] = field(default_factory=set)
    env: dict[str, str] = field(default_factory=dict)
    """Variables of every daemon."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await asyncio.gather(*(daemon.stop() for daemon in self.daemons))
        for state_dir in self.state_dirs:
            Records(state_dir / "agent" / "workers").end_all()

    async def queen(self, *flags: str, port: int = 0) -> Daemon:
        return await self.start("queen", f"--port={port}", *flags)

    async def hive(
        self,
        hive_id: str = "gpu-0",
        *flags: str,
        queen: Daemon | str | None = None,
        port: int = 0,
        env: Mapping[str, str] | None = None,
    ) -> Daemon:
        """A hive agent; with a queen it is announced to her, and known when this returns."""
        queen_url = queen.url if isinstance(queen, Daemon) else queen
        daemon = await self.start(
            "agent",
            f"--port={port}",
            f"--hive-id={hive_id}",
            f"--queen-url={queen_url or 'http://127.0.0.1:9'}",
            *flags,
            folder=hive_id,
            env=env,
        )
        if isinstance(queen, Daemon):
            await online(queen.client, hive_id)
        return daemon

    async def start(
        self,
        command: str,
        *flags: str,
        folder: str | None = None,
        env: Mapping[str, str] | None = None,
        prefix: Sequence[str] = (),
        state_dir: Path | None = None,
    ) -> Daemon:
        """Run ``hive <command>`` and wait until it listens.

        :param prefix: a command that runs it, elsewhere
        :param state_dir: instead of one that goes with the cluster
        """
        name = f"{folder or command}-{len(self.daemons)}"
        state_dir = state_dir or self.folder / (folder or command)
        log_path = self.folder / f"{name}.log"
        with log_path.open("wb") as log:
            process = await asyncio.create_subprocess_exec(
                *prefix,
                *hive_command(),
                command,
                f"--state-dir={state_dir}",
                "--exit-with-parent",
                *flags,
                env={**clean_env(), "XDG_RUNTIME_DIR": str(self.folder), **self.env, **(env or {})},
                cwd=self.folder,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
            )
        self.state_dirs.add(state_dir)
        assert process.stdout is not None
        async with asyncio.timeout(START_S):
            while line := await process.stdout.readline():
                if found := _LISTENS.match(line.strip()):
                    url = found[3].decode()
                    daemon = Daemon(found[2].decode(), url, process, log_path, JobClient(url))
                    self.daemons.append(daemon)
                    return daemon
        raise AssertionError(f"hive {command} did not start:\n{log_path.read_text()}")


@contextlib.asynccontextmanager
async def cluster() -> AsyncIterator[Cluster]:
    """A cluster in a temporary folder of its own."""
    with tempfile.TemporaryDirectory(prefix="hive-test-") as folder:
        async with Cluster(Path(folder)) as made:
            yield made


def hive_command() -> list[str]:
    return [sys.executable, "-m", "keeper"]


def with_constants(module: str, **constants: float) -> list[str]:
    """A prefix for :meth:`Cluster.start`: the daemon runs with other constants in a module."""
    code = (
        "import importlib, runpy, sys\n"
        f"vars(importlib.import_module({module!r})).update({constants!r})\n"
        "sys.argv = sys.argv[3:]\n"
        "runpy.run_module('keeper', run_name='__main__', alter_sys=True)\n"
    )
    return [sys.executable, "-c", code]


def clean_env() -> dict[str, str]:
    """This environment without Hive's variables, able to import the rooms from anywhere."""
    root = str(Path(__file__).resolve().parent.parent)
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HIVE_", "HF_"))}
    if os.environ.get("HIVE_TEST_TRUNKS") == "0":  # make test-http
        kept["HIVE_TRUNKS"] = "0"
    return {**kept, "PYTHONPATH": root, "PYTHONSAFEPATH": "1", "PYTHONFAULTHANDLER": "1"}


async def spawn(
    daemon: Daemon, model: str = "hive-tiny", *, hive_id: str | None = None, **options: Any
) -> dict[str, Any]:
    """Start a worker on the CPU; its ``WorkerInfo`` as the job gives it."""
    operation = {"operation": "worker_spawn", "model": model, "worker": "cpu", "device": 0}
    if hive_id is not None:
        operation["hive_id"] = hive_id
    return dict(await daemon.client.run({**operation, "options": options}))


async def spawn_scripted(
    daemon: Daemon,
    model: str = "parrot",
    *,
    hive_id: str | None = None,
    slots: int = 4,
    **script: Any,
) -> dict[str, Any]:
    """Start a scripted worker."""
    return await spawn(
        daemon, model, hive_id=hive_id, engine="scripted", slots=slots, script=script
    )


async def installed(state_dir: Path, recipe: str) -> Path:
    """A hive's folder of engines with this one in it, put there by ``hive engines install``."""
    async with cluster() as made:
        hive = await made.start("agent", "--port=0", "--hive-id=installer", state_dir=state_dir)
        command = [*hive_command(), "--url", hive.url, "engines", "install", recipe]
        install = await asyncio.create_subprocess_exec(*command, env=clean_env())
        assert await install.wait() == 0
    return state_dir / "agent" / "engines"


async def online(queen: JobClient, *hive_ids: str) -> None:
    """Wait until the queen hears these hives."""

    async def heard() -> bool:
        hives = (await queen.get("/v1/hives"))["hives"]
        states = {hive["hive_id"]: hive["state"] for hive in hives}
        return all(states.get(hive_id) == "online" for hive_id in hive_ids)

    await until(heard, f"hives {hive_ids} to be online")


async def served(daemon: JobClient, *models: str) -> None:
    """Wait until a daemon lists these models as loaded."""

    async def listed() -> bool:
        data = (await daemon.get("/v1/models"))["data"]
        return set(models) <= {model["id"] for model in data}

    await until(listed, f"models {models} to be served")


async def until(
    condition: Callable[[], Any], what: str, *, within_s: float = WAIT_S, every_s: float = 0.02
) -> Any:
    """Poll a condition (plain or async) of another process; what it returned when it held."""
    deadline = asyncio.get_running_loop().time() + within_s
    while True:
        value = condition()
        if asyncio.iscoroutine(value):
            value = await value
        if value:
            return value
        if asyncio.get_running_loop().time() > deadline:
            raise AssertionError(f"waited {within_s} s in vain for {what}")
        await asyncio.sleep(every_s)


def alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
