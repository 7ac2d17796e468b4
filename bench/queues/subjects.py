"""Everything that is measured, and what each needs to run."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import tempfile
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from pathlib import Path

from bench.meter import Cores, started_on
from bench.peers.base import Absent, FromIndex, Program, free_port, own_env
from bench.queues.programs import (
    BULLMQ,
    HUEY,
    POSTGRES,
    PROCRASTINATE,
    REDIS,
    RQ,
    SAQ,
    FromNpm,
)
from bench.subjects import end
from operations.hosts import VERSION
from tests import postgres
from tests.cluster import cluster
from wire.keys import Keys
from wire.secret import Secret

ROOT = Path(__file__).resolve().parents[2]
DRIVERS = Path(__file__).parent / "drivers"
UP_WITHIN_S = 20.0
TENANT = "bench"

SYNCED = ("--appendonly", "yes", "--appendfsync", "always", "--save", "")
SQLITE = "hive: SQLite"
ON_POSTGRES = "hive: PostgreSQL"


@dataclass(frozen=True)
class Up:
    """A queue that is up.

    :param url: what its clients are told
    :param more: options of its driver besides
    """

    url: str
    more: Mapping[str, str] = field(default_factory=dict)


class Server(ABC):
    """What a queue is kept in."""

    @abstractmethod
    def version(self) -> str:
        """:raises Absent: it is not here"""

    @abstractmethod
    def up(self, cores: Cores) -> AbstractAsyncContextManager[Up]:
        """Afresh, with nothing in it, on the core that is measured.

        :raises Absent: it did not come up
        """


@dataclass(frozen=True)
class RedisServer(Server):
    """:param flags: instead of its defaults, which promise nothing of the last seconds"""

    flags: tuple[str, ...] = ()

    def version(self) -> str:
        return f"redis\n{REDIS.version()}"

    @contextlib.asynccontextmanager
    async def up(self, cores: Cores) -> AsyncIterator[Up]:
        port = free_port()
        with tempfile.TemporaryDirectory(prefix="hive-bench-") as folder:
            with (Path(folder) / "output").open("wb") as output, started_on(cores.measured):
                process = await asyncio.create_subprocess_exec(
                    *(str(REDIS.binary), "--port", str(port), "--bind", "127.0.0.1", *self.flags),
                    env={**own_env(), **REDIS.libraries},
                    cwd=folder,
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                )
            try:
                await _listens(port, process)
                yield Up(f"redis://127.0.0.1:{port}")
            finally:
                await end(process)


class PostgresServer(Server):
    """As it comes: fsync on, each commit waits for it."""

    def version(self) -> str:
        return f"PostgreSQL\n{POSTGRES.version()}"

    @contextlib.asynccontextmanager
    async def up(self, cores: Cores) -> AsyncIterator[Up]:
        with contextlib.ExitStack() as stack:
            with started_on(cores.measured):
                server = stack.enter_context(postgres.running())
            yield Up(server.create("bench"))


class File(Server):
    """A file, and no server."""

    def version(self) -> str:
        return ""

    @contextlib.asynccontextmanager
    async def up(self, cores: Cores) -> AsyncIterator[Up]:
        with tempfile.TemporaryDirectory(prefix="hive-bench-") as folder:
            yield Up(str(Path(folder) / "queue.db"))


@dataclass(frozen=True)
class Queen(Server):
    """A queen with a cluster secret, asked with an API key; her queue on what ``below`` is."""

    below: Server

    def version(self) -> str:
        return self.below.version()

    @contextlib.asynccontextmanager
    async def up(self, cores: Cores) -> AsyncIterator[Up]:
        secret = Secret.new()
        key, _ = Keys(secret).make(scopes=("queue", "drone"), tenant=TENANT)
        async with self.below.up(cores) as below, cluster() as made:
            made.env = {"HIVE_SECRET": secret.text}
            on_postgres = below.url.startswith("postgresql:")
            flags = (f"--database={below.url}",) if on_postgres else ()
            with started_on(cores.measured):
                queen = await made.queen(*flags)
            store = below.url if on_postgres else str(made.folder / "queen" / "queue.db")
            yield Up(queen.url, {"key": key, "store": store})


@dataclass(frozen=True)
class Subject:
    """A row of the table.

    :param program: whose environment the driver needs; None: Hive's own
    :param tens: whether tasks are put in tens in one call
    :param takes_tens: whether they are claimed and completed in tens
    :param past: whether claims are measured before a million finished rows
    :param served: whether somebody else than callers and workers does the work; otherwise the
        workers have the core that is measured
    """

    row: str
    driver: str
    server: Server
    program: Program | None
    tens: bool = False
    takes_tens: bool = False
    past: bool = False
    served: bool = True

    def version(self) -> str:
        """:raises Absent: it cannot be measured here"""
        own = VERSION if self.program is None else self.program.version()
        return f"{own}\n{self.server.version()}".strip()

    def argv(self) -> Sequence[str]:
        if isinstance(self.program, FromNpm):
            return ("node", str(DRIVERS / self.driver))
        python = self.program.python if isinstance(self.program, FromIndex) else sys.executable
        return (str(python), "-m", f"bench.queues.drivers.{self.driver}")

    def env(self) -> dict[str, str]:
        home = {} if self.program is None else {"BENCH_HOME": str(self.program.home)}
        return {**own_env(), **home, "PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1"}


def _on_redis(
    name: str, driver: str, program: Program, *, tens: bool = False
) -> tuple[Subject, ...]:
    return (
        Subject(f"{name}: redis, fsync", driver, RedisServer(SYNCED), program, tens),
        Subject(f"{name}: redis default", driver, RedisServer(), program, tens),
    )


SUBJECTS: tuple[Subject, ...] = (
    Subject(SQLITE, "hive", Queen(File()), None, tens=True, takes_tens=True, past=True),
    Subject(
        ON_POSTGRES, "hive", Queen(PostgresServer()), None, tens=True, takes_tens=True, past=True
    ),
    Subject("Procrastinate", "procrastinate", PostgresServer(), PROCRASTINATE, True, past=True),
    *_on_redis("RQ", "rq", RQ, tens=True),
    *_on_redis("SAQ", "saq", SAQ),
    Subject("SAQ: PostgreSQL", "saq", PostgresServer(), SAQ),
    *_on_redis("BullMQ", "bullmq.mjs", BULLMQ, tens=True),
    Subject("huey: SQLite", "huey", File(), HUEY, served=False),
    *_on_redis("huey", "huey", HUEY),
)


async def _listens(port: int, process: asyncio.subprocess.Process) -> None:
    deadline = asyncio.get_running_loop().time() + UP_WITHIN_S
    while process.returncode is None and asyncio.get_running_loop().time() < deadline:
        with contextlib.suppress(OSError):
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.close()
            return
        await asyncio.sleep(0.02)
    raise Absent(f"it ended, or did not listen within {UP_WITHIN_S:.0f} s")
