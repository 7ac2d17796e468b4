"""The other queues and the redis that most of them need, each in a folder of its own."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from bench.peers.base import (
    ASK_S,
    INSTALL_S,
    NOT_INSTALLED,
    Absent,
    FromDebian,
    FromIndex,
    Program,
    run,
)
from tests.postgres import binaries


class Redis(FromDebian):
    def version(self) -> str:
        said = super().version()
        found = re.search(r"v=([\d.]+)", said)
        return found[1] if found else said


@dataclass(frozen=True)
class FromNpm(Program):
    """A package for Node, with what it depends on, in a folder of its own.

    :param requirement: as npm reads it; blanks between several
    """

    name: str
    package: str
    requirement: str

    def install(self) -> None:
        if self.home.exists():
            return
        if shutil.which("node") is None or shutil.which("npm") is None:
            raise Absent("it runs on Node, and there is no node or no npm here")
        self.home.mkdir(parents=True)
        try:
            npm = ("npm", "install", "--no-audit", "--no-fund", "--ignore-scripts", "--prefix")
            run([*npm, str(self.home), *self.requirement.split()], INSTALL_S)
        except BaseException:
            shutil.rmtree(self.home, ignore_errors=True)
            raise

    def version(self) -> str:
        if not (self.home / "node_modules" / self.package).is_dir():
            raise Absent(NOT_INSTALLED)
        ask = "console.log(require(process.argv[1] + '/package.json').version)"
        place = str(self.home / "node_modules" / self.package)
        return run(["node", "-e", ask, place], ASK_S).strip()


@dataclass(frozen=True)
class OnPath(Program):
    """PostgreSQL's server, where this machine has it: it is looked for, not installed."""

    name: str

    def install(self) -> None:
        self.version()

    def version(self) -> str:
        found = binaries()
        if found is None:
            raise Absent("there is no PostgreSQL server here; Debian's package is 'postgresql'")
        said = run([str(Path(found) / "postgres"), "--version"], ASK_S)
        number = re.search(r"\d+\.\d+", said)
        return number[0] if number else said.strip()


REDIS = Redis(
    "redis",
    "usr/bin/redis-server",
    ("redis-server", "redis-tools", "libatomic1", "libjemalloc2", "liblzf1"),
)
POSTGRES = OnPath("postgresql")
RQ = FromIndex("rq", "rq", "rq==3.0.0")
PROCRASTINATE = FromIndex(
    "procrastinate", "procrastinate", "procrastinate==3.10.0 psycopg[binary,pool]"
)
SAQ = FromIndex("saq", "saq", "saq[redis,postgres]==0.26.4 psycopg[binary,pool]")
HUEY = FromIndex("huey", "huey", "huey==3.5.4 redis")
BULLMQ = FromNpm("bullmq", "bullmq", "bullmq@6.7.0 ioredis")

PROGRAMS: tuple[Program, ...] = (REDIS, POSTGRES, RQ, PROCRASTINATE, SAQ, HUEY, BULLMQ)
